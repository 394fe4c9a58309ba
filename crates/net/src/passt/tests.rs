// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs in passt's place, and passt, by way of a launcher.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::process::Pid;

use super::*;
use crate::tests::{LIMIT, packet, receive, wait};
use crate::{MacAddress, Netdev};

/// How often something is tried that a busy host may spoil.
const TRIES: u32 = 8;

/// What is run in passt's place: a script, and a launcher for it.
struct Ground {
    launcher: Launcher,
    program: PathBuf,
    directory: tempfile::TempDir,
}

impl Ground {
    /// The script finds a file to write its process's number to in `$pid`.
    fn new(script: &str) -> Ground {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program.sh");
        let pid = directory.path().join("pid");
        let first = "[ \"$1\" = probe ] && exit 0";
        let script = format!("#!/bin/sh\n{first}\npid={}\n{script}\n", pid.display());
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        // A process that another test is just starting may still have it open, as it was here.
        while let Err(error) = Command::new(&program).arg("probe").status() {
            assert_eq!(error.kind(), ErrorKind::ExecutableFileBusy);
        }
        Ground {
            launcher: Launcher::thread(vec![program.clone()]).unwrap(),
            program,
            directory,
        }
    }

    fn start(&self, words: &[&str]) -> Result<Arc<Netdev>, NetError> {
        let spec = PasstSpec {
            program: None,
            arguments: words.iter().map(|word| (*word).to_owned()).collect(),
        };
        Netdev::passt("net0", &self.launcher, &spec)
    }

    /// Why it is not started. What does not end within a second counts as started, as it may on a busy host.
    fn refused(&self, words: &[&str]) -> String {
        let refused = (0..TRIES).find_map(|_| self.start(words).err());
        refused.expect("it is started each time").to_string()
    }

    /// The number of the script's process.
    fn pid(&self) -> u32 {
        let path = self.directory.path().join("pid");
        let written = wait(|| {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            text.trim()
                .parse()
                .map_err(|_| ErrorKind::WouldBlock.into())
        });
        written.unwrap()
    }

    fn has_run(&self) -> bool {
        self.directory.path().join("pid").exists()
    }
}

fn runs(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

const ECHO: &str = "echo $$ > $pid\n[ \"$*\" = '--foreground --fd 0 --mtu=1500 --ipv4-only' ] || exit 1\nexec cat 1>&0";

#[test]
fn a_program_gets_its_arguments_and_our_socket_and_ends_with_it() {
    let ground = Ground::new(ECHO);
    let netdev = ground.start(&["-m", "1500", "-4"]).unwrap();
    let net = netdev.claim("card0").unwrap();
    net.send(&packet(b"there and back")).unwrap();
    assert_eq!(wait(|| receive(&*net)).unwrap(), b"there and back");
    let pid = ground.pid();
    assert!(runs(pid));
    drop((net, netdev));
    assert!(!runs(pid), "it is reaped, too");
    // Another by the same launcher.
    let netdev = ground.start(&["--mtu=1500", "--ipv4-only"]).unwrap();
    let net = netdev.claim("card0").unwrap();
    net.send(&packet(b"again")).unwrap();
    assert_eq!(wait(|| receive(&*net)).unwrap(), b"again");
}

#[test]
fn a_program_gets_nothing_of_the_environment_but_the_search_path() {
    assert!(std::env::var_os("PATH").is_some() && std::env::vars_os().count() > 1);
    let ground = Ground::new("cat /proc/$$/environ > $pid.environment; exec sleep 1000");
    let _netdev = ground.start(&[]).unwrap();
    let path = ground.directory.path().join("pid.environment");
    // Written by one call.
    let written = wait(|| match std::fs::read_to_string(&path) {
        Ok(text) if !text.is_empty() => Ok(text),
        _ => Err(ErrorKind::WouldBlock.into()),
    });
    let environment = written.unwrap();
    let names: Vec<&str> = environment
        .split_terminator('\0')
        .map(|entry| entry.split('=').next().unwrap_or_default())
        .collect();
    assert_eq!(names, ["PATH"]);
}

#[test]
fn what_can_not_be_started_is_named_with_the_reason() {
    let missing = Launcher::thread(vec!["/nowhere/passt".into()]).unwrap();
    let error = Netdev::passt("net0", &missing, &PasstSpec::default()).unwrap_err();
    let said = error.to_string();
    assert!(matches!(error, NetError::Program { .. }), "{said}");
    assert!(
        said.contains("/nowhere/passt") && said.contains("No such file"),
        "{said}"
    );

    let ending = Ground::new("echo 'one thing' >&2; echo 'no route to anywhere' >&2; exit 3");
    let said = ending.refused(&[]);
    assert!(
        said.contains("program.sh: it ended with exit code 3: no route to anywhere"),
        "{said}"
    );
    let silent = Ground::new("kill -9 $$");
    let said = silent.refused(&[]);
    assert!(said.ends_with("it was ended by signal 9"), "{said}");
}

#[test]
fn nothing_else_is_executed_whoever_asks() {
    let ground = Ground::new("echo $$ > $pid; exec sleep 1000");
    let other = PasstSpec {
        program: Some("/bin/sh".into()),
        ..PasstSpec::default()
    };
    let said = Netdev::passt("net0", &ground.launcher, &other)
        .unwrap_err()
        .to_string();
    assert!(said.contains("/bin/sh"), "{said}");
    let said = ground.refused(&["--pcap", "/tmp/x"]);
    assert!(said.contains("--pcap"), "{said}");
    // Past what this end checks.
    let ask = |program: &Path, words: &[&str]| {
        let (network, _ours) = wire::pair().unwrap();
        let (lifeline, theirs) = wire::pair().unwrap();
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let control = ground.launcher.control.as_fd();
        wire::ask(control, program, &words, network.as_fd(), theirs.as_fd()).unwrap();
        drop(theirs);
        answer(lifeline.as_fd(), LIMIT).unwrap()
    };
    for (program, words) in [
        (Path::new("/bin/sh"), &["-4"][..]),
        (&ground.program, &["--pcap=/tmp/x"]),
        (&ground.program, &["/bin/sh"]),
        (Path::new(""), &[]),
    ] {
        let answer = ask(program, words);
        assert!(
            matches!(answer, Reply::Failed(_)),
            "{program:?} {words:?}: {answer:?}"
        );
    }
    assert!(!ground.has_run());
    // What is asked for without a way to be told is closed.
    rustix::net::send(
        &ground.launcher.control,
        b"x",
        rustix::net::SendFlags::empty(),
    )
    .unwrap();
    assert!(matches!(ask(&ground.program, &["-4"]), Reply::Started(_)));
}

#[test]
fn a_program_that_dies_says_how_and_its_card_goes_all_the_same() {
    let ground = Ground::new("echo $$ > $pid; echo 'last words' >&2; exec sleep 1000 2>/dev/null");
    let netdev = ground.start(&[]).unwrap();
    let net = netdev.claim("card0").unwrap();
    let pid = ground.pid();
    assert_eq!(receive(&*net).unwrap_err().kind(), ErrorKind::WouldBlock);
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let error = wait(|| receive(&*net)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    // Said soon, which on a busy host may be a little later.
    let runs = "it has closed its connection and runs";
    let mut said = (0..2 * LIMIT.as_secs()).map(|_| netdev.end_of_peer().unwrap());
    let said = said.find(|said| said != runs);
    assert_eq!(said.unwrap(), "it was ended by signal 9: last words");
    drop(net);
    netdev.remove().unwrap();
    drop(netdev);
    drop(ground);
}

#[test]
fn programs_end_with_their_launcher() {
    let ground = Ground::new("echo $$ > $pid; exec sleep 1000");
    let netdev = ground.start(&[]).unwrap();
    let pid = ground.pid();
    assert!(runs(pid));
    let Ground { launcher, .. } = ground;
    drop(launcher);
    assert!(!runs(pid));
    assert_eq!(netdev.end_of_peer().unwrap(), "its launcher has ended");
    drop(netdev);
}

#[test]
fn a_program_that_talks_a_lot_is_not_held_up() {
    let talk = "i=0; while [ $i -lt 3000 ]; do echo '0123456789012345678901234567890123456789' >&2; i=$((i+1)); done";
    let ground = Ground::new(&format!("echo $$ > $pid; {talk}; exec cat 1>&0"));
    let netdev = ground.start(&[]).unwrap();
    let net = netdev.claim("card0").unwrap();
    net.send(&packet(b"heard")).unwrap();
    assert_eq!(wait(|| receive(&*net)).unwrap(), b"heard");
}

#[test]
fn there_is_a_most_of_programs() {
    let ground = Ground::new("exec sleep 1000");
    let mut lifelines = Vec::new();
    let last = loop {
        let (network, _ours) = wire::pair().unwrap();
        let (lifeline, theirs) = wire::pair().unwrap();
        let control = ground.launcher.control.as_fd();
        wire::ask(
            control,
            &ground.program,
            &[],
            network.as_fd(),
            theirs.as_fd(),
        )
        .unwrap();
        match answer(lifeline.as_fd(), LIMIT).unwrap() {
            Reply::Started(_) => lifelines.push(lifeline),
            other => break other,
        }
        assert!(lifelines.len() < 1000);
    };
    let Reply::Failed(why) = last else {
        panic!("{last:?}");
    };
    assert!(why.contains("64") && lifelines.len() == 64, "{why}");
    // With one of them less there is room for one.
    let cut = lifelines.pop().unwrap();
    shutdown(&cut, Shutdown::Write).unwrap();
    gone(cut.as_fd(), LIMIT).unwrap();
    assert!(ground.start(&[]).is_ok());
}

/// An ARP question "who has 10.0.0.1".
fn arp() -> Vec<u8> {
    let me = MacAddress::of_card(0).0;
    let mut frame = [&MacAddress::BROADCAST.0[..], &me, &[0x08, 0x06]].concat();
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend([&me[..], &[10, 0, 0, 2], &[0; 6], &[10, 0, 0, 1]].concat());
    frame
}

#[test]
fn passt_answers() {
    if Command::new("passt").arg("--version").output().is_err() {
        eprintln!("SKIPPED: passt_answers: there is no program passt on this host");
        return;
    }
    let launcher = Launcher::thread(vec!["passt".into()]).unwrap();
    let netdev = match Netdev::passt("net0", &launcher, &PasstSpec::default()) {
        Ok(netdev) => netdev,
        Err(error) => {
            eprintln!("SKIPPED: passt_answers: passt does not run here: {error}");
            return;
        }
    };
    let net = netdev.claim("card0").unwrap();
    net.send(&packet(&arp())).unwrap();
    let answer = wait(|| receive(&*net)).unwrap();
    assert_eq!(answer[..6], MacAddress::of_card(0).0);
    assert_eq!(answer[12..14], [0x08, 0x06]);
    assert_eq!(answer[20..22], [0, 2], "an ARP reply");
    drop((net, netdev));
    let bad = PasstSpec {
        arguments: vec!["--interface=nosuch".to_owned()],
        ..PasstSpec::default()
    };
    let refused = (0..TRIES).find_map(|_| Netdev::passt("net0", &launcher, &bad).err());
    let error = refused.expect("it is started each time").to_string();
    assert!(
        error.contains("passt: it ended with exit code 1: ") && error.contains("nosuch"),
        "{error}"
    );
}

/// What this program is to be when it is started again: `vmm` or `launcher`.
const ROLE: &str = "EBBTIDE_TEST_PASST_ROLE";
/// The program of both.
const PROGRAM: &str = "EBBTIDE_TEST_PASST_PROGRAM";

fn again(role: &str, program: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "passt::tests::nothing_outlives_a_killed_vmm"])
        .env(ROLE, role)
        .env(PROGRAM, program)
        .stdout(Stdio::null());
    command
}

/// Whoever has a launcher is killed: program and launcher go, though the program itself would stay.
#[test]
fn nothing_outlives_a_killed_vmm() {
    let programs = || vec![PathBuf::from(std::env::var_os(PROGRAM).unwrap())];
    match std::env::var(ROLE).as_deref() {
        Ok("launcher") => {
            let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
            return serve(socket, &programs()).unwrap();
        }
        Ok(_) => {
            let mut command = again("launcher", &programs()[0]);
            let launcher = Launcher::start(&mut command, programs()).unwrap();
            let _netdev = Netdev::passt("net0", &launcher, &PasstSpec::default()).unwrap();
            // One who wants to be outlived gives its end of the launcher's socket away, to the launcher itself.
            let control = launcher.control.as_fd();
            let (network, _ours) = wire::pair().unwrap();
            wire::ask(control, &programs()[0], &[], network.as_fd(), control).unwrap();
            loop {
                std::thread::sleep(LIMIT);
            }
        }
        Err(_) => {}
    }
    let script = "trap '' TERM INT HUP; echo $PPID > $pid.launcher; echo $$ >> $pid.all; echo $$ > $pid; exec sleep 1000";
    let ground = Ground::new(script);
    let mut vmm = again("vmm", &ground.program).spawn().unwrap();
    let pid = ground.pid();
    let all = ground.directory.path().join("pid.all");
    let both = wait(|| {
        let all = std::fs::read_to_string(&all).unwrap_or_default();
        let pids: Vec<u32> = all.lines().filter_map(|line| line.parse().ok()).collect();
        match pids.len() {
            2 => Ok(pids),
            _ => Err(ErrorKind::WouldBlock.into()),
        }
    });
    let both = both.unwrap();
    let launcher = ground.directory.path().join("pid.launcher");
    let launcher: u32 = std::fs::read_to_string(launcher)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(runs(pid) && runs(launcher) && launcher != vmm.id());
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    // Orphans, which are reaped by somebody else.
    let is_over = |pid| match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.contains(") Z "),
        Err(_) => true,
    };
    let all_over = || both.iter().chain([&launcher]).all(|pid| is_over(*pid));
    let over = wait(|| match all_over() {
        true => Ok(()),
        false => Err(ErrorKind::WouldBlock.into()),
    });
    assert!(over.is_ok(), "program or launcher is left");
}
