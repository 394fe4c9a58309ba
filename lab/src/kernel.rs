// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Debian's kernels, unpacked in the cache.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use crate::packages::unpacked;
use crate::places::{cache_dir, write_whole};

/// A line of Debian's kernels that guests are tested with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Series {
    /// Debian 12's own.
    V6_1,
    /// Debian 13's own, also in Debian 12's security suite.
    V6_12,
}

impl Series {
    /// All of them.
    pub const ALL: [Series; 2] = [Series::V6_1, Series::V6_12];
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Series::V6_1 => "6.1",
            Series::V6_12 => "6.12",
        })
    }
}

impl FromStr for Series {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Series> {
        match Series::ALL.iter().find(|series| series.to_string() == text) {
            Some(series) => Ok(*series),
            None => bail!("unknown kernel {text:?}: one of 6.1, 6.12"),
        }
    }
}

/// A kernel and its modules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Release, as `uname -r` will say.
    pub version: String,
    /// The bzImage.
    pub vmlinuz: PathBuf,
    /// `lib/modules/VERSION`.
    pub modules: PathBuf,
}

impl Kernel {
    /// The cloud kernel of a series: small, for guests.
    ///
    /// # Errors
    /// It is neither in the cache nor to be had from Debian.
    pub fn cloud(series: Series) -> Result<Kernel> {
        let own = format!("linux-image-{series}-cloud-amd64");
        let prefix = format!("linux-image-{series}.");
        let names: &[&str] = match series {
            Series::V6_1 => &["linux-image-cloud-amd64", &own],
            Series::V6_12 => &[&own, "linux-image-cloud-amd64"],
        };
        unpacked(names, &prefix)
            .and_then(|tree| Kernel::in_tree(&tree))
            .with_context(|| format!("guest kernel {series}"))
    }

    /// The full kernel of this Debian release: has 9p, for the capsule.
    ///
    /// # Errors
    /// It is neither in the cache nor to be had from Debian.
    pub fn full() -> Result<Kernel> {
        let names = ["linux-image-amd64"];
        unpacked(&names, "linux-image-")
            .and_then(|tree| Kernel::in_tree(&tree))
            .context("the capsule's kernel")
    }

    /// The uncompressed kernel, for a loader that takes ELF: a processor that
    /// is emulated needs seconds to decompress what takes us a fraction of one.
    ///
    /// # Errors
    /// The bzImage is packed in a way that is not known here; the cache can't be written.
    pub fn vmlinux(&self) -> Result<PathBuf> {
        let path = cache_dir()?.join("vmlinux").join(&self.version);
        if !path.is_file() {
            let image = std::fs::read(&self.vmlinuz)
                .with_context(|| format!("read {}", self.vmlinuz.display()))?;
            let vmlinux = decompress(payload(&image)?)
                .with_context(|| format!("{}", self.vmlinuz.display()))?;
            write_whole(&path, &vmlinux)?;
        }
        Ok(path)
    }

    fn in_tree(tree: &Path) -> Result<Kernel> {
        let boot = tree.join("boot");
        let entries =
            std::fs::read_dir(&boot).with_context(|| format!("read {}", boot.display()))?;
        let version = entries
            .flatten()
            .find_map(|entry| {
                entry
                    .file_name()
                    .to_str()?
                    .strip_prefix("vmlinuz-")
                    .map(str::to_owned)
            })
            .with_context(|| format!("no vmlinuz in {}", boot.display()))?;
        // Debian 13 has moved the modules to /usr.
        let modules = ["lib/modules", "usr/lib/modules"]
            .map(|directory| tree.join(directory).join(&version))
            .into_iter()
            .find(|directory| directory.is_dir())
            .with_context(|| format!("no modules for {version} in {}", tree.display()))?;
        Ok(Kernel {
            vmlinuz: boot.join(format!("vmlinuz-{version}")),
            modules,
            version,
        })
    }
}

/// The compressed kernel within a bzImage (Linux: Documentation/arch/x86/boot.rst,
/// fields `setup_sects`, `payload_offset`, `payload_length`).
fn payload(image: &[u8]) -> Result<&[u8]> {
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("bzImage is cut short")?;
        Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    if image.get(0x202..0x206) != Some(b"HdrS") {
        bail!("not a bzImage");
    }
    let setup_sectors = match image.get(0x1f1) {
        Some(0) | None => 4,
        Some(&count) => usize::from(count),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    image
        .get(start..start + word(0x24c)?)
        .context("bzImage is cut short")
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    let mut vmlinux = Vec::new();
    // Behind the stream stands the size, which the boot code wants to know beforehand.
    if payload.starts_with(b"\xfd7zXZ\0") {
        lzma_rust2::XzReader::new(payload, false)
            .read_to_end(&mut vmlinux)
            .context("decompress (xz)")?;
    } else if payload.starts_with(&[0x1f, 0x8b]) {
        flate2::read::GzDecoder::new(payload)
            .read_to_end(&mut vmlinux)
            .context("decompress (gzip)")?;
    } else {
        bail!(
            "the kernel is packed in an unknown way ({:02x?})",
            payload.get(..4).unwrap_or_default()
        );
    }
    Ok(vmlinux)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bz_image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x600 + 16];
        image[0x1f1] = 2;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248] = 16;
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend(payload);
        image
    }

    #[test]
    fn the_kernel_is_found_in_a_bz_image_and_unpacked() {
        let packed: &[u8] = include_bytes!("../testdata/tide.xz");
        let image = bz_image(&[packed, &4u32.to_le_bytes()].concat());
        assert_eq!(decompress(payload(&image).unwrap()).unwrap(), b"tide");
        assert!(payload(&image[..image.len() - 1]).is_err());
        assert!(payload(&image[..0x200]).is_err());
        assert!(decompress(payload(&bz_image(b"\x02\x21\x4c\x18")).unwrap()).is_err());
    }

    #[test]
    fn series_are_read_as_they_are_written() {
        for series in Series::ALL {
            assert_eq!(series.to_string().parse::<Series>().unwrap(), series);
        }
        assert!(
            "6".parse::<Series>()
                .unwrap_err()
                .to_string()
                .contains("6.1, 6.12")
        );
    }

    #[test]
    fn trees_of_both_layouts_are_understood() {
        for layout in ["lib/modules", "usr/lib/modules"] {
            let tree = tempfile::tempdir().unwrap();
            assert!(Kernel::in_tree(tree.path()).is_err());
            std::fs::create_dir_all(tree.path().join("boot")).unwrap();
            std::fs::write(tree.path().join("boot/vmlinuz-6.1.0-9"), "").unwrap();
            assert!(Kernel::in_tree(tree.path()).is_err());
            std::fs::create_dir_all(tree.path().join(layout).join("6.1.0-9")).unwrap();
            let kernel = Kernel::in_tree(tree.path()).unwrap();
            assert_eq!(kernel.version, "6.1.0-9");
            assert_eq!(kernel.modules, tree.path().join(layout).join("6.1.0-9"));
        }
    }
}
