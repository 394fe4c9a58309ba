// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The listening socket: a live one is refused, a dead one is replaced, ours is removed when it is dropped.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::Error;

/// How long to wait for another process that is making a socket in the same directory.
const DIRECTORY_WAIT: Duration = Duration::from_millis(500);

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketSpec {
    /// The socket's path.
    pub path: PathBuf,
}

impl SocketSpec {
    /// A socket at this path.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }
}

impl FromStr for SocketSpec {
    type Err = Error;

    /// Reads `unix:PATH`. What QEMU's users add is taken as far as it says what is the case anyway: `server`,
    /// `server=on`, `nowait`, `wait=off`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = |reason: &str| Error::SocketSpec {
            value: text.to_owned(),
            reason: reason.to_owned(),
        };
        let rest = text
            .strip_prefix("unix:")
            .ok_or_else(|| fail("it does not begin with unix:"))?;
        let mut parts = rest.split(',');
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err(fail("it has no path"));
        }
        for option in parts {
            match option {
                "server" | "server=on" | "nowait" | "wait=off" => {}
                "wait" | "wait=on" => return Err(fail("the machine does not wait for a client")),
                "server=off" => return Err(fail("the machine only listens")),
                _ => return Err(fail(&format!("the option '{option}' is not known"))),
            }
        }
        Ok(Self::unix(path))
    }
}

impl fmt::Display for SocketSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix:{}", self.path.display())
    }
}

/// A listening socket that owns its file.
#[derive(Debug)]
pub(super) struct Listening {
    fd: OwnedFd,
    path: PathBuf,
    /// Device and inode: somebody else may have put another file there since.
    file: (u64, u64),
}

impl Listening {
    pub(super) fn bind(spec: &SocketSpec) -> Result<Self, Error> {
        // The address is the path as given, for a socket's path must be short; the file is found again by its
        // absolute path, for the process may change its directory.
        let address =
            SocketAddrUnix::new(&spec.path).map_err(|errno| address_error(&spec.path, errno))?;
        let path =
            std::path::absolute(&spec.path).map_err(|source| listen_error(&spec.path, source))?;
        // Two processes that both find a dead socket would else remove each other's new one.
        let directory = lock_directory(&path);
        clear_dead(&path, &address)?;
        let make = || -> rustix::io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let fd =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            rustix::net::bind(&fd, &address)?;
            rustix::net::listen(&fd, 16)?;
            Ok(fd)
        };
        let fd = make().map_err(|errno| listen_error(&path, errno.into()))?;
        let file = fs::symlink_metadata(&path).map_err(|source| listen_error(&path, source))?;
        drop(directory);
        Ok(Self {
            fd,
            path,
            file: (file.dev(), file.ino()),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A client that waits; `WouldBlock` when there is none.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        let fd = rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        Ok(fd.into())
    }

    /// Removes the file now, if it is still ours.
    pub(super) fn remove_file(&self) {
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.remove_file();
    }
}

fn listen_error(path: &Path, source: io::Error) -> Error {
    Error::Listen {
        path: path.to_owned(),
        source,
    }
}

fn address_error(path: &Path, errno: Errno) -> Error {
    let source = match errno {
        Errno::NAMETOOLONG => io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "the path has {} bytes, a socket's may have 107",
                path.as_os_str().len()
            ),
        ),
        other => other.into(),
    };
    listen_error(path, source)
}

/// A lock on the directory, held while the file is looked at. Best effort: without it only the race is back.
fn lock_directory(path: &Path) -> Option<File> {
    let directory = File::open(path.parent()?).ok()?;
    let deadline = Instant::now() + DIRECTORY_WAIT;
    loop {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(5))
            }
            Err(_) => return None,
        }
    }
}

/// Removes a socket nobody listens on.
fn clear_dead(path: &Path, address: &SocketAddrUnix) -> Result<(), Error> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(listen_error(path, source)),
    };
    if !found.file_type().is_socket() {
        return Err(Error::NotASocket {
            path: path.to_owned(),
        });
    }
    if is_live(address).map_err(|source| listen_error(path, source))? {
        return Err(Error::SocketInUse {
            path: path.to_owned(),
        });
    }
    tracing::info!(path = %path.display(), "replacing a socket nobody listens on");
    fs::remove_file(path).map_err(|source| listen_error(path, source))
}

/// Whether somebody listens. Asked without waiting: a full backlog is a listener too.
fn is_live(address: &SocketAddrUnix) -> io::Result<bool> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&fd, address) {
        Ok(()) | Err(Errno::WOULDBLOCK) => Ok(true),
        Err(Errno::CONNREFUSED) => Ok(false),
        // A datagram socket or the like: somebody else's.
        Err(Errno::PROTOTYPE) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn options_are_read_as_qemu_writes_them() {
        for text in [
            "unix:/tmp/q",
            "unix:/tmp/q,server=on,wait=off",
            "unix:/tmp/q,server,nowait",
        ] {
            assert_eq!(
                text.parse::<SocketSpec>().unwrap(),
                SocketSpec::unix("/tmp/q")
            );
        }
        for (text, reason) in [
            ("/tmp/q", "does not begin with unix:"),
            ("tcp:localhost:1", "does not begin with unix:"),
            ("unix:", "no path"),
            ("unix:,server", "no path"),
            ("unix:/q,wait=on", "does not wait"),
            ("unix:/q,server=off", "only listens"),
            ("unix:/q,sever", "'sever' is not known"),
        ] {
            let error = text.parse::<SocketSpec>().unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains(text), "{error}");
        }
    }

    #[test]
    fn a_live_socket_is_refused_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let spec = SocketSpec::unix(directory.path().join("q"));
        let first = Listening::bind(&spec).unwrap();
        let error = Listening::bind(&spec).unwrap_err();
        assert!(matches!(error, Error::SocketInUse { .. }), "{error}");
        assert!(first.accept().is_ok(), "the first still listens");
    }

    #[test]
    fn a_dead_socket_is_replaced_and_ours_removed() {
        let directory = tempfile::tempdir().unwrap();
        let spec = SocketSpec::unix(directory.path().join("q"));
        drop(UnixListener::bind(&spec.path).unwrap());
        assert!(spec.path.exists(), "std leaves its file");
        let listening = Listening::bind(&spec).unwrap();
        UnixStream::connect(&spec.path).unwrap();
        drop(listening);
        assert!(!spec.path.exists());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let spec = SocketSpec::unix(directory.path().join("q"));
        fs::write(&spec.path, "precious").unwrap();
        assert!(matches!(
            Listening::bind(&spec),
            Err(Error::NotASocket { .. })
        ));
        assert_eq!(fs::read(&spec.path).unwrap(), b"precious");
        fs::remove_file(&spec.path).unwrap();
        let _datagram = std::os::unix::net::UnixDatagram::bind(&spec.path).unwrap();
        assert!(matches!(
            Listening::bind(&spec),
            Err(Error::SocketInUse { .. })
        ));
    }

    #[test]
    fn a_file_that_is_not_ours_any_more_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let spec = SocketSpec::unix(directory.path().join("q"));
        let listening = Listening::bind(&spec).unwrap();
        fs::remove_file(&spec.path).unwrap();
        let _other = UnixListener::bind(&spec.path).unwrap();
        drop(listening);
        assert!(spec.path.exists());
    }

    #[test]
    fn a_relative_path_is_removed_too() {
        let directory = tempfile::tempdir().unwrap();
        let up: PathBuf = std::env::current_dir()
            .unwrap()
            .components()
            .map(|_| "..")
            .collect();
        let inside = directory.path().strip_prefix("/").unwrap();
        let spec = SocketSpec::unix(up.join(inside).join("q"));
        let listening = Listening::bind(&spec).unwrap();
        assert!(directory.path().join("q").exists());
        drop(listening);
        assert!(!directory.path().join("q").exists());
    }

    #[test]
    fn impossible_paths_are_named() {
        let long = SocketSpec::unix(format!("/tmp/{}", "x".repeat(120)));
        let error = Listening::bind(&long).unwrap_err().to_string();
        assert!(
            error.contains("125 bytes") && error.contains("107"),
            "{error}"
        );
        let nowhere = SocketSpec::unix("/nonexistent/q");
        let error = Listening::bind(&nowhere).unwrap_err().to_string();
        assert!(
            error.starts_with("/nonexistent/q: cannot listen: No such file"),
            "{error}"
        );
    }
}
