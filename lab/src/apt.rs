// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Asks Debian's apt, in a way that works as root and as a user.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

use crate::places::find_program;

/// Where the machine's own package sources are described.
const SOURCES: &str = "/etc/apt/sources.list";
const SOURCES_DIR: &str = "/etc/apt/sources.list.d";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt, with the machine's package lists or with lists of its own.
#[derive(Clone, Debug, Default)]
pub struct Apt {
    options: Vec<OsString>,
}

impl Apt {
    /// apt as the machine is set up.
    ///
    /// # Errors
    /// There is no apt on this machine.
    pub fn new() -> Result<Apt> {
        if find_program("apt-get").is_none() {
            bail!(
                "this machine has no apt-get: Ebbtide's lab takes its kernels from Debian packages"
            );
        }
        let mut apt = Apt::default();
        apt.option("DPkg::Lock::Timeout=300");
        apt.option("Acquire::Retries=3");
        if is_root() {
            // Else apt warns that its own user can't write to our directory.
            apt.option("APT::Sandbox::User=root");
        }
        Ok(apt)
    }

    /// apt with lists below `directory`: the mirror this machine uses, its
    /// release, and the security suite, which a bare debootstrap leaves out.
    /// A user without root may update these lists.
    ///
    /// # Errors
    /// The machine's sources name no Debian mirror; `directory` can't be written.
    pub fn with_own_lists(directory: &Path) -> Result<Apt> {
        let mut apt = Apt::new()?;
        let sources = own_sources(&read_sources(), &release_codename()?)?;
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(part))
                .with_context(|| format!("create {}", directory.display()))?;
        }
        let list = directory.join("sources.list");
        crate::places::write_whole(&list, sources.as_bytes())?;
        for (key, path) in [
            ("Dir::Etc::sourcelist", list),
            ("Dir::Etc::sourceparts", PathBuf::from("/dev/null")),
            ("Dir::State::lists", directory.join("lists")),
            ("Dir::Cache", directory.join("cache")),
        ] {
            apt.option(format!("{key}={}", path.display()));
        }
        Ok(apt)
    }

    fn option(&mut self, option: impl Into<OsString>) {
        self.options.extend([OsString::from("-o"), option.into()]);
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(find_program(program).unwrap_or_else(|| program.into()));
        command
            .args(&self.options)
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command.stdin(Stdio::null());
        command
    }

    /// Reads the package lists anew.
    ///
    /// # Errors
    /// apt's own words.
    pub fn update(&self) -> Result<()> {
        run(
            self.command("apt-get").args(["update", "-q"]),
            "apt-get update",
        )
        .map(drop)
    }

    /// Installs packages without what they merely recommend.
    ///
    /// # Errors
    /// apt's own words.
    pub fn install(&self, packages: &[&str]) -> Result<()> {
        let mut command = self.command("apt-get");
        command
            .args(["install", "-q", "-y", "--no-install-recommends"])
            .args(packages);
        run(
            &mut command,
            &format!("apt-get install {}", packages.join(" ")),
        )
        .map(drop)
    }

    /// Name and version of the newest package that `name` stands for: what it
    /// depends on first with the given prefix, or itself. `None` when the
    /// lists don't know it.
    ///
    /// # Errors
    /// apt-cache can't be run.
    pub fn newest(&self, name: &str, prefix: &str) -> Result<Option<Package>> {
        let mut command = self.command("apt-cache");
        command.args(["show", "--no-all-versions", name]);
        let output = command.output().context("run apt-cache")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let Some(version) = control_field(&text, "Version") else {
            return Ok(None);
        };
        match control_field(&text, "Depends").and_then(|depends| first_dependency(depends, prefix))
        {
            Some(concrete) => self.newest(&concrete, prefix),
            None => Ok(Some(Package {
                name: name.to_owned(),
                version: version.to_owned(),
            })),
        }
    }

    /// Downloads a package into `directory`; apt compares it with the signed hash.
    ///
    /// # Errors
    /// apt's own words.
    pub fn download(&self, package: &Package, directory: &Path) -> Result<PathBuf> {
        let mut command = self.command("apt-get");
        let what = format!("{}={}", package.name, package.version);
        command
            .args(["download", "-q", &what])
            .current_dir(directory);
        run(&mut command, &format!("apt-get download {what}"))?;
        let files =
            fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))?;
        files
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get download {what} left no package"))
    }
}

/// A package as apt names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Name.
    pub name: String,
    /// Debian version.
    pub version: String,
}

/// Whether this process may install packages.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs a program; its words become the error when it fails.
pub(crate) fn run(command: &mut Command, what: &str) -> Result<Output> {
    let output = command.output().with_context(|| format!("run {what}"))?;
    if !output.status.success() {
        let mut text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if text.is_empty() {
            text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        }
        bail!("{what} failed ({}):\n{text}", output.status);
    }
    Ok(output)
}

fn control_field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

fn first_dependency(depends: &str, prefix: &str) -> Option<String> {
    let names = depends
        .split([',', '|'])
        .filter_map(|item| item.split_whitespace().next());
    names
        .map(|name| name.split(':').next().unwrap_or(name))
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
}

fn release_codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release names no VERSION_CODENAME")
}

/// All lines of the machine's package sources, in either format.
fn read_sources() -> String {
    let mut text = fs::read_to_string(SOURCES).unwrap_or_default();
    for entry in fs::read_dir(SOURCES_DIR).into_iter().flatten().flatten() {
        text.push('\n');
        text.push_str(&fs::read_to_string(entry.path()).unwrap_or_default());
    }
    text
}

/// Sources for the release and its security suite on the mirror that `sources` uses.
fn own_sources(sources: &str, codename: &str) -> Result<String> {
    let mirror = sources
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with('#'))
        .flat_map(str::split_whitespace)
        .find_map(|word| {
            word.trim_end_matches('/')
                .strip_suffix("/debian")
                .filter(|host| host.contains("://"))
        })
        .context("no Debian mirror is named in /etc/apt: it is needed to download kernels")?;
    let signed = if Path::new(KEYRING).exists() {
        format!(" [signed-by={KEYRING}]")
    } else {
        String::new()
    };
    Ok(format!(
        "deb{signed} {mirror}/debian {codename} main\n\
         deb{signed} {mirror}/debian-security {codename}-security main\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meta_packages_lead_to_kernels() {
        let text = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\n\
                    Depends: foo (>= 1) | bar, linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n";
        assert_eq!(control_field(text, "Version"), Some("6.1.192-2"));
        let depends = control_field(text, "Depends").unwrap();
        assert_eq!(
            first_dependency(depends, "linux-image-").unwrap(),
            "linux-image-6.1.0-56-cloud-amd64"
        );
        assert_eq!(
            first_dependency("kmod, linux-base:any", "linux-image-"),
            None
        );
    }

    #[test]
    fn both_formats_of_sources_name_the_mirror() {
        let old = "# deb http://old.example/debian x main\ndeb [arch=amd64] https://mirror.example/debian/ bookworm main\n";
        let new = "Types: deb\nURIs: https://mirror.example/debian\nSuites: bookworm\n";
        for sources in [old, new] {
            let own = own_sources(sources, "bookworm").unwrap();
            assert!(
                own.contains("https://mirror.example/debian bookworm main\n"),
                "{own}"
            );
            assert!(
                own.contains("https://mirror.example/debian-security bookworm-security main\n"),
                "{own}"
            );
        }
        assert!(own_sources("deb https://mirror.example/ubuntu jammy main", "jammy").is_err());
    }

    #[test]
    fn a_failing_program_says_what_it_said() {
        let error = run(
            Command::new("sh").args(["-c", "echo no room >&2; exit 4"]),
            "the test",
        )
        .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("the test failed") && text.contains("no room"),
            "{text}"
        );
    }
}
