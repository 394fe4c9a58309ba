// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The capsule: a machine with a real KVM where there is none.
//!
//! QEMU emulates an AMD processor with nested paging (TCG), a Debian kernel in
//! it loads kvm-amd, and the host's root directory, read over 9p, is its root.
//! So every program of the host runs in it under the same path, beside a
//! `/dev/kvm` that works. It runs one command and ends:
//!
//! - `/tmp`, `/run`, `/var/tmp` and `/dev/shm` are fresh and writable; what the
//!   command line or the environment names below them stays visible, read-only;
//! - everything else is read-only, but for the shares, which are writable and
//!   have the same path inside and outside;
//! - standard output and error come through live, and nothing else does: kernel
//!   messages go to the console log.

mod core;
mod host;
mod session;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ebbtide_agent::capsule_protocol::{CAPSULE_VARIABLE, COVERED, Job, Share};

use crate::initramfs::Initramfs;
use crate::kernel::Kernel;
use crate::modules::Modules;
use crate::{agent, packages, places};

/// Modules of the capsule's kernel; each brings what it depends on.
const MODULES: [&str; 6] = [
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "kvm-amd",
    "tun",
];
/// Variables that name a directory for temporary files. The host's would be
/// read-only inside; without them programs take /tmp.
const TEMPORARY: [&str; 4] = ["TMPDIR", "TMP", "TEMP", "TEMPDIR"];

/// How a capsule is made.
#[derive(Clone, Debug)]
pub struct Capsule {
    /// RAM in MiB. Not taken from the host before it is used.
    pub memory_mib: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// QEMU's `-cpu`.
    pub processor: String,
    /// Host directories that the command may write to, made if missing.
    pub shares: Vec<PathBuf>,
    /// Paths below `/tmp`, `/run` or `/var/tmp` that the command must see,
    /// besides those its command line, environment and directory name.
    pub visible: Vec<PathBuf>,
    /// Limit for the time until the command starts.
    pub boot_timeout: Duration,
    /// Limit for the whole run.
    pub timeout: Option<Duration>,
    /// Where the kernel's messages go; by default a file that is deleted.
    pub console_log: Option<PathBuf>,
}

impl Default for Capsule {
    fn default() -> Capsule {
        Capsule {
            memory_mib: 10_000,
            cpus: 2,
            processor: host::PROCESSOR.to_owned(),
            shares: Vec::new(),
            visible: Vec::new(),
            boot_timeout: Duration::from_secs(120),
            timeout: None,
            console_log: None,
        }
    }
}

/// What to run in a capsule.
#[derive(Clone, Debug)]
pub struct Invocation {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: PathBuf,
}

impl Invocation {
    /// A command with this process's environment and directory.
    ///
    /// # Errors
    /// There is no working directory.
    pub fn here(argv: impl IntoIterator<Item = impl Into<String>>) -> Result<Invocation> {
        Ok(Invocation {
            argv: argv.into_iter().map(Into::into).collect(),
            env: std::env::vars_os()
                .filter_map(|(name, value)| {
                    Some((name.into_string().ok()?, value.into_string().ok()?))
                })
                .collect(),
            cwd: std::env::current_dir().context("working directory")?,
        })
    }
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// From the start of QEMU to the start of the command.
    pub boot: Duration,
    /// From the start of QEMU to the command's end.
    pub total: Duration,
}

impl Outcome {
    /// What a shell would make of it: 128 + N for signal N.
    pub fn shell_code(&self) -> i32 {
        self.code
            .or(self.signal.map(|signal| 128 + signal))
            .unwrap_or(1)
    }
}

/// A signal ended the capsule from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("interrupted by signal {signal}")]
pub struct Interrupted {
    /// SIGINT or SIGTERM.
    pub signal: i32,
}

/// Whether this process runs in a capsule.
pub fn is_inside() -> bool {
    std::env::var_os(CAPSULE_VARIABLE).is_some()
}

impl Capsule {
    /// Runs one command and waits for its end. SIGINT and SIGTERM of this
    /// thread end the capsule meanwhile. Nothing is left running, whatever
    /// happens.
    ///
    /// # Errors
    /// Something needed is missing; the capsule did not come up or went down
    /// (with the end of its console log); a limit was passed; [`Interrupted`].
    pub fn run(
        &self,
        invocation: &Invocation,
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
    ) -> Result<Outcome> {
        if is_inside() {
            bail!(
                "this runs in a capsule already, where the processor can't be emulated once more in useful time"
            );
        }
        packages::ensure_packages(&["qemu-system-x86"])?;
        let kernel = Kernel::full()?;
        let files = host::Files::create(&build_initrd(&kernel)?, self.console_log.as_deref())?;
        let job = self.job(invocation)?;
        let ports = host::Ports::open()?;
        let mut command = host::command(self, &kernel, &files, &job.shares, &ports)?;
        command.stderr(files.log.try_clone().context("QEMU's log")?);
        let core = core::Core::take()?;
        session::Session::start(&mut command, ports, files, core)?.run(self, &job, stdout, stderr)
    }

    fn job(&self, invocation: &Invocation) -> Result<Job> {
        let mut shares = Vec::new();
        for (index, path) in self.shares.iter().enumerate() {
            std::fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
            let path = path
                .canonicalize()
                .with_context(|| format!("share {}", path.display()))?;
            let path = path
                .into_os_string()
                .into_string()
                .ok()
                .context("the path of a share is not UTF-8")?;
            shares.push(Share {
                tag: format!("share{index}"),
                path,
            });
        }
        let kept = |(name, _): &&(String, String)| !TEMPORARY.contains(&name.as_str());
        let env: Vec<_> = invocation.env.iter().filter(kept).cloned().collect();
        let cwd = invocation
            .cwd
            .to_str()
            .context("the working directory is not UTF-8")?
            .to_owned();
        let mut named: Vec<PathBuf> = self.visible.clone();
        named.extend(shares.iter().map(|share| PathBuf::from(&share.path)));
        named.push(invocation.cwd.clone());
        named.push(places::workspace());
        named.extend(places::target_dir().into_iter().chain(places::cache_dir()));
        named.extend(std::env::current_exe());
        let texts = invocation
            .argv
            .iter()
            .chain(env.iter().map(|(_, value)| value));
        named.extend(texts.flat_map(|text| paths_in(text)));
        Ok(Job {
            argv: invocation.argv.clone(),
            env,
            cwd,
            visible: below_covered(&named, &COVERED).into_iter().collect(),
            shares,
            clock_ms: 0,
            tmp_bytes: (self.memory_mib << 20) / 2,
        })
    }
}

fn build_initrd(kernel: &Kernel) -> Result<Vec<u8>> {
    let modules = Modules::open(&kernel.modules)?.resolve(&MODULES)?;
    let programs = agent::build()?;
    let init = std::fs::read(&programs.capsule_init).context("read the capsule's init")?;
    Ok(Initramfs::bootable(&init, &modules).finish())
}

/// Absolute paths in an argument or variable such as `path=/a,id=b` or `/a:/b`.
fn paths_in(text: &str) -> impl Iterator<Item = PathBuf> {
    text.split(['=', ',', ':'])
        .filter(|part| part.starts_with('/'))
        .map(PathBuf::from)
}

/// For each path below a covered directory that exists: the entry of the
/// covered directory it is in.
fn below_covered(paths: &[PathBuf], covered: &[&str]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for path in paths {
        let real = path.canonicalize().unwrap_or_else(|_| path.clone());
        for path in [path, &real] {
            found.extend(
                covered
                    .iter()
                    .filter_map(|directory| entry_below(path, directory)),
            );
        }
    }
    found
}

fn entry_below(path: &Path, directory: &str) -> Option<String> {
    let first = path.strip_prefix(directory).ok()?.components().next()?;
    let entry = Path::new(directory).join(first);
    entry.exists().then(|| entry.to_str().map(str::to_owned))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found_in_options() {
        let paths: Vec<_> = paths_in("path=/a/b,id=x,other=/c:/d").collect();
        assert_eq!(paths, ["/a/b", "/c", "/d"].map(PathBuf::from));
        assert_eq!(paths_in("relative/a").count(), 0);
    }

    #[test]
    fn the_entry_of_the_covered_directory_is_shown() {
        let covered = tempfile::tempdir().unwrap();
        let root = covered.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("clone/target/debug")).unwrap();
        let link = root
            .parent()
            .unwrap()
            .join(format!("link-{}", std::process::id()));
        std::os::unix::fs::symlink(root.join("clone/target"), &link).unwrap();
        let named = [
            root.join("clone/target/debug/x"),
            root.join("absent/x"),
            root.clone(),
            link.clone(),
        ];
        let found = below_covered(&named, &[root.to_str().unwrap()]);
        std::fs::remove_file(link).unwrap();
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            [root.join("clone").to_str().unwrap()]
        );
    }

    #[test]
    fn a_job_leaves_out_temporary_directories_and_keeps_the_rest() {
        let invocation = Invocation {
            argv: vec!["/bin/true".into()],
            env: vec![
                ("TMPDIR".into(), "/tmp/x".into()),
                ("LANG".into(), "C".into()),
            ],
            cwd: "/".into(),
        };
        let results = tempfile::tempdir().unwrap();
        let share = results.path().join("new/results");
        let capsule = Capsule {
            shares: vec![share.clone()],
            ..Capsule::default()
        };
        let job = capsule.job(&invocation).unwrap();
        assert_eq!(job.env, [("LANG".to_owned(), "C".to_owned())]);
        assert_eq!(
            job.shares[0].path,
            share.canonicalize().unwrap().to_str().unwrap()
        );
        assert_eq!(job.tmp_bytes, 5_242_880_000);
    }

    #[test]
    fn outcomes_become_exit_codes_as_in_a_shell() {
        let ended = |code, signal| Outcome {
            code,
            signal,
            boot: Duration::ZERO,
            total: Duration::ZERO,
        };
        assert_eq!(ended(Some(3), None).shell_code(), 3);
        assert_eq!(ended(None, Some(9)).shell_code(), 137);
    }
}
