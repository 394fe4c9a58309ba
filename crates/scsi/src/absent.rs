// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a target answers for a logical unit it does not have (SPC-4, 6.4.1; SAM-5, 5.10).

use crate::attention::Attention;
use crate::cdb::{Cdb, op};
use crate::inquiry;
use crate::lun::Lun;
use crate::sense::Sense;
use crate::unit::{Work, report_luns, request_sense};

/// Judges a command to a unit that is not there, of a target that has `luns`.
///
/// # Errors
/// The sense data: LOGICAL UNIT NOT SUPPORTED for most commands.
pub fn begin_absent(cdb: &[u8], luns: &[Lun]) -> Result<Work, Sense> {
    let cdb = Cdb::new(cdb).map_err(|_| Sense::LUN_NOT_SUPPORTED)?;
    match cdb.opcode() {
        op::INQUIRY => inquiry::absent(cdb),
        op::REPORT_LUNS => report_luns(cdb, luns),
        op::REQUEST_SENSE => request_sense(cdb, &Attention::default(), Sense::LUN_NOT_SUPPORTED),
        _ => Err(Sense::LUN_NOT_SUPPORTED),
    }
}
