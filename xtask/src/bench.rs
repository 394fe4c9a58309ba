// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask bench`: side by side with peers and floors, in one run.

use std::fs;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::{build, lab};

#[derive(clap::Args)]
pub struct BenchArgs {
    /// Only this
    #[arg(value_enum)]
    suite: Option<Suite>,
    /// Run the guests on this machine's own KVM, whatever the probe says
    #[arg(long)]
    host: bool,
    /// Only the rows of the memory core, which need no guest
    #[arg(long, conflicts_with = "suite")]
    core: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Suite {
    /// Disks that their guest ejects while requests of 20 s are under way, also on this machine's own KVM; writes
    /// target/bench/unplug.json
    Unplug,
    /// Of these only the rows of this machine's own KVM; writes target/bench/unplug_host.json
    UnplugHost,
    /// Disks that their guest reads as fast as it goes, at several depths; writes target/bench/blk.json
    Blk,
}

/// One measurement beside its peer.
#[derive(Serialize, Deserialize)]
struct Row {
    id: String,
    ours: f64,
    peer: f64,
    peer_name: String,
    floor: Option<f64>,
    unit: String,
    n: u32,
    min: f64,
    max: f64,
    /// What every run of ours has to stay below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    budget: Option<f64>,
    /// Ours divided by the peer's, in the median of the rounds; what it should not be below or above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ratio_min: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ratio_max: Option<f64>,
    /// Processor time of the threads that are waited for, at worst.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cpu: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cpu_peer: Option<f64>,
}

impl Row {
    /// Whether it is as fast as the peer, and the budget was kept; nothing for a row that has neither to keep.
    fn verdict(&self) -> String {
        let ratio = self
            .ratio
            .map(|ratio| match (self.ratio_min, self.ratio_max) {
                (Some(min), _) if ratio < min => {
                    format!("MISSED: {ratio:.2} of the peer, below {min}")
                }
                (_, Some(max)) if ratio > max => {
                    format!("MISSED: {ratio:.2} of the peer, above {max}")
                }
                (None, None) => format!("{ratio:.2} of the peer"),
                _ => format!("ok: {ratio:.2} of the peer"),
            });
        let budget = self.budget.map(|budget| match self.max < budget {
            true => format!("ok: {:.2} < {budget}", self.max),
            false => format!("MISSED: {:.2}, not below {budget}", self.max),
        });
        let both = ratio.into_iter().chain(budget);
        both.collect::<Vec<_>>().join("; ")
    }
}

#[derive(Serialize)]
struct Summary {
    rows: Vec<Row>,
}

/// Measures, prints a table, writes `target/bench/summary.json`, or the file of the suite. A budget that is missed is
/// shown, and is no error.
///
/// # Errors
/// When a benchmark or a peer can't run: an empty cell is an error.
pub fn run(args: &BenchArgs) -> Result<()> {
    match args.suite {
        Some(Suite::Unplug) => return report(guests("unplug", args.host)?, "unplug.json"),
        Some(Suite::UnplugHost) => {
            return report(guests("unplug-host", args.host)?, "unplug_host.json");
        }
        Some(Suite::Blk) => return report(guests("blk", args.host)?, "blk.json"),
        None => {}
    }
    let mut rows = core()?;
    if !args.core {
        rows.extend(guests("guests", args.host)?);
    }
    report(rows, "summary.json")
}

fn report(rows: Vec<Row>, name: &str) -> Result<()> {
    println!(
        "{:<25} {:>10} {:>10} {:>10} {:<5} {:<15} {:>10} {:>10} worst of ours and its budget",
        "id", "ours", "peer", "floor", "unit", "peer is", "cpu", "peer's"
    );
    for r in &rows {
        let known = |value: Option<f64>| value.map_or_else(|| "-".into(), |v| format!("{v:.2}"));
        let line = format!(
            "{:<20} {:>10.2} {:>10.2} {:>10} {:<5} {:<15} {:>10} {:>10} {}",
            r.id,
            r.ours,
            r.peer,
            known(r.floor),
            r.unit,
            r.peer_name,
            known(r.cpu),
            known(r.cpu_peer),
            r.verdict()
        );
        println!("{}", line.trim_end());
    }
    let dir = build::target_dir().join("bench");
    fs::create_dir_all(&dir)?;
    let file = dir.join(name);
    fs::write(&file, serde_json::to_string_pretty(&Summary { rows })?)?;
    println!("written to {}", file.display());
    Ok(())
}

fn core() -> Result<Vec<Row>> {
    let text = build::output(&mut build::cargo(&[
        "bench",
        "--quiet",
        "--package",
        "ebbtide-memory",
        "--bench",
        "core",
    ]))?;
    parse(&text)
}

fn guests(suite: &str, host: bool) -> Result<Vec<Row>> {
    let mut command = lab::command("bench")?;
    // Progress is seen as it is made.
    command.arg("--suite").arg(suite).stderr(Stdio::inherit());
    if host {
        command.env("EBBTIDE_KVM", "host");
    }
    let text = build::output(&mut command)?;
    parse(&text)
}

/// Rows are the lines that are JSON objects; everything else is for people.
fn parse(text: &str) -> Result<Vec<Row>> {
    let rows: Vec<Row> = text
        .lines()
        .filter(|l| l.trim_start().starts_with('{'))
        .map(|l| serde_json::from_str(l).with_context(|| format!("bench row {l}")))
        .collect::<Result<_>>()?;
    if rows.is_empty() {
        bail!("a benchmark printed no row:\n{text}");
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_prose() {
        let row = r#"{"id":"a","ours":1,"peer":2,"peer_name":"p","floor":null,"unit":"ns","n":5,"min":1,"max":2}"#;
        let rows = parse(&format!("hello\n{row}\n")).unwrap();
        assert_eq!(rows[0].id, "a");
        assert_eq!(rows[0].verdict(), "");
        let budgeted = row.replace("\"max\":2", "\"max\":2,\"budget\":2.5");
        assert_eq!(parse(&budgeted).unwrap()[0].verdict(), "ok: 2.00 < 2.5");
        let missed = row.replace("\"max\":2", "\"max\":2,\"budget\":2");
        let verdict = parse(&missed).unwrap()[0].verdict();
        assert!(verdict.starts_with("MISSED"), "{verdict}");
        for (bounds, expected) in [
            (
                "\"ratio\":0.99,\"ratio_min\":1",
                "MISSED: 0.99 of the peer, below 1",
            ),
            ("\"ratio\":1.0,\"ratio_min\":1", "ok: 1.00 of the peer"),
            (
                "\"ratio\":0.9,\"ratio_max\":0.8",
                "MISSED: 0.90 of the peer, above 0.8",
            ),
            ("\"ratio\":0.8,\"ratio_max\":0.8", "ok: 0.80 of the peer"),
            ("\"ratio\":2.0", "2.00 of the peer"),
            (
                "\"ratio\":0.14,\"ratio_max\":1.0,\"budget\":2",
                "ok: 0.14 of the peer; MISSED: 2.00, not below 2",
            ),
        ] {
            let row = row.replace("\"max\":2", &format!("\"max\":2,{bounds}"));
            assert_eq!(parse(&row).unwrap()[0].verdict(), expected);
        }
        assert!(parse("hello").is_err());
        assert!(parse("{\"id\":\"a\"}").is_err());
    }
}
