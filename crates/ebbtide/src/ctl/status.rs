// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ctl status`

use ebbtide_qmp::commands::EBBTIDE_QUERY_STATUS;
use ebbtide_qmp::schema::Empty;

use super::{Failure, Outcome, Session};

pub(super) fn show(session: &mut Session<'_>) -> Result<Outcome, Failure> {
    let status = session.call_own(&EBBTIDE_QUERY_STATUS, Empty {})?;
    if session.json {
        session.print_json(&status)?;
    } else {
        writeln!(session.out, "status   {}", status.status)?;
        writeln!(session.out, "vcpus    {}", status.vcpus)?;
        writeln!(session.out, "pid      {}", status.pid)?;
        writeln!(session.out, "version  {}", status.version)?;
    }
    Ok(Outcome::Done)
}
