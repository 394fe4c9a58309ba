// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PID 1 of the capsule: gives one command of the host a machine with KVM.
//!
//! The host's root directory, read over 9p, becomes the root; fresh file
//! systems cover what must be writable. What the command writes goes through
//! pipes to virtio-serial ports, so that kernel messages never mix in.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use ebbtide_agent::boot;
use ebbtide_agent::capsule_protocol::{
    CAPSULE_VARIABLE, CONTROL_PORT, COVERED, Job, Notice, ROOT_TAG, STDERR_PORT, STDOUT_PORT,
};
use rustix::mount::{MountFlags, mount_bind, mount_move, mount_remount};
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions, setrlimit};
use rustix::system::RebootCommand;

const HOST: &str = "/host";
const ALIVE_EVERY: Duration = Duration::from_secs(5);
const PORT_TIMEOUT: Duration = Duration::from_secs(20);
const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
const CLOCK_TIMEOUT: Duration = Duration::from_secs(10);
const NINE_P: &str = "trans=virtio,version=9p2000.L,msize=512000";

fn main() {
    let mut problems = boot::mount_kernel_file_systems();
    problems.extend(boot::load_modules(|name| {
        if name.starts_with("kvm") {
            await_clock();
        }
    }));
    for problem in &problems {
        eprintln!("capsule: {problem}");
    }
    match open_port(CONTROL_PORT) {
        Ok(file) => {
            let control = Arc::new(Control {
                file,
                turn: Mutex::new(()),
            });
            let last = run(&control).unwrap_or_else(|error| Notice::Failed {
                error: format!("{error:#}"),
            });
            control.send(&last);
        }
        Err(error) => eprintln!("capsule: {error:#}"),
    }
    rustix::fs::sync();
    let error = rustix::system::reboot(RebootCommand::PowerOff);
    eprintln!("capsule: power off: {error:?}");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// KVM must not be loaded before the kernel has measured its clock for the second time.
///
/// KVM keeps the frequency it finds as the one that guests get. Where the processor can't scale a
/// guest's clock, as here, and the later value turns out lower by more than 250 ppm, Linux 6.1
/// takes a guest's clock to stand at zero ("user requested TSC rate below hardware speed"), and
/// its timers run off as late as this machine is old: guests that sleep never wake.
fn await_clock() {
    let deadline = Instant::now() + CLOCK_TIMEOUT;
    let first = || fs::read_to_string(CLOCK).is_ok_and(|clock| clock.trim() == "tsc-early");
    while first() {
        if Instant::now() > deadline {
            eprintln!("capsule: the clock has not been measured after {CLOCK_TIMEOUT:?}");
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

struct Control {
    file: File,
    /// One notice at a time.
    turn: Mutex<()>,
}

impl Control {
    fn send(&self, notice: &Notice) {
        let line = serde_json::to_string(notice).unwrap_or_default() + "\n";
        let _turn = self.turn.lock();
        if let Err(error) = (&self.file).write_all(line.as_bytes()) {
            eprintln!("capsule: control port: {error}");
        }
    }
}

fn run(control: &Arc<Control>) -> Result<Notice> {
    control.send(&Notice::Up {
        uptime_ms: boot::uptime_ms(),
    });
    let (stdout, stderr) = (open_port(STDOUT_PORT)?, open_port(STDERR_PORT)?);
    let job = read_job(&control.file)?;
    set_clock(job.clock_ms);
    enter_host_root(&job)?;
    prepare_kernel();
    control.send(&Notice::Started {
        uptime_ms: boot::uptime_ms(),
        kvm: Path::new("/dev/kvm").exists(),
    });
    report_life(control);
    let status = execute(&job, stdout, stderr)?;
    for share in &job.shares {
        // Writes back what the share still holds in memory.
        let _ = rustix::mount::unmount(share.path.as_str(), rustix::mount::UnmountFlags::empty());
    }
    Ok(Notice::Exit {
        code: status.code(),
        signal: status.signal(),
    })
}

/// So that the lab can tell a capsule that works from one that stands still.
fn report_life(control: &Arc<Control>) {
    let control = Arc::clone(control);
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(ALIVE_EVERY);
            control.send(&Notice::Alive);
        }
    });
}

/// The device behind a virtio-serial port of this name.
fn open_port(name: &str) -> Result<File> {
    let deadline = Instant::now() + PORT_TIMEOUT;
    loop {
        if let Some(device) = find_port(name) {
            let open = OpenOptions::new().read(true).write(true).open(&device);
            return open.with_context(|| format!("open {}", device.display()));
        }
        if Instant::now() > deadline {
            bail!("no virtio-serial port is named {name}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn find_port(name: &str) -> Option<PathBuf> {
    fs::read_dir("/sys/class/virtio-ports")
        .ok()?
        .flatten()
        .find_map(|entry| {
            let found = fs::read_to_string(entry.path().join("name")).ok()?;
            let device = Path::new("/dev").join(entry.file_name());
            (found.trim() == name && device.exists()).then_some(device)
        })
}

fn read_job(control: &File) -> Result<Job> {
    let mut line = String::new();
    BufReader::new(control)
        .read_line(&mut line)
        .context("read the job")?;
    serde_json::from_str(&line).context("understand the job")
}

fn set_clock(clock_ms: u64) {
    let time = rustix::time::Timespec {
        tv_sec: (clock_ms / 1000) as i64,
        tv_nsec: ((clock_ms % 1000) * 1_000_000) as _,
    };
    if let Err(error) = rustix::time::clock_settime(rustix::time::ClockId::Realtime, time) {
        eprintln!("capsule: set the clock: {error}");
    }
}

/// Makes the host's root the root, with fresh file systems where needed.
fn enter_host_root(job: &Job) -> Result<()> {
    let options = format!("{NINE_P},cache=loose");
    boot::mount_at("9p", ROOT_TAG, HOST, MountFlags::RDONLY, &options)?;
    // A second view of the covered directories, to take the visible ones from.
    let plain = PathBuf::from("/plain");
    fs::create_dir_all(&plain).context("create /plain")?;
    mount_bind(HOST, &plain).context("bind the host's root")?;

    for directory in COVERED.iter().map(|path| resolve(path)) {
        if directory.is_dir() {
            cover(&directory, job.tmp_bytes)?;
        }
    }
    for path in &job.visible {
        uncover(&plain, path)?;
    }
    rustix::mount::unmount(&plain, rustix::mount::UnmountFlags::DETACH)
        .context("unmount /plain")?;
    for share in &job.shares {
        let options = format!("{NINE_P},cache=mmap");
        boot::mount_at(
            "9p",
            &share.tag,
            &format!("{HOST}{}", share.path),
            MountFlags::empty(),
            &options,
        )?;
    }
    for name in ["proc", "sys", "dev"] {
        let target = format!("{HOST}/{name}");
        mount_move(format!("/{name}"), &target).with_context(|| format!("move /{name}"))?;
    }
    std::env::set_current_dir(HOST).context("enter the host's root")?;
    mount_move(".", "/").context("make the host's root the root")?;
    rustix::process::chroot(".").context("chroot")?;
    std::env::set_current_dir("/").context("enter /")?;
    mount_device_file_systems()
}

/// A directory of the host as seen below [`HOST`]; a link (such as /var/run)
/// would lead out of it.
fn resolve(path: &str) -> PathBuf {
    let inside = PathBuf::from(format!("{HOST}{path}"));
    match fs::read_link(&inside) {
        Ok(target) if target.is_absolute() => {
            PathBuf::from(HOST).join(target.strip_prefix("/").unwrap_or(&target))
        }
        _ => inside,
    }
}

fn cover(directory: &Path, limit_bytes: u64) -> Result<()> {
    let target = directory.to_str().context("path is not UTF-8")?;
    boot::mount_at(
        "tmpfs",
        "capsule",
        target,
        MountFlags::NOSUID,
        &format!("mode=1777,size={limit_bytes}"),
    )
}

/// Shows a directory below a covered one again, read-only.
fn uncover(plain: &Path, path: &str) -> Result<()> {
    let relative = path.trim_start_matches('/');
    let (source, target) = (plain.join(relative), Path::new(HOST).join(relative));
    if source.is_dir() {
        fs::create_dir_all(&target).with_context(|| format!("create {path}"))?;
    } else {
        fs::create_dir_all(target.parent().context("no parent")?)
            .with_context(|| format!("create {path}"))?;
        File::create(&target).with_context(|| format!("create {path}"))?;
    }
    mount_bind(&source, &target).with_context(|| format!("show {path}"))?;
    let flags = MountFlags::RDONLY | MountFlags::BIND;
    mount_remount(&target, flags, "").with_context(|| format!("make {path} read-only"))
}

fn mount_device_file_systems() -> Result<()> {
    let plain = MountFlags::NOSUID | MountFlags::NODEV;
    boot::mount_at(
        "devpts",
        "devpts",
        "/dev/pts",
        MountFlags::NOSUID,
        "newinstance,ptmxmode=0666,mode=0620",
    )?;
    boot::mount_at("tmpfs", "shm", "/dev/shm", plain, "mode=1777")?;
    boot::mount_at("cgroup2", "cgroup2", "/sys/fs/cgroup", plain, "")?;
    for (link, target) in [
        ("fd", "self/fd"),
        ("stdin", "self/fd/0"),
        ("stdout", "self/fd/1"),
        ("stderr", "self/fd/2"),
    ] {
        let _ = std::os::unix::fs::symlink(format!("/proc/{target}"), format!("/dev/{link}"));
    }
    Ok(())
}

/// Settings that make memory tests fast, and what a machine has by itself.
/// None is worth failing for; what fails is in the console log.
fn prepare_kernel() {
    for (path, value) in [
        ("/sys/kernel/mm/transparent_hugepage/enabled", "always"),
        (
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
            "always",
        ),
        ("/proc/sys/kernel/hostname", "capsule"),
    ] {
        if let Err(error) = fs::write(path, value) {
            eprintln!("capsule: write {value} to {path}: {error}");
        }
    }
    // The kernel's own limit for open files is meant for PID 1 alone.
    let files = Rlimit {
        current: Some(1 << 16),
        maximum: Some(1 << 20),
    };
    if let Err(error) = setrlimit(Resource::Nofile, files) {
        eprintln!("capsule: limit of open files: {error}");
    }
    if let Err(error) = raise_loopback() {
        eprintln!("capsule: loopback: {error}");
    }
}

fn raise_loopback() -> std::io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: ifreq is plain data for which all zeros is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
    // SAFETY: the socket is open, and SIOCSIFFLAGS reads one ifreq, which lives through the call.
    if unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS as _, &raw const request) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

fn execute(job: &Job, stdout: File, stderr: File) -> Result<ExitStatus> {
    let (program, arguments) = job.argv.split_first().context("the command is empty")?;
    let (out_reader, out_writer) = std::io::pipe().context("pipe")?;
    let (err_reader, err_writer) = std::io::pipe().context("pipe")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(job.env.iter().cloned())
        .env(CAPSULE_VARIABLE, "1");
    command
        .current_dir(&job.cwd)
        .stdin(Stdio::null())
        .stdout(out_writer)
        .stderr(err_writer);
    // Its own group, as a shell would do it.
    command.process_group(0);
    let child = command
        .spawn()
        .map_err(|error| not_started(program, &job.cwd, error))?;
    drop(command);
    let pumps = [pump(out_reader, stdout), pump(err_reader, stderr)];
    let pid = Pid::from_raw(child.id() as i32).context("pid of the command")?;
    let status = wait_for(pid)?;
    // Whatever it left behind would keep the pipes open.
    let _ = rustix::process::kill_process_group(pid, Signal::KILL);
    kill_everything();
    for pump in pumps {
        pump.join()
            .map_err(|_| anyhow!("output was lost"))?
            .context("hand over output")?;
    }
    Ok(status)
}

fn not_started(program: &str, cwd: &str, error: std::io::Error) -> anyhow::Error {
    if !Path::new(cwd).is_dir() {
        return anyhow!("working directory {cwd} is not visible in the capsule");
    }
    anyhow!("start {program}: {error}")
}

fn pump(mut from: std::io::PipeReader, mut to: File) -> JoinHandle<std::io::Result<()>> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 32 << 10];
        loop {
            let length = std::io::Read::read(&mut from, &mut buffer)?;
            if length == 0 {
                return Ok(());
            }
            to.write_all(buffer.get(..length).unwrap_or_default())?;
        }
    })
}

/// Waits for one process and reaps all others that end meanwhile.
fn wait_for(wanted: Pid) -> Result<ExitStatus> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == wanted => {
                return Ok(ExitStatus::from_raw(status.as_raw()));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for the command"),
        }
    }
}

fn kill_everything() {
    // SAFETY: kill takes numbers only; -1 means everything but PID 1, which is this program.
    unsafe { libc::kill(-1, libc::SIGKILL) };
}
