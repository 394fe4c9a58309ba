// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ctl memory`

use ebbtide_qmp::commands::EBBTIDE_QUERY_MEMORY;
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::ebbtide::{Memory, MemoryDevice};

use super::table::{Column, table};
use super::{Failure, Outcome, Session, human};

pub(super) fn show(session: &mut Session<'_>) -> Result<Outcome, Failure> {
    let memory = session.call_own(&EBBTIDE_QUERY_MEMORY, Empty {})?;
    if session.json {
        session.print_json(&memory)?;
    } else {
        write!(session.out, "{}", text(&memory))?;
    }
    Ok(Outcome::Done)
}

/// The whole picture, for people.
pub(super) fn text(memory: &Memory) -> String {
    let mut text = format!(
        "boot      {}\nplugged   {}\ntotal     {} of at most {}\nhost RSS  {}\n",
        human(memory.boot),
        human(memory.plugged),
        human(memory.total),
        human(memory.max),
        human(memory.rss)
    );
    if !memory.devices.is_empty() {
        text.push('\n');
        text.push_str(&devices(&memory.devices));
    }
    text
}

fn devices(devices: &[MemoryDevice]) -> String {
    use Column::{Left, Right};
    let columns = [
        Left("ID"),
        Left("TYPE"),
        Right("NODE"),
        Right("SIZE"),
        Right("REQUESTED"),
        Right("MAX"),
        Right("BLOCK"),
        Right("ADDRESS"),
    ];
    let row = |device: &MemoryDevice| {
        vec![
            device.id.clone(),
            device.kind.clone(),
            device.node.to_string(),
            human(device.size),
            human(device.requested),
            human(device.max),
            human(device.block_size),
            format!("{:#x}", device.memaddr),
        ]
    };
    table(&columns, &devices.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_for_people() {
        let memory = Memory {
            boot: 512 << 20,
            plugged: 3584 << 20,
            total: 4 << 30,
            max: 8 << 30,
            rss: 700 << 20,
            devices: vec![MemoryDevice {
                id: "vmem0".into(),
                kind: "virtio-mem".into(),
                node: 0,
                memaddr: 1 << 32,
                block_size: 2 << 20,
                requested: 3584 << 20,
                size: 3584 << 20,
                max: 7680 << 20,
            }],
        };
        assert_eq!(
            text(&memory),
            "boot      512 MiB\n\
             plugged   3.5 GiB\n\
             total     4 GiB of at most 8 GiB\n\
             host RSS  700 MiB\n\
             \n\
             ID     TYPE        NODE     SIZE  REQUESTED      MAX  BLOCK      ADDRESS\n\
             vmem0  virtio-mem     0  3.5 GiB    3.5 GiB  7.5 GiB  2 MiB  0x100000000\n"
        );
    }
}
