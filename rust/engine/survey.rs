// SPDX-License-Identifier: GPL-2.0

//! The scanner's look at 2 MiB folios: what would be gained if they were split.
//!
//! Each part is hashed where it is, mapped and in use; all of this may be stale at once. `split` looks
//! at the bytes before it acts. A folio that is seldom written is write-protected as a whole, and
//! what was hashed under that, with no pin on the folio, is not hashed again until a write comes.
//!
//! Lock order: region > index.

use super::{
    count,
    host::Host,
    region::RegionGuard,
    shared::{Candidate, Key, CANDIDATES},
    vm::Scope,
};
use crate::logic::{
    hints,
    huge::{HugeWord, PartClass},
    slot::{Class, State},
};

/// Write-protects the folio, once a pass, if that pays.
pub(crate) fn protect_if_calm(guard: &mut RegionGuard<'_>) {
    let holds = guard.is_any_protected();
    if guard.calm().pass(holds) && !guard.is_all_protected() {
        guard.protect_huge();
    }
}

/// Looks again for equals of part `index`, whose bytes are those that were hashed.
pub(crate) fn refresh(host: &Host, guard: &mut RegionGuard<'_>, index: usize, scope: Scope) {
    let Some(word) = HugeWord::from_slot(guard.slot(index)) else {
        return;
    };
    if let Some(hash) = word.hash() {
        note(host, guard, index, Key { hash, scope }, false, true);
    }
}

/// Notes what is known of part `index`, whose hash under `key` was just taken; `stable`: it stays
/// true until the part's protection goes.
pub(crate) fn note(
    host: &Host,
    guard: &mut RegionGuard<'_>,
    index: usize,
    key: Key,
    zero: bool,
    stable: bool,
) {
    let Some(word) = HugeWord::from_slot(guard.slot(index)) else {
        return;
    };
    let looked_at = |class, stable| {
        let word = word.looked_at(class, key.hash);
        word.with_stable(stable).slot()
    };
    if zero {
        guard.note(index, looked_at(PartClass::Zero, stable));
    } else if word.changed_to(key.hash) {
        // It may change again: it counts once it was seen twice.
        guard.note(index, looked_at(PartClass::Unique, false));
    } else if has_equal(host, guard, index, key) {
        guard.note(index, looked_at(PartClass::Duplicate, stable));
    } else {
        let own = guard.region().page_id(index);
        let note = |slot| guard.note(index, slot);
        let placed = hints::settle(looked_at(PartClass::Unique, stable), note, || {
            host.index().hint(key.hash, own, host.registry())
        });
        // Others do not find it: it is hashed again.
        if !placed {
            count(&host.refusals.no_hint);
        }
    }
}

/// Whether some other page has the content. If that is a part of a folio too, it gets to know.
fn has_equal(host: &Host, guard: &RegionGuard<'_>, index: usize, key: Key) -> bool {
    let mut candidates = [None; CANDIDATES];
    let own = guard.region().page_id(index);
    host.index().find(key, u32::MAX, &mut candidates);
    candidates
        .into_iter()
        .flatten()
        .any(|candidate| match candidate {
            Candidate::Record(_) => true,
            Candidate::Page(id) => id != own && is_equal(host, id, key),
        })
}

/// Whether the page of a hint has, as far as is known, the content.
fn is_equal(host: &Host, page_id: u32, key: Key) -> bool {
    let Some((region, index)) = host.registry().page(page_id) else {
        return false;
    };
    if region.vm().scope() != key.scope {
        return false;
    }
    let slot = region.peek(index);
    match slot.state() {
        State::Private => slot.class() == Class::Unshared && slot.tag() == key.hash as u16,
        State::Huge => {
            let known = HugeWord::from_slot(slot);
            let Some(word) = known.filter(|word| word.has_hash(key.hash)) else {
                return false;
            };
            // The first one found is the others' twin; a duplicate among them waits for it as well.
            region.try_note(index, slot, word.with_twin().slot());
            true
        }
        _ => false,
    }
}
