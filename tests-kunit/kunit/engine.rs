// SPDX-License-Identifier: GPL-2.0

#[kernel::macros::kunit_tests(thinram_engine)]
mod tests {
    use crate::{
        engine::{
            backing::Backing,
            data::{self, Readable},
            host::Host,
            merge::{self, Outcome, Room},
            regroup::Change,
            scan,
            shared::{Candidate, Key, CANDIDATES},
        },
        logic::{
            counts::Class as Count,
            hints,
            slot::{Class, Slot, State},
            tunables::ShareScope,
        },
        sys::{
            hash,
            mapping::MappingSource,
            page::{Frame, Purpose},
            zs::Scratch,
        },
    };
    use core::sync::atomic::Ordering;
    use kernel::{prelude::*, sync::Arc};

    /// Three regions.
    const PAGES: u64 = 3 * 512;
    /// A page of the first region, and of the second and the third.
    const A: u64 = 3;
    const B: u64 = 600;
    const C: u64 = 1500;

    fn guest(host: &Arc<Host>, name: &[u8], domain: &[u8]) -> Result<Arc<Backing>> {
        let vm = host.vms().attach_for_test(name, domain)?;
        let backing = Backing::new(host.clone(), vm, MappingSource::for_test())?;
        backing.resize(PAGES);
        Ok(backing)
    }

    /// What the kernel does at a file's end.
    fn end(backing: &Backing) {
        backing.evict();
        backing.host().vms().detach(backing.vm());
    }

    /// Writes a page; the frame that it is in.
    fn write(backing: &Backing, page: u64, pattern: u32) -> Result<u64> {
        let mut frame = data::writable(backing, page)?;
        frame.fill(pattern);
        Ok(frame.as_ref().pfn())
    }

    fn reads(backing: &Backing, page: u64, pattern: u32) -> bool {
        match data::readable(backing, page) {
            Ok(Readable::Page(frame)) => frame.as_ref().filled_with() == Some(pattern),
            Ok(Readable::Zeroes) => pattern == 0,
            Err(_) => false,
        }
    }

    fn slot(backing: &Backing, page: u64) -> Slot {
        let region = backing.region(page);
        region.map_or(Slot::EMPTY, |region| region.peek(Backing::index(page)))
    }

    fn state(backing: &Backing, page: u64) -> State {
        slot(backing, page).state()
    }

    fn count(backing: &Backing, class: Count) -> u64 {
        backing.vm().snapshot().pages.get(class)
    }

    fn key(backing: &Backing, hash: u64) -> Key {
        let scope = backing.vm().scope();
        Key { hash, scope }
    }

    /// Notes that the page was looked at, and leaves its hint. Whether there was a place for it.
    fn hint(backing: &Backing, page: u64, hash: u64) -> Result<bool> {
        let host = backing.host();
        let region = backing.region(page).ok_or(ENOENT)?;
        let index = Backing::index(page);
        let mut guard = region.lock();
        let looked = guard.slot(index).looked_at(Class::Unshared, hash);
        let note = |slot| guard.note(index, slot);
        Ok(hints::settle(looked.with_stable(true), note, || {
            merge::leave_hint(host, key(backing, hash), region.page_id(index))
        }))
    }

    /// The scanner's attempt to merge a page.
    fn merge(backing: &Backing, page: u64, hash: u64) -> Result<Outcome> {
        let host = backing.host();
        let mut spare = Frame::alloc(Purpose::Shared, -1);
        let mut scratch = Scratch::new();
        let room = Room {
            spare: &mut spare,
            scratch: &mut scratch,
        };
        let region = backing.region(page).ok_or(ENOENT)?;
        let mut guard = region.lock();
        let key = key(backing, hash);
        let rules = host.rules();
        Ok(merge::try_merge(
            host,
            &mut guard,
            Backing::index(page),
            key,
            rules,
            room,
        ))
    }

    /// Two pages of this content become one.
    fn share(one: (&Backing, u64), two: (&Backing, u64), pattern: u32) -> Result<u32> {
        let host = one.0.host();
        host.index().maintain(host.registry(), 1000)?;
        write(one.0, one.1, pattern)?;
        write(two.0, two.1, pattern)?;
        let frame = data::writable(one.0, one.1)?;
        let hash = hash::of_page(frame.as_ref(), host.seed(one.0.vm().scope()));
        drop(frame);
        let hinted = hint(one.0, one.1, hash)?;
        let merged = merge(two.0, two.1, hash)? == Outcome::Merged;
        if hinted && merged {
            Ok(slot(two.0, two.1).record())
        } else {
            Err(EBUSY)
        }
    }

    #[test]
    fn pages_of_two_regions_become_one_fresh_frame() -> Result {
        let host = Host::new()?;
        let guest = guest(&host, b"a", b"lab")?;
        host.index().maintain(host.registry(), 1000)?;
        let (one, two) = (write(&guest, A, 7)?, write(&guest, B, 7)?);
        assert_eq!(merge(&guest, B, 99)?, Outcome::Unique);
        assert!(hint(&guest, A, 99)?);
        assert_eq!(merge(&guest, B, 99)?, Outcome::Merged);
        assert!(state(&guest, A) == State::Shared && state(&guest, B) == State::Shared);
        assert_eq!(slot(&guest, A).record(), slot(&guest, B).record());
        let shared = match data::readable(&guest, A)? {
            Readable::Page(frame) => frame.as_ref().pfn(),
            Readable::Zeroes => 0,
        };
        // Never a sharer's own: nobody chooses where it lies.
        assert!(shared != one && shared != two && shared != 0);
        assert!(reads(&guest, A, 7) && reads(&guest, B, 7));
        let figures = host.index().figures();
        assert_eq!((figures.pages_shared, figures.pages_sharing), (1, 1));
        assert_eq!(
            (count(&guest, Count::Shared), count(&guest, Count::Private)),
            (2, 0)
        );
        // A third one joins.
        write(&guest, C, 7)?;
        assert_eq!(merge(&guest, C, 99)?, Outcome::Merged);
        assert_eq!(host.index().figures().pages_sharing, 2);
        end(&guest);
        Ok(())
    }

    #[test]
    fn an_equal_hash_is_not_enough() -> Result {
        let host = Host::new()?;
        let guest = guest(&host, b"a", b"lab")?;
        host.index().maintain(host.registry(), 1000)?;
        write(&guest, A, 7)?;
        write(&guest, B, 7)?;
        // All bytes but the last are the same.
        data::writable(&guest, B)?.fill_for_test(4095, 1);
        assert!(hint(&guest, A, 99)?);
        assert_eq!(merge(&guest, B, 99)?, Outcome::Unique);
        assert_eq!(host.refusals.differs.load(Ordering::Relaxed), 1);
        assert!(state(&guest, A) == State::Private && state(&guest, B) == State::Private);
        // The same with a frame that is shared already.
        write(&guest, C, 7)?;
        assert_eq!(merge(&guest, C, 99)?, Outcome::Merged);
        assert_eq!(merge(&guest, B, 99)?, Outcome::Unique);
        assert_eq!(host.refusals.differs.load(Ordering::Relaxed), 2);
        assert_eq!(host.index().figures().pages_sharing, 1);
        assert!(reads(&guest, A, 7) && !reads(&guest, B, 7));
        end(&guest);
        Ok(())
    }

    #[test]
    fn a_page_that_somebody_holds_is_left_alone() -> Result {
        let host = Host::new()?;
        let guest = guest(&host, b"a", b"lab")?;
        host.index().maintain(host.registry(), 1000)?;
        write(&guest, A, 7)?;
        write(&guest, B, 7)?;
        assert!(hint(&guest, A, 99)?);
        for held in [A, B] {
            let holder = data::writable(&guest, held)?;
            // What may be written to is not known any more: it leaves its hint again.
            assert!(hint(&guest, A, 99)?);
            assert_eq!(merge(&guest, B, 99)?, Outcome::NotNow);
            drop(holder);
        }
        assert_eq!(host.refusals.pinned.load(Ordering::Relaxed), 2);
        assert!(state(&guest, A) == State::Private && state(&guest, B) == State::Private);
        assert_eq!(merge(&guest, B, 99)?, Outcome::Merged);
        end(&guest);
        Ok(())
    }

    #[test]
    fn nothing_merges_across_a_border() -> Result {
        let host = Host::new()?;
        let (a, b) = (guest(&host, b"a", b"lab")?, guest(&host, b"b", b"den")?);
        host.index().maintain(host.registry(), 1000)?;
        for backing in [&a, &b] {
            write(backing, A, 7)?;
        }
        // The hash is the same here, which seeds prevent otherwise.
        assert!(hint(&a, A, 99)?);
        assert_eq!(merge(&b, A, 99)?, Outcome::Unique);
        // Nor with a frame that others share.
        write(&a, B, 7)?;
        assert_eq!(merge(&a, B, 99)?, Outcome::Merged);
        assert_eq!(merge(&b, A, 99)?, Outcome::Unique);
        assert!(state(&b, A) == State::Private);
        let frame = data::writable(&b, A)?;
        let hash = |vm: &Backing| hash::of_page(frame.as_ref(), host.seed(vm.vm().scope()));
        assert!(hash(&a) != hash(&b));
        drop(frame);
        end(&a);
        end(&b);
        Ok(())
    }

    #[test]
    fn a_write_breaks_one_share_alone() -> Result {
        let host = Host::new()?;
        let (a, b) = (guest(&host, b"a", b"lab")?, guest(&host, b"b", b"lab")?);
        let id = share((&a, A), (&b, B), 7)?;
        // A reader keeps what it has.
        let reader = match data::readable(&a, A)? {
            Readable::Page(frame) => frame,
            Readable::Zeroes => return Err(EINVAL),
        };
        write(&a, A, 8)?;
        assert!(state(&a, A) == State::Private && state(&b, B) == State::Shared);
        assert!(reads(&a, A, 8) && reads(&b, B, 7));
        assert_eq!(a.vm().events.cow_breaks.load(Ordering::Relaxed), 1);
        assert_eq!(host.index().figures().pages_sharing, 0);
        // The last sharer's write goes into no frame that a reader could hold.
        write(&b, B, 9)?;
        assert!(reads(&b, B, 9) && reader.as_ref().filled_with() == Some(7));
        assert_eq!(host.index().figures().pages_shared, 0);
        assert!(host.index().page(id).is_none());
        end(&a);
        end(&b);
        Ok(())
    }

    #[test]
    fn a_lonely_sharer_gets_a_frame_of_its_own() -> Result {
        let host = Host::new()?;
        let (a, b) = (guest(&host, b"a", b"lab")?, guest(&host, b"b", b"lab")?);
        share((&a, A), (&b, B), 7)?;
        // As a pipe does that was filled through the one who goes.
        let Readable::Page(pipe) = data::readable(&a, A)? else {
            return Err(EINVAL);
        };
        a.punch(A, A + 1);
        let own = Frame::alloc(Purpose::Returned, -1).ok_or(ENOMEM)?;
        let region = b.region(B).ok_or(ENOENT)?;
        scan::give_back(&host, &mut region.lock(), Backing::index(B), own);
        assert!(state(&b, B) == State::Private && reads(&b, B, 7));
        assert_eq!(host.index().figures().pages_shared, 0);
        write(&b, B, 8)?;
        assert!(reads(&b, B, 8) && pipe.as_ref().filled_with() == Some(7));
        end(&a);
        end(&b);
        Ok(())
    }

    #[test]
    fn holes_give_back_what_they_cut() -> Result {
        let host = Host::new()?;
        let (a, b) = (guest(&host, b"a", b"lab")?, guest(&host, b"b", b"lab")?);
        share((&a, A), (&b, B), 7)?;
        write(&a, A + 1, 8)?;
        // From within the shared page to the end of the one after it.
        data::punch_bytes(&a, A * 4096 + 100, (A + 2) * 4096)?;
        assert!(state(&a, A) == State::Private && state(&a, A + 1) == State::Empty);
        let cut = data::writable(&a, A)?;
        let mut copy = Frame::alloc(Purpose::Shared, -1).ok_or(ENOMEM)?;
        copy.fill(7);
        assert!(!cut.as_ref().same_content(copy.as_ref()));
        copy.as_ref().zero_range(100, 4096);
        assert!(cut.as_ref().same_content(copy.as_ref()));
        drop(cut);
        assert!(reads(&b, B, 7));
        // A shorter file has nothing of what lay beyond.
        write(&b, C, 5)?;
        b.resize(B + 1);
        b.resize(PAGES);
        assert!(reads(&b, C, 0) && reads(&b, B, 7));
        assert_eq!(count(&b, Count::Empty), PAGES - 1);
        end(&b);
        assert_eq!(host.index().figures().pages_shared, 0);
        end(&a);
        assert_eq!(
            (host.registry().live(), host.index().figures().bytes),
            (0, 0)
        );
        assert_eq!(a.vm().snapshot().pages.total(), 0);
        Ok(())
    }

    #[test]
    fn a_new_border_breaks_what_crosses_it() -> Result {
        let host = Host::new()?;
        let (a, b) = (guest(&host, b"a", b"lab")?, guest(&host, b"b", b"lab")?);
        share((&a, A), (&b, A), 7)?;
        let within = share((&b, B), (&b, C), 8)?;
        let old = b.vm().scope();
        let den = host.vms().domain(b"den")?;
        host.regroup(&Change::Domain(b.vm(), den))?;
        assert!(b.vm().scope() != old && a.vm().scope() == old);
        // What only the one that moved shares moves with it, and is found there.
        assert!(state(&b, A) == State::Private && state(&b, B) == State::Shared);
        assert!(host.index().scope_of(within) == Some(b.vm().scope()));
        let Readable::Page(frame) = data::readable(&b, B)? else {
            return Err(EINVAL);
        };
        let hash = hash::of_page(frame.as_ref(), host.seed(b.vm().scope()));
        let mut found = [None; CANDIDATES];
        host.index().find(key(&b, hash), u32::MAX, &mut found);
        let is_it =
            |c: &Option<Candidate>| matches!(c, Some(Candidate::Record(id)) if *id == within);
        assert!(found.iter().any(is_it));
        assert!(reads(&a, A, 7) && reads(&b, A, 7) && reads(&b, B, 8) && reads(&b, C, 8));
        // One who does not share has no page with anybody, itself included.
        host.regroup(&Change::Share(b.vm(), false))?;
        assert_eq!(
            (count(&b, Count::Shared), count(&b, Count::Private)),
            (0, 3)
        );
        assert!(reads(&b, B, 8) && reads(&b, C, 8));
        end(&a);
        end(&b);
        Ok(())
    }

    #[test]
    fn each_scope_has_its_border() -> Result {
        let host = Host::new()?;
        let (a, b) = (guest(&host, b"a", b"lab")?, guest(&host, b"b", b"den")?);
        host.regroup(&Change::ShareScope(ShareScope::Host))?;
        share((&a, A), (&b, A), 7)?;
        share((&a, B), (&a, C), 8)?;
        host.regroup(&Change::ShareScope(ShareScope::Vm))?;
        assert_eq!((count(&a, Count::Shared), count(&b, Count::Shared)), (2, 0));
        assert!(share((&a, A), (&b, A), 7).is_err());
        host.regroup(&Change::ShareScope(ShareScope::Host))?;
        share((&a, A), (&b, A), 7)?;
        host.regroup(&Change::Unshare)?;
        assert_eq!((count(&a, Count::Shared), count(&b, Count::Shared)), (0, 0));
        assert!(reads(&a, A, 7) && reads(&b, A, 7) && reads(&a, B, 8) && reads(&a, C, 8));
        assert_eq!(host.index().figures().pages_shared, 0);
        end(&a);
        end(&b);
        Ok(())
    }

    #[test]
    fn what_lies_behind_a_hole_is_found() -> Result {
        let host = Host::new()?;
        let guest = guest(&host, b"a", b"lab")?;
        // Nothing of the first two regions was ever touched, and the third begins with data.
        write(&guest, 1024, 7)?;
        for from in [0, 5, 511, 512, 600, 1023, 1024] {
            assert_eq!(data::seek(&guest, from, PAGES, true), Some(1024));
        }
        assert_eq!(data::seek(&guest, 1025, PAGES, true), None);
        assert_eq!(data::seek(&guest, 1024, PAGES, false), Some(1025));
        assert_eq!(data::allocated_pages(&guest), 1);
        end(&guest);
        Ok(())
    }

    #[test]
    fn a_page_is_stable_only_with_its_hint() -> Result {
        let host = Host::new()?;
        let guest = guest(&host, b"a", b"lab")?;
        let hash = |page: u64| page.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        for page in 0..PAGES {
            if page % 64 == 0 {
                host.index().maintain(host.registry(), PAGES)?;
            }
            write(&guest, page, page as u32 + 1)?;
            hint(&guest, page, hash(page))?;
        }
        let mut stable = 0;
        for page in 0..PAGES {
            let region = guest.region(page).ok_or(ENOENT)?;
            let own = region.page_id(Backing::index(page));
            let mut found = [None; CANDIDATES];
            host.index()
                .find(key(&guest, hash(page)), u32::MAX, &mut found);
            let is_it =
                |c: &Option<Candidate>| matches!(c, Some(Candidate::Page(id)) if *id == own);
            let is_stable = slot(&guest, page).is_stable();
            // Growth moves hints and may lose some, but never without a word to their pages.
            assert!(!is_stable || found.iter().any(is_it));
            stable += u64::from(is_stable);
        }
        // The index grows before it is full.
        assert!(stable * 100 >= PAGES * 99);
        assert!(host.index().figures().bytes < PAGES * 16);
        end(&guest);
        Ok(())
    }
}
