// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The DIMM slots as the guest sees them: state and registers, nothing else.
//!
//! ```text
//!              plug                 request_removal               eject (guest)
//!   ┌───────┐ ─────► ┌─────────┐ ───────────────────► ┌──────────┐ ─────► ┌─────────┐
//!   │ Empty │        │ Plugged │ ◄─────────────────── │ Removing │        │ Ejected │
//!   └───────┘ ◄──┐   └─────────┘  refused, cancelled  └──────────┘        └─────────┘
//!                │        └──── eject, if allowed uninvited; withdraw ────────► │
//!                └──────────────────────── detach ──────────────────────────────┘
//! ```
//!
//! Nothing leads back from `Ejected`: the guest has let go of the memory and will not look at it again.

use super::{Arrival, DimmPlace, GuestEject, SlotError, SlotState};

/// Register offsets. What is read and what is written at one offset are different registers.
const ADDRESS: u64 = 0x0;
const LENGTH: u64 = 0x8;
const NODE: u64 = 0x10;
const SELECTOR: u64 = 0x0;
const OST_EVENT: u64 = 0x4;
const OST_STATUS: u64 = 0x8;
const FLAGS: u64 = 0x14;

/// Bits of the flags: read as what is, written to acknowledge an event or to eject.
const ENABLED: u8 = 1 << 0;
const INSERTED: u8 = 1 << 1;
const REMOVE: u8 = 1 << 2;
const EJECT: u8 = 1 << 3;

/// `_OST` source: an ejection request, by the platform (ACPI 6.5, table 6.22) or begun by the guest.
const OST_EJECT_REQUEST: u32 = 0x3;
const OST_GUEST_EJECT: u32 = 0x103;
/// `_OST` status of these: it worked, and it is still under way (table 6.24). All others are refusals.
const OST_SUCCESS: u32 = 0;
const OST_IN_PROGRESS: u32 = 0x84;

/// What a guest's write asks of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// The guest has let go of the memory.
    Eject { slot: u16 },
    /// It tried to, unasked, and may not.
    Uninvited { slot: u16 },
    /// It reported by `_OST`; `refused` if that was its last word on a requested removal, `announced` if what it had
    /// ejected and might not is to be found again.
    Ost {
        slot: u16,
        source: u32,
        status: u32,
        refused: bool,
        announced: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
struct Slot {
    occupant: Option<Occupant>,
    /// The first half of a report.
    ost_event: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Occupant {
    place: DimmPlace,
    stage: Stage,
    insert_event: bool,
    remove_event: bool,
    /// The guest has ejected it, which was refused. It had given the memory up before, and looks for a module that is not
    /// enabled any more: it is shown that, and told of a new module when it is done with the old one.
    given_up: bool,
    /// Removal requests the guest has taken note of and not answered for good: an answer to the first of two must not
    /// take back the second.
    asked: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Plugged,
    Removing,
    Ejected,
}

/// All slots and the selector.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    selector: u32,
}

impl Slots {
    pub(super) fn new(count: u16) -> Self {
        Self {
            slots: vec![Slot::default(); count.into()],
            selector: 0,
        }
    }

    pub(super) fn count(&self) -> u16 {
        // Made from a u16.
        self.slots.len() as u16
    }

    pub(super) fn state(&self, slot: u16) -> Result<SlotState, SlotError> {
        let found = self.slots.get(usize::from(slot));
        let found = found.ok_or_else(|| self.no_such(slot))?;
        Ok(match found.occupant.map(|occupant| occupant.stage) {
            None => SlotState::Empty,
            Some(Stage::Plugged) => SlotState::Plugged,
            Some(Stage::Removing) => SlotState::Removing,
            Some(Stage::Ejected) => SlotState::Ejected,
        })
    }

    pub(super) fn plug(
        &mut self,
        slot: u16,
        place: DimmPlace,
        arrival: Arrival,
    ) -> Result<(), SlotError> {
        if place.size_bytes == 0 || place.base.checked_add(place.size_bytes).is_none() {
            let DimmPlace {
                base, size_bytes, ..
            } = place;
            return Err(SlotError::Place {
                slot,
                base,
                size_bytes,
            });
        }
        let found = self.get(slot)?;
        if found.occupant.is_some() {
            return Err(SlotError::Occupied { slot });
        }
        found.occupant = Some(Occupant {
            place,
            stage: Stage::Plugged,
            insert_event: arrival == Arrival::Hot,
            remove_event: false,
            given_up: false,
            asked: 0,
        });
        Ok(())
    }

    /// Asks the guest for the module, or asks it again.
    pub(super) fn request_removal(&mut self, slot: u16) -> Result<(), SlotError> {
        let occupant = self.occupant(slot)?;
        if occupant.stage == Stage::Ejected {
            return Err(SlotError::Ejected { slot });
        }
        occupant.stage = Stage::Removing;
        occupant.remove_event = true;
        occupant.given_up = false;
        Ok(())
    }

    /// Takes a request back. Whichever of this and the guest's eject comes first decides.
    pub(super) fn cancel_removal(&mut self, slot: u16) -> Result<(), SlotError> {
        let occupant = self.occupant(slot)?;
        match occupant.stage {
            Stage::Plugged => Err(SlotError::NotRemoving { slot }),
            Stage::Ejected => Err(SlotError::Ejected { slot }),
            Stage::Removing => {
                occupant.plugged_again();
                Ok(())
            }
        }
    }

    /// Takes the module away without the guest.
    pub(super) fn withdraw(&mut self, slot: u16) -> Result<(), SlotError> {
        let occupant = self.occupant(slot)?;
        if occupant.stage == Stage::Ejected {
            return Err(SlotError::Ejected { slot });
        }
        occupant.ejected();
        Ok(())
    }

    pub(super) fn detach(&mut self, slot: u16) -> Result<(), SlotError> {
        if self.occupant(slot)?.stage != Stage::Ejected {
            return Err(SlotError::NotEjected { slot });
        }
        self.get(slot)?.occupant = None;
        Ok(())
    }

    /// Another guest: it looks at all slots by itself, and knows of no request.
    pub(super) fn reset(&mut self) {
        self.selector = 0;
        for slot in &mut self.slots {
            slot.ost_event = 0;
            if let Some(occupant) = &mut slot.occupant {
                occupant.insert_event = false;
                occupant.given_up = false;
                if occupant.stage == Stage::Removing {
                    occupant.plugged_again();
                }
            }
        }
    }

    /// The registers of the selected slot. `None` for an access that no register answers.
    pub(super) fn read(&self, offset: u64, size: u8) -> Option<u32> {
        if !matches!(size, 1..=4) {
            return None;
        }
        let start = usize::try_from(offset).ok()?;
        let image = self.image();
        let bytes = image.get(start..start.checked_add(size.into())?)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |value, &byte| value << 8 | u32::from(byte)),
        )
    }

    /// All zeroes for a slot that is empty or not there.
    fn image(&self) -> [u8; super::PORT_COUNT as usize] {
        let mut image = [0; super::PORT_COUNT as usize];
        let Some(occupant) = self.selected().and_then(|slot| slot.occupant.as_ref()) else {
            return image;
        };
        let DimmPlace {
            base,
            size_bytes,
            node,
            guest_eject: _,
        } = occupant.place;
        put(&mut image, ADDRESS, &base.to_le_bytes());
        put(&mut image, LENGTH, &size_bytes.to_le_bytes());
        put(&mut image, NODE, &node.to_le_bytes());
        put(&mut image, FLAGS, &[occupant.flags()]);
        image
    }

    /// A write of `size` bytes: a register takes what is written at its offset, however wide; what is between registers
    /// is ignored.
    pub(super) fn write(&mut self, offset: u64, size: u8, value: u64) -> Option<Effect> {
        let mask = match size {
            1..=4 => u32::MAX >> (32 - 8 * u32::from(size)),
            _ => return None,
        };
        let value = value as u32 & mask;
        match offset {
            SELECTOR => {
                self.selector = value;
                None
            }
            OST_EVENT => {
                self.selected_mut()?.ost_event = value;
                None
            }
            OST_STATUS => self.report(value),
            FLAGS => self.control(value as u8),
            _ => None,
        }
    }

    fn report(&mut self, status: u32) -> Option<Effect> {
        let slot = self.selected_number()?;
        let selected = self.selected_mut()?;
        let source = selected.ost_event;
        let (refused, announced) = selected.occupant.as_mut().map_or((false, false), |it| {
            (it.answered(source, status), it.found_again(source, status))
        });
        Some(Effect::Ost {
            slot,
            source,
            status,
            refused,
            announced,
        })
    }

    fn control(&mut self, control: u8) -> Option<Effect> {
        let slot = self.selected_number()?;
        let occupant = self.selected_mut()?.occupant.as_mut()?;
        if control & INSERTED != 0 {
            occupant.insert_event = false;
        }
        if control & REMOVE != 0 && occupant.remove_event {
            occupant.remove_event = false;
            occupant.asked = occupant.asked.saturating_add(1);
        }
        if control & EJECT == 0 || occupant.stage == Stage::Ejected {
            return None;
        }
        let allowed = match occupant.place.guest_eject {
            GuestEject::On => true,
            GuestEject::Requested => occupant.stage == Stage::Removing,
            GuestEject::Off => false,
        };
        if !allowed {
            occupant.given_up = true;
            return Some(Effect::Uninvited { slot });
        }
        occupant.ejected();
        Some(Effect::Eject { slot })
    }

    fn selected_number(&self) -> Option<u16> {
        u16::try_from(self.selector).ok()
    }

    fn selected(&self) -> Option<&Slot> {
        self.slots.get(usize::try_from(self.selector).ok()?)
    }

    fn selected_mut(&mut self) -> Option<&mut Slot> {
        self.slots.get_mut(usize::try_from(self.selector).ok()?)
    }

    fn no_such(&self, slot: u16) -> SlotError {
        let slots = self.count();
        SlotError::NoSuchSlot { slot, slots }
    }

    fn get(&mut self, slot: u16) -> Result<&mut Slot, SlotError> {
        let error = self.no_such(slot);
        self.slots.get_mut(usize::from(slot)).ok_or(error)
    }

    fn occupant(&mut self, slot: u16) -> Result<&mut Occupant, SlotError> {
        let found = self.get(slot)?.occupant.as_mut();
        found.ok_or(SlotError::Empty { slot })
    }
}

impl Occupant {
    fn flags(&self) -> u8 {
        let bit = |set: bool, bit: u8| if set { bit } else { 0 };
        bit(self.stage != Stage::Ejected && !self.given_up, ENABLED)
            | bit(self.insert_event, INSERTED)
            | bit(self.remove_event, REMOVE)
    }

    fn plugged_again(&mut self) {
        self.stage = Stage::Plugged;
        self.remove_event = false;
        self.asked = 0;
    }

    fn ejected(&mut self) {
        self.stage = Stage::Ejected;
        self.insert_event = false;
        self.remove_event = false;
        self.given_up = false;
        self.asked = 0;
    }

    /// Takes note of a report; true when it refuses the last request there is.
    fn answered(&mut self, source: u32, status: u32) -> bool {
        let refusal = matches!(source, OST_EJECT_REQUEST | OST_GUEST_EJECT)
            && !matches!(status, OST_SUCCESS | OST_IN_PROGRESS);
        if !refusal || self.stage != Stage::Removing {
            return false;
        }
        self.asked = self.asked.saturating_sub(1);
        if self.asked > 0 || self.remove_event {
            return false;
        }
        self.plugged_again();
        true
    }

    /// Takes note of a report; true when the guest is done with the module that it has given up, and may find it again.
    fn found_again(&mut self, source: u32, status: u32) -> bool {
        let ended =
            matches!(source, OST_EJECT_REQUEST | OST_GUEST_EJECT) && status != OST_IN_PROGRESS;
        if !self.given_up || !ended {
            return false;
        }
        self.given_up = false;
        self.insert_event = true;
        true
    }
}

/// Offsets are constants that lie inside.
fn put(image: &mut [u8], offset: u64, bytes: &[u8]) {
    let at = image.iter_mut().skip(offset as usize);
    at.zip(bytes).for_each(|(to, &from)| *to = from);
}
