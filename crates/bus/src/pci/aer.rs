// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Advanced error reporting (PCIe 5.0, 6.2 and 7.8.4): how an error in a function becomes status bits, a message to the
//! root port, and its interrupt. No error happens by itself here; they are injected.

use super::express::{DEVICE_CONTROL, DEVICE_STATUS};
use super::registers::{BRIDGE_CONTROL, COMMAND, Registers, SECONDARY_STATUS, STATUS};
use super::{Bus, Config, Devfn, HostBridge, PciError};

const EXTENDED_ERRORS: u16 = 1;
const VERSION: u8 = 2;
/// Bytes of the structure, header included: without and with the root port's registers.
const BYTES: usize = 0x2c;
const ROOT_BYTES: usize = 0x38;

/// Offsets in the structure.
const UNCORRECTABLE_STATUS: u16 = 0x04;
const UNCORRECTABLE_MASK: u16 = 0x08;
const UNCORRECTABLE_SEVERITY: u16 = 0x0c;
const CORRECTABLE_STATUS: u16 = 0x10;
const CORRECTABLE_MASK: u16 = 0x14;
const CONTROL: u16 = 0x18;
const HEADER_LOG: u16 = 0x1c;
const ROOT_COMMAND: u16 = 0x2c;
const ROOT_STATUS: u16 = 0x30;
const ERROR_SOURCE: u16 = 0x34;

/// The bits of the errors below.
const UNCORRECTABLE: u32 = 0x003f_f030;
const CORRECTABLE: u32 = 0x0000_31c1;
/// Severity at power-on: what breaks the link or its flow control is fatal.
const FATAL: u32 = 0x0006_2030;
/// Correctable errors masked at power-on: advisory ones.
const ADVISORY: u32 = 1 << 13;
/// First error pointer, in the control register.
const FIRST_ERROR: u32 = 0x1f;

/// Device control and status: the three kinds of errors, unsupported requests.
const REPORT_CORRECTABLE: u16 = 1;
const REPORT_NON_FATAL: u16 = 1 << 1;
const REPORT_FATAL: u16 = 1 << 2;
const REPORT_UNSUPPORTED: u16 = 1 << 3;
/// COMMAND and BRIDGE_CONTROL: SERR# enable, which lets errors through as messages.
const COMMAND_SERR: u16 = 1 << 8;
const BRIDGE_SERR: u16 = 1 << 1;
/// STATUS: signalled, and secondary status: received a system error.
const SYSTEM_ERROR: u16 = 1 << 14;

/// Root error command: interrupts for each severity. Root error status: received, several received, first uncorrectable
/// one is fatal, non-fatal and fatal ones received.
const ROOT_COMMAND_WRITABLE: u32 = 7;
const ROOT_STATUS_EVENTS: u32 = 0x7f;

/// Errors that hardware has corrected; the values are their bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum CorrectableError {
    Receiver = 0,
    BadTlp = 6,
    BadDllp = 7,
    ReplayRollover = 8,
    ReplayTimeout = 12,
    AdvisoryNonFatal = 13,
}

impl CorrectableError {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Receiver,
        Self::BadTlp,
        Self::BadDllp,
        Self::ReplayRollover,
        Self::ReplayTimeout,
        Self::AdvisoryNonFatal,
    ];
}

/// Errors that cost something; the values are their bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum UncorrectableError {
    DataLinkProtocol = 4,
    SurpriseDown = 5,
    PoisonedTlp = 12,
    FlowControlProtocol = 13,
    CompletionTimeout = 14,
    CompleterAbort = 15,
    UnexpectedCompletion = 16,
    ReceiverOverflow = 17,
    MalformedTlp = 18,
    Ecrc = 19,
    UnsupportedRequest = 20,
    AcsViolation = 21,
}

impl UncorrectableError {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::DataLinkProtocol,
        Self::SurpriseDown,
        Self::PoisonedTlp,
        Self::FlowControlProtocol,
        Self::CompletionTimeout,
        Self::CompleterAbort,
        Self::UnexpectedCompletion,
        Self::ReceiverOverflow,
        Self::MalformedTlp,
        Self::Ecrc,
        Self::UnsupportedRequest,
        Self::AcsViolation,
    ];
}

/// An error to inject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InjectedError {
    /// A corrected one.
    Correctable(CorrectableError),
    /// Another one, with the header of the packet it is about.
    Uncorrectable(UncorrectableError, [u32; 4]),
}

impl InjectedError {
    /// The error that has bit `bit` of the correctable or the uncorrectable status, if it can be injected.
    pub fn of_bit(correctable: bool, bit: u8, header: [u32; 4]) -> Option<Self> {
        if correctable {
            let mut all = CorrectableError::ALL.into_iter();
            return all
                .find(|error| *error as u8 == bit)
                .map(InjectedError::Correctable);
        }
        let mut all = UncorrectableError::ALL.into_iter();
        let error = all.find(|error| *error as u8 == bit)?;
        Some(InjectedError::Uncorrectable(error, header))
    }
}

/// How bad a message to the root port says an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorSeverity {
    /// ERR_COR.
    Correctable,
    /// ERR_NONFATAL.
    NonFatal,
    /// ERR_FATAL.
    Fatal,
}

impl Config {
    /// Adds advanced error reporting. The PCI Express capability is there already.
    ///
    /// # Errors
    /// [`PciError::CapabilitySpace`].
    pub(super) fn add_error_reporting(&mut self, root: bool) -> Result<(), PciError> {
        let mut body = [0; ROOT_BYTES - 4];
        let mut writable = [0; ROOT_BYTES - 4];
        let mut define = |register: u16, value: u32, bits: u32| {
            let at = usize::from(register - 4);
            for (structure, value) in [(&mut body, value), (&mut writable, bits)] {
                for (to, from) in structure.iter_mut().skip(at).zip(value.to_le_bytes()) {
                    *to = from;
                }
            }
        };
        define(UNCORRECTABLE_MASK, 0, UNCORRECTABLE);
        define(UNCORRECTABLE_SEVERITY, FATAL, UNCORRECTABLE);
        define(CORRECTABLE_MASK, ADVISORY, CORRECTABLE);
        define(ROOT_COMMAND, 0, ROOT_COMMAND_WRITABLE);
        let bytes = if root { ROOT_BYTES } else { BYTES } - 4;
        let at = self.add_extended_capability(
            EXTENDED_ERRORS,
            VERSION,
            body.get(..bytes).unwrap_or_default(),
            writable.get(..bytes).unwrap_or_default(),
        )?;
        self.define_write_one_clears(at + UNCORRECTABLE_STATUS, &UNCORRECTABLE.to_le_bytes());
        self.define_write_one_clears(at + CORRECTABLE_STATUS, &CORRECTABLE.to_le_bytes());
        if root {
            self.define_write_one_clears(at + ROOT_STATUS, &ROOT_STATUS_EVENTS.to_le_bytes());
        }
        self.errors = Some(at);
        Ok(())
    }

    /// An error happens in the function. Returns the message it sends, if it sends one.
    fn raise(&self, error: InjectedError) -> Result<Option<ErrorSeverity>, PciError> {
        let (Some(express), Some(errors)) = (self.express, self.errors) else {
            return Err(PciError::NoErrorReporting(self.gate().name().to_owned()));
        };
        Ok(self.change(|registers| {
            let mut function = Reporting {
                registers,
                express,
                errors,
            };
            match error {
                InjectedError::Correctable(error) => function.correctable(error as u8),
                InjectedError::Uncorrectable(error, header) => {
                    function.uncorrectable(error as u8, header)
                }
            }
        }))
    }

    /// A message arrives at the root port. Returns whether it interrupts.
    pub(super) fn receive_at_root(&self, severity: ErrorSeverity, requester: u16) -> bool {
        let Some(errors) = self.errors else {
            return false;
        };
        self.change(|registers| record(registers, errors, severity, requester))
    }

    /// Whether a bridge lets an error message from behind it through.
    pub(super) fn forwards_errors(&self) -> bool {
        self.change(|registers| {
            or16(registers, SECONDARY_STATUS, SYSTEM_ERROR);
            registers.read_u16(BRIDGE_CONTROL) & BRIDGE_SERR != 0
        })
    }
}

/// The registers of the function an error happens in.
struct Reporting<'a> {
    registers: &'a mut Registers,
    express: u16,
    errors: u16,
}

impl Reporting<'_> {
    fn correctable(&mut self, bit: u8) -> Option<ErrorSeverity> {
        or16(
            self.registers,
            self.express + DEVICE_STATUS,
            REPORT_CORRECTABLE,
        );
        or32(self.registers, self.errors + CORRECTABLE_STATUS, 1 << bit);
        let masked = self.registers.read(self.errors + CORRECTABLE_MASK, 4) >> bit & 1 != 0;
        let reported = self.device_control() & REPORT_CORRECTABLE != 0;
        (!masked && reported).then_some(ErrorSeverity::Correctable)
    }

    /// The flow of 6.2.5 (figure 6-2).
    fn uncorrectable(&mut self, bit: u8, header: [u32; 4]) -> Option<ErrorSeverity> {
        let unsupported = bit == UncorrectableError::UnsupportedRequest as u8;
        let fatal = self.registers.read(self.errors + UNCORRECTABLE_SEVERITY, 4) >> bit & 1 != 0;
        let (severity, report) = match fatal {
            true => (ErrorSeverity::Fatal, REPORT_FATAL),
            false => (ErrorSeverity::NonFatal, REPORT_NON_FATAL),
        };
        let detected = report | if unsupported { REPORT_UNSUPPORTED } else { 0 };
        or16(self.registers, self.express + DEVICE_STATUS, detected);
        let before = self.registers.read(self.errors + UNCORRECTABLE_STATUS, 4);
        or32(self.registers, self.errors + UNCORRECTABLE_STATUS, 1 << bit);
        if self.registers.read(self.errors + UNCORRECTABLE_MASK, 4) >> bit & 1 != 0 {
            return None;
        }
        self.log(before, bit, header);
        let serr = self.registers.read_u16(COMMAND) & COMMAND_SERR != 0;
        let control = self.device_control();
        let enabled = control & report != 0 && (!unsupported || control & REPORT_UNSUPPORTED != 0);
        if serr {
            or16(self.registers, STATUS, SYSTEM_ERROR);
        }
        (serr || enabled).then_some(severity)
    }

    /// The first error since the guest looked is the one whose header is kept.
    fn log(&mut self, status_before: u32, bit: u8, header: [u32; 4]) {
        let at = self.errors + CONTROL;
        let control = self.registers.read(at, 4);
        if status_before >> (control & FIRST_ERROR) & 1 != 0 {
            return;
        }
        let control = control & !FIRST_ERROR | u32::from(bit);
        self.registers.set(at, &control.to_le_bytes());
        for (offset, dword) in (self.errors + HEADER_LOG..).step_by(4).zip(header) {
            self.registers.set(offset, &dword.to_le_bytes());
        }
    }

    fn device_control(&self) -> u16 {
        self.registers.read_u16(self.express + DEVICE_CONTROL)
    }
}

/// What a root port does with a message. Returns whether it interrupts.
fn record(registers: &mut Registers, at: u16, severity: ErrorSeverity, requester: u16) -> bool {
    let status = registers.read(at + ROOT_STATUS, 4);
    let (received, source, enable) = match severity {
        ErrorSeverity::Correctable => (1, ERROR_SOURCE, 1),
        ErrorSeverity::NonFatal => (1 << 2, ERROR_SOURCE + 2, 2),
        ErrorSeverity::Fatal => (1 << 2, ERROR_SOURCE + 2, 4),
    };
    let mut events = received;
    if status & received != 0 {
        events |= received << 1;
    } else {
        registers.set(at + source, &requester.to_le_bytes());
        if severity == ErrorSeverity::Fatal {
            events |= 1 << 4;
        }
    }
    events |= match severity {
        ErrorSeverity::Correctable => 0,
        ErrorSeverity::NonFatal => 1 << 5,
        ErrorSeverity::Fatal => 1 << 6,
    };
    or32(registers, at + ROOT_STATUS, events);
    registers.read(at + ROOT_COMMAND, 4) & enable != 0
}

impl HostBridge {
    /// Makes `error` happen in the function the guest knows as `devfn` of bus `bus`: its status bits are set, and unless
    /// the guest has masked it the root port above is told and interrupts.
    ///
    /// # Errors
    /// [`PciError::NoErrorReporting`].
    pub fn inject_error(
        &self,
        bus: u8,
        devfn: Devfn,
        error: InjectedError,
    ) -> Result<(), PciError> {
        report(self.bus(), 0, (bus, devfn), error).map(drop)
    }
}

/// Carries an error from its function, `target`, up to the bus `own`. Returns the message that arrives there.
fn report(
    bus: &Bus,
    own: u8,
    target: (u8, Devfn),
    error: InjectedError,
) -> Result<Option<ErrorSeverity>, PciError> {
    let (number, devfn) = target;
    let requester = u16::from(number) << 8 | u16::from(devfn.bits());
    let missing = || PciError::NoErrorReporting(format!("{number:02x}:{devfn}"));
    if number == own {
        let function = bus.enter(devfn).ok_or_else(missing)?;
        let message = function.function.config().raise(error)?;
        // A root port's own errors go to its own root registers.
        return Ok(message.filter(|&it| function.function.receive_own_error(it, requester)));
    }
    let entered = bus.enter_bridge_to(number).ok_or_else(missing)?;
    let bridge = entered.function.config().bridge().ok_or_else(missing)?;
    let message = report(bridge.bus(), bridge.secondary(), target, error)?;
    Ok(message.filter(|&it| entered.function.receive_error(it, requester)))
}

fn or16(registers: &mut Registers, at: u16, bits: u16) {
    let value = registers.read_u16(at) | bits;
    registers.set(at, &value.to_le_bytes());
}

fn or32(registers: &mut Registers, at: u16, bits: u32) {
    let value = registers.read(at, 4) | bits;
    registers.set(at, &value.to_le_bytes());
}
