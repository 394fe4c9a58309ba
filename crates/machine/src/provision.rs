// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether files still provide the memory that stands on them.
//!
//! Others may cut a file short or fill its filesystem. KVM does not tell of it: it lets a processor that touches what is not
//! there wait, as for memory that is swapped out, and tries again for ever. So who has files is asked, now and then. A guest
//! whose memory is lost is stopped; one whose memory may not come is warned about, and goes on when there is room again.

use std::collections::HashSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use ebbtide_iothread::{Blocking, Local};
use ebbtide_memory::{Error, Memory, RamBlock};

use crate::lifecycle::{Request, Requests};

/// How often files are looked at.
const PERIOD: Duration = Duration::from_secs(1);

/// Who asks. It keeps nothing of the machine alive.
pub(crate) struct Provision {
    pub(crate) memory: Weak<Memory>,
    pub(crate) blocking: Weak<Blocking>,
    pub(crate) requests: Requests,
    pub(crate) local: Local,
}

impl Provision {
    /// Asks until the machine is gone.
    pub(crate) async fn watch(self) {
        let mut warned = HashSet::new();
        loop {
            self.local.sleep(PERIOD).await;
            let Some(files) = self.files() else { return };
            if files.is_empty() {
                warned.clear();
                continue;
            }
            let Some(blocking) = self.blocking.upgrade() else {
                return;
            };
            let checks = blocking.run(move || files.iter().map(check).collect::<Vec<_>>());
            drop(blocking);
            for (name, checked) in checks.await {
                self.take(name, checked, &mut warned);
            }
        }
    }

    /// The blocks that are files; None: the machine is gone.
    fn files(&self) -> Option<Vec<Arc<RamBlock>>> {
        let mut blocks = self.memory.upgrade()?.ram().blocks();
        blocks.retain(|block| block.is_file());
        Some(blocks)
    }

    fn take(&self, name: String, checked: Result<(), Error>, warned: &mut HashSet<String>) {
        match checked {
            Ok(()) => {
                warned.remove(&name);
            }
            Err(lost @ Error::BackingTooShort { .. }) => {
                self.requests.send(Request::MemoryLost(lost.to_string()));
            }
            Err(error) => {
                if warned.insert(name) {
                    tracing::warn!("{error}: a guest that uses memory of it may have to wait");
                }
            }
        }
    }
}

fn check(block: &Arc<RamBlock>) -> (String, Result<(), Error>) {
    (block.name().to_owned(), block.check_provided())
}
