// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Direct kernel boot: a bzImage or an ELF `vmlinux`, by the 64-bit entry of the Linux boot
//! protocol (Documentation/arch/x86/boot.rst), with an optional initial RAM disk.
//!
//! [`BootImage`] keeps the files open, so that a system reset can load them again after the guest
//! has written over them, also when the path has since gone.
//!
//! ```text
//! 0x0500   GDT                     0x7000   zero page (boot_params)
//! 0x9000   page tables (identity, 4 GiB in 2 MiB pages)
//! 0x2_0000 command line            0x10_0000 and up: the kernel
//! end of low RAM, downwards: the initrd
//! ```

mod tables;
mod zero_page;

use std::ffi::CString;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use linux_loader::loader::{
    Cmdline, KernelLoader, KernelLoaderResult, bootparam::setup_header, bzimage::BzImage, elf::Elf,
    load_cmdline,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::Error;
use crate::layout::{Layout, MIB};

/// Where the page tables of the entry state start (CR3).
pub const PAGE_TABLES: u64 = 0x9000;
/// Where the GDT of the entry state is.
pub const GDT: u64 = 0x500;
/// Stack of the entry state; the kernel sets its own at once.
pub const STACK: u64 = 0x8ff0;
const ZERO_PAGE: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
const KERNEL_LOAD: u64 = MIB;
/// Of a bzImage, the 64-bit entry point lies this far behind its load address.
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// `xloadflags` bit: the kernel has the 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// The command line of a kernel whose header does not tell.
const ELF_CMDLINE_SIZE: usize = 2048;
/// An initrd may lie anywhere below this if the header does not tell.
const DEFAULT_INITRD_MAX: u64 = 0x37ff_ffff;

/// What to start.
#[derive(Clone, Debug)]
pub struct BootSpec {
    /// A bzImage or an ELF kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, complete.
    pub cmdline: String,
}

/// Where a loaded kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First instruction, in 64-bit mode.
    pub rip: u64,
    /// The zero page, handed over in RSI.
    pub rsi: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    BzImage,
    Elf,
}

/// The opened and checked files of a [`BootSpec`].
#[derive(Debug)]
pub struct BootImage {
    spec: BootSpec,
    kernel: File,
    kind: Kind,
    initrd: Option<(File, u64)>,
    cmdline: Cmdline,
}

impl BootImage {
    /// Opens the files and checks what can be checked without guest memory.
    ///
    /// # Errors
    /// A file that is missing, unreadable, empty, truncated or no kernel; a command line with a
    /// NUL or longer than the kernel takes.
    pub fn open(spec: BootSpec) -> Result<BootImage, Error> {
        let (mut kernel, kernel_bytes) = open_file("kernel", &spec.kernel)?;
        let (kind, cmdline_max) = examine(&mut kernel, kernel_bytes, &spec.kernel)?;
        let initrd = match &spec.initrd {
            Some(path) => Some(open_file("initrd", path)?),
            None => None,
        };
        let cmdline = command_line(&spec.cmdline, cmdline_max)?;
        Ok(BootImage {
            spec,
            kernel,
            kind,
            initrd,
            cmdline,
        })
    }

    /// The command line as the kernel gets it.
    pub fn command_line(&self) -> &str {
        &self.spec.cmdline
    }

    /// Writes kernel, initrd, command line, zero page, page tables and GDT into guest memory.
    ///
    /// Reads files: not for threads that must not block.
    ///
    /// # Errors
    /// What does not fit into `layout`'s low RAM, and files that changed or can't be read.
    pub fn load<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        layout: &Layout,
        rsdp: u64,
    ) -> Result<Entry, Error> {
        let loaded = self.load_kernel(memory, layout)?;
        load_cmdline(memory, GuestAddress(COMMAND_LINE), &self.cmdline)
            .map_err(|e| Error::Boot(format!("the command line can't be loaded: {e}")))?;
        let mut header = loaded.setup_header.unwrap_or_default();
        let initrd = self.load_initrd(memory, layout, &loaded, &header)?;
        zero_page::complete_header(&mut header, COMMAND_LINE, self.cmdline_len()?, initrd);
        zero_page::write(memory, ZERO_PAGE, header, layout, rsdp)?;
        tables::write(memory, PAGE_TABLES, GDT)?;
        let rip = match self.kind {
            Kind::BzImage => loaded.kernel_load.0 + BZIMAGE_ENTRY_64,
            Kind::Elf => loaded.kernel_load.0,
        };
        Ok(Entry {
            rip,
            rsi: ZERO_PAGE,
        })
    }

    fn cmdline_len(&self) -> Result<u32, Error> {
        let text = self
            .cmdline
            .as_cstring()
            .map_err(|e| Error::Boot(format!("the command line: {e}")))?;
        u32::try_from(text.as_bytes_with_nul().len())
            .map_err(|_| Error::Boot("the command line is longer than 4 GiB".into()))
    }

    fn load_kernel<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        layout: &Layout,
    ) -> Result<KernelLoaderResult, Error> {
        let mut file = self.kernel.try_clone().map_err(|e| self.kernel_error(&e))?;
        file.seek(SeekFrom::Start(0))
            .map_err(|e| self.kernel_error(&e))?;
        let start = Some(GuestAddress(KERNEL_LOAD));
        let loaded = match self.kind {
            Kind::BzImage => BzImage::load(memory, start, &mut file, start),
            Kind::Elf => Elf::load(memory, None, &mut file, start),
        }
        .map_err(|e| {
            Error::Boot(format!(
                "kernel {}: can't be loaded into {} MiB of low memory: {e}",
                self.spec.kernel.display(),
                layout.low_ram.end / MIB
            ))
        })?;
        let room = loaded
            .setup_header
            .map_or(0, |h| h.pref_address.saturating_add(u64::from(h.init_size)));
        if room > layout.low_ram.end {
            return Err(Error::Boot(format!(
                "kernel {}: needs {} MiB to start, the guest has {} MiB of low memory",
                self.spec.kernel.display(),
                room.div_ceil(MIB),
                layout.low_ram.end / MIB
            )));
        }
        Ok(loaded)
    }

    fn kernel_error(&self, e: &std::io::Error) -> Error {
        Error::File {
            what: "kernel",
            path: self.spec.kernel.clone(),
            reason: e.to_string(),
        }
    }

    /// Places the initrd as high in low RAM as the kernel allows: it is then out of the way of the
    /// decompressor, wherever that puts the kernel.
    fn load_initrd<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        layout: &Layout,
        loaded: &KernelLoaderResult,
        header: &setup_header,
    ) -> Result<Option<(u64, u64)>, Error> {
        let (Some((file, len)), Some(path)) = (&self.initrd, &self.spec.initrd) else {
            return Ok(None);
        };
        let limit = match header.initrd_addr_max {
            0 => DEFAULT_INITRD_MAX,
            max => u64::from(max),
        };
        let top = layout.low_ram.end.min(limit.saturating_add(1));
        // The decompressed kernel may be put at its preferred address and needs init_size there.
        let kernel_end = loaded.kernel_end.max(
            header
                .pref_address
                .saturating_add(u64::from(header.init_size)),
        );
        let start = top.checked_sub(*len).map(|s| s & !0xfff);
        let Some(start) = start.filter(|&s| s >= kernel_end) else {
            return Err(Error::Boot(format!(
                "initrd {}: its {} MiB do not fit behind the kernel in {} MiB of low memory",
                path.display(),
                len.div_ceil(MIB),
                layout.low_ram.end / MIB
            )));
        };
        let failed = |reason: String| Error::File {
            what: "initrd",
            path: path.clone(),
            reason,
        };
        let mut file = file.try_clone().map_err(|e| failed(e.to_string()))?;
        file.seek(SeekFrom::Start(0))
            .map_err(|e| failed(e.to_string()))?;
        let count = usize::try_from(*len).map_err(|e| failed(e.to_string()))?;
        memory
            .read_exact_volatile_from(GuestAddress(start), &mut file, count)
            .map_err(|e| failed(e.to_string()))?;
        Ok(Some((start, *len)))
    }
}

fn open_file(what: &'static str, path: &Path) -> Result<(File, u64), Error> {
    let failed = |reason: String| Error::File {
        what,
        path: path.to_owned(),
        reason,
    };
    // Without waiting: opening a pipe would last until somebody writes to it.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| failed(e.to_string()))?;
    let meta = file.metadata().map_err(|e| failed(e.to_string()))?;
    if !meta.is_file() {
        return Err(failed("is not a regular file".into()));
    }
    if meta.len() == 0 {
        return Err(failed("is empty".into()));
    }
    // From here on reads wait: network file systems cut those short that may not.
    rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::empty())
        .map_err(|e| failed(e.to_string()))?;
    Ok((file, meta.len()))
}

/// Tells a bzImage from an ELF kernel and how long a command line it takes.
fn examine(file: &mut File, bytes: u64, path: &Path) -> Result<(Kind, usize), Error> {
    use std::io::Read;
    let failed = |reason: String| Error::File {
        what: "kernel",
        path: path.to_owned(),
        reason,
    };
    let mut head = Vec::with_capacity(0x280);
    file.take(0x280)
        .read_to_end(&mut head)
        .map_err(|e| failed(e.to_string()))?;
    if head.starts_with(b"\x7fELF") {
        return Ok((Kind::Elf, ELF_CMDLINE_SIZE));
    }
    if head.get(0x202..0x206) != Some(b"HdrS".as_slice()) {
        return Err(failed(
            "is neither a bzImage nor an ELF kernel for x86-64".into(),
        ));
    }
    let u16_at = |at: usize| {
        head.get(at..at + 2)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u16::from_le_bytes)
    };
    let u32_at = |at: usize| {
        head.get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u32::from_le_bytes)
    };
    let version = u16_at(0x206);
    if version < 0x020c || u16_at(0x236) & XLF_KERNEL_64 == 0 {
        return Err(failed(format!(
            "has no 64-bit entry point (boot protocol {}.{:02}; 2.12 or newer is needed)",
            version >> 8,
            version & 0xff
        )));
    }
    let setup_sectors = match head.get(0x1f1) {
        Some(0) | None => 4,
        Some(&n) => u64::from(n),
    };
    // syssize counts the protected-mode code in 16-byte units.
    let expected = (setup_sectors + 1) * 512 + u64::from(u32_at(0x1f4)) * 16;
    // The last unit may be partial, and a signature may follow.
    if bytes + 16 <= expected {
        return Err(failed(format!(
            "is truncated: {bytes} bytes, its header says {expected}"
        )));
    }
    Ok((Kind::BzImage, (u32_at(0x238) as usize).max(255)))
}

fn command_line(text: &str, max: usize) -> Result<Cmdline, Error> {
    if CString::new(text).is_err() {
        return Err(Error::Boot("the command line contains a NUL byte".into()));
    }
    if text.len() > max {
        return Err(Error::Boot(format!(
            "the command line has {} bytes, the kernel takes at most {max}",
            text.len()
        )));
    }
    let mut cmdline =
        Cmdline::new(text.len() + 2).map_err(|e| Error::Boot(format!("the command line: {e}")))?;
    if !text.is_empty() {
        cmdline
            .insert_str(text)
            .map_err(|e| Error::Boot(format!("the command line {text:?}: {e}")))?;
    }
    Ok(cmdline)
}

#[cfg(test)]
mod tests;
