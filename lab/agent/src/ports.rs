// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! I/O ports, reached as a driver would: with the processor's own instructions.

use std::arch::asm;
use std::io;
use std::ops::RangeInclusive;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::protocol::{PortValue, PortWritten};

/// Writes `value` and measures how long the instruction took. Whoever answers the write holds the processor for as long,
/// and with it this thread.
///
/// # Errors
/// The width is not 1, 2 or 4; the value does not fit; the ports are beyond the last one; the kernel does not give them.
pub fn write(port: u16, value: u32, width: u8) -> Result<PortWritten> {
    ensure!(
        u64::from(value) >> (8 * u32::from(width.min(4))) == 0,
        "value {value:#x} does not fit into {width} bytes"
    );
    let _open = Open::new(port, width)?;
    let begun = Instant::now();
    // SAFETY: `_open` gave this thread the ports, so the instruction is allowed; it touches no memory and no flags. What
    // the device behind it does to the machine is what the lab asked for.
    unsafe {
        match width {
            1 => {
                asm!("out dx, al", in("dx") port, in("al") value as u8, options(nomem, nostack, preserves_flags))
            }
            2 => {
                asm!("out dx, ax", in("dx") port, in("ax") value as u16, options(nomem, nostack, preserves_flags))
            }
            _ => {
                asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags))
            }
        }
    }
    let ns = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
    Ok(PortWritten { ns })
}

/// Reads a port.
///
/// # Errors
/// As [`write`].
pub fn read(port: u16, width: u8) -> Result<PortValue> {
    let _open = Open::new(port, width)?;
    // SAFETY: as in `write`.
    let value = unsafe {
        match width {
            1 => {
                let value: u8;
                asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags));
                u32::from(value)
            }
            2 => {
                let value: u16;
                asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags));
                u32::from(value)
            }
            _ => {
                let value: u32;
                asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags));
                value
            }
        }
    };
    Ok(PortValue { value })
}

/// Ports this thread may use as long as this lives.
struct Open(RangeInclusive<u16>);

impl Open {
    fn new(port: u16, width: u8) -> Result<Open> {
        if !matches!(width, 1 | 2 | 4) {
            bail!("width {width}: a port is accessed with 1, 2 or 4 bytes");
        }
        let last = port
            .checked_add(u16::from(width) - 1)
            .with_context(|| format!("port {port:#x}: {width} bytes are beyond the last port"))?;
        let ports = port..=last;
        permit(&ports, true).with_context(|| format!("use port {port:#x}"))?;
        Ok(Open(ports))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        // What fails here is of no use to anybody: the thread ends after the answer.
        let _ = permit(&self.0, false);
    }
}

fn permit(ports: &RangeInclusive<u16>, on: bool) -> io::Result<()> {
    let (first, last) = (u64::from(*ports.start()), u64::from(*ports.end()));
    // SAFETY: changes nothing but which ports this thread may use.
    if unsafe { libc::ioperm(first, last - first + 1, i32::from(on)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_access_is_refused_before_a_port_is_touched() {
        for (port, value, width, part) in [
            (0x80, 0, 3, "width 3"),
            (0x80, 0, 0, "width 0"),
            (0x80, 0x100, 1, "does not fit"),
            (0x80, 0x1_0000, 2, "does not fit"),
            (0xffff, 0, 2, "beyond"),
        ] {
            let error = format!("{:#}", write(port, value, width).unwrap_err());
            assert!(error.contains(part), "{error}");
        }
        assert!(read(0xfffd, 4).is_err());
    }
}
