// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VMM under test as a child process: Ebbtide, or Debian's QEMU as its peer
//! with an equal machine.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ebbtide_agent::protocol::Ready;
use serde_json::{Value, json};

use crate::guest::Guest;
use crate::image::{COMMAND_LINE, Image};
use crate::places::find_program;
use crate::process::Contained;
use crate::qmp::Qmp;

/// Id of the virtio-mem device on both VMMs.
const MEMORY_DEVICE: &str = "/machine/peripheral/vmem0";
const SOCKET_TIMEOUT: Duration = Duration::from_secs(30);
/// The end of what a VMM says of a descriptor that a vCPU was the last to know.
const STAYS_OPEN: &str = "it stays open";
const LOG_TAIL_LINES: usize = 40;
const BLOCK_SIZE: &str = "2M";

/// Which VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Program {
    /// The `ebbtide` binary at this path.
    Ebbtide(PathBuf),
    /// `qemu-system-x86_64` of Debian.
    Qemu,
}

/// A disk of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Id on the VMM.
    pub id: String,
    /// A raw image.
    pub path: PathBuf,
    /// The guest may not write.
    pub readonly: bool,
}

/// What to start.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The VMM.
    pub program: Program,
    /// QEMU's machine: `q35`, or `pc`, whose bus 0 has hot-plug slots as Ebbtide's has.
    pub qemu_board: &'static str,
    /// Kernel and initramfs.
    pub image: Image,
    /// Kernel command line.
    pub command_line: String,
    /// Virtual processors.
    pub cpus: u32,
    /// RAM from the start.
    pub boot_bytes: u64,
    /// RAM with all that virtio-mem can add; `None`: no such device.
    pub max_bytes: Option<u64>,
    /// Slots for DIMMs.
    pub memory_slots: u16,
    /// What the memory is in; by default the host's own. Of Ebbtide only.
    pub memory_file: Option<PathBuf>,
    /// In order: /dev/vda, /dev/vdb, ...
    pub disks: Vec<Disk>,
    /// More arguments for the VMM.
    pub more: Vec<String>,
    /// Where what it says goes, to be read when it has ended; by default a file that is deleted.
    pub log: Option<PathBuf>,
}

impl Machine {
    /// 1 CPU, 512 MiB, the usual command line, no disk.
    pub fn new(program: Program, image: Image) -> Machine {
        Machine {
            program,
            qemu_board: "q35",
            image,
            command_line: COMMAND_LINE.to_owned(),
            cpus: 1,
            boot_bytes: 512 << 20,
            max_bytes: None,
            memory_slots: 0,
            memory_file: None,
            disks: Vec::new(),
            more: Vec::new(),
            log: None,
        }
    }

    /// The command line of the VMM with its sockets.
    ///
    /// # Errors
    /// QEMU is not installed; a path is not UTF-8.
    fn command(&self, serial: &Path, qmp: &Path) -> Result<Command> {
        match &self.program {
            Program::Ebbtide(path) => self.ebbtide(path, serial, qmp),
            Program::Qemu => self.qemu(serial, qmp),
        }
    }

    fn ebbtide(&self, program: &Path, serial: &Path, qmp: &Path) -> Result<Command> {
        let mut command = Command::new(program);
        command.arg("run").arg("--kernel").arg(&self.image.kernel);
        if let Some(initrd) = &self.image.initrd {
            command.arg("--initrd").arg(initrd);
        }
        command
            .arg("--cmdline")
            .arg(&self.command_line)
            // Where tests put the images they plug later.
            .arg("--allow")
            .arg(std::env::temp_dir())
            .arg("--cpus")
            .arg(self.cpus.to_string());
        let max = self
            .max_bytes
            .map(|bytes| format!(",max={}M", bytes >> 20))
            .unwrap_or_default();
        let slots = match self.memory_slots {
            0 => String::new(),
            slots => format!(",slots={slots}"),
        };
        let file = match &self.memory_file {
            None => String::new(),
            Some(path) => format!(",backend=file,path={}", text(path)?),
        };
        command
            .arg("--memory")
            .arg(format!("size={}M{max}{slots}{file}", self.boot_bytes >> 20));
        for disk in &self.disks {
            let readonly = if disk.readonly { ",readonly=on" } else { "" };
            command.arg("--disk").arg(format!(
                "path={},id={}{readonly}",
                text(&disk.path)?,
                disk.id
            ));
        }
        command
            .arg("--serial")
            .arg(format!("unix:{}", text(serial)?));
        command.arg("--qmp").arg(format!("unix:{}", text(qmp)?));
        command.args(&self.more);
        Ok(command)
    }

    fn qemu(&self, serial: &Path, qmp: &Path) -> Result<Command> {
        let program =
            find_program("qemu-system-x86_64").context("qemu-system-x86_64 is not installed")?;
        let mut command = Command::new(program);
        command.args([
            "-M",
            self.qemu_board,
            "-nodefaults",
            "-display",
            "none",
            "-accel",
            "kvm",
            "-cpu",
            "host",
        ]);
        command.arg("-kernel").arg(&self.image.kernel);
        if let Some(initrd) = &self.image.initrd {
            command.arg("-initrd").arg(initrd);
        }
        command
            .arg("-append")
            .arg(&self.command_line)
            .arg("-smp")
            .arg(self.cpus.to_string());
        let boot = self.boot_bytes >> 20;
        match self.max_bytes {
            None => command.arg("-m").arg(format!("{boot}M")),
            Some(max_bytes) => {
                let (max, device) = (max_bytes >> 20, (max_bytes - self.boot_bytes) >> 20);
                command.arg("-m").arg(format!("{boot}M,maxmem={max}M"));
                command.arg("-object").arg(format!(
                    "memory-backend-ram,id=vmem0-ram,size={device}M,reserve=off"
                ));
                command.arg("-device").arg(format!(
                    "virtio-mem-pci,id=vmem0,memdev=vmem0-ram,block-size={BLOCK_SIZE},requested-size=0"
                ))
            }
        };
        for disk in &self.disks {
            let (id, path) = (&disk.id, text(&disk.path)?);
            let readonly = if disk.readonly { "on" } else { "off" };
            let drive = format!("if=none,id={id}-file,format=raw,file={path},read-only={readonly}");
            command.arg("-drive").arg(drive);
            command
                .arg("-device")
                .arg(format!("virtio-blk-pci,id={id},drive={id}-file"));
        }
        // It waits for us to connect, so that no output is lost.
        command
            .arg("-serial")
            .arg(format!("unix:{},server=on,wait=on", text(serial)?));
        command
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", text(qmp)?));
        command.args(&self.more);
        Ok(command)
    }
}

fn text(path: &Path) -> Result<&str> {
    let text = path
        .to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))?;
    ensure!(
        !text.contains(','),
        "a VMM's option can't hold the comma in {text}"
    );
    Ok(text)
}

/// A running VMM; killed when dropped, its sockets removed.
#[derive(Debug)]
pub struct Vmm {
    // Before the directory, so that the process ends first.
    child: Contained,
    guest: Guest,
    qmp: Qmp,
    directory: tempfile::TempDir,
    log: PathBuf,
    begun: Instant,
    boot_bytes: u64,
    ready: Option<Ready>,
}

impl Vmm {
    /// Starts a VMM and connects to its serial line and its QMP socket. The
    /// calling thread must live as long as the VMM, see [`Contained`].
    ///
    /// # Errors
    /// It can't be started or ends at once; what it said is in the error.
    pub fn start(machine: &Machine) -> Result<Vmm> {
        let directory = tempfile::Builder::new()
            .prefix("ebbtide-vmm-")
            .tempdir()
            .context("temporary directory")?;
        let (serial, qmp) = (
            directory.path().join("serial"),
            directory.path().join("qmp"),
        );
        let mut command = machine.command(&serial, &qmp)?;
        let log = machine
            .log
            .clone()
            .unwrap_or_else(|| directory.path().join("log"));
        let output = std::fs::File::create(&log).context("log of the VMM")?;
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("log of the VMM")?)
            .stderr(output);
        let begun = Instant::now();
        let mut child = Contained::spawn(&mut command, &[])?;
        let deadline = begun + SOCKET_TIMEOUT;
        let stream = connect(&serial, &mut child, &log, deadline)?;
        let guest = Guest::new(stream.try_clone().context("serial line")?, stream);
        let stream = connect(&qmp, &mut child, &log, deadline)?;
        let qmp = Qmp::over(stream).with_context(|| log_tail(&log))?;
        Ok(Vmm {
            child,
            guest,
            qmp,
            directory,
            log,
            begun,
            boot_bytes: machine.boot_bytes,
            ready: None,
        })
    }

    /// The guest's end.
    pub fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }

    /// Management's end.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Where another QMP client can connect (Ebbtide serves several).
    pub fn qmp_path(&self) -> PathBuf {
        self.directory.path().join("qmp")
    }

    /// The VMM's process.
    pub fn process(&mut self) -> &mut Contained {
        &mut self.child
    }

    /// When the VMM was started.
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// Resident memory of the VMM, guest RAM included.
    ///
    /// # Errors
    /// It has ended.
    pub fn rss_bytes(&self) -> Result<u64> {
        self.child.memory_bytes("VmRSS")
    }

    /// Waits for the agent; the time from exec to its first byte.
    ///
    /// # Errors
    /// As [`Guest::wait_ready`], with what the VMM said.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<Duration> {
        let result = self.guest.wait_ready_at(timeout);
        let (ready, at) = result.with_context(|| log_tail(&self.log))?;
        self.ready = Some(ready);
        Ok(at.saturating_duration_since(self.begun))
    }

    /// What the agent said when it was last waited for.
    pub fn ready(&self) -> Option<&Ready> {
        self.ready.as_ref()
    }

    /// Asks for this much RAM in all (boot RAM plus plugged).
    ///
    /// # Errors
    /// Less than boot RAM; the VMM refuses.
    pub fn request_total(&mut self, total_bytes: u64) -> Result<()> {
        let requested = total_bytes
            .checked_sub(self.boot_bytes)
            .context("less than boot RAM")?;
        let arguments =
            json!({"path": MEMORY_DEVICE, "property": "requested-size", "value": requested});
        self.qmp.execute("qom-set", arguments).map(drop)
    }

    /// RAM in all, as the VMM counts it.
    ///
    /// # Errors
    /// There is no virtio-mem device, or the VMM doesn't answer.
    pub fn total(&mut self) -> Result<u64> {
        let arguments = json!({"path": MEMORY_DEVICE, "property": "size"});
        let size = self.qmp.execute("qom-get", arguments)?;
        Ok(self.boot_bytes + size.as_u64().with_context(|| format!("size is {size}"))?)
    }

    /// Asks for this much RAM and waits until it is reached.
    ///
    /// # Errors
    /// Not reached in time: says how far it got.
    pub fn resize(&mut self, total_bytes: u64, timeout: Duration) -> Result<Duration> {
        let begun = Instant::now();
        self.request_total(total_bytes)?;
        self.wait_total(total_bytes, timeout)?;
        Ok(begun.elapsed())
    }

    /// Waits until RAM in all is this much.
    ///
    /// # Errors
    /// Not reached in time: says how far it got.
    pub fn wait_total(&mut self, total_bytes: u64, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let total = self.total()?;
            if total == total_bytes {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("RAM is {total} bytes after {timeout:?}, not {total_bytes}");
            }
            // Often enough to time a resize, seldom enough not to slow it down.
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The VMM's state as QMP names it, such as `running`.
    ///
    /// # Errors
    /// The VMM doesn't answer.
    pub fn status(&mut self) -> Result<String> {
        let status = self.qmp.execute("query-status", Value::Null)?;
        let text = status.get("status").and_then(Value::as_str);
        text.map(str::to_owned)
            .with_context(|| format!("query-status: {status}"))
    }

    /// Powers the guest off and waits for the VMM to end well.
    ///
    /// # Errors
    /// It doesn't end in time or not with success.
    pub fn power_off(mut self, timeout: Duration) -> Result<()> {
        self.guest.power_off()?;
        let status = self.wait_exit(timeout)?;
        ensure!(
            status.success(),
            "the VMM ended with {status}{}",
            self.log()
        );
        Ok(())
    }

    /// Waits for the VMM to end.
    ///
    /// # Errors
    /// Still running after `timeout`; one of its vCPUs was to close a file, which is no work of theirs.
    pub fn wait_exit(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let status = self.child.wait(timeout).with_context(|| self.log())?;
        let said = std::fs::read(&self.log).context("log of the VMM")?;
        let said = String::from_utf8_lossy(&said);
        let leaks = said.lines().filter(|line| line.ends_with(STAYS_OPEN));
        let leaks: Vec<&str> = leaks.collect();
        ensure!(leaks.is_empty(), "{}", leaks.join("\n"));
        Ok(status)
    }

    /// The end of what the VMM has said.
    pub fn log(&self) -> String {
        log_tail(&self.log)
    }
}

impl Drop for Vmm {
    /// A VMM that is given up says in its log where each of its threads was, and when KVM means to
    /// wake its guest: who reads of a guest that did not answer wants to know whose fault it was.
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let state = threads(self.child.pid()) + &apic_timers();
            let log = std::fs::File::options().append(true).open(&self.log);
            // Only a help, and there is nobody left to tell.
            let _ = log.and_then(|mut log| log.write_all(state.as_bytes()));
        }
    }
}

/// A line for each thread of a process: name, state, processor time in ticks, where it sleeps in
/// the kernel (proc(5)).
fn threads(pid: u32) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let mut lines = String::new();
    for task in tasks.into_iter().flatten().flatten() {
        let read = |file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let (stat, sleeps) = (read("stat"), read("wchan"));
        let Some((name, rest)) = stat.rsplit_once(") ") else {
            continue;
        };
        let name = name.split_once('(').map_or("", |(_, name)| name);
        let fields: Vec<&str> = rest.split(' ').collect();
        if let [state, .., user, system] = fields.get(..13).unwrap_or_default() {
            lines += &format!("thread {name}: {state}, {user} + {system} ticks, {sleeps}\n");
        }
    }
    lines
}

/// When the timers of KVM's local APICs run off: a line for each that is armed, if this kernel
/// lists its timers.
fn apic_timers() -> String {
    let list = std::fs::read_to_string("/proc/timer_list").unwrap_or_default();
    let mut lines = list.lines();
    let mut armed = String::new();
    while let Some(line) = lines.next() {
        if line.contains("apic_timer_fn") {
            let expires = lines.next().unwrap_or_default();
            armed += &format!("guest timer:{expires}\n");
        }
    }
    armed
}

/// The end of what a VMM has said into the file `log`.
pub fn log_tail(log: &Path) -> String {
    let text = std::fs::read(log)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let kept = lines
        .iter()
        .skip(lines.len().saturating_sub(LOG_TAIL_LINES));
    kept.fold(String::from("\n--- VMM ---"), |all, line| all + "\n" + line)
}

fn connect(
    path: &Path,
    child: &mut Contained,
    log: &Path,
    deadline: Instant,
) -> Result<UnixStream> {
    loop {
        if let Ok(stream) = UnixStream::connect(path) {
            return Ok(stream);
        }
        if let Some(status) = child.try_wait()? {
            bail!("the VMM ended at once with {status}{}", log_tail(log));
        }
        if Instant::now() >= deadline {
            bail!(
                "the VMM does not listen on {}{}",
                path.display(),
                log_tail(log)
            );
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(program: Program) -> Machine {
        let image = Image {
            version: "6.1".into(),
            kernel: "/k".into(),
            initrd: Some("/i".into()),
        };
        Machine {
            max_bytes: Some(4 << 30),
            ..Machine::new(program, image)
        }
    }

    fn arguments(machine: &Machine) -> Vec<String> {
        let command = machine.command(Path::new("/s"), Path::new("/q")).unwrap();
        command
            .get_args()
            .map(|argument| argument.to_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn ebbtide_gets_the_documented_options() {
        let mut machine = machine(Program::Ebbtide("/bin/ebbtide".into()));
        machine.disks.push(Disk {
            id: "d0".into(),
            path: "/disk".into(),
            readonly: true,
        });
        let line = arguments(&machine).join(" ");
        assert!(
            line.starts_with("run --kernel /k --initrd /i --cmdline console=ttyS0"),
            "{line}"
        );
        let rest = "--cpus 1 --memory size=512M,max=4096M --disk path=/disk,id=d0,readonly=on \
                    --serial unix:/s --qmp unix:/q";
        assert!(line.ends_with(rest), "{line}");
    }

    #[test]
    fn a_vmm_that_fails_says_why() {
        let script = tempfile::tempdir().unwrap();
        let path = script.path().join("vmm");
        std::fs::write(&path, "#!/bin/sh\necho no such kernel >&2\nexit 2\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&path, mode).unwrap();
        // A process that another test is just starting may still have it open, as it was here.
        while let Err(error) = Command::new(&path).output() {
            assert_eq!(error.kind(), std::io::ErrorKind::ExecutableFileBusy);
        }
        let error = Vmm::start(&machine(Program::Ebbtide(path)))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("exit status: 2") && error.contains("no such kernel"),
            "{error}"
        );
    }

    #[test]
    fn commas_are_refused() {
        assert!(text(Path::new("/a,b")).is_err());
    }
}
