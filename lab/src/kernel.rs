// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Debian's kernels, unpacked in the cache.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use crate::packages::unpacked;

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

#[cfg(test)]
mod tests {
    use super::*;

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
