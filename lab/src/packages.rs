// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the lab needs from Debian: installed programs, and packages unpacked
//! into the cache without installing them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::{Apt, Package, is_root, run};
use crate::places::{cache_dir, find_program};

/// Packages whose presence shows in a program.
const PROGRAMS: [(&str, &str); 6] = [
    ("qemu-system-x86", "qemu-system-x86_64"),
    ("mmdebstrap", "mmdebstrap"),
    ("python3", "python3"),
    ("passt", "passt"),
    ("e2fsprogs", "mkfs.ext4"),
    ("dpkg", "dpkg"),
];

/// Makes sure that these Debian packages are there.
///
/// What is missing is installed when this is root on Debian.
///
/// # Errors
/// One line that names the missing packages and the command to install them,
/// or apt's own words.
pub fn ensure_packages(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|package| !is_present(package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    let Some(apt) = Apt::new().ok().filter(|_| is_root()) else {
        bail!("missing Debian packages: {names}; install them with: sudo apt-get install {names}");
    };
    eprintln!("installing {names}");
    if let Err(first) = apt.install(&missing) {
        apt.update().with_context(|| format!("{first:#}"))?;
        apt.install(&missing)?;
    }
    match missing.iter().find(|package| !is_present(package)) {
        Some(package) => bail!("{package} was installed and is still not found"),
        None => Ok(()),
    }
}

fn is_present(package: &str) -> bool {
    if package == "busybox-static" {
        return static_busybox().is_ok();
    }
    match PROGRAMS.iter().find(|(name, _)| *name == package) {
        Some((_, program)) => find_program(program).is_some(),
        None => is_installed(package),
    }
}

fn is_installed(package: &str) -> bool {
    let query = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}", package])
        .output();
    query.is_ok_and(|output| output.status.success() && output.stdout == b"installed")
}

/// A busybox that needs no shared library.
///
/// # Errors
/// There is none; Debian's package `busybox` has a dynamic one.
pub fn static_busybox() -> Result<PathBuf> {
    let path = find_program("busybox").context("busybox is not installed")?;
    let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    if crate::elf::needs_interpreter(&content).with_context(|| path.display().to_string())? {
        bail!("{} is not static: install busybox-static", path.display());
    }
    Ok(path)
}

/// The tree of the newest package that the first known of `names` stands for.
///
/// Each name is a package or a meta package; what it stands for must begin
/// with `prefix`. What is in the cache already is taken without asking apt;
/// otherwise it is downloaded, verified by apt, and unpacked, in this order and
/// under temporary names, so that an interruption leaves nothing half done.
///
/// # Errors
/// No name is known to apt, or the download fails.
pub fn unpacked(names: &[&str], prefix: &str) -> Result<PathBuf> {
    let cache = cache_dir()?;
    let meta = names.first().context("no package was named")?;
    let remembered = cache.join("newest").join(meta);
    if let Some(tree) = remembered_tree(&cache, &remembered) {
        return Ok(tree);
    }
    let _lock = crate::places::lock_cache(&cache)?;
    fs::create_dir_all(cache.join("packages"))
        .with_context(|| format!("create {}", cache.display()))?;
    // Another process may have been faster.
    if let Some(tree) = remembered_tree(&cache, &remembered) {
        return Ok(tree);
    }
    let name = download(&cache, names, prefix)?;
    crate::places::write_whole(&remembered, name.as_bytes())?;
    Ok(cache.join("packages").join(name))
}

fn remembered_tree(cache: &Path, remembered: &Path) -> Option<PathBuf> {
    let name = fs::read_to_string(remembered).ok()?;
    let tree = cache.join("packages").join(name.trim());
    tree.is_dir().then_some(tree)
}

/// Name of the tree in the cache.
fn download(cache: &Path, names: &[&str], prefix: &str) -> Result<String> {
    let (apt, package) = find(cache, names, prefix)?;
    let name = format!(
        "{}_{}",
        package.name,
        package.version.replace(['/', ':'], "_")
    );
    let tree = cache.join("packages").join(&name);
    if tree.is_dir() {
        return Ok(name);
    }
    eprintln!("downloading {} {}", package.name, package.version);
    let work = tempfile::Builder::new()
        .prefix("download-")
        .tempdir_in(cache)
        .context("create a directory")?;
    let deb = match apt.download(&package, work.path()) {
        Ok(deb) => deb,
        // Lists older than the mirror name files that are gone.
        Err(first) => {
            let own = updated_own_lists(cache).with_context(|| format!("{first:#}"))?;
            let newest = newest_of(&own, names, prefix)?.with_context(|| format!("{first:#}"))?;
            own.download(&newest, work.path())?
        }
    };
    let root = work.path().join("root");
    let what = format!("dpkg -x {}", deb.display());
    run(Command::new("dpkg").arg("-x").arg(&deb).arg(&root), &what)?;
    match fs::rename(&root, &tree) {
        Err(_) if tree.is_dir() => Ok(name),
        result => result
            .map(|()| name)
            .with_context(|| format!("rename to {}", tree.display())),
    }
}

fn find(cache: &Path, names: &[&str], prefix: &str) -> Result<(Apt, Package)> {
    let apt = Apt::new()?;
    if let Some(package) = newest_of(&apt, names, prefix)? {
        return Ok((apt, package));
    }
    // The lists may be empty (a fresh image) or without the security suite.
    let own = updated_own_lists(cache)?;
    match newest_of(&own, names, prefix)? {
        Some(package) => Ok((own, package)),
        None => bail!(
            "apt knows none of {} in this Debian release ({prefix}*)",
            names.join(", ")
        ),
    }
}

fn updated_own_lists(cache: &Path) -> Result<Apt> {
    let own = Apt::with_own_lists(&cache.join("apt"))?;
    own.update()?;
    Ok(own)
}

fn newest_of(apt: &Apt, names: &[&str], prefix: &str) -> Result<Option<Package>> {
    for name in names {
        let newest = apt.newest(name, "linux-image-")?;
        if let Some(package) = newest.filter(|package| package.name.starts_with(prefix)) {
            return Ok(Some(package));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remembered_tree_must_exist() {
        let cache = tempfile::tempdir().unwrap();
        let remembered = cache.path().join("newest/x");
        assert_eq!(remembered_tree(cache.path(), &remembered), None);
        crate::places::write_whole(&remembered, b"x_1").unwrap();
        assert_eq!(remembered_tree(cache.path(), &remembered), None);
        fs::create_dir_all(cache.path().join("packages/x_1")).unwrap();
        assert_eq!(
            remembered_tree(cache.path(), &remembered),
            Some(cache.path().join("packages/x_1"))
        );
    }

    #[test]
    fn unknown_packages_are_not_present() {
        assert!(!is_present("no-such-package"));
        assert!(is_present("dpkg") == find_program("dpkg").is_some());
    }
}
