// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--object`, `--chardev`, `--netdev`, `--blockdev`, `--device`: QEMU's options for what a machine is made of.
//!
//! Each becomes the arguments of the QMP command that does the same while the machine runs, so that what is made at the
//! start and what comes later go one way. A value is still a text where it came as one; who takes it gives it its type.

use ebbtide_qmp::types::block::BlockdevOptions;
use ebbtide_qmp::types::chardev::ChardevAdd;
use ebbtide_qmp::types::device::DeviceAdd;
use ebbtide_qmp::types::net::NetdevAdd;
use ebbtide_qmp::types::qom::ObjectAdd;
use ebbtide_qmp::{Properties, QmpError};

use super::options::OptionError;

/// The options as they were typed. Each may be JSON too, as its QMP command takes it.
#[derive(Debug, Default, clap::Args)]
pub struct PartArgs {
    /// A memory backend, in QEMU's spelling: memory-backend-ram,id=ID,size=SIZE
    #[arg(long = "object", value_name = "OPTIONS")]
    objects: Vec<String>,
    /// A device, in QEMU's spelling: virtio-blk-pci,drive=NODE[,id=ID][,bus=BUS][,addr=SLOT]
    #[arg(long = "device", value_name = "OPTIONS")]
    devices: Vec<String>,
    /// A block node, in QEMU's spelling: file,node-name=NAME,filename=FILE
    #[arg(long = "blockdev", value_name = "OPTIONS")]
    blockdevs: Vec<String>,
    /// A network backend, in QEMU's spelling: tap,id=ID,ifname=NAME
    #[arg(long = "netdev", value_name = "OPTIONS")]
    netdevs: Vec<String>,
    /// A character device, in QEMU's spelling: socket,id=ID,path=PATH,server=on,wait=off
    #[arg(long = "chardev", value_name = "OPTIONS")]
    chardevs: Vec<String>,
}

/// What a machine is made of, backends before the devices that use them; within a kind, as they were given.
#[derive(Debug, Default, PartialEq)]
pub struct Parts {
    /// Memory backends, iothreads.
    pub objects: Vec<ObjectAdd>,
    /// Character devices.
    pub chardevs: Vec<ChardevAdd>,
    /// Network backends.
    pub netdevs: Vec<NetdevAdd>,
    /// Block nodes.
    pub blockdevs: Vec<BlockdevOptions>,
    /// Devices.
    pub devices: Vec<DeviceAdd>,
}

impl Parts {
    /// Reads the options.
    ///
    /// # Errors
    /// The first option that is malformed, lacks what all of its kind have, or has a name another of its kind has.
    pub fn parse(args: &PartArgs) -> Result<Parts, OptionError> {
        let parts = Parts {
            objects: each("--object", &args.objects, object)?,
            chardevs: each("--chardev", &args.chardevs, chardev)?,
            netdevs: each("--netdev", &args.netdevs, netdev)?,
            blockdevs: each("--blockdev", &args.blockdevs, blockdev)?,
            devices: each("--device", &args.devices, device)?,
        };
        unique("--object", "id", parts.objects.iter().map(|o| &o.id))?;
        unique("--chardev", "id", parts.chardevs.iter().map(|c| &c.id))?;
        unique("--netdev", "id", parts.netdevs.iter().map(|n| &n.id))?;
        let nodes = parts.blockdevs.iter().filter_map(|b| b.node_name.as_ref());
        unique("--blockdev", "node-name", nodes)?;
        let devices = parts.devices.iter().filter_map(|d| d.id.as_ref());
        unique("--device", "id", devices)?;
        Ok(parts)
    }
}

fn each<T>(
    option: &str,
    texts: &[String],
    read: fn(&str) -> Result<T, QmpError>,
) -> Result<Vec<T>, OptionError> {
    let read = |text: &String| read(text).map_err(|error| OptionError::new(option, error.desc));
    texts.iter().map(read).collect()
}

fn object(text: &str) -> Result<ObjectAdd, QmpError> {
    let mut properties = Properties::parse(text, "qom-type")?;
    Ok(ObjectAdd {
        qom_type: properties.need_string("qom-type")?,
        id: properties.need_string("id")?,
        properties,
    })
}

fn chardev(text: &str) -> Result<ChardevAdd, QmpError> {
    ChardevAdd::from_option(Properties::parse(text, "backend")?)
}

fn netdev(text: &str) -> Result<NetdevAdd, QmpError> {
    let mut properties = Properties::parse(text, "type")?.nested()?;
    Ok(NetdevAdd {
        kind: properties.need_string("type")?,
        id: properties.need_string("id")?,
        properties,
    })
}

fn blockdev(text: &str) -> Result<BlockdevOptions, QmpError> {
    let properties = Properties::parse(text, "driver")?.nested()?;
    let node = BlockdevOptions::from_properties(properties)?;
    match node.node_name {
        Some(_) => Ok(node),
        None => Err(QmpError::unnamed_node()),
    }
}

fn device(text: &str) -> Result<DeviceAdd, QmpError> {
    let mut properties = Properties::parse(text, "driver")?;
    Ok(DeviceAdd {
        driver: properties.need_string("driver")?,
        bus: properties.take_string("bus")?,
        id: properties.take_string("id")?,
        properties,
    })
}

fn unique<'n>(
    option: &str,
    key: &str,
    names: impl Iterator<Item = &'n String>,
) -> Result<(), OptionError> {
    let mut seen = std::collections::BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(OptionError::new(
                option,
                format!("{key}={name} is given twice"),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use ebbtide_qmp::types::block::BlockdevDriver;
    use ebbtide_qmp::types::blockdev::{BlockdevRef, BlockdevSource};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        parts: PartArgs,
    }

    fn parse(words: &[&str]) -> Result<Parts, OptionError> {
        let cli = Cli::try_parse_from(std::iter::once(&"run").chain(words)).unwrap();
        Parts::parse(&cli.parts)
    }

    fn mistake(words: &[&str]) -> String {
        parse(words).unwrap_err().to_string()
    }

    #[test]
    fn a_machine_in_qemus_spelling() {
        let parts = parse(&[
            "--device",
            "virtio-blk-pci,drive=d0,id=disk,addr=05.0",
            "--blockdev",
            "raw,node-name=d0,file.driver=file,file.filename=/a,,b,read-only=on",
            "--object",
            "memory-backend-memfd,id=m0,size=1G,share",
            "--netdev",
            "tap,id=n0,ifname=t0",
            "--chardev",
            "socket,id=c0,path=/s,server=on,wait=off",
            "--device",
            r#"{"driver": "pc-dimm", "id": "dimm0", "memdev": "m0", "node": 0}"#,
        ]);
        let Parts {
            mut objects,
            chardevs,
            netdevs,
            mut blockdevs,
            mut devices,
        } = parts.unwrap();
        assert_eq!(objects[0].properties.need_size("size"), Ok(1 << 30));
        assert_eq!(objects[0].properties.take_bool("share"), Ok(Some(true)));
        assert_eq!(chardevs[0].backend.kind, "socket");
        assert_eq!(
            (netdevs[0].kind.as_str(), netdevs[0].id.as_str()),
            ("tap", "n0")
        );
        assert_eq!(blockdevs[0].read_only, Some(true));
        let Ok(BlockdevSource::Raw {
            file: BlockdevRef::Inline(file),
            ..
        }) = blockdevs[0].take_source()
        else {
            panic!("{blockdevs:?}");
        };
        assert_eq!(file.driver, BlockdevDriver::File);
        let ids: Vec<_> = devices.iter().map(|d| d.id.as_deref()).collect();
        assert_eq!(ids, [Some("disk"), Some("dimm0")], "as they were given");
        let address = devices[0].properties.take_pci_address("addr");
        assert_eq!(address.unwrap().unwrap().slot, 5);
        assert_eq!(devices[1].properties.take_uint::<u32>("node"), Ok(Some(0)));
    }

    #[test]
    fn mistakes_name_the_option() {
        for (words, text) in [
            (
                &["--device", "id=x"][..],
                "--device: Parameter 'driver' is missing",
            ),
            (
                &["--object", "memory-backend-ram"],
                "--object: Parameter 'id' is missing",
            ),
            (&["--netdev", "tap"], "--netdev: Parameter 'id' is missing"),
            (
                &["--blockdev", "null-co"],
                "--blockdev: 'node-name' must be specified for the root node",
            ),
            (
                &["--blockdev", "qcow2,node-name=n"],
                "--blockdev: Parameter 'driver' does not accept value 'qcow2'",
            ),
            (
                &["--chardev", "null,id=a", "--chardev", "null,id=a"],
                "--chardev: id=a is given twice",
            ),
            (
                &["--device", "x,id=a,id=b"],
                "--device: Parameter 'id' is given twice",
            ),
        ] {
            assert_eq!(mistake(words), text);
        }
    }
}
