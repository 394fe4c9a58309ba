// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tree and the flat views as text, laid out as people know it from QEMU's `info mtree`.

use std::fmt::Write;
use std::sync::Arc;

use super::commit::Tree;
use super::fixture::Fixture;
use super::region::{Region, RegionKind};
use crate::FlatSection;

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
        let mut done: Vec<&Arc<Region>> = Vec::new();
        for space in &self.spaces {
            // Address spaces with one root show the same.
            if done.iter().any(|root| Arc::ptr_eq(root, &space.root)) {
                continue;
            }
            let _ = writeln!(text, "FlatView #{}", done.len());
            done.push(&space.root);
            let peers = self.spaces.iter();
            for peer in peers.filter(|peer| Arc::ptr_eq(&peer.root, &space.root)) {
                let _ = writeln!(text, " AS \"{}\", root: {}", peer.name, peer.root.name());
            }
            let _ = writeln!(text, " Root memory region: {}", space.root.name());
            if space.flats.is_empty() {
                let _ = writeln!(text, "  No rendered FlatView");
            }
            for flat in &space.flats {
                section_text(&flat.section, text);
            }
            for fixture in &space.fixtures {
                fixture_text(fixture, text);
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

/// What people know a region's kind as.
fn kind_text(region: &Region) -> &'static str {
    match region.kind() {
        RegionKind::Container => "container",
        RegionKind::Ram { device: true, .. } => "ramd",
        RegionKind::Ram { readonly: true, .. } => "rom",
        RegionKind::Ram { .. } => "ram",
        RegionKind::RomDevice { .. } if region.is_direct() => "romd",
        RegionKind::RomDevice { .. } | RegionKind::Mmio(_) => "i/o",
        RegionKind::Iommu(_) => "iommu",
        RegionKind::Reservation => "reservation",
        RegionKind::Alias { target, .. } => kind_text(target),
    }
}

fn section_text(section: &FlatSection, text: &mut String) {
    let region = &section.region;
    let (first, last) = (section.range.start, section.range.end - 1);
    let _ = write!(
        text,
        "  {first:016x}-{last:016x} (prio {}, {}): {}",
        region.priority(),
        kind_text(region),
        region.name()
    );
    if section.offset_in_region != 0 {
        let _ = write!(text, " @{:016x}", section.offset_in_region);
    }
    text.push('\n');
}

fn fixture_text(fixture: &Fixture, text: &mut String) {
    let _ = match fixture {
        Fixture::Ioeventfd(it) => {
            let _ = write!(text, "  ioeventfd {:016x} size {}", it.addr, it.size);
            match it.datamatch {
                Some(value) => writeln!(text, " value {value:#x}"),
                None => writeln!(text),
            }
        }
        Fixture::Coalesced(it) => {
            let (first, last) = (it.range.start, it.range.end - 1);
            writeln!(text, "  coalesced {first:016x}-{last:016x}")
        }
    };
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
    let kind = kind_text(region);
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
