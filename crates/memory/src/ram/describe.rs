// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One RAM block as text, for people.

use std::fmt::Write;

use super::blocks::short_size;
use super::{NumaPolicy, RamBlock};

impl RamBlock {
    /// All that is known of the block, one line each.
    pub fn dump(&self) -> String {
        let mapping = self.mapping();
        let on = |set: bool| if set { "on" } else { "off" };
        let mut text = format!("RAM block {}\n", self.name());
        let mut line = |what: &str, value: String| {
            let _ = writeln!(text, "  {what:<10} {value}");
        };
        line("state", self.state().to_owned());
        line("offset", format!("{:#018x}", self.ram_offset()));
        line("host", format!("{:#018x}", self.host().as_ptr() as u64));
        let (used, max) = (self.size_bytes(), self.max_size_bytes());
        line("size", format!("{used} bytes, at most {max}"));
        let sharing = match (mapping.is_shared(), self.is_readonly()) {
            (_, true) => "read-only",
            (true, _) => "shared",
            (false, _) => "private",
        };
        let pages = short_size(self.page_size_bytes());
        let path = mapping.path().map(|path| format!(" {}", path.display()));
        let path = path.unwrap_or_default();
        let kind = mapping.kind();
        line(
            "backing",
            format!("{kind}{path}, {sharing}, pages of {pages}"),
        );
        let policy = self.policy();
        let numa = policy.numa.as_ref().map_or("default".to_owned(), numa_text);
        let (merge, dump) = (on(policy.merge), on(policy.dump));
        line("policy", format!("numa {numa}, merge {merge}, dump {dump}"));
        if let Some(block) = self.block_size_bytes() {
            let plugged = self.plugged_bytes();
            line("plugged", format!("{plugged} bytes in blocks of {block}"));
        }
        for (holder, count) in self.pin_holders() {
            line("pins", format!("{count} of {holder}"));
        }
        for listener in self.discard_listeners() {
            line("listener", listener);
        }
        text
    }
}

fn numa_text(policy: &NumaPolicy) -> String {
    let list = |nodes: &[u32]| {
        let nodes: Vec<_> = nodes.iter().map(u32::to_string).collect();
        nodes.join(",")
    };
    match policy {
        NumaPolicy::Bind(nodes) => format!("bind {}", list(nodes)),
        NumaPolicy::Preferred(node) => format!("preferred {node}"),
        NumaPolicy::Interleave(nodes) => format!("interleave {}", list(nodes)),
    }
}
