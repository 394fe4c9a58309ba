// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ctl status`

use ebbtide_qmp::commands::EBBTIDE_QUERY_STATUS;
use ebbtide_qmp::schema::Empty;
use ebbtide_qmp::types::ebbtide::Reset;

use super::{Failure, Outcome, Session};

pub(super) fn show(session: &mut Session<'_>) -> Result<Outcome, Failure> {
    let status = session.call_own(&EBBTIDE_QUERY_STATUS, Empty {})?;
    if session.json {
        session.print_json(&status)?;
    } else {
        writeln!(session.out, "status   {}", status.status)?;
        if let Some(reset) = &status.reset {
            writeln!(session.out, "reset    {}", under_way(reset))?;
        }
        writeln!(session.out, "vcpus    {}", status.vcpus)?;
        writeln!(session.out, "pid      {}", status.pid)?;
        writeln!(session.out, "version  {}", status.version)?;
    }
    Ok(Outcome::Done)
}

/// A reset, in one line.
fn under_way(reset: &Reset) -> String {
    let seconds = reset.age_ms / 1000;
    let said = format!("{} for {seconds} s ({})", reset.step, reset.cause);
    match &*reset.memory {
        [] => said,
        memory => format!(
            "{said}: the host still uses {} for the last guest",
            memory.join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use ebbtide_qmp::types::ebbtide::ResetStep;
    use ebbtide_qmp::types::run_state::ShutdownCause;

    use super::*;

    #[test]
    fn a_reset_says_what_it_waits_for() {
        let mut reset = Reset {
            cause: ShutdownCause::GuestReset,
            step: ResetStep::Draining,
            age_ms: 2999,
            memory: Vec::new(),
        };
        assert_eq!(under_way(&reset), "draining for 2 s (guest-reset)");
        (reset.step, reset.memory) = (ResetStep::Memory, vec!["ram".into(), "dimm0".into()]);
        assert_eq!(
            under_way(&reset),
            "memory for 2 s (guest-reset): the host still uses ram, dimm0 for the last guest"
        );
    }
}
