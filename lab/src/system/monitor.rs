// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Several monitor clients at once: one is killed, one sends garbage, one is Python.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::hotplug::Residue;
use super::{BOOT, GIB, Ground, MIB, STEP_LIMIT, finish};
use crate::qmp::Qmp;
use crate::resident;

/// A monitor that has not done anything within this is dead.
const PATIENCE: Duration = Duration::from_secs(60);
const SCRIPT: &str = include_str!("client.py");

/// A client dies in the middle of a command; the others and the guest go on.
pub fn killed_client(ground: &Ground) -> Result<()> {
    let mut vmm = ground.boot(1, 2 * GIB)?;
    let path = vmm.qmp_path();
    let before = Residue::of(&mut vmm)?;
    for _ in 0..2 {
        killed_amid_requests(ground, &path)?;
    }
    vmm.request_total(2 * GIB)?;
    for _ in 0..20 {
        let mut other = Qmp::connect(&path)?;
        other.execute("query-memory-devices", Value::Null)?;
    }
    vmm.wait_total(2 * GIB, STEP_LIMIT)?;
    vmm.resize(BOOT, STEP_LIMIT)?;
    before.again(&mut vmm).context("what clients leave")?;
    finish(vmm)
}

/// kill -9 in the middle of requests: half of one is sent by each of several connections, and they are closed.
fn killed_amid_requests(ground: &Ground, path: &Path) -> Result<()> {
    let mut child = Command::new(&ground.python)
        .args(["-c", HALF_A_REQUEST])
        .arg(path)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = String::new();
    let output = child.stdout.take().context("its output")?;
    BufReader::new(output).read_line(&mut said)?;
    child.kill()?;
    child.wait()?;
    ensure!(said == "sent\n", "the client says {said:?}");
    Ok(())
}

const HALF_A_REQUEST: &str = "
import socket, sys, time
all = [socket.socket(socket.AF_UNIX) for _ in range(10)]
for s in all:
    s.connect(sys.argv[1])
    s.sendall(b'{\"execute\":\"qmp_capabilities\"}{\"execute\":\"query-status\"}{\"execute\":')
print('sent', flush=True)
time.sleep(600)
";

/// Garbage, floods and deep nesting get an error; other clients are served meanwhile.
pub fn garbage(ground: &Ground) -> Result<()> {
    let mut vmm = ground.boot(1, GIB)?;
    let path = vmm.qmp_path();
    let own = resident::beside_boot_ram(&mut vmm)?;
    let nested = "[".repeat(100_000);
    let wrong_type = r#"{"execute":"qom-get","arguments":{"path":7,"property":"size"}}"#;
    for (what, bytes) in [
        ("not JSON", b"hello\n".as_slice()),
        ("not UTF-8", b"{\"execute\":\"\xff\xfe\"}\n".as_slice()),
        ("deep nesting", nested.as_bytes()),
        ("a wrong type", wrong_type.as_bytes()),
        ("an array", b"[1,2,3]"),
    ] {
        let answer = send(&path, bytes).context(what)?;
        ensure!(answer.contains("\"error\""), "{what}: {answer}");
    }
    flood(&path).context("100 MiB without an end")?;
    resident::beside_boot_ram_within(&mut vmm, own + 64 * MIB).context("after a flood")?;
    ensure!(vmm.status()? == "running", "the VM is {}", vmm.status()?);
    let unknown = vmm
        .qmp()
        .execute("qom-get", json!({"path": "/x", "property": "y"}));
    let text = format!("{:#}", unknown.err().context("a path that is not there")?);
    ensure!(text.contains("/x"), "{text}");
    finish(vmm)
}

/// Negotiates, sends `bytes`, returns what is said about them.
fn send(path: &Path, bytes: &[u8]) -> Result<String> {
    let mut socket = UnixStream::connect(path)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
    // The server may have closed by now; what it said before counts.
    let _ = socket.write_all(bytes);
    let _ = socket.write_all(b"\n");
    let mut text = Vec::new();
    let mut chunk = [0; 4096];
    while !String::from_utf8_lossy(&text).contains("\"error\"") {
        match socket.read(&mut chunk)? {
            0 => break,
            n => text.extend_from_slice(&chunk[..n]),
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn flood(path: &Path) -> Result<()> {
    let mut socket = UnixStream::connect(path)?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"")?;
    let chunk = vec![b'a'; MIB as usize];
    for _ in 0..100 {
        match socket.write_all(&chunk) {
            Ok(()) => {}
            // Closed on us: also an answer.
            Err(e) if [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&e.kind()) => {
                break;
            }
            Err(e) => return Err(e).context("it is neither taken nor refused"),
        }
    }
    Ok(())
}

/// Lines as people type them: options, quotes, suffixes, help; a mistake is told for what it is.
pub fn typed_lines(ground: &Ground) -> Result<()> {
    let mut vmm = ground.boot(1, GIB)?;
    for (line, says) in [
        ("info status", "VM status: running"),
        ("info version", "ebbtide"),
        ("info ramblock", "mem-vmem0"),
        ("info mtree -f", "FlatView"),
        ("info mtree -z", "unsupported option -z"),
        ("info nope", "unknown command: 'info nope'"),
        ("help qom-set", "sizes may carry a suffix"),
        ("qom-list", "machine (child<"),
        ("qom-set vmem0 requested-size", "string expected"),
        ("qom-set vmem0 requested-size 1Q", "its unit is not known"),
        ("qom-set vmem0 requested-size 300M", ""),
        ("qom-get vmem0 requested-size", "314572800"),
        ("qom-set -j \"vmem0\" requested-size 2097152", ""),
        ("qom-get vmem0 requested-size", "2097152"),
        ("quit now", "extraneous characters"),
    ] {
        let answer = vmm
            .qmp()
            .execute("human-monitor-command", json!({"command-line": line}))?;
        let text = answer.as_str().context("an answer that is no text")?;
        let right = if says.is_empty() {
            text.is_empty()
        } else {
            text.contains(says)
        };
        ensure!(right, "{line}: {text:?}, expected {says:?}");
    }
    let stranger = vmm.qmp().execute(
        "human-monitor-command",
        json!({"command-line": "info status", "cpu-index": 9}),
    );
    let text = format!("{:#}", stranger.err().context("a vCPU that is not there")?);
    ensure!(text.contains("cpu-index"), "{text}");
    finish(vmm)
}

/// QEMU's own Python client, unchanged: negotiates, resizes, receives the events.
pub fn python_client(ground: &Ground) -> Result<()> {
    let vmm = ground.boot(1, 2 * GIB)?;
    let out = Command::new(&ground.python)
        .args(["-c", SCRIPT])
        .arg(vmm.qmp_path())
        .output()
        .context("run the Python client")?;
    let text = String::from_utf8_lossy(&out.stdout);
    ensure!(
        out.status.success() && text.contains("client: ok"),
        "the Python client ended with {}\n{text}{}",
        out.status,
        String::from_utf8_lossy(&out.stderr)
    );
    finish(vmm)
}
