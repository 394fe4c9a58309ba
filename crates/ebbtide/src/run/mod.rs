// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ebbtide run`: from the command line to a machine, and its life until it ends.

mod devices;
mod options;
mod parts;
mod signals;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use ebbtide_hypervisor::probe::Flavour;
use ebbtide_iothread::Local;
use ebbtide_machine::boot::BootSpec;
use ebbtide_machine::config::{MAX_CPUS, MachineConfig, MemoryDeviceConfig};
use ebbtide_machine::lifecycle::Ending;
use ebbtide_machine::{Built, ConfinementConfig, Launcher, Prepared, Seccomp};
use ebbtide_qmp::types::device::DeviceAdd;
use ebbtide_qmp::types::qom::ObjectAdd;
use ebbtide_qmp::{EventSink, Server, SocketSpec};
use serde_json::json;

use crate::launcher;
use options::OptionError;
use parts::{PartArgs, Parts};
use signals::Signals;

/// Exit code for a command line that can't be understood, as clap uses it.
const USAGE: u8 = 2;
/// How long answers to monitors may take to get out at the end.
const CLOSE_GRACE: Duration = Duration::from_secs(1);
/// Without it Debian's kernels leave plugged memory offline, and a grown guest sees nothing.
const ONLINE_PARAMETER: &str = "memhp_default_state";
const ONLINE_MOVABLE: &str = "memhp_default_state=online_movable";

/// Run a guest
#[derive(clap::Args)]
#[command(after_help = "\
Sizes are bytes, or numbers with K, M, G, T (powers of 1024). The VM ends with 0 when the guest
powers off, on quit, SIGTERM and Ctrl-C; with 1 on a failure; with 2 when the command line is wrong.

Examples:
  ebbtide run --kernel vmlinuz --initrd initrd.img --cmdline console=ttyS0
  ebbtide run --kernel vmlinuz --cmdline 'console=ttyS0 root=/dev/vda' --cpus 2 \\
      --memory size=1G,max=16G --disk path=debian.img --qmp unix:vm.qmp
  ebbtide run --kernel vmlinuz --memory 1G --serial off --qmp unix:vm.qmp \\
      --object memory-backend-ram,id=m0,size=8G \\
      --device virtio-mem-pci,id=vm0,memdev=m0,requested-size=1G")]
pub struct RunArgs {
    /// Kernel: a bzImage or an ELF vmlinux
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0")]
    cmdline: String,
    /// Number of vCPUs, 1 to 4
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u64,
    /// size=SIZE[,max=SIZE][,backend=anon|memfd|hugetlb|file][,path=FILE][,prefault=on][,slots=N]:
    /// RAM at boot, slots for DIMMs; max adds the virtio-mem device vmem0 with the rest, not reserved up front
    #[arg(long, value_name = "OPTIONS", default_value = "512M")]
    memory: String,
    /// path=FILE[,id=ID][,readonly=on][,serial=TEXT][,direct=on]: a raw disk image or block device
    #[arg(long = "disk", value_name = "OPTIONS")]
    disks: Vec<String>,
    /// stdio, file:PATH, unix:PATH (listens) or off: the guest's first serial port
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: String,
    /// unix:PATH: listen for QMP clients
    #[arg(long, value_name = "unix:PATH")]
    qmp: Vec<String>,
    #[command(flatten)]
    parts: PartArgs,
    /// What netdevs of type passt start, or off. With --qmp or such a netdev, a process that may start it, and nothing
    /// else, runs beside the machine
    #[arg(long, value_name = "PROGRAM", default_value = "passt")]
    passt: OsString,
    /// on, log or off: end the process when a thread makes a system call that it has no need for, log it, or let it be
    #[arg(long, value_name = "MODE", default_value = "on")]
    seccomp: SeccompMode,
    /// on or off: let only files be opened that lie in the directories of those named here, or below --allow
    #[arg(long, value_name = "SWITCH", default_value = "on")]
    landlock: Switch,
    /// A directory or file that monitors may have opened, too
    #[arg(long, value_name = "PATH")]
    allow: Vec<PathBuf>,
    /// End the VM when the guest resets
    #[arg(long)]
    no_reboot: bool,
    /// How long reset and quit wait for requests in flight
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = crate::seconds::from_zero)]
    drain_timeout: Duration,
}

#[derive(Clone, Copy, clap::ValueEnum)]
pub enum SeccompMode {
    On,
    Log,
    Off,
}

impl From<SeccompMode> for Seccomp {
    fn from(mode: SeccompMode) -> Seccomp {
        match mode {
            SeccompMode::On => Seccomp::On,
            SeccompMode::Log => Seccomp::Log,
            SeccompMode::Off => Seccomp::Off,
        }
    }
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Switch {
    On,
    Off,
}

/// Runs a guest to its end.
pub fn main(args: RunArgs) -> ExitCode {
    let passt = args.passt.clone();
    let config = match configure(args) {
        Ok(config) => config,
        Err(e) => {
            eprintln!("ebbtide run: {e}");
            return ExitCode::from(USAGE);
        }
    };
    if Flavour::detect(Path::new("/sys/module")) == Some(Flavour::Pvm) {
        tracing::warn!(
            "this machine's KVM is a PVM host, which emulates an ordinary kernel instruction by instruction: expect hours (see ebbtide doctor)"
        );
    }
    // Before anything is there that it could inherit.
    let launcher = match launcher::of(&config, &passt) {
        Ok(launcher) => launcher,
        Err(e) => {
            eprintln!("ebbtide run: the launcher of passt: {e}");
            return ExitCode::FAILURE;
        }
    };
    // Before the first thread: they inherit the mask.
    let signals = match Signals::block() {
        Ok(signals) => signals,
        Err(e) => {
            eprintln!("ebbtide run: signals: {e}");
            return ExitCode::FAILURE;
        }
    };
    let lived = ebbtide_iothread::run("control", |local| live(config, launcher, signals, local));
    match lived.map_err(anyhow::Error::from).and_then(|r| r) {
        Ok(ending) if ending.undrained.is_empty() => ExitCode::SUCCESS,
        Ok(ending) => {
            eprintln!(
                "ebbtide run: requests did not end in time: {}",
                ending.undrained.join(", ")
            );
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("ebbtide run: {}", one_line(&e));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, each said once: some errors name theirs themselves.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !line.contains(&cause) {
            line.push_str(": ");
            line.push_str(&cause);
        }
    }
    line
}

async fn live(
    config: MachineConfig,
    launcher: Option<Launcher>,
    signals: Signals,
    local: Local,
) -> anyhow::Result<Ending> {
    let sockets = config.qmp.clone();
    let events = EventSink::new(&local);
    // It may take long: gigabytes are populated, a file system does not answer.
    let unfinished = signals.end_process_meanwhile()?;
    let prepared = Prepared::new(config, launcher)?;
    unfinished.over();
    let Built {
        machine,
        requests,
        memory_events,
    } = prepared.build(&local).await?;
    let machine = Rc::new(machine);
    let table = ebbtide_machine::monitor::table(&machine);
    let server = Server::new(&local, Rc::new(table), events.clone());
    for path in sockets {
        server
            .listen(&SocketSpec::unix(path))
            .map_err(|e| anyhow::anyhow!("--qmp: {e}"))?;
    }
    let watch = local.spawn(signals.watch(local.clone(), machine.requests().clone()));
    let sizes = local.spawn(ebbtide_machine::report_sizes(memory_events, events.clone()));
    machine.start(&events).await?;
    let ending = machine.run(requests, &events).await;
    drop((watch, sizes));
    server.close(CLOSE_GRACE).await;
    Ok(ending)
}

fn configure(args: RunArgs) -> Result<MachineConfig, OptionError> {
    let (ram, auto) = devices::memory(&args.memory)?;
    let disks = (0..)
        .zip(&args.disks)
        .map(|(index, text)| devices::disk(text, index))
        .collect::<Result<_, _>>()?;
    let mut parts = Parts::parse(&args.parts)?;
    let memory_devices = memory_devices(&mut parts, auto)?;
    let qmp = args
        .qmp
        .iter()
        .map(|text| devices::qmp(text))
        .collect::<Result<_, _>>()?;
    let cpus = u8::try_from(args.cpus).map_err(|_| {
        OptionError::new(
            "command line",
            format!("cpus={}: 1 to {MAX_CPUS} are accepted", args.cpus),
        )
    })?;
    let config = MachineConfig {
        objects: parts.objects,
        chardevs: parts.chardevs,
        netdevs: parts.netdevs,
        block_nodes: parts.blockdevs,
        devices: parts.devices,
        boot: BootSpec {
            kernel: args.kernel,
            initrd: args.initrd,
            cmdline: command_line(
                args.cmdline,
                !memory_devices.is_empty() || ram.dimm_slots > 0,
            ),
        },
        cpus,
        ram,
        memory_devices,
        disks,
        serial: devices::serial(&args.serial)?,
        qmp,
        no_reboot: args.no_reboot,
        drain_timeout: args.drain_timeout,
        confinement: ConfinementConfig {
            seccomp: args.seccomp.into(),
            landlock: args.landlock == Switch::On,
            allow: args.allow,
        },
    };
    config
        .validate()
        .map_err(|e| OptionError::new("command line", e))?;
    Ok(config)
}

/// The virtio-mem devices: that of `--memory`, and those put together from `--object` and `--device`. All others are left
/// in `parts`.
fn memory_devices(
    parts: &mut Parts,
    auto: Option<MemoryDeviceConfig>,
) -> Result<Vec<MemoryDeviceConfig>, OptionError> {
    let mut configs: Vec<MemoryDeviceConfig> = auto.into_iter().collect();
    let is_memory = |device: &DeviceAdd| devices::MEMORY_DRIVERS.contains(&&*device.driver);
    let (memory, others): (Vec<_>, Vec<_>) = std::mem::take(&mut parts.devices)
        .into_iter()
        .partition(is_memory);
    for device in &others {
        ebbtide_machine::check_driver(&device.driver)
            .map_err(|reason| devices::unknown_driver(&device.driver, &reason))?;
    }
    parts.devices = others;
    let used = |object: &ObjectAdd| {
        let memdev =
            |device: &DeviceAdd| device.properties.get("memdev") == Some(&json!(object.id));
        memory.iter().any(memdev)
    };
    let (objects, others) = std::mem::take(&mut parts.objects)
        .into_iter()
        .partition::<Vec<_>, _>(used);
    parts.objects = others;
    let mut objects = objects
        .into_iter()
        .map(devices::object)
        .collect::<Result<Vec<_>, _>>()?;
    for device in memory {
        configs.push(devices::device(device, configs.len(), &mut objects)?);
    }
    configs.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(configs)
}

/// Adds what a growing guest needs, unless the user has decided it.
fn command_line(text: String, grows: bool) -> String {
    let decided = text
        .split_whitespace()
        .any(|word| word.split('=').next() == Some(ONLINE_PARAMETER));
    if !grows || decided {
        return text;
    }
    tracing::info!(
        "{ONLINE_MOVABLE} is added to the kernel's command line, so that it uses plugged memory"
    );
    let text = text.trim_end();
    if text.is_empty() {
        ONLINE_MOVABLE.to_owned()
    } else {
        format!("{text} {ONLINE_MOVABLE}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: RunArgs,
    }

    #[test]
    fn what_the_launcher_may_start() {
        let programs = |words: &[&str]| {
            let line = ["run", "--kernel", "k"].iter().chain(words);
            let args = Cli::try_parse_from(line).unwrap().args;
            let passt = args.passt.clone();
            launcher::programs(&configure(args).unwrap(), &passt)
        };
        let (qmp, card) = (["--qmp", "unix:q"], ["--netdev", "passt,id=n,path=/a"]);
        assert_eq!(
            programs(&[]),
            [""; 0].map(PathBuf::from),
            "nobody could ask"
        );
        assert_eq!(programs(&qmp), ["passt"].map(PathBuf::from));
        assert_eq!(programs(&card), ["passt", "/a"].map(PathBuf::from));
        let json = r#"{"type": "passt", "id": "m", "path": "/b"}"#;
        let several = [&card[..], &["--netdev", json, "--passt", "/b"]].concat();
        assert_eq!(programs(&several), ["/b", "/a"].map(PathBuf::from));
        let tap = ["--netdev", "tap,id=n,ifname=t"];
        assert!(programs(&tap).is_empty());
        assert!(programs(&[&qmp[..], &["--passt", "off"]].concat()).is_empty());
    }

    #[test]
    fn a_cause_is_said_once() {
        let refused = || std::io::Error::other("not permitted");
        let named = anyhow::Error::from(refused()).context("io_uring (not permitted)");
        assert_eq!(one_line(&named), "io_uring (not permitted)");
        let plain = anyhow::Error::from(refused()).context("io_uring");
        assert_eq!(one_line(&plain), "io_uring: not permitted");
    }

    #[test]
    fn online_parameter_is_added_unless_decided() {
        let plain = command_line("quiet".into(), true);
        assert_eq!(plain, "quiet memhp_default_state=online_movable");
        assert_eq!(command_line("quiet".into(), false), "quiet");
        let decided = "memhp_default_state=offline quiet";
        assert_eq!(command_line(decided.into(), true), decided);
        assert_eq!(command_line(String::new(), true), ONLINE_MOVABLE);
    }
}
