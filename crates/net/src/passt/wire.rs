// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is said between who wants a program and who starts it, over sockets that keep messages apart.
//!
//! ```text
//!   control   ──▶ program, arguments; with them the program's end of the network and an end of a lifeline
//!   lifeline  ◀── Started or Failed, later Ended; whoever closes or shuts it down has the program end
//! ```

use std::ffi::OsStr;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::io::retry_on_intr;
use rustix::net::sockopt::socket_domain;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg,
    send, sendmsg, socketpair,
};

/// Program and arguments together.
const REQUEST_BYTES_MAX: usize = 16 << 10;
const REPLY_BYTES_MAX: usize = 1 << 10;

/// A pair of sockets for messages.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(socketpair(family, kind, SocketFlags::CLOEXEC, None)?)
}

/// What to start.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub program: PathBuf,
    pub arguments: Vec<String>,
}

impl Request {
    fn encode(program: &Path, arguments: &[String]) -> io::Result<Vec<u8>> {
        let mut bytes = program.as_os_str().as_bytes().to_vec();
        for argument in arguments {
            bytes.push(0);
            bytes.extend_from_slice(argument.as_bytes());
        }
        let zeroes = bytes.iter().filter(|byte| **byte == 0).count();
        if bytes.len() > REQUEST_BYTES_MAX || zeroes != arguments.len() {
            let why = format!("more than {REQUEST_BYTES_MAX} bytes, or zero bytes in them");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        Ok(bytes)
    }

    fn decode(bytes: &[u8]) -> Option<Request> {
        let mut parts = bytes.split(|byte| *byte == 0);
        let program = PathBuf::from(OsStr::from_bytes(parts.next()?));
        let arguments = parts.map(|part| String::from_utf8(part.to_vec()));
        Some(Request {
            program,
            arguments: arguments.collect::<Result<_, _>>().ok()?,
        })
    }
}

/// Asks for a program with `network` as its standard input, which lives as long as `lifeline`'s other end.
pub(super) fn ask(
    control: BorrowedFd<'_>,
    program: &Path,
    arguments: &[String],
    network: BorrowedFd<'_>,
    lifeline: BorrowedFd<'_>,
) -> io::Result<()> {
    let bytes = Request::encode(program, arguments)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [network, lifeline];
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let parts = [IoSlice::new(&bytes)];
    // One that hangs does not take its messages any more; who asks must not hang, too.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    retry_on_intr(|| sendmsg(control, &parts, &mut ancillary, flags))?;
    Ok(())
}

/// A message on the control socket.
pub(super) enum Asked {
    /// A request, the network, the lifeline.
    For(Request, OwnedFd, OwnedFd),
    /// Something else. What came with it is closed.
    Nonsense,
    /// Nobody will ask any more.
    Over,
}

/// Takes the next message; waits for it.
pub(super) fn asked(control: BorrowedFd<'_>) -> io::Result<Asked> {
    let mut buffer = vec![0; REQUEST_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let message = retry_on_intr(|| recvmsg(control, &mut parts, &mut ancillary, flags))?;
    let mut fds = Vec::new();
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.extend(received);
        }
    }
    if message.bytes == 0 && fds.is_empty() {
        return Ok(Asked::Over);
    }
    let cut = ReturnFlags::TRUNC | ReturnFlags::CTRUNC;
    let request = buffer.get(..message.bytes).and_then(Request::decode);
    // Other files can make whoever waits for them wait, or mean something else to a program.
    let are_sockets = fds.iter().all(is_local_socket);
    Ok(match (request, <[OwnedFd; 2]>::try_from(fds)) {
        (Some(request), Ok([network, lifeline]))
            if are_sockets && !message.flags.intersects(cut) =>
        {
            Asked::For(request, network, lifeline)
        }
        _ => Asked::Nonsense,
    })
}

fn is_local_socket(fd: &OwnedFd) -> bool {
    socket_domain(fd).is_ok_and(|family| family == AddressFamily::UNIX)
}

/// What is said of a program.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// It runs, as this process.
    Started(u32),
    /// It could not be started: why.
    Failed(String),
    /// It has ended: how, and what it said last.
    Ended(String),
}

impl Reply {
    fn encode(&self) -> Vec<u8> {
        let (tag, text) = match self {
            Reply::Started(pid) => (b'S', pid.to_string()),
            Reply::Failed(why) => (b'F', why.clone()),
            Reply::Ended(how) => (b'E', how.clone()),
        };
        let mut bytes = vec![tag];
        bytes.extend_from_slice(text.as_bytes());
        bytes.truncate(REPLY_BYTES_MAX);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Reply> {
        let (tag, text) = bytes.split_first()?;
        let text = String::from_utf8_lossy(text).into_owned();
        match tag {
            b'S' => text.parse().ok().map(Reply::Started),
            b'F' => Some(Reply::Failed(text)),
            b'E' => Some(Reply::Ended(text)),
            _ => None,
        }
    }
}

/// Says something on a lifeline. Never waits: who does not listen does not hear it.
pub(super) fn reply(lifeline: BorrowedFd<'_>, reply: &Reply) {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    // It fails only where nobody listens.
    let _ = retry_on_intr(|| send(lifeline, &reply.encode(), flags));
}

/// Takes what was said on a lifeline. `None`: nothing will be said any more.
///
/// # Errors
/// `WouldBlock`: nothing yet.
pub(super) fn replied(lifeline: BorrowedFd<'_>) -> io::Result<Option<Reply>> {
    let mut buffer = [0; REPLY_BYTES_MAX];
    let (length, _) = retry_on_intr(|| recv(lifeline.as_fd(), &mut buffer, RecvFlags::DONTWAIT))?;
    Ok(buffer.get(..length).and_then(Reply::decode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_arrives_with_what_it_hands_over() {
        let (ours, theirs) = pair().unwrap();
        let (network, lifeline) = pair().unwrap();
        let arguments = ["--mtu=1500".to_owned(), String::new()];
        let program = Path::new("/bin/passt");
        let fds = (network.as_fd(), lifeline.as_fd());
        ask(ours.as_fd(), program, &arguments, fds.0, fds.1).unwrap();
        let Asked::For(request, network, lifeline) = asked(theirs.as_fd()).unwrap() else {
            panic!("no request");
        };
        assert_eq!((&*request.program, request.arguments.len()), (program, 2));
        assert_eq!(request.arguments, arguments);
        reply(network.as_fd(), &Reply::Started(7));
        let said = replied(lifeline.as_fd()).unwrap();
        assert_eq!(said, Some(Reply::Started(7)), "they are each other's ends");
        drop(ours);
        assert!(matches!(asked(theirs.as_fd()).unwrap(), Asked::Over));
    }

    #[test]
    fn nonsense_is_told_apart() {
        let (ours, theirs) = pair().unwrap();
        let (one, two) = pair().unwrap();
        // Without descriptors, with one, and longer than any request.
        send(&ours, b"passt", SendFlags::empty()).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [one.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        let parts = [IoSlice::new(b"passt")];
        sendmsg(&ours, &parts, &mut ancillary, SendFlags::empty()).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [one.as_fd(), two.as_fd(), two.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&ours, &parts, &mut ancillary, SendFlags::empty()).unwrap();
        send(
            &ours,
            &vec![b'a'; REQUEST_BYTES_MAX + 1],
            SendFlags::empty(),
        )
        .unwrap();
        // With something that is no socket, at either place.
        let file = std::fs::File::open("/dev/null").unwrap();
        let (file, program) = (file.as_fd(), Path::new("p"));
        ask(ours.as_fd(), program, &[], file, one.as_fd()).unwrap();
        ask(ours.as_fd(), program, &[], one.as_fd(), file).unwrap();
        for _ in 0..6 {
            assert!(matches!(asked(theirs.as_fd()).unwrap(), Asked::Nonsense));
        }
        let long = ["a".repeat(REQUEST_BYTES_MAX)];
        let fds = (one.as_fd(), two.as_fd());
        assert!(ask(ours.as_fd(), Path::new("p"), &long, fds.0, fds.1).is_err());
        let zero = ["a\0b".to_owned()];
        assert!(ask(ours.as_fd(), Path::new("p"), &zero, fds.0, fds.1).is_err());
    }

    #[test]
    fn replies() {
        let (ours, theirs) = pair().unwrap();
        let nothing = replied(ours.as_fd()).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        for said in [
            Reply::Started(u32::MAX),
            Reply::Failed("no".into()),
            Reply::Ended(String::new()),
        ] {
            reply(theirs.as_fd(), &said);
            assert_eq!(replied(ours.as_fd()).unwrap(), Some(said));
        }
        drop(theirs);
        assert_eq!(replied(ours.as_fd()).unwrap(), None);
    }
}
