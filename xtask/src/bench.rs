// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `cargo xtask bench`: side by side with peers and floors, in one run.

use std::fs;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::{build, lab};

#[derive(clap::Args)]
pub struct BenchArgs {
    /// Run the guests on this machine's own KVM, whatever the probe says
    #[arg(long)]
    host: bool,
    /// Only the rows of the memory core, which need no guest
    #[arg(long)]
    core: bool,
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
}

#[derive(Serialize)]
struct Summary {
    rows: Vec<Row>,
}

/// Measures, prints a table, writes `target/bench/summary.json`.
///
/// # Errors
/// When a benchmark or a peer can't run: an empty cell is an error.
pub fn run(args: &BenchArgs) -> Result<()> {
    let mut rows = core()?;
    if !args.core {
        rows.extend(guests(args.host)?);
    }
    println!(
        "{:<18} {:>10} {:>10} {:>10} {:<5} peer",
        "id", "ours", "peer", "floor", "unit"
    );
    for r in &rows {
        let floor = r.floor.map_or_else(|| "-".into(), |f| format!("{f:.2}"));
        println!(
            "{:<18} {:>10.2} {:>10.2} {:>10} {:<5} {}",
            r.id, r.ours, r.peer, floor, r.unit, r.peer_name
        );
    }
    let dir = build::target_dir().join("bench");
    fs::create_dir_all(&dir)?;
    let file = dir.join("summary.json");
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

fn guests(host: bool) -> Result<Vec<Row>> {
    let mut command = lab::command("bench")?;
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
        assert!(parse("hello").is_err());
        assert!(parse("{\"id\":\"a\"}").is_err());
    }
}
