// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The registers of the watchdog and what they make of time (Intel 6300ESB data sheet 300641-004, 16).
//!
//! ```text
//!             enable, reload                 zero: interrupt            zero: WDT_TOUT#, sticky bit
//!   stopped ─────────────────▶ first stage ──────────────────▶ second ─────────────────────▶ stopped
//!      ▲                        ▲  preload 1                   preload 2 │
//!      └─ disable, reset        └───────────── reload ───────────────────┘
//!
//!   free running:  enable, reload ──▶ second stage, again and again; WDT_TOUT# changes at each zero
//! ```

use std::time::Duration;

use ebbtide_bus::gated::all_ones;

/// In memory: the two preload values, the interrupt status, the reload register.
mod at {
    pub const PRELOAD1: u64 = 0x00;
    pub const PRELOAD2: u64 = 0x04;
    pub const INTERRUPT_STATUS: u64 = 0x08;
    pub const RELOAD: u64 = 0x0c;
    pub const END: u64 = 0x10;
}

/// In configuration space, by dword: the configuration register (16 bits), the lock register (8 bits).
mod config_at {
    pub const CONFIGURATION: u16 = 0x60;
    pub const LOCK: u16 = 0x68;
}

/// The dwords of configuration space that are the watchdog's own.
pub(super) const CONFIG_DWORDS: std::ops::Range<u16> = config_at::CONFIGURATION..0x6c;

/// Preload values have 20 bits.
const PRELOAD_BITS: u32 = 0xf_ffff;
/// Interrupt status: the first stage ended.
const INTERRUPT_ACTIVE: u32 = 1;
/// Reload register.
const RELOAD: u32 = 1 << 8;
const TIMEOUT: u32 = 1 << 9;
/// What is written to the reload register, one after the other, before anything else.
const UNLOCK: [u32; 2] = [0x80, 0x86];
/// Configuration: interrupt type (0: pin, 2: SMI, 3: none), prescaler, WDT_TOUT# off.
const INTERRUPT_TYPE: u32 = 3;
const INTERRUPT_PIN: u32 = 0;
const FAST: u32 = 1 << 2;
const OUTPUT_OFF: u32 = 1 << 5;
/// Lock: the register itself, the watchdog, free running.
const LOCKED: u32 = 1 << 0;
const ENABLE: u32 = 1 << 1;
const FREE_RUNNING: u32 = 1 << 2;

/// A tick of the PCI clock, 33 MHz.
const CLOCK_NANOS: u64 = 30;
/// The down-counter's bits below the preload value.
const SLOW_BITS: u32 = 15;
const FAST_BITS: u32 = 5;
/// No stage is shorter: a guest that lets a microsecond run freely would keep a thread of the host busy.
const SHORTEST: Duration = Duration::from_millis(1);

/// What happens to the timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timer {
    /// Nothing.
    Keep,
    /// It does not run any more.
    Stop,
    /// It runs from now on, for this long.
    Run(Duration),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Stopped,
    First,
    Second,
}

/// How far the sequence is that lets one write through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sequence {
    Locked,
    Half,
    Open,
}

/// The watchdog without its clock.
#[derive(Debug)]
pub(super) struct Registers {
    preload1: u32,
    preload2: u32,
    interrupt_active: bool,
    timeout: bool,
    configuration: u32,
    lock: u32,
    sequence: Sequence,
    stage: Stage,
    /// WDT_TOUT# is driven low.
    output: bool,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            preload1: PRELOAD_BITS,
            preload2: PRELOAD_BITS,
            interrupt_active: false,
            timeout: false,
            configuration: 0,
            lock: 0,
            sequence: Sequence::Locked,
            stage: Stage::Stopped,
            output: false,
        }
    }
}

impl Registers {
    /// A reset of the system. That a time-out happened is known until software clears it: it is how the next system
    /// learns what ended the last.
    pub(super) fn reset(&mut self) {
        *self = Self {
            timeout: self.timeout,
            ..Self::default()
        };
    }

    /// Whether the interrupt pin is asserted.
    pub(super) fn interrupt(&self) -> bool {
        self.interrupt_active && self.configuration & INTERRUPT_TYPE == INTERRUPT_PIN
    }

    /// A read of the memory registers. Behind them are zeroes.
    pub(super) fn read(&self, offset: u64, size: u8) -> u64 {
        (0..u64::from(size.min(8))).fold(0, |value, at| {
            let byte = offset.checked_add(at).map_or(0, |offset| self.byte(offset));
            value | u64::from(byte) << (8 * at)
        })
    }

    fn byte(&self, offset: u64) -> u8 {
        let dword = match offset & !3 {
            at::PRELOAD1 => self.preload1,
            at::PRELOAD2 => self.preload2,
            at::INTERRUPT_STATUS => u32::from(self.interrupt_active),
            at::RELOAD if self.timeout => TIMEOUT,
            _ => 0,
        };
        (dword >> (8 * (offset & 3))) as u8
    }

    /// A write to the memory registers. One that does not lie in a dword is two.
    pub(super) fn write(&mut self, offset: u64, size: u8, value: u64) -> Timer {
        if size == 8 && offset.is_multiple_of(8) {
            let first = self.write(offset, 4, value);
            let second = self.write(offset + 4, 4, value >> 32);
            return if second == Timer::Keep { first } else { second };
        }
        let shift = 8 * (offset & 3);
        if !matches!(size, 1 | 2 | 4) || offset >= at::END || shift + 8 * u64::from(size) > 32 {
            return Timer::Keep;
        }
        let mask = (all_ones(size) << shift) as u32;
        let bits = (value << shift) as u32 & mask;
        let open = self.advance(offset, bits);
        match offset & !3 {
            at::PRELOAD1 if open => merge(&mut self.preload1, mask & PRELOAD_BITS, bits),
            at::PRELOAD2 if open => merge(&mut self.preload2, mask & PRELOAD_BITS, bits),
            at::INTERRUPT_STATUS if bits & INTERRUPT_ACTIVE != 0 => self.interrupt_active = false,
            at::RELOAD if open => {
                self.timeout &= bits & TIMEOUT == 0;
                if bits & RELOAD != 0 && self.lock & ENABLE != 0 {
                    return self.start();
                }
            }
            _ => {}
        }
        Timer::Keep
    }

    /// Follows the unlock sequence. True when this write is the one that it lets through.
    fn advance(&mut self, offset: u64, bits: u32) -> bool {
        let [first, second] = UNLOCK;
        let before = self.sequence;
        self.sequence = match before {
            _ if offset == at::RELOAD && bits == first => Sequence::Half,
            Sequence::Half if offset == at::RELOAD && bits == second => Sequence::Open,
            _ => Sequence::Locked,
        };
        before == Sequence::Open && self.sequence == Sequence::Locked
    }

    /// One of the [`CONFIG_DWORDS`].
    pub(super) fn config(&self, dword: u16) -> u32 {
        match dword {
            config_at::CONFIGURATION => self.configuration,
            config_at::LOCK => self.lock,
            _ => 0,
        }
    }

    /// A write of the bits in `mask` to one of the [`CONFIG_DWORDS`].
    pub(super) fn set_config(&mut self, dword: u16, mask: u32, bits: u32) -> Timer {
        match dword {
            config_at::CONFIGURATION => {
                let writable = INTERRUPT_TYPE | FAST | OUTPUT_OFF;
                merge(&mut self.configuration, mask & writable, bits);
                Timer::Keep
            }
            // Locked until a reset.
            config_at::LOCK if self.lock & LOCKED == 0 => {
                let before = self.lock;
                merge(
                    &mut self.lock,
                    mask & (LOCKED | ENABLE | FREE_RUNNING),
                    bits,
                );
                match (before & ENABLE != 0, self.lock & ENABLE != 0) {
                    (false, true) => self.start(),
                    (true, false) => {
                        self.stage = Stage::Stopped;
                        Timer::Stop
                    }
                    _ => Timer::Keep,
                }
            }
            _ => Timer::Keep,
        }
    }

    /// The counter begins anew.
    fn start(&mut self) -> Timer {
        self.stage = if self.lock & FREE_RUNNING == 0 {
            Stage::First
        } else {
            Stage::Second
        };
        Timer::Run(self.duration())
    }

    /// How long the stage lasts.
    fn duration(&self) -> Duration {
        let preload = match self.stage {
            Stage::First => self.preload1,
            Stage::Second | Stage::Stopped => self.preload2,
        };
        let bits = if self.configuration & FAST == 0 {
            SLOW_BITS
        } else {
            FAST_BITS
        };
        let nanos = (u64::from(preload) << bits) * CLOCK_NANOS;
        Duration::from_nanos(nanos).max(SHORTEST)
    }

    /// The counter is zero. Says how it goes on, and whether WDT_TOUT# fell.
    pub(super) fn expire(&mut self) -> (Timer, bool) {
        match self.stage {
            Stage::Stopped => (Timer::Keep, false),
            Stage::First => {
                self.interrupt_active = true;
                self.stage = Stage::Second;
                (Timer::Run(self.duration()), false)
            }
            Stage::Second => {
                self.timeout = true;
                let free_running = self.lock & FREE_RUNNING != 0;
                // Once it is low it only rises in free running, and in a reset.
                self.output = !(free_running && self.output);
                let fell = self.output && self.configuration & OUTPUT_OFF == 0;
                if free_running {
                    return (Timer::Run(self.duration()), fell);
                }
                self.stage = Stage::Stopped;
                (Timer::Stop, fell)
            }
        }
    }
}

fn merge(register: &mut u32, mask: u32, bits: u32) {
    *register = *register & !mask | bits & mask;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unlock(registers: &mut Registers) {
        for key in UNLOCK {
            assert_eq!(registers.write(at::RELOAD, 1, u64::from(key)), Timer::Keep);
        }
    }

    fn enabled(lock: u32) -> Registers {
        let mut registers = Registers::default();
        for (at, value) in [(at::PRELOAD1, 512), (at::PRELOAD2, 1024)] {
            unlock(&mut registers);
            registers.write(at, 4, value);
        }
        registers.set_config(config_at::LOCK, 0xff, lock);
        registers
    }

    fn millis(duration: Duration) -> u128 {
        duration.as_millis()
    }

    #[test]
    fn a_write_needs_the_sequence_each_time() {
        let mut registers = Registers::default();
        registers.write(at::PRELOAD1, 4, 7);
        assert_eq!(registers.read(at::PRELOAD1, 4), 0xf_ffff);
        unlock(&mut registers);
        registers.write(at::PRELOAD1, 4, 0xfff0_0007);
        assert_eq!(registers.read(at::PRELOAD1, 4), 7, "20 bits");
        registers.write(at::PRELOAD1, 4, 8);
        assert_eq!(registers.read(at::PRELOAD1, 4), 7, "one write only");
        for broken in [[0x86, 0x80], [0x80, 0x80], [0x80, 0x87], [0, 0x86]] {
            let mut registers = Registers::default();
            for key in broken {
                registers.write(at::RELOAD, 2, key);
            }
            registers.write(at::PRELOAD2, 4, 9);
            assert_eq!(registers.read(at::PRELOAD2, 4), 0xf_ffff, "{broken:x?}");
        }
        // Reads are no part of it, and parts of registers can be written.
        registers.write(at::RELOAD, 4, 0x80);
        registers.read(at::RELOAD, 2);
        registers.write(at::RELOAD, 2, 0x86);
        registers.read(0, 8);
        registers.write(at::PRELOAD2 + 1, 1, 0x12);
        assert_eq!(registers.read(at::PRELOAD2, 4), 0xf_12ff);
    }

    #[test]
    fn two_stages_and_then_the_output() {
        let mut registers = enabled(0);
        registers.set_config(config_at::CONFIGURATION, 0xffff, 0x0003);
        let Timer::Run(first) = registers.set_config(config_at::LOCK, 0xff, ENABLE) else {
            panic!("not started");
        };
        assert_eq!(millis(first), 503);
        let (Timer::Run(second), false) = registers.expire() else {
            panic!("no second stage");
        };
        assert_eq!(millis(second), 1006);
        assert_eq!(registers.read(at::INTERRUPT_STATUS, 4), 1);
        assert!(!registers.interrupt(), "no interrupt was asked for");
        assert_eq!(registers.expire(), (Timer::Stop, true));
        assert_eq!(registers.read(at::RELOAD, 2), u64::from(TIMEOUT));
        assert_eq!(registers.expire(), (Timer::Keep, false));
        registers.reset();
        assert_eq!(registers.read(at::RELOAD, 2), u64::from(TIMEOUT), "sticky");
        assert_eq!(registers.config(config_at::LOCK), 0);
        unlock(&mut registers);
        registers.write(at::RELOAD, 2, u64::from(TIMEOUT | RELOAD));
        assert_eq!(registers.read(at::RELOAD, 2), 0);
    }

    #[test]
    fn a_reload_begins_with_the_first_stage_if_it_is_enabled() {
        let mut registers = enabled(ENABLE);
        registers.expire();
        assert!(registers.interrupt());
        registers.write(at::INTERRUPT_STATUS, 4, 1);
        assert!(!registers.interrupt());
        unlock(&mut registers);
        let Timer::Run(first) = registers.write(at::RELOAD, 2, u64::from(RELOAD)) else {
            panic!("not reloaded");
        };
        assert_eq!(millis(first), 503);
        assert_eq!(registers.set_config(config_at::LOCK, 0xff, 0), Timer::Stop);
        unlock(&mut registers);
        assert_eq!(
            registers.write(at::RELOAD, 2, u64::from(RELOAD)),
            Timer::Keep
        );
    }

    #[test]
    fn what_is_locked_stays_until_reset() {
        let mut registers = enabled(ENABLE | LOCKED);
        assert_eq!(registers.set_config(config_at::LOCK, 0xff, 0), Timer::Keep);
        assert_eq!(registers.config(config_at::LOCK), ENABLE | LOCKED);
        registers.reset();
        registers.set_config(config_at::LOCK, 0xff, FREE_RUNNING);
        assert_eq!(registers.config(config_at::LOCK), FREE_RUNNING);
    }

    #[test]
    fn free_running_uses_the_second_value_and_toggles() {
        let mut registers = enabled(ENABLE | FREE_RUNNING);
        let fell: Vec<bool> = (0..4)
            .map(|_| {
                let (timer, fell) = registers.expire();
                assert_eq!(timer, Timer::Run(Duration::from_nanos(1024 * 983_040)));
                fell
            })
            .collect();
        assert_eq!(fell, [true, false, true, false]);
        assert!(!registers.interrupt(), "there is no first stage");
    }

    #[test]
    fn an_output_that_is_off_never_falls_and_no_stage_is_short() {
        let mut registers = enabled(0);
        registers.set_config(config_at::CONFIGURATION, 0xffff, OUTPUT_OFF | FAST);
        assert_eq!(
            registers.set_config(config_at::LOCK, 0xff, ENABLE),
            Timer::Run(SHORTEST),
            "491 microseconds"
        );
        registers.expire();
        assert_eq!(registers.expire(), (Timer::Stop, false));
        assert_eq!(
            registers.config(config_at::CONFIGURATION),
            OUTPUT_OFF | FAST
        );
    }
}
