// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the lab and the guest agent say to each other over a serial line.
//!
//! One JSON object per line in each direction. Lines of the agent start with
//! [`PREFIX`], because the kernel writes its own messages to the same console:
//! a receiver ignores every line without it.
//!
//! ```text
//! lab   -> {"id":1,"cmd":"fill","bytes":3221225472,"seed":7}
//! agent -> @ebb {"event":"progress","id":1,"done":536870912,"total":3221225472}
//! agent -> @ebb {"id":1,"ok":{"bytes":3221225472,"ms":9120}}
//! agent -> @ebb {"id":2,"error":"nothing is filled: send fill first"}
//! ```
//!
//! Requests run side by side; answers come in the order they are ready and
//! carry the `id` of their request.

use serde::{Deserialize, Serialize};

/// Begins every line the agent writes.
pub const PREFIX: &str = "@ebb ";

/// Longest request line the agent reads, in bytes.
pub const REQUEST_LIMIT_BYTES: usize = 64 * 1024;

/// One request line.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Request {
    /// Chosen by the sender, repeated in the answer.
    pub id: u64,
    /// What to do.
    #[serde(flatten)]
    pub command: Command,
}

/// What the agent can be asked to do.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum Command {
    /// The state of the guest: [`Report`].
    Report,
    /// Allocates `bytes` and writes a pattern derived from `seed`: [`Filled`].
    Fill {
        /// Size in bytes; rounded up to 2 MiB.
        bytes: u64,
        /// Decides the pattern.
        seed: u64,
    },
    /// Compares every word of what [`Command::Fill`] wrote: [`Checked`].
    Check,
    /// Gives back what [`Command::Fill`] took: [`Freed`].
    Free,
    /// Starts writing and verifying at random positions of a disk: [`DiskStatus`].
    DiskStart(DiskStart),
    /// How the work on a disk goes: [`DiskStatus`].
    DiskStatus {
        /// The device, as given to [`Command::DiskStart`].
        path: String,
    },
    /// Reads back every block written so far; the work goes on after it: [`DiskStatus`].
    DiskVerify {
        /// The device.
        path: String,
    },
    /// Ends the work on a disk: [`DiskStatus`].
    DiskStop {
        /// The device.
        path: String,
        /// Also read back every block that was written.
        #[serde(default)]
        verify: bool,
    },
    /// Writes the first `bytes` of a disk once, flushes and reads them back: [`DiskStatus`].
    DiskOnce {
        /// The device.
        path: String,
        /// How much; rounded down to whole blocks.
        bytes: u64,
        /// Decides the content.
        seed: u64,
    },
    /// Writes from memory at `place` to the beginning of a disk, past the page cache; answers when that has ended:
    /// [`Written`].
    WriteFrom {
        /// The device.
        path: String,
        /// Which memory.
        #[serde(flatten)]
        place: Place,
        /// Decides what is written: [`words`](crate::placed::words).
        seed: u64,
    },
    /// Has a pipe hold memory at `place` where it is, until [`Command::Unpin`]: [`PinnedMemory`].
    Pin(Place),
    /// Lets go of what [`Command::Pin`] holds: [`PinnedMemory`].
    Unpin,
    /// Reads a disk at random as fast as it goes: [`DiskLoaded`].
    DiskLoad(DiskLoad),
    /// Searches the kernel log: [`KernelLog`].
    Dmesg {
        /// Lines that contain one of these come back.
        deny: Vec<String>,
        /// How many of the last lines to send along.
        #[serde(default)]
        tail: usize,
    },
    /// Holds `bytes` in pipes, which is memory the kernel can't move: [`PipesHeld`].
    Pipes {
        /// Size in bytes; rounded up to whole pages.
        bytes: u64,
    },
    /// Drains and closes all pipes: [`PipesHeld`].
    PipesFree,
    /// Runs a program: [`Executed`].
    Exec {
        /// Program and arguments; `busybox` is at `/bin/busybox`.
        argv: Vec<String>,
        /// The program is killed after this time.
        #[serde(default = "default_exec_timeout_ms")]
        timeout_ms: u64,
    },
    /// Writes to an I/O port and measures how long the guest's processor stays at that: [`PortWritten`].
    PortWrite {
        /// The port.
        port: u16,
        /// What to write; must fit.
        value: u32,
        /// Bytes: 1, 2 or 4.
        width: u8,
    },
    /// Reads an I/O port: [`PortValue`].
    PortRead {
        /// The port.
        port: u16,
        /// Bytes: 1, 2 or 4.
        width: u8,
    },
    /// Answers after this time: [`Done`].
    Sleep {
        /// How long.
        ms: u64,
    },
    /// Answers, then restarts the guest: [`Done`].
    Reboot,
    /// Answers, then powers the guest off: [`Done`].
    Poweroff,
}

/// The agent's default for [`Command::Exec`].
pub fn default_exec_timeout_ms() -> u64 {
    30_000
}

/// Arguments of [`Command::DiskStart`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct DiskStart {
    /// The device, such as `/dev/vda`. What is on it is overwritten.
    pub path: String,
    /// Decides positions and content.
    pub seed: u64,
    /// Read back and compare what was written while going on.
    #[serde(default = "yes")]
    pub verify: bool,
    /// Pause between two operations.
    #[serde(default)]
    pub pause_us: u64,
    /// Use only this much of the device; 0 means all of it.
    #[serde(default)]
    pub span_bytes: u64,
}

fn yes() -> bool {
    true
}

/// Memory of the guest by its address.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Place {
    /// How much; rounded up to whole pages.
    pub bytes: u64,
    /// Where all of it must be, or the request fails: guest-physical addresses from here on.
    pub from: u64,
    /// Up to here.
    pub to: u64,
}

/// Arguments of [`Command::DiskLoad`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct DiskLoad {
    /// The device, such as `/dev/vda`.
    pub path: String,
    /// Requests under way at any time.
    pub depth: u32,
    /// For how long new ones are made.
    pub ms: u64,
    /// Decides positions.
    pub seed: u64,
}

/// One line from the agent, without [`PREFIX`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Message {
    /// Something happened.
    Event(Event),
    /// A request succeeded.
    Answer {
        /// The request's `id`.
        id: u64,
        /// The result, one of the structs of this module.
        ok: serde_json::Value,
    },
    /// A request failed.
    Failure {
        /// The request's `id`; 0 when the line could not be read at all.
        id: u64,
        /// Why.
        error: String,
    },
}

/// What the agent reports unasked.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The agent takes requests from now on.
    Ready(Ready),
    /// A long request is on its way.
    Progress {
        /// The request's `id`.
        id: u64,
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
}

/// The agent's first line.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Ready {
    /// Kernel release.
    pub kernel: String,
    /// CPUs online.
    pub cpus: u32,
    /// MemTotal in bytes.
    pub mem_total: u64,
    /// Guest time since the kernel started when the agent was started.
    pub started_ms: u64,
    /// Guest time since the kernel started, modules loaded.
    pub uptime_ms: u64,
    /// What went wrong on the way; empty if all is well.
    pub problems: Vec<String>,
}

/// Answer to [`Command::Report`]. Sizes in bytes.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Report {
    /// Guest time since the kernel started.
    pub uptime_ms: u64,
    /// CPUs online.
    pub cpus: u32,
    /// All RAM the kernel manages.
    pub mem_total: u64,
    /// RAM in no use at all.
    pub mem_free: u64,
    /// RAM that can be had without swapping.
    pub mem_available: u64,
    /// All of /proc/meminfo.
    pub meminfo: std::collections::BTreeMap<String, u64>,
    /// Hot-pluggable memory blocks as the kernel counts them.
    pub blocks: MemoryBlocks,
    /// What virtio-mem has added.
    pub virtio_mem: VirtioMem,
}

/// `/sys/devices/system/memory`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct MemoryBlocks {
    /// Size of one block in bytes.
    pub size: u64,
    /// Blocks that are online.
    pub online: u32,
    /// Blocks that are present but not online.
    pub offline: u32,
}

/// What the guest shows of its virtio-mem devices.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct VirtioMem {
    /// Devices bound to the driver.
    pub devices: u32,
    /// Sum of the ranges that /proc/iomem names as `System RAM (virtio_mem)`.
    pub added: u64,
}

/// Answer to [`Command::Fill`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Filled {
    /// Bytes written.
    pub bytes: u64,
    /// Time taken.
    pub ms: u64,
}

/// Answer to [`Command::Check`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Checked {
    /// Bytes compared.
    pub bytes: u64,
    /// Whether every word was right.
    pub ok: bool,
    /// The first word that was not.
    pub mismatch: Option<Mismatch>,
    /// Time taken.
    pub ms: u64,
}

/// A word that is not what was written.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Mismatch {
    /// Position in bytes.
    pub offset: u64,
    /// What was written there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
}

/// Answer to [`Command::Free`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Freed {
    /// Bytes given back; 0 if nothing was filled.
    pub bytes: u64,
}

/// Answer to the disk commands: totals since [`Command::DiskStart`].
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct DiskStatus {
    /// What decided positions and content.
    pub seed: u64,
    /// No error and no mismatch so far.
    pub ok: bool,
    /// Whether the work goes on.
    pub running: bool,
    /// Write operations completed.
    pub writes: u64,
    /// Read operations completed.
    pub reads: u64,
    /// Flushes completed.
    pub syncs: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Bytes read back and found right.
    pub bytes_verified: u64,
    /// Different blocks of 4 KiB that hold something.
    pub blocks: u64,
    /// Operations that failed.
    pub errors: u64,
    /// Blocks that held something else than was written.
    pub mismatches: u64,
    /// The first failure or mismatch.
    pub first_error: Option<String>,
    /// Longest operation in milliseconds.
    pub slowest_ms: u64,
    /// Longest time without the end of an operation in milliseconds, pauses and the one under way included.
    pub longest_gap_ms: u64,
    /// Whether every block was read back at the end of this request.
    pub verified_all: bool,
}

/// Answer to [`Command::WriteFrom`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Written {
    /// Bytes written.
    pub bytes: u64,
    /// Time taken.
    pub ms: u64,
}

/// Answer to [`Command::Pin`] and [`Command::Unpin`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct PinnedMemory {
    /// Bytes now held.
    pub bytes: u64,
}

/// Answer to [`Command::DiskLoad`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct DiskLoaded {
    /// Blocks of 4 KiB read.
    pub reads: u64,
    /// From before the first request to the end of the last one.
    pub ns: u64,
}

/// Answer to [`Command::Dmesg`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct KernelLog {
    /// Lines in the kernel log.
    pub lines: u64,
    /// The lines that contain a denied pattern, at most 50.
    pub matches: Vec<String>,
    /// The last lines, as many as were asked for.
    pub tail: Vec<String>,
}

/// Answer to [`Command::Pipes`] and [`Command::PipesFree`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct PipesHeld {
    /// Bytes now held in pipes.
    pub bytes: u64,
}

/// Answer to [`Command::Exec`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Executed {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Whether the time limit ended it.
    pub timed_out: bool,
    /// Standard output and error, interleaved as they came, at most 32 KiB.
    pub output: String,
    /// Whether the output was longer.
    pub truncated: bool,
}

/// Answer to [`Command::PortWrite`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct PortWritten {
    /// From before the instruction to after it, in the guest's monotonic time.
    pub ns: u64,
}

/// Answer to [`Command::PortRead`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct PortValue {
    /// What was read.
    pub value: u32,
}

/// An answer that carries nothing else.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Done {}

/// Finds a message in one line of console output.
///
/// A line without [`PREFIX`] is `None`. The prefix may stand behind other
/// text: the kernel or firmware may have left a line unfinished.
///
/// # Errors
/// The JSON error, when what follows the prefix is no message.
pub fn parse_line(line: &str) -> Option<Result<Message, serde_json::Error>> {
    let at = line.find(PREFIX)?;
    let text = line.get(at + PREFIX.len()..)?;
    Some(serde_json::from_str(text.trim_end()))
}

/// The line for a message, newline included.
pub fn format_line(message: &Message) -> String {
    let json = serde_json::to_string(message).unwrap_or_else(|error| {
        format!(r#"{{"id":0,"error":"answer can't be written: {error}"}}"#)
    });
    format!("{PREFIX}{json}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_lines_have_the_documented_form() {
        let line = r#"{"id":1,"cmd":"fill","bytes":3221225472,"seed":18446744073709551615}"#;
        let request: Request = serde_json::from_str(line).unwrap();
        let fill = Command::Fill {
            bytes: 3 << 30,
            seed: u64::MAX,
        };
        assert_eq!((request.id, &request.command), (1, &fill));
        assert_eq!(serde_json::to_string(&request).unwrap(), line);

        let disk = r#"{"id":2,"cmd":"disk_start","path":"/dev/vda","seed":3}"#;
        let request: Request = serde_json::from_str(disk).unwrap();
        let Command::DiskStart(start) = request.command else {
            panic!("{request:?}")
        };
        assert!(start.verify);
    }

    #[test]
    fn unknown_commands_and_wrong_types_are_errors() {
        for line in [
            r#"{"id":1,"cmd":"fly"}"#,
            r#"{"id":1,"cmd":"fill","bytes":"much","seed":1}"#,
            r#"{"id":1,"cmd":"fill","bytes":-1,"seed":1}"#,
            r#"{"cmd":"report"}"#,
            "[]",
        ] {
            assert!(serde_json::from_str::<Request>(line).is_err(), "{line}");
        }
    }

    #[test]
    fn messages_survive_a_round_trip() {
        let ready = Ready {
            kernel: "6.1.0".into(),
            cpus: 2,
            mem_total: 1 << 29,
            started_ms: 1,
            uptime_ms: 2,
            problems: vec![],
        };
        for message in [
            Message::Event(Event::Ready(ready)),
            Message::Event(Event::Progress {
                id: 4,
                done: 1,
                total: 2,
            }),
            Message::Answer {
                id: 5,
                ok: serde_json::json!({}),
            },
            Message::Failure {
                id: 6,
                error: "line\nbreak".into(),
            },
        ] {
            let line = format_line(&message);
            assert_eq!(line.matches('\n').count(), 1, "{line}");
            assert_eq!(parse_line(&line).unwrap().unwrap(), message);
        }
    }

    #[test]
    fn console_noise_is_no_message() {
        assert!(parse_line("[    0.1] Linux version 6.1").is_none());
        assert!(
            parse_line("noise @ebb {\"id\":1,\"ok\":{}}\r")
                .unwrap()
                .is_ok()
        );
        assert!(parse_line("@ebb {\"id\":1,[ 3.1] usb").unwrap().is_err());
    }
}
