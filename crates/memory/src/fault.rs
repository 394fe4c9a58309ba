// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Accesses to guest memory that fail instead of ending the process.
//!
//! A mapped file can be cut short by somebody else, a page can be broken, a filesystem can run
//! full: the access then raises SIGBUS or SIGSEGV. Each instruction here that touches guest memory
//! has an entry in a table, of where it is and where to go on; the signal's receiver looks the
//! instruction up, sets the register that tells the failure and goes on there. An access that
//! does not fault pays for a register set to zero and a branch that is never taken.
//!
//! ```text
//!   eax = 0                      fault at 2: ──► kernel ──► on_fault: found in the table?
//!   2: mov value, [guest]                                     yes: eax = 1, rip = 3
//!   3: eax != 0 ──► Fault                                     no:  who was there before
//! ```
//!
//! On machines other than x86-64, and under Miri, accesses are plain and fault as they do.

use std::io;

/// Memory that the host did not provide. What lies before the first byte that failed was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// Bytes copied.
    pub(crate) done: usize,
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
pub(crate) use guarded::{copy, install, load, store};
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
pub(crate) use plain::{copy, install, load, store};

/// Integers that one instruction moves.
pub(crate) trait Word: Copy {
    /// # Safety
    /// As [`load`].
    unsafe fn load(guest: *const Self) -> Result<Self, Fault>;
    /// # Safety
    /// As [`store`].
    unsafe fn store(guest: *mut Self, value: Self) -> Result<(), Fault>;
    /// As `store`, and not reordered with later loads.
    ///
    /// # Safety
    /// As [`store`].
    unsafe fn store_fenced(guest: *mut Self, value: Self) -> Result<(), Fault>;
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod guarded {
    use std::arch::asm;
    use std::ffi::{c_int, c_void};
    use std::ptr;
    use std::sync::{Mutex, OnceLock};

    use super::{Fault, Word, io};

    /// Where an instruction is, and where to go on when it faults: distances from the fields
    /// themselves, so that the table needs no relocation when the program is loaded.
    #[repr(C)]
    struct Site {
        instruction: i32,
        resume: i32,
    }

    unsafe extern "C" {
        // The linker makes these for a section whose name is an identifier.
        #[link_name = "__start_ebbtide_faults"]
        static FIRST: Site;
        #[link_name = "__stop_ebbtide_faults"]
        static END: Site;
    }

    /// An entry for the instruction between the labels 2 and 3. The section is retained, as
    /// nothing refers to its parts.
    macro_rules! site {
        () => {
            concat!(
                ".pushsection ebbtide_faults,\"aR\",@progbits\n",
                ".balign 4\n",
                ".long 2b - .\n",
                ".long 3b - .\n",
                ".popsection"
            )
        };
    }

    macro_rules! word {
        ($int:ty, $class:ident, $load:literal, $store:literal, $exchange:literal) => {
            impl Word for $int {
                #[inline(always)]
                unsafe fn load(guest: *const $int) -> Result<$int, Fault> {
                    let (value, failed): ($int, u32);
                    // SAFETY: reads the guest's word, or faults, which the table answers. To the
                    // compiler it touches all memory: nothing moves across it.
                    unsafe {
                        asm!($load, "3:", site!(),
                            guest = in(reg) guest,
                            value = out($class) value,
                            inout("eax") 0 => failed,
                            options(nostack, preserves_flags));
                    }
                    if failed == 0 { Ok(value) } else { Err(Fault { done: 0 }) }
                }

                #[inline(always)]
                unsafe fn store(guest: *mut $int, value: $int) -> Result<(), Fault> {
                    let failed: u32;
                    // SAFETY: as above, for a write.
                    unsafe {
                        asm!($store, "3:", site!(),
                            guest = in(reg) guest,
                            value = in($class) value,
                            inout("eax") 0 => failed,
                            options(nostack, preserves_flags));
                    }
                    if failed == 0 { Ok(()) } else { Err(Fault { done: 0 }) }
                }

                #[inline(always)]
                unsafe fn store_fenced(guest: *mut $int, value: $int) -> Result<(), Fault> {
                    let failed: u32;
                    // SAFETY: as above; an exchange with memory is locked.
                    unsafe {
                        asm!($exchange, "3:", site!(),
                            guest = in(reg) guest,
                            value = inout($class) value => _,
                            inout("eax") 0 => failed,
                            options(nostack, preserves_flags));
                    }
                    if failed == 0 { Ok(()) } else { Err(Fault { done: 0 }) }
                }
            }
        };
    }

    word!(
        u8,
        reg_byte,
        "2: mov {value}, byte ptr [{guest}]",
        "2: mov byte ptr [{guest}], {value}",
        "2: xchg byte ptr [{guest}], {value}"
    );
    word!(
        u16,
        reg,
        "2: mov {value:x}, word ptr [{guest}]",
        "2: mov word ptr [{guest}], {value:x}",
        "2: xchg word ptr [{guest}], {value:x}"
    );
    word!(
        u32,
        reg,
        "2: mov {value:e}, dword ptr [{guest}]",
        "2: mov dword ptr [{guest}], {value:e}",
        "2: xchg dword ptr [{guest}], {value:e}"
    );
    word!(
        u64,
        reg,
        "2: mov {value}, qword ptr [{guest}]",
        "2: mov qword ptr [{guest}], {value}",
        "2: xchg qword ptr [{guest}], {value}"
    );

    /// Loads a word of any alignment; when aligned, atomically and with acquire ordering.
    ///
    /// # Safety
    /// `guest` must be an address in guest memory that nobody unmaps meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn load<T: Word>(guest: *const T) -> Result<T, Fault> {
        // SAFETY: the caller's promise.
        unsafe { T::load(guest) }
    }

    /// Stores a word of any alignment; when aligned, atomically and with release ordering.
    ///
    /// # Safety
    /// As [`load`], of memory that the caller may write to.
    #[inline(always)]
    pub(crate) unsafe fn store<T: Word>(guest: *mut T, value: T) -> Result<(), Fault> {
        // SAFETY: the caller's promise.
        unsafe { T::store(guest, value) }
    }

    /// Copies bytes one way or the other between guest memory and memory of ours.
    ///
    /// # Safety
    /// The guest's side as in [`load`] and [`store`], the other valid for `len` bytes; they must
    /// not overlap.
    pub(crate) unsafe fn copy(source: *const u8, target: *mut u8, len: usize) -> Result<(), Fault> {
        let left: usize;
        // SAFETY: the caller vouches for both ranges; the direction flag is clear by the ABI. An
        // instruction that is interrupted by a fault leaves in rcx what it has not copied, so
        // eax tells nothing more.
        unsafe {
            asm!("2: rep movsb", "3:", site!(),
                inout("rcx") len => left,
                inout("rsi") source => _,
                inout("rdi") target => _,
                out("eax") _,
                options(nostack, preserves_flags));
        }
        if left == 0 {
            Ok(())
        } else {
            Err(Fault { done: len - left })
        }
    }

    /// Where to go on after a fault at `instruction`.
    fn resume_at(instruction: u64) -> Option<u64> {
        let from =
            |field: &i32| (ptr::from_ref(field) as u64).wrapping_add_signed(i64::from(*field));
        let mut site = &raw const FIRST;
        while site < &raw const END {
            // SAFETY: between the two symbols the linker has put sites only.
            let here = unsafe { &*site };
            if from(&here.instruction) == instruction {
                return Some(from(&here.resume));
            }
            site = site.wrapping_add(1);
        }
        None
    }

    const SIGNALS: [c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

    /// Who received the signals before.
    static BEFORE: [OnceLock<libc::sigaction>; 2] = [const { OnceLock::new() }; 2];

    /// Receives the two signals from now on. What is none of ours goes to whoever received them
    /// before. Once in a process; later calls do nothing.
    pub(crate) fn install() -> io::Result<()> {
        static INSTALLING: Mutex<()> = Mutex::new(());
        // An entry that is never used: without any, as in a program that has no copy left when it
        // is optimised, the linker knows no table, and refuses.
        // SAFETY: does nothing.
        unsafe {
            asm!(
                "2: nop",
                "3:",
                site!(),
                options(nostack, nomem, preserves_flags)
            )
        };
        let _installing = INSTALLING
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        for (signal, before) in SIGNALS.into_iter().zip(&BEFORE) {
            if before.get().is_some() {
                continue;
            }
            // SAFETY: all zeroes is a valid sigaction, and the calls read and write it.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                if libc::sigaction(signal, ptr::null(), &mut action) != 0 {
                    return Err(io::Error::last_os_error());
                }
                // Before it can be needed.
                let _ = before.set(action);
                action.sa_sigaction = on_fault as *const () as usize;
                // On the alternate stack, as std's own receiver, that tells stack overflows.
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigemptyset(&mut action.sa_mask);
                if libc::sigaction(signal, &action, ptr::null_mut()) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(())
    }

    /// Async-signal-safe: reads the table and writes registers.
    extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        // SAFETY: a receiver with SA_SIGINFO gets both from the kernel.
        let (code, registers) = unsafe {
            let context = &mut *context.cast::<libc::ucontext_t>();
            ((*info).si_code, &mut context.uc_mcontext.gregs)
        };
        // Codes of the kernel are positive: a signal that somebody sent is no fault.
        if code > 0
            && let Some(resume) = resume_at(registers[libc::REG_RIP as usize] as u64)
        {
            registers[libc::REG_RIP as usize] = resume as i64;
            registers[libc::REG_RAX as usize] = 1;
            return;
        }
        hand_on(signal, info, context);
    }

    /// Gives the signal to whoever received it before us.
    fn hand_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        let at = usize::from(signal == libc::SIGBUS);
        let Some(before) = BEFORE.get(at).and_then(OnceLock::get) else {
            return;
        };
        match before.sa_sigaction {
            // SAFETY: sets the default action and, for a signal that was sent, sends it again; a
            // fault comes again by itself. The process ends with the right status.
            libc::SIG_DFL => unsafe {
                libc::sigaction(signal, before, ptr::null_mut());
                if (*info).si_code <= 0 {
                    libc::raise(signal);
                }
            },
            // Sent: ignored. A fault would come again for ever: the kernel ends the process then.
            // SAFETY: as above.
            libc::SIG_IGN => unsafe {
                if (*info).si_code > 0 {
                    libc::signal(signal, libc::SIG_DFL);
                }
            },
            // SAFETY: an address the process itself has registered, of the kind its flags say.
            action => unsafe {
                if before.sa_flags & libc::SA_SIGINFO != 0 {
                    type Full = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
                    std::mem::transmute::<usize, Full>(action)(signal, info, context);
                } else {
                    std::mem::transmute::<usize, extern "C" fn(c_int)>(action)(signal);
                }
            },
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
mod plain {
    use std::sync::atomic::Ordering::{Acquire, Release, SeqCst};
    use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

    use super::{Fault, Word, io};

    macro_rules! word {
        ($int:ty, $atomic:ty) => {
            impl Word for $int {
                #[inline(always)]
                unsafe fn load(guest: *const $int) -> Result<$int, Fault> {
                    if guest.is_aligned() {
                        // SAFETY: the caller's promise; aligned.
                        return Ok(unsafe { <$atomic>::from_ptr(guest.cast_mut()) }.load(Acquire));
                    }
                    let mut bytes = [0; size_of::<$int>()];
                    // SAFETY: the caller's promise; both sides have this many bytes.
                    unsafe { copy(guest.cast(), bytes.as_mut_ptr(), bytes.len()) }?;
                    Ok(<$int>::from_ne_bytes(bytes))
                }

                #[inline(always)]
                unsafe fn store(guest: *mut $int, value: $int) -> Result<(), Fault> {
                    if guest.is_aligned() {
                        // SAFETY: the caller's promise; aligned.
                        unsafe { <$atomic>::from_ptr(guest) }.store(value, Release);
                        return Ok(());
                    }
                    let bytes = value.to_ne_bytes();
                    // SAFETY: the caller's promise; both sides have this many bytes.
                    unsafe { copy(bytes.as_ptr(), guest.cast(), bytes.len()) }
                }

                #[inline(always)]
                unsafe fn store_fenced(guest: *mut $int, value: $int) -> Result<(), Fault> {
                    // SAFETY: the caller's promise; fenced stores are aligned.
                    unsafe { <$atomic>::from_ptr(guest) }.store(value, SeqCst);
                    Ok(())
                }
            }
        };
    }

    word!(u8, AtomicU8);
    word!(u16, AtomicU16);
    word!(u32, AtomicU32);
    word!(u64, AtomicU64);

    /// Loads a word of any alignment; when aligned, atomically and with acquire ordering.
    ///
    /// # Safety
    /// `guest` must be valid for reads.
    #[inline(always)]
    pub(crate) unsafe fn load<T: Word>(guest: *const T) -> Result<T, Fault> {
        // SAFETY: the caller's promise.
        unsafe { T::load(guest) }
    }

    /// Stores a word of any alignment; when aligned, atomically and with release ordering.
    ///
    /// # Safety
    /// `guest` must be valid for writes.
    #[inline(always)]
    pub(crate) unsafe fn store<T: Word>(guest: *mut T, value: T) -> Result<(), Fault> {
        // SAFETY: the caller's promise.
        unsafe { T::store(guest, value) }
    }

    /// # Safety
    /// As `ptr::copy_nonoverlapping`, except that either side may change meanwhile.
    pub(crate) unsafe fn copy(source: *const u8, target: *mut u8, len: usize) -> Result<(), Fault> {
        for at in 0..len {
            // SAFETY: the caller vouches for both ranges.
            unsafe {
                target
                    .add(at)
                    .write_volatile(source.add(at).read_volatile())
            };
        }
        Ok(())
    }

    /// There is nothing to receive.
    pub(crate) fn install() -> io::Result<()> {
        Ok(())
    }
}
