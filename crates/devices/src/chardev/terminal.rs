// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A terminal in raw mode, and back.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::termios::{
    ControlModes, InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios,
    isatty, tcgetattr, tcgetpgrp, tcsetattr,
};
use signal_hook::SigId;
use signal_hook::consts::{SIGABRT, SIGCONT, SIGQUIT};
use signal_hook::low_level::{emulate_default_handler, register, unregister};

/// Signals that end the process without its destructors being run. Those that end it in order are not here: whoever
/// handles them drops the [`RawTerminal`]. Nor is SIGBUS: accesses to guest memory recover from it.
const FATAL: [i32; 2] = [SIGQUIT, SIGABRT];

/// Keeps a terminal in raw mode; dropping it restores what was before, and so does a fatal signal.
pub(super) struct RawTerminal {
    saved: Arc<Saved>,
    handlers: Vec<SigId>,
}

struct Saved {
    terminal: OwnedFd,
    before: Termios,
    raw: Termios,
}

impl Saved {
    // Two ioctls each: they allocate nothing and may be called by a signal handler.
    fn restore(&self) {
        self.set(&self.before);
    }

    fn apply(&self) {
        self.set(&self.raw);
    }

    /// A process in the background must not change the terminal: it would be stopped.
    fn set(&self, mode: &Termios) {
        if in_foreground(&self.terminal) {
            let _ = tcsetattr(&self.terminal, OptionalActions::Now, mode);
        }
    }
}

fn in_foreground(terminal: &OwnedFd) -> bool {
    tcgetpgrp(terminal) == Ok(rustix::process::getpgrp())
}

impl RawTerminal {
    /// Puts `terminal` into raw mode, or does so as soon as this process is brought to its foreground. `None` when it is
    /// not a terminal, or none that controls this process.
    pub(super) fn enter(terminal: OwnedFd) -> io::Result<Option<Self>> {
        if !isatty(&terminal) || tcgetpgrp(&terminal).is_err() {
            return Ok(None);
        }
        let before = tcgetattr(&terminal)?;
        let raw = raw_mode(before.clone());
        let mut this = Self {
            saved: Arc::new(Saved {
                terminal,
                before,
                raw,
            }),
            handlers: Vec::new(),
        };
        this.install_handlers()?;
        this.saved.apply();
        Ok(Some(this))
    }

    /// Whether this process may read from the terminal.
    pub(super) fn in_foreground(&self) -> bool {
        in_foreground(&self.saved.terminal)
    }

    fn install_handlers(&mut self) -> io::Result<()> {
        for signal in FATAL {
            let saved = Arc::clone(&self.saved);
            let action = move || {
                saved.restore();
                let _ = emulate_default_handler(signal);
            };
            // SAFETY: the action makes two ioctls and then dies of the signal: nothing that is not async-signal-safe, and
            // no return to an instruction that faulted.
            self.handlers.push(unsafe { register(signal, action) }?);
        }
        let saved = Arc::clone(&self.saved);
        // The shell has its own mode while the process is stopped or in the background.
        // SAFETY: the action makes two ioctls, which are async-signal-safe.
        self.handlers
            .push(unsafe { register(SIGCONT, move || saved.apply()) }?);
        Ok(())
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            unregister(handler);
        }
        self.saved.restore();
    }
}

/// Bytes pass as they are typed, without echo. Output is still processed, for the guest's own terminal driver has done
/// its part and lines of the host's log are to look right; Ctrl-C, Ctrl-\ and Ctrl-Z still send signals.
fn raw_mode(mut mode: Termios) -> Termios {
    mode.input_modes -= InputModes::IGNBRK
        | InputModes::BRKINT
        | InputModes::PARMRK
        | InputModes::ISTRIP
        | InputModes::INLCR
        | InputModes::IGNCR
        | InputModes::ICRNL
        | InputModes::IXON;
    mode.output_modes |= OutputModes::OPOST;
    mode.local_modes -=
        LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::IEXTEN;
    mode.local_modes |= LocalModes::ISIG;
    mode.control_modes -= ControlModes::CSIZE | ControlModes::PARENB;
    mode.control_modes |= ControlModes::CS8;
    mode.special_codes[SpecialCodeIndex::VMIN] = 1;
    mode.special_codes[SpecialCodeIndex::VTIME] = 0;
    mode
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

    fn pseudo_terminal() -> (OwnedFd, OwnedFd) {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        let path = ptsname(&controller, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        (
            controller,
            rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap(),
        )
    }

    #[test]
    fn raw_mode_passes_bytes_and_keeps_signals() {
        let (_controller, terminal) = pseudo_terminal();
        let before = tcgetattr(&terminal).unwrap();
        assert!(
            before
                .local_modes
                .contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
        );
        tcsetattr(&terminal, OptionalActions::Now, &raw_mode(before)).unwrap();
        let after = tcgetattr(&terminal).unwrap();
        assert!(
            !after
                .local_modes
                .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::IEXTEN)
        );
        assert!(after.local_modes.contains(LocalModes::ISIG));
        assert!(
            !after
                .input_modes
                .intersects(InputModes::ICRNL | InputModes::IXON)
        );
        assert!(after.output_modes.contains(OutputModes::OPOST));
    }

    #[test]
    fn what_is_no_terminal_of_ours_is_left_alone() {
        let (_controller, terminal) = pseudo_terminal();
        let before = tcgetattr(&terminal).unwrap().local_modes;
        let watch = terminal.try_clone().unwrap();
        // A terminal, but not the one that controls this process.
        assert!(RawTerminal::enter(terminal).unwrap().is_none());
        assert_eq!(tcgetattr(&watch).unwrap().local_modes, before);
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(RawTerminal::enter(reader.into()).unwrap().is_none());
    }
}
