// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tree and the flat views as text, laid out as people know it from QEMU's `info mtree`.

use std::fmt::Write;
use std::sync::Arc;

use super::commit::Tree;
use super::region::{Region, RegionKind};
use crate::SectionKind;

impl Tree {
    pub(crate) fn text(&self, flat: bool) -> String {
        let mut text = String::new();
        if flat {
            self.flat_text(&mut text)
        } else {
            self.tree_text(&mut text)
        }
        text
    }

    fn flat_text(&self, text: &mut String) {
        for (number, space) in self.spaces.iter().enumerate() {
            let _ = writeln!(text, "FlatView #{number}");
            let _ = writeln!(text, " AS \"{}\", root: {}", space.name, space.root.name());
            if space.flats.is_empty() {
                let _ = writeln!(text, "  No rendered FlatView");
            }
            for flat in &space.flats {
                let section = &flat.section;
                let kind = match &section.kind {
                    SectionKind::Ram {
                        readonly: false, ..
                    } => "ram",
                    SectionKind::Ram { readonly: true, .. } => "rom",
                    SectionKind::Mmio => "i/o",
                    SectionKind::Reservation => "reservation",
                };
                let (first, last) = (section.range.start, section.range.end - 1);
                let _ = write!(
                    text,
                    "  {first:016x}-{last:016x} ({kind}): {}",
                    section.region.name()
                );
                if section.offset_in_region != 0 {
                    let _ = write!(text, " @{:016x}", section.offset_in_region);
                }
                text.push('\n');
            }
            for ioeventfd in &space.ioeventfds {
                let _ = write!(
                    text,
                    "  ioeventfd {:016x} size {}",
                    ioeventfd.addr, ioeventfd.size
                );
                if let Some(value) = ioeventfd.datamatch {
                    let _ = write!(text, " value {value:#x}");
                }
                text.push('\n');
            }
            text.push('\n');
        }
    }

    fn tree_text(&self, text: &mut String) {
        let mut shown: Vec<Arc<Region>> = Vec::new();
        let mut aliased = Vec::new();
        for space in &self.spaces {
            let _ = writeln!(text, "address-space: {}", space.name);
            region_text(&space.root, 0, 0, 1, text, &mut aliased);
            shown.push(Arc::clone(&space.root));
            text.push('\n');
        }
        // What only aliases show, from its topmost parent.
        while let Some(region) = aliased.pop() {
            let mut top = region;
            while let Some(parent) = top.parent() {
                top = parent;
            }
            if !shown.iter().any(|other| Arc::ptr_eq(other, &top)) {
                let _ = writeln!(text, "memory-region: {}", top.name());
                region_text(&top, 0, 0, 1, text, &mut aliased);
                text.push('\n');
                shown.push(top);
            }
        }
    }
}

/// Offset of a region's last byte. A region of all 2^64 bytes keeps a size one less.
fn last_byte(region: &Region) -> u64 {
    match region.size() {
        u64::MAX => u64::MAX,
        size => size.saturating_sub(1),
    }
}

fn region_text(
    region: &Arc<Region>,
    base: u64,
    priority: i32,
    depth: usize,
    text: &mut String,
    aliased: &mut Vec<Arc<Region>>,
) {
    let last = base.saturating_add(last_byte(region));
    let kind = match region.kind() {
        RegionKind::Container => "container",
        RegionKind::Ram {
            readonly: false, ..
        } => "ram",
        RegionKind::Ram { readonly: true, .. } => "rom",
        RegionKind::Mmio(_) => "i/o",
        RegionKind::Reservation => "reservation",
        RegionKind::Alias { target, .. } => match target.kind() {
            RegionKind::Ram {
                readonly: false, ..
            } => "ram",
            RegionKind::Ram { readonly: true, .. } => "rom",
            RegionKind::Mmio(_) => "i/o",
            _ => "container",
        },
    };
    let _ = write!(
        text,
        "{:indent$}{base:016x}-{last:016x} (prio {priority}, {kind}): ",
        "",
        indent = 2 * depth
    );
    match region.kind() {
        RegionKind::Alias { target, offset } => {
            let last = offset.saturating_add(last_byte(region));
            let _ = write!(
                text,
                "alias {} @{} {offset:016x}-{last:016x}",
                region.name(),
                target.name()
            );
            aliased.push(Arc::clone(target));
        }
        _ => text.push_str(region.name()),
    }
    let state = region.state();
    if state.disabled {
        text.push_str(" [disabled]");
    }
    text.push('\n');
    let mut children = state.children.clone();
    drop(state);
    children.sort_by_key(|child| (child.offset, -i64::from(child.priority)));
    for child in &children {
        region_text(
            &child.region,
            base.saturating_add(child.offset),
            child.priority,
            depth + 1,
            text,
            aliased,
        );
    }
}
