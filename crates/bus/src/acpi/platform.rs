// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The FADT: that the platform is hardware-reduced, how it is reset and put to sleep (ACPI 6.5, 5.2.9).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, RESET_PORT, RESET_VALUE, SLEEP_PORT};

/// IAPC_BOOT_ARCH bits (ACPI 6.5, table 5.11). Bits 0 (legacy devices) and 1 (8042) stay clear: there are none to probe.
const VGA_NOT_PRESENT: u16 = 1 << 2;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

/// The table that points to the DSDT at `dsdt`.
pub(super) fn fadt(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // WBINVD works; without this flag an OS has to assume that caches can't be flushed for sleep.
        .flag(Flags::Wbinvd)
        // There are no fixed-feature buttons: the power button is a device of the DSDT.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT).into();
    fadt.reset_reg = byte_port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = byte_port(SLEEP_PORT);
    fadt.sleep_status_reg = byte_port(SLEEP_PORT + 1);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"EBBTIDE\0").into();
    fadt.finalize()
}

fn byte_port(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        port.into(),
    )
}
