// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Character devices on real files and sockets.

use super::*;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

use ebbtide_iothread::{IoThread, oneshot};

const LONG: Duration = Duration::from_secs(60);

/// A wire served by an iothread.
struct Served {
    wire: Arc<Wire>,
    done: std::sync::mpsc::Receiver<()>,
    _thread: IoThread,
}

fn serve(spec: &ChardevSpec) -> Served {
    let wire = Wire::new();
    let attached = Chardev::open(spec).unwrap().attach(&wire);
    let thread = IoThread::spawn("chardev").unwrap();
    let (ended, done) = std::sync::mpsc::channel();
    thread
        .remote()
        .spawn(move |local| async move {
            attached.serve(local).await;
            ended.send(()).unwrap();
        })
        .unwrap();
    Served {
        wire,
        done,
        _thread: thread,
    }
}

impl Served {
    /// Closes the wire and waits until the host side has written everything.
    fn close(self) {
        self.wire.close();
        self.done.recv_timeout(LONG).expect("the host side ends");
    }
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LONG, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Sends until the client hears: a socket drops what nobody listens to. Afterwards the line is quiet.
fn greet(wire: &Wire, client: &mut UnixStream) {
    client
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let mut byte = [b'#'];
    eventually("the client hears", || {
        wire.put(b"#");
        (&*client).read(&mut [0]).is_ok_and(|count| count > 0)
    });
    client.set_read_timeout(Some(LONG)).unwrap();
    wire.put(b"!");
    while byte == *b"#" {
        client.read_exact(&mut byte).unwrap();
    }
}

fn read_exactly(client: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    client.read_exact(&mut bytes).unwrap();
    bytes
}

/// What the device has received.
fn received(wire: &Wire, count: usize) -> Vec<u8> {
    let collected = std::cell::RefCell::new(Vec::new());
    eventually("input arrives", || {
        let mut bytes = [0; 4096];
        let count_now = wire.get(&mut bytes);
        collected
            .borrow_mut()
            .extend_from_slice(&bytes[..count_now]);
        collected.borrow().len() >= count
    });
    collected.into_inner()
}

#[test]
fn specifications() {
    let parse = |text: &str| text.parse::<ChardevSpec>();
    assert_eq!(parse("stdio").unwrap(), ChardevSpec::Stdio);
    assert_eq!(parse("off").unwrap(), ChardevSpec::Off);
    assert_eq!(
        parse("file:/tmp/a:b").unwrap(),
        ChardevSpec::File("/tmp/a:b".into())
    );
    assert_eq!(
        parse("unix:s.sock").unwrap(),
        ChardevSpec::Unix("s.sock".into())
    );
    for bad in ["", "stdio:", "file:", "unix:", "pty", "tcp:1", "off:x"] {
        let message = parse(bad).unwrap_err().to_string();
        assert!(
            message.contains(&format!("\"{bad}\"")) && message.contains("unix:PATH"),
            "{message}"
        );
    }
}

#[test]
fn a_file_gets_everything_and_is_truncated_first() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial.log");
    std::fs::write(&path, "old contents that are longer").unwrap();
    let served = serve(&ChardevSpec::File(path.clone()));
    let mut expected = Vec::new();
    for n in 0..5000 {
        let line = format!("line {n}\n");
        served.wire.put(line.as_bytes());
        expected.extend_from_slice(line.as_bytes());
    }
    served.close();
    assert_eq!(std::fs::read(&path).unwrap(), expected);
}

#[test]
fn a_file_that_cannot_be_opened_is_named() {
    let error = Chardev::open(&ChardevSpec::File("/nonexistent/serial.log".into()))
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("/nonexistent/serial.log"), "{error}");
}

#[test]
fn a_pipe_nobody_reads_is_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pipe");
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        &path,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
    )
    .unwrap();
    let error = Chardev::open(&ChardevSpec::File(path.clone())).map(|_| ());
    let text = error.unwrap_err().to_string();
    assert!(text.contains("pipe"), "{text}");
    let mut reader = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let served = serve(&ChardevSpec::File(path));
    served.wire.put(b"read");
    let mut text = [0; 4];
    std::io::Read::read_exact(&mut reader, &mut text).unwrap();
    assert_eq!(&text, b"read");
    served.close();
}

#[test]
fn a_socket_path_that_is_too_long_is_named_with_its_length() {
    let long = format!("/tmp/{}", "x".repeat(120));
    let error = Chardev::open(&ChardevSpec::Unix(long.into())).map(|_| ());
    let text = error.unwrap_err().to_string();
    assert!(text.contains("125 bytes") && text.contains("107"), "{text}");
}

#[test]
fn output_on_a_full_disk_is_dropped_and_the_device_goes_on() {
    let served = serve(&ChardevSpec::File("/dev/full".into()));
    served.wire.put(b"x");
    let wire = Arc::clone(&served.wire);
    eventually("nobody listens any more", || {
        wire.put(b"y");
        !wire.has_output()
    });
    served.close();
}

#[test]
fn off_ends_when_it_is_closed() {
    let served = serve(&ChardevSpec::Off);
    served.wire.put(b"nobody");
    assert!(!served.wire.has_output());
    served.close();
}

#[test]
fn a_socket_carries_bytes_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial.sock");
    let served = serve(&ChardevSpec::Unix(path.clone()));
    served.wire.put(b"before anybody listened");
    let mut client = UnixStream::connect(&path).unwrap();
    greet(&served.wire, &mut client);
    served.wire.put(b"to the client");
    assert_eq!(read_exactly(&mut client, 13), b"to the client");
    client.write_all(b"to the guest").unwrap();
    assert_eq!(received(&served.wire, 12), b"to the guest");
    served.wire.put(b"last words");
    served.close();
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"last words");
    assert!(!path.exists(), "the socket is removed");
}

#[test]
fn a_client_may_leave_and_the_next_one_come() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial.sock");
    let served = serve(&ChardevSpec::Unix(path.clone()));
    for _ in 0..3 {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"hi").unwrap();
        assert_eq!(received(&served.wire, 2), b"hi");
        greet(&served.wire, &mut client);
    }
    served.close();
}

#[test]
fn a_client_that_only_listens_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial.sock");
    let served = serve(&ChardevSpec::Unix(path.clone()));
    let mut listener = UnixStream::connect(&path).unwrap();
    listener.shutdown(std::net::Shutdown::Write).unwrap();
    greet(&served.wire, &mut listener);
    served.wire.put(b"still there");
    assert_eq!(read_exactly(&mut listener, 11), b"still there");
    let mut next = UnixStream::connect(&path).unwrap();
    greet(&served.wire, &mut next);
    served.close();
}

#[test]
fn a_second_client_waits_for_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial.sock");
    let served = serve(&ChardevSpec::Unix(path.clone()));
    let mut first = UnixStream::connect(&path).unwrap();
    greet(&served.wire, &mut first);
    let mut second = UnixStream::connect(&path).unwrap();
    second.write_all(b"second").unwrap();
    first.write_all(b"first").unwrap();
    assert_eq!(received(&served.wire, 5), b"first");
    drop(first);
    assert_eq!(received(&served.wire, 6), b"second");
    greet(&served.wire, &mut second);
    served.close();
}

#[test]
fn a_slow_client_loses_the_oldest_output_and_it_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial.sock");
    let served = serve(&ChardevSpec::Unix(path.clone()));
    let mut client = UnixStream::connect(&path).unwrap();
    greet(&served.wire, &mut client);
    let line = [b'x'; 1023]
        .iter()
        .chain(b"\n")
        .copied()
        .collect::<Vec<_>>();
    for _ in 0..2048 {
        served.wire.put(&line);
    }
    served.wire.put(b"the end");
    let dropped = served.wire.dropped_bytes();
    assert!(dropped > 0, "2 MiB fit no buffer here");
    let wire = Arc::clone(&served.wire);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        all
    });
    served.close();
    let all = reader.join().unwrap();
    assert!(all.ends_with(b"the end"));
    assert_eq!(all.len() as u64 + wire.dropped_bytes(), 2048 * 1024 + 7);
}

#[test]
fn a_guest_that_does_not_read_holds_the_client_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial.sock");
    let served = serve(&ChardevSpec::Unix(path.clone()));
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_nonblocking(true).unwrap();
    let mut sent = 0;
    let start = Instant::now();
    // More than the wire takes stays in the socket, and in the end the client has to wait.
    while start.elapsed() < Duration::from_millis(300) {
        match client.write(&[b'z'; 4096]) {
            Ok(count) => sent += count,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        assert!(sent < 8 << 20, "nothing holds the client up");
    }
    assert_eq!(
        received(&served.wire, sent).len(),
        sent,
        "and nothing is lost"
    );
    served.close();
}

#[test]
fn closing_does_not_wait_for_a_client_that_never_reads_if_the_task_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial.sock");
    let served = serve(&ChardevSpec::Unix(path.clone()));
    let mut client = UnixStream::connect(&path).unwrap();
    greet(&served.wire, &mut client);
    for _ in 0..1024 {
        served.wire.put(&[b'x'; 1024]);
    }
    served.wire.close();
    drop(served);
    assert!(!path.exists(), "stopping the iothread drops the chardev");
}

#[test]
fn a_live_socket_is_refused_and_a_dead_one_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial.sock");
    let spec = ChardevSpec::Unix(path.clone());
    let live = UnixListener::bind(&path).unwrap();
    assert!(matches!(Chardev::open(&spec).err(), Some(Error::SocketInUse(at)) if at == path));
    drop(live);
    assert!(path.exists(), "nobody removed it");
    let chardev = Chardev::open(&spec).unwrap();
    assert!(matches!(
        Chardev::open(&spec).err(),
        Some(Error::SocketInUse(_))
    ));
    drop(chardev);
    assert!(!path.exists());
}

#[test]
fn what_is_no_socket_is_neither_used_nor_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    assert!(matches!(
        Chardev::open(&ChardevSpec::Unix(path.clone())).err(),
        Some(Error::NotASocket(_))
    ));
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
    let missing = folder.path().join("no/such/folder.sock");
    assert!(matches!(
        Chardev::open(&ChardevSpec::Unix(missing)).err(),
        Some(Error::Socket { .. })
    ));
}

#[test]
fn a_socket_somebody_else_has_replaced_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial.sock");
    let chardev = Chardev::open(&ChardevSpec::Unix(path.clone())).unwrap();
    std::fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(chardev);
    assert!(path.exists());
}

#[test]
fn many_bytes_wake_the_host_side_a_few_times() {
    let wire = Wire::new();
    wire.listen(true);
    let thread = IoThread::spawn("chardev").unwrap();
    let (ended, done) = oneshot::channel();
    let host = Arc::clone(&wire);
    thread
        .remote()
        .spawn(move |local| async move {
            let (mut pieces, mut bytes) = (0u32, 0);
            while let Some(piece) = next_output(&local, &host).await {
                pieces += 1;
                bytes += piece.len();
            }
            let _ = ended.send((pieces, bytes));
        })
        .unwrap();
    let start = Instant::now();
    for _ in 0..50_000 {
        wire.put(b"x");
    }
    wire.close();
    let taken = start.elapsed();
    let result = ebbtide_iothread::run("test", |_| done).unwrap();
    let (pieces, bytes) = result.unwrap();
    assert_eq!(bytes, 50_000);
    let limit = 3 + taken.as_millis() as u32;
    assert!(pieces <= limit, "{pieces} pieces in {taken:?}");
}

/// Runs `future` to its end, which must come.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    ebbtide_iothread::run("test", |local| async move {
        local.timeout(LONG, future).await.expect("an end")
    })
    .unwrap()
}

#[test]
fn a_device_that_can_wait_loses_nothing() {
    let wire = Wire::new();
    assert_eq!(wire.offer(b"nobody listens"), 14);
    assert!(!wire.has_output() && !wire.is_listening());
    wire.listen(true);
    assert!(wire.is_listening());
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
    let mut seen = 0;
    let (mut sent, mut taken) = (0, Vec::new());
    while taken.len() < bytes.len() {
        let count = wire.offer(&bytes[sent..]);
        sent += count;
        assert_eq!(wire.offer(&bytes[sent..]), 0, "it is full");
        taken.extend(wire.take());
        assert_eq!(taken.len(), sent);
        block_on(wire.changes().changed(&mut seen));
    }
    assert!(taken == bytes);
    assert_eq!(wire.dropped_bytes(), 0);
}

#[test]
fn a_device_is_told_of_every_change() {
    let wire = Wire::new();
    let mut seen = 0;
    let changes: [&dyn Fn(); 5] = [
        &|| wire.listen(true),
        &|| wire.receive(b"input"),
        &|| drop(wire.take()),
        &|| wire.listen(false),
        &|| wire.close(),
    ];
    for change in changes {
        change();
        block_on(wire.changes().changed(&mut seen));
    }
}

/// A client that reads nothing: the device is told that there is no room, and all of it arrives when the client reads.
#[test]
fn a_socket_that_is_full_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console.sock");
    let served = serve(&ChardevSpec::Unix(path.clone()));
    let mut client = UnixStream::connect(&path).unwrap();
    eventually("the client is served", || served.wire.is_listening());
    let mut sent = Vec::new();
    let mut refused = Instant::now();
    while refused.elapsed() < Duration::from_millis(300) {
        let bytes = [(sent.len() % 253) as u8; 5000];
        let count = served.wire.offer(&bytes);
        sent.extend(&bytes[..count]);
        if count > 0 {
            refused = Instant::now();
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    let expected = sent.len();
    let mut received = vec![0; expected];
    client.set_read_timeout(Some(LONG)).unwrap();
    client.read_exact(&mut received).unwrap();
    assert!(received == sent);
    served.close();
}
