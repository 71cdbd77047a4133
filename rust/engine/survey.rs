// SPDX-License-Identifier: GPL-2.0

//! The scanner's look at 2 MiB folios: what would be gained if they were split.
//!
//! Each part is hashed where it is, mapped and in use; nothing is protected or zapped for it, so all
//! of this may be stale at once. `split` looks at the bytes before it acts.
//!
//! Lock order: region > index.

use super::{
    count,
    host::Host,
    region::RegionGuard,
    shared::{Candidate, Key, CANDIDATES},
};
use crate::logic::{
    huge::{HugeWord, PartClass},
    slot::{Class, State},
};

/// Notes what is known of part `index`, whose hash under `key` was just taken.
pub(crate) fn note(host: &Host, guard: &mut RegionGuard<'_>, index: usize, key: Key, zero: bool) {
    let Some(word) = HugeWord::from_slot(guard.slot(index)) else {
        return;
    };
    let class = if zero {
        PartClass::Zero
    } else if word.changed_to(key.hash) {
        // It may change again: it counts once it was seen twice.
        PartClass::Unique
    } else if has_equal(host, guard, index, key) {
        PartClass::Duplicate
    } else {
        let own = guard.region().page_id(index);
        if !host.index().hint(key.hash, own, host.registry()) {
            count(&host.refusals.no_hint);
        }
        PartClass::Unique
    };
    guard.note(index, word.looked_at(class, key.hash).slot());
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
