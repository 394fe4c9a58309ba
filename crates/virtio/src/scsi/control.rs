// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The control queue: task management functions and asynchronous notification (virtio 1.3, 5.6.6.2).

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use ebbtide_memory::ReadGuard;
use ebbtide_scsi::Condition;

use super::answer::AnswerPlace;
use super::request::{
    Address, Control, Function, NOTIFICATION_ANSWER_BYTES, NOTIFICATION_BYTES, Response, TMF_BYTES,
};
use super::shared::Shared;
use super::targets::{Units, luns_of};
use super::tasks::{Entry, Fate};
use crate::service::{Answered, Begun, Service, Unanswerable};
use crate::virtq::Chain;

/// The requests of the control queue.
pub(super) struct Controls {
    pub shared: Arc<Shared>,
    /// Which of the device's queues it is.
    pub index: u16,
}

/// A function that may have to wait for commands.
pub(super) struct Job {
    head: u16,
    answer: AnswerPlace,
    function: Function,
    address: Address,
    tag: u64,
}

/// What an answered request keeps: where its answer goes, and the one that is still to be written.
pub(super) type Kept = (AnswerPlace, Option<Response>);

impl Service for Controls {
    type Job = Job;
    type Kept = Kept;

    fn begin(
        &self,
        guard: &ReadGuard<'_>,
        chain: &mut Chain,
    ) -> Result<Begun<Job, Kept>, Unanswerable> {
        let begun = self.parse(guard, chain.take())?;
        if let Begun::Job(Job { head, answer, .. }) = &begun {
            let pins = answer.host_ranges().map(|range| (0, range));
            let flights = &self.shared.flights;
            flights.begin(self.index, *head, flights.ns(Instant::now()), pins);
        }
        Ok(begun)
    }

    fn refuse(&self, guard: &ReadGuard<'_>, chain: Chain) -> Result<Answered<Kept>, Unanswerable> {
        Ok(match self.parse(guard, chain)? {
            Begun::Answered(answered) => answered,
            Begun::Job(Job { head, answer, .. }) => Answered {
                head,
                written: answer.give(&[Response::BadTarget as u8], 0),
                kept: (answer, None),
            },
        })
    }

    async fn carry_out(self: Rc<Self>, job: Job) -> Answered<Kept> {
        let Job {
            head,
            answer,
            function,
            address,
            tag,
        } = job;
        let response = self.manage(function, address, tag).await;
        self.shared.flights.end(self.index, head);
        Answered {
            head,
            written: 0,
            kept: (answer, Some(response)),
        }
    }

    fn write_answer(&self, answered: &mut Answered<Kept>) {
        let (answer, response) = &mut answered.kept;
        if let Some(response) = response.take() {
            answered.written = answer.give(&[response as u8], 0);
        }
    }

    fn broken(&self) {
        self.shared.counters.broken();
    }
}

impl Controls {
    fn parse(&self, guard: &ReadGuard<'_>, chain: Chain) -> Result<Begun<Job, Kept>, Unanswerable> {
        let Chain {
            head,
            readable,
            mut writable,
        } = chain;
        let mut bytes = [0; (TMF_BYTES) as usize];
        let length = readable
            .copy_to(guard, &mut bytes)
            .map_err(|source| Unanswerable::Memory { head, source })?;
        let request = bytes.get(..length).and_then(Control::parse);
        match request.ok_or(Unanswerable::NoRoom { head })? {
            Control::Task {
                function,
                address,
                tag,
            } => {
                let answer = AnswerPlace::take(guard, head, &mut writable, 1)?;
                match self.check(function, address) {
                    Ok((function, address)) => Ok(Begun::Job(Job {
                        head,
                        answer,
                        function,
                        address,
                        tag,
                    })),
                    Err(response) => Ok(at_once(head, answer, &[response as u8])),
                }
            }
            Control::Notification { address } => {
                const { assert!(NOTIFICATION_BYTES <= TMF_BYTES) };
                let place = NOTIFICATION_ANSWER_BYTES;
                let answer = AnswerPlace::take(guard, head, &mut writable, place)?;
                let response = match address {
                    Some(address) => self.exists(address).err().unwrap_or(Response::Ok),
                    None => Response::BadTarget,
                };
                // No event of those asked for ever happens.
                Ok(at_once(head, answer, &[0, 0, 0, 0, response as u8]))
            }
        }
    }

    fn check(
        &self,
        function: Option<Function>,
        address: Option<Address>,
    ) -> Result<(Function, Address), Response> {
        let function = function.ok_or(Response::FunctionRejected)?;
        let address = address.ok_or(Response::BadTarget)?;
        if function == Function::NexusReset {
            // Of the target, whichever of its units is named.
            let units = self.shared.targets.read();
            let there = units.keys().any(|unit| unit.target == address.target);
            return there
                .then_some((function, address))
                .ok_or(Response::BadTarget);
        }
        self.exists(address)?;
        Ok((function, address))
    }

    /// A unit that is on its way out still has commands to manage.
    fn exists(&self, address: Address) -> Result<(), Response> {
        let units = self.shared.targets.read();
        if units.contains_key(&address) {
            Ok(())
        } else if luns_of(&units, address.target).is_empty() {
            Err(Response::BadTarget)
        } else {
            Err(Response::IncorrectLun)
        }
    }

    async fn manage(&self, function: Function, address: Address, tag: u64) -> Response {
        let tasks = &self.shared.tasks;
        let of_unit = move |entry: &Entry| entry.address == address;
        let of_task = move |entry: &Entry| entry.address == address && entry.tag == tag;
        let of_target = move |entry: &Entry| entry.address.target == address.target;
        let under_way = |any| match any {
            true => Response::FunctionSucceeded,
            false => Response::Ok,
        };
        match function {
            Function::QueryTask => return under_way(tasks.any(of_task)),
            Function::QueryTaskSet => return under_way(tasks.any(of_unit)),
            Function::AbortTask => tasks.end(Fate::Aborted, of_task).await,
            // There is one initiator: its tasks are all tasks.
            Function::AbortTaskSet | Function::ClearTaskSet => {
                tasks.end(Fate::Aborted, of_unit).await;
            }
            Function::UnitReset => {
                tasks.end(Fate::Reset, of_unit).await;
                self.reset(|unit| unit == address, Condition::UnitReset);
            }
            Function::NexusReset => {
                tasks.end(Fate::Reset, of_target).await;
                self.reset(|unit| unit.target == address.target, Condition::NexusLoss);
            }
        }
        Response::Ok
    }

    fn reset(&self, which: impl Fn(Address) -> bool, condition: Condition) {
        let units: &Units = &self.shared.targets.read();
        for (address, owned) in units {
            if which(*address) {
                owned.get().logical.reset(condition);
            }
        }
    }
}

fn at_once(head: u16, answer: AnswerPlace, bytes: &[u8]) -> Begun<Job, Kept> {
    Begun::Answered(Answered {
        head,
        written: answer.give(bytes, 0),
        kept: (answer, None),
    })
}
