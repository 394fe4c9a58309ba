// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the queues of a device share.

use std::sync::Arc;

use super::config::Config;
use super::events::Events;
use super::metrics::Counters;
use super::targets::Targets;
use super::tasks::Tasks;
use crate::flights::Flights;

pub(super) struct Shared {
    pub name: Arc<str>,
    pub config: Config,
    pub targets: Targets,
    pub tasks: Arc<Tasks>,
    pub events: Arc<Events>,
    pub counters: Counters,
    pub flights: Flights,
}
