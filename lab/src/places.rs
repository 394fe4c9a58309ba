// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where things lie on disk.

use std::env;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The root of the source tree.
pub fn workspace() -> PathBuf {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR"));
    lab.parent().unwrap_or(lab).to_owned()
}

/// Cargo's target directory.
///
/// # Errors
/// `CARGO_TARGET_DIR` is relative and there is no working directory.
pub fn target_dir() -> Result<PathBuf> {
    match env::var_os("CARGO_TARGET_DIR").filter(|value| !value.is_empty()) {
        Some(value) => std::path::absolute(value).context("CARGO_TARGET_DIR"),
        None => Ok(workspace().join("target")),
    }
}

/// Where downloads are kept: `EBBTIDE_CACHE`, else `ebbtide` in the user's
/// cache directory. Outside the source tree, so that a fresh clone finds it.
///
/// # Errors
/// None of `EBBTIDE_CACHE`, `XDG_CACHE_HOME` and `HOME` is set.
pub fn cache_dir() -> Result<PathBuf> {
    let set = |name: &str| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let directory = set("EBBTIDE_CACHE")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("ebbtide")))
        .or_else(|| Some(set("HOME")?.join(".cache/ebbtide")))
        .context("no place to keep downloads: set EBBTIDE_CACHE, XDG_CACHE_HOME or HOME")?;
    std::path::absolute(&directory)
        .with_context(|| format!("cache directory {}", directory.display()))
}

/// Makes this process the only one that adds to the cache, until the file is closed.
///
/// # Errors
/// The cache can't be created.
pub fn lock_cache(cache: &Path) -> Result<std::fs::File> {
    std::fs::create_dir_all(cache).with_context(|| format!("create {}", cache.display()))?;
    let lock = std::fs::File::create(cache.join("lock")).context("lock the cache")?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
        .context("lock the cache")?;
    Ok(lock)
}

/// Looks for a program in `PATH` and where Debian keeps the administrator's.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let always = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(always)
        .map(|directory| directory.join(name))
        .find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    file.metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// Writes a file so that it is either the old one or the new one, and leaves
/// it alone when it holds `content` already.
///
/// # Errors
/// The directory can't be made or written to.
pub fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    if std::fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let directory = path
        .parent()
        .with_context(|| format!("{} has no directory", path.display()))?;
    std::fs::create_dir_all(directory)
        .with_context(|| format!("create {}", directory.display()))?;
    // As any file would be made; a temporary file is its owner's alone by default.
    let permissions = std::fs::Permissions::from_mode(0o644);
    let mut file = tempfile::Builder::new()
        .permissions(permissions)
        .tempfile_in(directory)
        .with_context(|| format!("create a file in {}", directory.display()))?;
    std::io::Write::write_all(&mut file, content)
        .with_context(|| format!("write {}", path.display()))?;
    file.persist(path)
        .with_context(|| format!("write {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_is_the_one_of_this_crate() {
        assert!(workspace().join("lab/src/places.rs").is_file());
    }

    #[test]
    fn programs_are_found_or_not() {
        assert!(find_program("sh").is_some_and(|path| path.is_absolute()));
        assert_eq!(find_program("no-such-program"), None);
    }

    #[test]
    fn writing_whole_replaces_and_spares_equal_content() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        write_whole(&path, b"one").unwrap();
        let first = std::fs::metadata(&path).unwrap().modified().unwrap();
        write_whole(&path, b"one").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), first);
        write_whole(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(
            std::fs::read_dir(directory.path().join("a"))
                .unwrap()
                .count(),
            1
        );
    }
}
