// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What ends the process when a thread makes a system call that its filter forbids.
//!
//! The kernel does not carry the call out and raises SIGSYS. The receiver says which thread it was and which call, and
//! ends the process; should the signal be blocked, the kernel ends it without a word. Only a vCPU that was to close a
//! descriptor goes on: it must not be the last that knows a file, but it is no reason to end a guest.

use std::ffi::{c_int, c_void};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use super::calls::VCPU_TOLD;

/// As a shell reports an end by this signal.
const EXIT_CODE: c_int = 128 + libc::SIGSYS;
/// Lines about descriptors that stay open, at most: a guest may be able to bring them about.
const TOLD_AT_MOST: u32 = 32;
/// Of a thread's name, with the zero at its end.
const NAME_BYTES: usize = 16;
const LINE_BYTES: usize = 160;

/// Begins to receive SIGSYS, for the whole process.
pub(super) fn receive() -> io::Result<()> {
    // SAFETY: sigaction is plain data for which all zeroes is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_violation as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void)
        as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    // SAFETY: both pointers are valid or null; the receiver makes only calls that may be made in one.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The part of siginfo_t that SIGSYS fills in (sigaction(2), asm-generic/siginfo.h).
#[repr(C)]
struct Violation {
    signo: c_int,
    errno: c_int,
    code: c_int,
    _pad: c_int,
    _call_address: *mut c_void,
    call: c_int,
    _arch: u32,
}

/// `SYS_SECCOMP`: the reason in `si_code` is a filter.
const BY_FILTER: c_int = 1;

extern "C" fn on_violation(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands over a siginfo_t, which is larger than its part for this signal.
    let violation = unsafe { info.cast::<Violation>().read() };
    let mut line = Line::new();
    let mut name = [0u8; NAME_BYTES];
    // SAFETY: the kernel writes at most 16 bytes, the last a zero. All filters let this pass.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    line.put(b"ebbtide: thread `");
    line.put(name.split(|byte| *byte == 0).next().unwrap_or_default());
    if violation.code == BY_FILTER {
        // SAFETY: the kernel hands over a ucontext_t; the signal is raised at the call, so that the registers are those
        // of its arguments, and the call's result is what is in RAX when it returns.
        let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
        if i64::from(violation.call) == VCPU_TOLD {
            registers[libc::REG_RAX as usize] = -i64::from(libc::EPERM);
            line.put(b"` was the last to know descriptor ");
            line.number(registers[libc::REG_RDI as usize] as u32);
            line.put(b", which its seccomp filter forbids to close: it stays open\n");
            return line.tell();
        }
        line.put(b"` made system call ");
        line.number(violation.call.unsigned_abs());
        line.put(b" (");
        // Commands, flags and descriptors have 32 bits.
        line.number(registers[libc::REG_RDI as usize] as u32);
        line.put(b", ");
        line.number(registers[libc::REG_RSI as usize] as u32);
        line.put(
            b"), which its seccomp filter forbids: ended (--seccomp log lets such calls pass)\n",
        );
    } else {
        line.put(b"` was sent SIGSYS: ended\n");
    }
    line.write();
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(EXIT_CODE) }
}

/// Text without an allocation; what does not fit is cut.
struct Line {
    bytes: [u8; LINE_BYTES],
    length: usize,
}

impl Line {
    fn new() -> Line {
        Line {
            bytes: [0; LINE_BYTES],
            length: 0,
        }
    }

    /// Writes it to standard error.
    fn write(&self) {
        // SAFETY: writes what was filled in.
        unsafe { libc::write(libc::STDERR_FILENO, self.bytes.as_ptr().cast(), self.length) };
    }

    /// The same, unless that was done often.
    fn tell(&self) {
        static TOLD: AtomicU32 = AtomicU32::new(0);
        if TOLD.fetch_add(1, Ordering::Relaxed) < TOLD_AT_MOST {
            self.write();
        }
    }

    fn put(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(at) = self.bytes.get_mut(self.length) {
                *at = *byte;
                self.length += 1;
            }
        }
    }

    fn number(&mut self, mut value: u32) {
        let mut digits = [0u8; 10];
        let mut first = digits.len();
        for (at, digit) in digits.iter_mut().enumerate().rev() {
            // Below 10.
            *digit = b'0' + (value % 10) as u8;
            first = at;
            value /= 10;
            if value == 0 {
                break;
            }
        }
        self.put(digits.get(first..).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_hold_text_and_numbers_and_never_more_than_fits() {
        let mut line = Line::new();
        line.put(b"call ");
        for value in [0, 7, 257, u32::MAX] {
            line.number(value);
            line.put(b" ");
        }
        assert_eq!(&line.bytes[..line.length], b"call 0 7 257 4294967295 ");
        line.put(&[b'x'; 2 * LINE_BYTES]);
        assert_eq!(line.length, LINE_BYTES);
    }
}
