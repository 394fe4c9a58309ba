// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who requires discards and who disables them.
//!
//! | | require | require coordinated |
//! |---|---|---|
//! | disable | excluded | excluded |
//! | disable uncoordinated | excluded | fine |

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::Error;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    Require,
    RequireCoordinated,
    Disable,
    DisableUncoordinated,
}

impl Claim {
    fn excludes(self, other: Claim) -> bool {
        use Claim::{Disable, DisableUncoordinated, Require, RequireCoordinated};
        let excluded = |a, b| {
            matches!(
                (a, b),
                (Disable, Require | RequireCoordinated) | (DisableUncoordinated, Require)
            )
        };
        excluded(self, other) || excluded(other, self)
    }

    /// What whoever holds it does, or cannot do.
    fn text(self) -> &'static str {
        match self {
            Claim::Require => "require discarding of RAM",
            Claim::RequireCoordinated => "require coordinated discarding of RAM",
            Claim::Disable => "disable discarding of RAM",
            Claim::DisableUncoordinated => "disable uncoordinated discarding of RAM",
        }
    }
}

/// How many tokens of each kind are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiscardCounts {
    /// [`DiscardRules::require`].
    pub required: usize,
    /// [`DiscardRules::require_coordinated`].
    pub coordinated_required: usize,
    /// [`DiscardRules::disable`].
    pub disabled: usize,
    /// [`DiscardRules::disable_uncoordinated`].
    pub uncoordinated_disabled: usize,
}

/// The rules on discards of one memory's RAM. Clones are the same rules.
#[derive(Clone, Default)]
pub struct DiscardRules(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    claims: Vec<(u64, Claim, String)>,
    last_id: u64,
}

/// A claim on discards, until it is dropped.
#[must_use = "the claim ends when the token is dropped"]
pub struct DiscardToken {
    rules: DiscardRules,
    id: u64,
    claim: Claim,
}

impl DiscardRules {
    /// `who` discards RAM without telling anybody, as a balloon does.
    ///
    /// # Errors
    /// `DiscardConflict` when discards, or uncoordinated ones, are disabled; names by whom.
    pub fn require(&self, who: &str) -> Result<DiscardToken, Error> {
        self.claim(Claim::Require, who)
    }

    /// `who` discards RAM and tells the block's [`super::DiscardListener`]s, as virtio-mem does.
    ///
    /// # Errors
    /// `DiscardConflict` when discards are disabled; names by whom.
    pub fn require_coordinated(&self, who: &str) -> Result<DiscardToken, Error> {
        self.claim(Claim::RequireCoordinated, who)
    }

    /// `who` cannot bear that any RAM is discarded.
    ///
    /// # Errors
    /// `DiscardConflict` when discards are required; names by whom.
    pub fn disable(&self, who: &str) -> Result<DiscardToken, Error> {
        self.claim(Claim::Disable, who)
    }

    /// `who` listens to discards and cannot bear those nobody tells.
    ///
    /// # Errors
    /// `DiscardConflict` when uncoordinated discards are required; names by whom.
    pub fn disable_uncoordinated(&self, who: &str) -> Result<DiscardToken, Error> {
        self.claim(Claim::DisableUncoordinated, who)
    }

    /// Runs `discard`, which tells nobody, unless somebody disables that: then `None`. Nobody
    /// claims anything while it runs, so who disables such discards knows that none is under way.
    /// It must not claim anything itself, and is better short.
    pub fn uncoordinated<T>(&self, discard: impl FnOnce() -> T) -> Option<T> {
        let held = self.lock();
        let mut claims = held.claims.iter();
        let disabled = claims.any(|(_, claim, _)| claim.excludes(Claim::Require));
        (!disabled).then(discard)
    }

    /// What is held now.
    pub fn counts(&self) -> DiscardCounts {
        let held = self.lock();
        let count = |claim| held.claims.iter().filter(|(_, c, _)| *c == claim).count();
        DiscardCounts {
            required: count(Claim::Require),
            coordinated_required: count(Claim::RequireCoordinated),
            disabled: count(Claim::Disable),
            uncoordinated_disabled: count(Claim::DisableUncoordinated),
        }
    }

    fn claim(&self, claim: Claim, who: &str) -> Result<DiscardToken, Error> {
        let mut held = self.lock();
        let mut blockers: Vec<String> = Vec::new();
        for (_, other, holder) in &held.claims {
            let text = format!("{holder} ({})", other.text());
            if claim.excludes(*other) && !blockers.contains(&text) {
                blockers.push(text);
            }
        }
        if !blockers.is_empty() {
            return Err(Error::DiscardConflict {
                who: who.to_owned(),
                wants: claim.text(),
                blockers: blockers.join(", "),
            });
        }
        held.last_id += 1;
        let id = held.last_id;
        held.claims.push((id, claim, who.to_owned()));
        drop(held);
        Ok(DiscardToken {
            rules: self.clone(),
            id,
            claim,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for DiscardToken {
    fn drop(&mut self) {
        let mut held = self.rules.lock();
        held.claims.retain(|(id, _, _)| *id != self.id);
    }
}

impl fmt::Debug for DiscardToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiscardToken({:?})", self.claim)
    }
}

impl fmt::Debug for DiscardRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DiscardRules").field(&self.counts()).finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    type Ask = fn(&DiscardRules, &str) -> Result<DiscardToken, Error>;
    const ALL: [(Claim, Ask); 4] = [
        (Claim::Require, DiscardRules::require),
        (Claim::RequireCoordinated, DiscardRules::require_coordinated),
        (Claim::Disable, DiscardRules::disable),
        (
            Claim::DisableUncoordinated,
            DiscardRules::disable_uncoordinated,
        ),
    ];

    #[test]
    fn the_table_of_exclusions_holds_both_ways() {
        let excluded = [
            (Claim::Disable, Claim::Require),
            (Claim::Disable, Claim::RequireCoordinated),
            (Claim::DisableUncoordinated, Claim::Require),
        ];
        for (first, ask_first) in ALL {
            for (second, ask_second) in ALL {
                let rules = DiscardRules::default();
                let held = ask_first(&rules, "one").unwrap();
                let before = rules.counts();
                let asked = ask_second(&rules, "two");
                let refused =
                    excluded.contains(&(first, second)) || excluded.contains(&(second, first));
                assert_eq!(asked.is_err(), refused, "{first:?} {second:?}");
                if refused {
                    assert_eq!(rules.counts(), before);
                    drop(held);
                    assert!(ask_second(&rules, "two").is_ok());
                }
            }
        }
    }

    #[test]
    fn discards_that_tell_nobody_are_done_where_they_may_be() {
        for (claim, ask) in ALL {
            let rules = DiscardRules::default();
            let held = ask(&rules, "one").unwrap();
            let disabled = matches!(claim, Claim::Disable | Claim::DisableUncoordinated);
            assert_eq!(
                rules.uncoordinated(|| 7),
                (!disabled).then_some(7),
                "{claim:?}"
            );
            drop(held);
            assert_eq!(rules.uncoordinated(|| 7), Some(7));
        }
    }

    #[test]
    fn who_disables_discards_waits_for_one_under_way() {
        let rules = DiscardRules::default();
        let (began, begin) = std::sync::mpsc::channel();
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                rules.uncoordinated(|| {
                    began.send(()).unwrap();
                    std::thread::sleep(std::time::Duration::from_millis(50));
                    over.store(true, std::sync::atomic::Ordering::SeqCst);
                })
            });
            begin.recv().unwrap();
            let token = rules.disable("gpu0").unwrap();
            assert!(over.load(std::sync::atomic::Ordering::SeqCst));
            drop(token);
        });
    }

    #[test]
    fn claims_are_counted_and_blockers_named_once() {
        let rules = DiscardRules::default();
        let first = rules.disable("vfio gpu0").unwrap();
        let second = rules.clone().disable("vfio gpu0").unwrap();
        let third = rules.disable_uncoordinated("vfio nic1").unwrap();
        assert_eq!(rules.counts().disabled, 2);
        assert_eq!(
            rules.require("balloon0").unwrap_err().to_string(),
            "balloon0 cannot require discarding of RAM: in the way are vfio gpu0 (disable \
             discarding of RAM), vfio nic1 (disable uncoordinated discarding of RAM)"
        );
        drop(first);
        assert!(rules.require_coordinated("vmem0").is_err());
        drop(second);
        let coordinated = rules.require_coordinated("vmem0").unwrap();
        assert!(rules.require("balloon0").is_err());
        drop(third);
        drop(rules.require("balloon0").unwrap());
        drop(coordinated);
        assert_eq!(rules.counts(), DiscardCounts::default());
    }
}
