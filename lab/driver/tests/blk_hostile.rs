// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A driver that throws random chains at a disk. The disk answers or wants a reset, and never anything else.

mod disk;

use disk::{ALL, Rig};
use ebbtide_lab_driver::{Layout, Part};
use ebbtide_memory::Gpa;

/// splitmix64
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

fn random_part(random: &mut Random, ram: Gpa, writable: bool) -> Part {
    let gpa = match random.below(10) {
        0 => Gpa(random.next()),
        1 => Gpa(1 << 35),
        2 => Gpa((32 << 20) - random.below(600)),
        3 => Gpa(0xe000_0000 + random.below(4096)),
        _ => Gpa(ram.0 + random.below(4096)),
    };
    let len = random.one_of(&[0, 1, 7, 8, 15, 16, 17, 20, 511, 512, 513, 1024, 4096]);
    Part { gpa, len, writable }
}

fn random_chain(random: &mut Random, ram: Gpa) -> Vec<Part> {
    let readable = random.below(4);
    let writable = random.below(4);
    let mut parts: Vec<_> = (0..readable)
        .map(|_| random_part(random, ram, false))
        .collect();
    parts.extend((0..writable).map(|_| random_part(random, ram, true)));
    if parts.is_empty() {
        parts.push(random_part(random, ram, true));
    }
    parts
}

#[test]
fn random_chains() {
    let mut rig = Rig::new();
    let ram = rig.board.ram().clone();
    let area = ram.alloc(16 << 10, 4096);
    let mut random = Random(1);
    let (mut answered, mut resets) = (0, 0);
    for round in 0..3000 {
        // Something that may be a header, everywhere.
        for at in (0..4096).step_by(16) {
            let kind = random.one_of(&[0_u32, 0, 1, 1, 4, 8, 11, 13, 2, 0xffff_ffff]);
            ram.put(Gpa(area.0 + at), &kind);
            ram.put(
                Gpa(area.0 + at + 8),
                &random.one_of(&[0_u64, 1, 8191, 8192, u64::MAX, 1 << 55]),
            );
        }
        let chain = random_chain(&mut random, area);
        let layout = random.one_of(&[Layout::Direct, Layout::Indirect, Layout::Mixed(1)]);
        rig.queue.add(&chain, layout).unwrap();
        rig.driver.kick(0);
        let mut used = None;
        assert!(
            ebbtide_lab_driver::poll(|| {
                used = rig.queue.poll_used();
                used.is_some() || rig.driver.needs_reset()
            }),
            "round {round}: neither an answer nor a wish for a reset for {chain:?}"
        );
        match used {
            Some(used) => {
                answered += 1;
                let room: u32 = chain
                    .iter()
                    .filter(|part| part.writable)
                    .map(|part| part.len)
                    .sum();
                assert!(used.written <= room, "{used:?} for {chain:?}");
            }
            None => {
                resets += 1;
                rig.restart(ALL);
            }
        }
    }
    assert!(
        answered > 500 && resets > 100,
        "{answered} answers, {resets} resets: the chains are not random enough"
    );
    rig.assert_works();
}
