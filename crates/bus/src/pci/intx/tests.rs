// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pins against a wired or that is computed anew each time.

use super::*;
use crate::pci::fakes::Level;

fn wires(count: u32) -> (Vec<Arc<Level>>, IntxWires) {
    let lines: Vec<Arc<Level>> = (0..count).map(|_| Arc::default()).collect();
    let inputs = (16..).zip(lines.iter().map(|line| Arc::clone(line) as _));
    let wires = IntxWires::new(inputs).unwrap();
    (lines, wires)
}

fn devfn(slot: u8) -> Devfn {
    Devfn::new(slot, 0).unwrap()
}

#[test]
fn neighbours_use_different_wires_and_behind_a_bridge_all_lead_to_its_pins() {
    let (_, root) = wires(8);
    let gsis = |slot| IntxPin::ALL.map(|pin| root.gsi(slot, pin));
    assert_eq!(gsis(0), [16, 17, 18, 19]);
    assert_eq!(gsis(6), [22, 23, 16, 17]);
    assert_eq!(gsis(8), gsis(0));
    let behind = root.behind(6);
    let gsis = |slot| IntxPin::ALL.map(|pin| behind.gsi(slot, pin));
    assert_eq!(gsis(0), [22, 23, 16, 17]);
    assert_eq!(gsis(1), [23, 16, 17, 22], "rotated by the slot");
    assert_eq!(gsis(5), gsis(1));
    assert_eq!(behind.behind(3).gsi(2, IntxPin::B), gsis(3)[3]);
    assert!(IntxWires::new([]).is_none());
}

#[test]
fn a_wire_is_high_as_long_as_somebody_asserts() {
    let (lines, wires) = wires(1);
    let [a, b] = [IntxPin::A, IntxPin::D].map(InterruptPin::new);
    assert_eq!(a.connect(&wires, devfn(1)), 16);
    b.connect(&wires, devfn(2));
    a.set(true);
    a.set(true);
    b.set(true);
    a.set(false);
    assert!(lines[0].is_high(), "b still asserts");
    b.set(false);
    assert!(!lines[0].is_high());
    assert_eq!(lines[0].changes(), 2, "once up, once down");
}

#[test]
fn a_pin_that_goes_lets_go() {
    let (lines, wires) = wires(1);
    let pin = InterruptPin::new(IntxPin::A);
    pin.set(true);
    assert!(!lines[0].is_high(), "not on a bus yet");
    pin.connect(&wires, devfn(0));
    assert!(lines[0].is_high());
    pin.disconnect();
    assert!(!lines[0].is_high());
    pin.set(true);
    assert!(!lines[0].is_high(), "on no wire any more");
    pin.connect(&wires, devfn(0));
    assert!(lines[0].is_high());
    drop(pin);
    assert!(!lines[0].is_high());
    assert_eq!(Arc::strong_count(&wires.0[0]), 1, "nobody holds the wire");
}

#[test]
fn the_wire_follows_any_sequence() {
    let (lines, wires) = wires(3);
    let pins: Vec<_> = (0..6)
        .map(|n| InterruptPin::new(IntxPin::ALL[n % 4]))
        .collect();
    let mut model = [(false, false, None::<usize>); 6];
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for step in 0..50_000 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let (at, on) = ((seed >> 8) as usize % 6, seed >> 20 & 1 == 1);
        let slot = (seed >> 24) as u8 % 32;
        let (pin, state) = (&pins[at], &mut model[at]);
        match seed >> 61 {
            0..=3 => (pin.set(on), state.0 = on).1,
            4 | 5 => (pin.set_disabled(on), state.1 = on).1,
            6 => {
                pin.connect(&wires, devfn(slot));
                state.2 = Some(usize::from(slot) % 3 + at % 4).map(|wire| wire % 3);
            }
            _ => (pin.disconnect(), state.2 = None).1,
        }
        for (wire, line) in lines.iter().enumerate() {
            let high = model
                .iter()
                .any(|&(asserted, disabled, on)| asserted && !disabled && on == Some(wire));
            assert_eq!(line.is_high(), high, "step {step}, wire {wire}");
        }
        assert_eq!(pins[at].is_asserted(), model[at].0);
    }
}
