// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Block nodes: from `blockdev-add` to an opened disk.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ebbtide_block::fault::Rule;
use ebbtide_block::{Cache, Discard, Disk, DiskSpec, Failure, Faults, NullSpec};
use ebbtide_iothread::Sender;
use ebbtide_qmp::QmpError;
use ebbtide_qmp::types::block::{
    BlockDeviceInfo, BlockdevCacheInfo, BlockdevDetectZeroes, BlockdevDiscard, BlockdevOptions,
    ImageInfo, OnOffAuto,
};
use ebbtide_qmp::types::blockdev::{BlockdevRef, BlockdevSource, HostFile};

use super::backends::{Released, Shelf, Use};
use super::drivers;
use super::opener::Opener;

/// How deep nodes may be described within each other.
const MAX_DEPTH: usize = 8;

/// A node.
pub(crate) struct BlockNode {
    disk: Arc<Disk>,
    info: BlockDeviceInfo,
    /// The node it stands on, where that has a name of its own.
    _below: Option<Use<BlockNode>>,
}

impl Released for BlockNode {}

impl BlockNode {
    /// A disk that was opened when the machine was made.
    pub(crate) fn opened(name: &str, disk: &Arc<Disk>, path: &str, direct: bool) -> BlockNode {
        BlockNode::new(Some(name), "file", path, Arc::clone(disk), direct)
    }

    /// A node that stands on no other.
    fn new(
        name: Option<&str>,
        driver: &str,
        filename: &str,
        disk: Arc<Disk>,
        direct: bool,
    ) -> BlockNode {
        BlockNode {
            info: describe(name, driver, filename, &disk, direct),
            disk,
            _below: None,
        }
    }

    /// Its disk.
    pub(crate) fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// What has to be closed when the node goes; the node it stands on is free at once.
    pub(crate) fn into_disk(self) -> Arc<Disk> {
        self.disk
    }

    /// As `query-named-block-nodes` tells it.
    pub(crate) fn info(&self) -> &BlockDeviceInfo {
        &self.info
    }
}

fn describe(
    name: Option<&str>,
    driver: &str,
    filename: &str,
    disk: &Disk,
    direct: bool,
) -> BlockDeviceInfo {
    let image = ImageInfo {
        filename: filename.to_owned(),
        format: driver.to_owned(),
        actual_size: None,
        virtual_size: disk.size_bytes(),
    };
    let cache = BlockdevCacheInfo {
        writeback: true,
        direct,
        no_flush: false,
    };
    let zeroes = BlockdevDetectZeroes::Off;
    BlockDeviceInfo::new(
        name.map(str::to_owned),
        image,
        disk.readonly(),
        cache,
        zeroes,
    )
}

/// Opens the node that `options` describe and puts it on the shelf; of what fails it tells `failures`.
///
/// # Errors
/// A name that is missing or taken, a file that can't be opened, what is not supported; nothing was added.
pub(crate) async fn add(
    shelf: &Shelf<BlockNode>,
    opener: Opener<'_>,
    failures: &Sender<Failure>,
    options: BlockdevOptions,
) -> Result<(), QmpError> {
    let name = options
        .node_name
        .clone()
        .ok_or_else(|| QmpError::generic("'node-name' must be specified for the root node"))?;
    if !drivers::is_id(&name) {
        return Err(QmpError::generic(format!("Invalid node-name: '{name}'")));
    }
    let check_free = || match shelf.get(&name) {
        Some(_) => Err(QmpError::duplicate_node(&name)),
        None => Ok(()),
    };
    check_free()?;
    let node = open(shelf, opener, options, 0).await?;
    // Another client may have taken the name meanwhile.
    check_free()?;
    // A disk that has another name already keeps it.
    node.disk.tell_failures(&name, failures.clone());
    shelf.add(&name, node)
}

async fn open(
    shelf: &Shelf<BlockNode>,
    opener: Opener<'_>,
    mut options: BlockdevOptions,
    depth: usize,
) -> Result<BlockNode, QmpError> {
    let source = options.take_source()?;
    refuse_what_is_missing(&options)?;
    let name = options.node_name.clone();
    match source {
        BlockdevSource::File(file) | BlockdevSource::HostDevice(file) => {
            open_file(opener, &options, file).await
        }
        BlockdevSource::NullCo {
            size,
            latency_ns,
            read_zeroes,
        } => {
            let disk = Disk::null_co(&NullSpec {
                size_bytes: size,
                latency: Duration::from_nanos(latency_ns),
                read_zeroes,
            })
            .map_err(|e| QmpError::generic(e.to_string()))?;
            let (name, disk) = (name.as_deref(), Arc::new(disk));
            let filename = "null-co://";
            Ok(BlockNode::new(name, "null-co", filename, disk, false))
        }
        BlockdevSource::Raw { file, offset, size } => {
            if offset != 0 || size.is_some() {
                return Err(QmpError::generic(
                    "'offset' and 'size' of the driver raw are not supported: the whole node is used",
                ));
            }
            let (below, disk, info) = below(shelf, opener, name, file, depth).await?;
            let filename = info.image.filename.clone();
            Ok(BlockNode {
                info: describe(
                    options.node_name.as_deref(),
                    "raw",
                    &filename,
                    &disk,
                    info.cache.direct,
                ),
                disk,
                _below: below,
            })
        }
        BlockdevSource::Fault { file, rules } => {
            let rules = rules
                .iter()
                .map(|rule| rule.parse::<Rule>())
                .collect::<Result<Vec<_>, _>>()
                .map_err(|e| QmpError::generic(e.to_string()))?;
            let (below, disk, info) = below(shelf, opener, name, file, depth).await?;
            let faults = Faults::new();
            rules.into_iter().for_each(|rule| faults.inject(rule));
            let disk = Arc::new(disk.behind(&faults));
            let driver = options.driver.to_string();
            Ok(BlockNode {
                info: describe(
                    options.node_name.as_deref(),
                    &driver,
                    &info.image.filename,
                    &disk,
                    info.cache.direct,
                ),
                disk,
                _below: below,
            })
        }
    }
}

type Below = (Option<Use<BlockNode>>, Arc<Disk>, BlockDeviceInfo);

/// The node another stands on: one that is there, or one of its own.
async fn below(
    shelf: &Shelf<BlockNode>,
    opener: Opener<'_>,
    user: Option<String>,
    node: BlockdevRef,
    depth: usize,
) -> Result<Below, QmpError> {
    match node {
        BlockdevRef::Node(name) => {
            let used = shelf.take(&name, user.as_deref().unwrap_or("another node"))?;
            let (disk, info) = (Arc::clone(used.value().disk()), used.value().info().clone());
            Ok((Some(used), disk, info))
        }
        BlockdevRef::Inline(_) if depth >= MAX_DEPTH => Err(QmpError::generic(format!(
            "nodes are described more than {MAX_DEPTH} deep within each other"
        ))),
        BlockdevRef::Inline(options) => {
            let node = Box::pin(open(shelf, opener, *options, depth + 1)).await?;
            Ok((node._below, node.disk, node.info))
        }
    }
}

async fn open_file(
    opener: Opener<'_>,
    options: &BlockdevOptions,
    file: HostFile,
) -> Result<BlockNode, QmpError> {
    let direct = options.cache.and_then(|c| c.direct).unwrap_or(false);
    let readonly = options.read_only.unwrap_or(false);
    let shared = options.force_share.unwrap_or(false);
    if shared && !readonly {
        return Err(QmpError::generic(
            "force-share=on can only be used with read-only images",
        ));
    }
    let spec = DiskSpec {
        readonly,
        cache: if direct {
            Cache::None
        } else {
            Cache::Writeback
        },
        discard: match options.discard.unwrap_or_default() {
            BlockdevDiscard::Ignore => Discard::Ignore,
            BlockdevDiscard::Unmap => Discard::Unmap,
        },
        locking: file.locking != OnOffAuto::Off && !shared,
        ..DiskSpec::new(&file.filename)
    };
    let may_be_readonly = options.auto_read_only.unwrap_or(false) && !readonly;
    let path = PathBuf::from(&file.filename);
    let disk = opener
        .open(Some(path), move || {
            Disk::open(&spec).or_else(|error| match may_be_readonly {
                true => Disk::open(&spec.readonly()).map_err(|_| error),
                false => Err(error),
            })
        })
        .await?;
    let disk = Arc::new(disk);
    let driver = options.driver.to_string();
    let name = options.node_name.as_deref();
    Ok(BlockNode::new(name, &driver, &file.filename, disk, direct))
}

fn refuse_what_is_missing(options: &BlockdevOptions) -> Result<(), QmpError> {
    let refused = if options.cache.and_then(|c| c.no_flush) == Some(true) {
        "cache.no-flush=on"
    } else if options.detect_zeroes.unwrap_or_default() != BlockdevDetectZeroes::Off {
        "detect-zeroes"
    } else {
        return Ok(());
    };
    Err(QmpError::generic(format!(
        "{refused} is not supported: leave it out"
    )))
}
