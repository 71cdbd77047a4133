// SPDX-License-Identifier: GPL-2.0

#[kernel::macros::kunit_tests(thinram_logic)]
mod tests {
    use crate::{
        logic::{
            catalog::{Catalog, Entry, HintOutcome, StableOutcome},
            cell::SlotCell,
            funding::{fair_share, poorest, Holding, Pages},
            hist::AtomicHist,
            object::{self, Object, Room},
            pace::{Limits, Pacer, TokenBucket},
            records::{Bytes, Dropped, Form, Records},
            slot::{Class, Slot, State},
            state::{minfree_kb, HostState, Tracker},
            tunables::{parse_size, BadValue, RunMode, KNOBS, VM_KNOBS},
        },
        sys::{
            frames::{self, Boxes},
            page::{Frame, Purpose},
        },
    };
    use kernel::{prelude::*, str::CString};

    /// The next number of a sequence that looks random (splitmix64).
    fn next(seed: &mut u64) -> u64 {
        *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    #[test]
    fn a_word_holds_what_this_kernel_has() -> Result {
        let frame = Frame::alloc(Purpose::Shared, -1).ok_or(ENOMEM)?;
        let pfn = frame.as_ref().pfn();
        // A physical address of this machine, as that of an object in a pool is.
        let address = (pfn << 12) + 4088;
        for len in [1, 2048, Slot::LENGTH_MAX] {
            assert!(Slot::can_hold(address, len));
            let slot = Slot::compressed(address, len);
            assert!(slot.state() == State::Compressed);
            assert_eq!((slot.object_address(), slot.object_len()), (address, len));
        }
        let mut slot = Slot::private(pfn);
        for (hash, backoff) in [(0, 0), (u64::MAX, 3), (0x1234_5678_9abc_def0, u8::MAX)] {
            slot = slot.looked_at(Class::Unshared, hash).with_stable(true);
            slot = slot.with_backoff(backoff);
            assert_eq!((slot.payload(), slot.tag()), (pfn, hash as u16));
            assert!(slot.is_stable() && slot.backoff() == backoff.min(3));
            assert!(slot == Slot::from_word(slot.word()));
            // No pass is too late, no place too far.
            assert!(!slot.with_backoff(0).skipped_in(u64::MAX, u64::MAX));
        }
        Ok(())
    }

    #[test]
    fn a_cell_takes_no_note_that_comes_late() -> Result {
        let looked = Slot::private(9)
            .looked_at(Class::Unshared, 5)
            .with_stable(true);
        let cell = SlotCell::new(looked);
        assert!(cell.forget_stable() && !cell.forget_stable());
        // Whoever saw the word before says nothing of it now.
        cell.try_note(looked, looked.with_backoff(2));
        assert!(cell.peek() == looked.with_stable(false));
        cell.try_note(cell.peek(), looked.with_stable(false).with_backoff(2));
        assert_eq!(cell.peek().backoff(), 2);
        assert_eq!(cell.swap(Slot::ZERO).payload(), 9);
        assert!(cell.peek().state() == State::Zero);
        Ok(())
    }

    #[test]
    fn a_catalog_loses_nothing_without_a_word() -> Result {
        const ENTRIES: u32 = 4000;
        let mut catalog = Catalog::new(Boxes::new());
        // The hash of each page, while its hint is there; of each record that has an entry.
        let mut hinted = KVec::from_elem(None, ENTRIES as usize, GFP_KERNEL)?;
        let mut listed = KVec::from_elem(None, ENTRIES as usize, GFP_KERNEL)?;
        let mut hash_of = KVec::from_elem(0, ENTRIES as usize, GFP_KERNEL)?;
        assert!(catalog.insert_hint(1, 1) == HintOutcome::Refused);
        catalog.store_mut().push(frames::group_page()?)?;
        let mut seed = 1;
        for id in 0..ENTRIES {
            let hash = next(&mut seed);
            hash_of[id as usize] = hash;
            let evicted = if id % 5 == 0 {
                match catalog.insert_stable(hash, id) {
                    StableOutcome::Placed => None,
                    StableOutcome::Evicted(page) => Some(page),
                    StableOutcome::Refused => continue,
                }
            } else {
                match catalog.insert_hint(hash, id) {
                    HintOutcome::Placed => None,
                    HintOutcome::Evicted(page) => Some(page),
                    HintOutcome::Replaced(_) => return Err(EEXIST),
                    HintOutcome::Refused => continue,
                }
            };
            if let Some(page) = evicted {
                hinted[page as usize] = None;
            }
            let of = if id % 5 == 0 {
                &mut listed
            } else {
                &mut hinted
            };
            of[id as usize] = Some(hash);
            while catalog.entries() * 2 > catalog.capacity() && catalog.wants_growth() {
                if catalog.wants_page() {
                    catalog.store_mut().push(frames::group_page()?)?;
                }
                let grown = catalog.grow_step(&mut |entry| match entry {
                    Entry::Hint(id) | Entry::Stable(id) => Some(hash_of[id as usize] as u16),
                });
                assert!(grown);
                while let Some(entry) = catalog.pop_displaced() {
                    match entry {
                        Entry::Hint(page) => hinted[page as usize] = None,
                        Entry::Stable(id) => listed[id as usize] = None,
                    }
                }
            }
        }
        let (mut hints, mut stable) = (0, 0);
        for id in 0..ENTRIES {
            if let Some(hash) = hinted[id as usize] {
                hints += 1u64;
                assert!(catalog.lookup(hash).any(|entry| entry == Entry::Hint(id)));
            }
            if let Some(hash) = listed[id as usize] {
                stable += 1u64;
                assert!(catalog.lookup(hash).any(|entry| entry == Entry::Stable(id)));
            }
        }
        assert_eq!(
            (catalog.entries(), catalog.stable_entries()),
            (hints + stable, stable)
        );
        // At half of its places nearly all have one.
        assert!((hints + stable) * 100 > u64::from(ENTRIES) * 98);
        for id in 0..ENTRIES {
            if let Some(hash) = listed[id as usize] {
                assert!(catalog.remove(hash, Entry::Stable(id)));
                assert!(!catalog.remove(hash, Entry::Stable(id)));
            }
        }
        catalog.clear_hints();
        assert_eq!(catalog.entries(), 0);
        Ok(())
    }

    #[test]
    fn records_count_their_sharers() -> Result {
        let mut records = Records::new(Boxes::new());
        assert!(records.alloc(1, 2).is_none());
        let mut live: KVec<(u32, u32, u64)> = KVec::new();
        let mut seed = 2;
        for round in 0..3000u64 {
            if records.wants_page() {
                records.store_mut().push(frames::record_page()?)?;
            }
            let what = next(&mut seed);
            let at = (what >> 8) as usize % live.len().max(1);
            match what % 4 {
                0 => {
                    let sharers = 1 + (what >> 40) as u32 % 5;
                    let id = records.alloc(round, sharers).ok_or(ENOSPC)?;
                    assert!(live.iter().all(|(other, ..)| *other != id));
                    live.push((id, sharers, round), GFP_KERNEL)?;
                }
                1 if !live.is_empty() => {
                    let (id, sharers, _) = live[at];
                    assert_eq!(records.add_sharer(id, 6).is_ok(), sharers < 6);
                    live[at].1 = (sharers + 1).min(6);
                }
                2 if !live.is_empty() => {
                    let (id, sharers, bytes) = live[at];
                    match records.drop_sharer(id) {
                        Ok(Dropped::Last(last)) => {
                            assert_eq!((sharers, last.payload), (1, bytes));
                            let _ = live.remove(at);
                        }
                        Ok(_) => {
                            assert!(sharers > 1);
                            live[at].1 = sharers - 1;
                        }
                        Err(_) => assert!(false),
                    }
                }
                3 if !live.is_empty() => {
                    let (id, _, bytes) = live[at];
                    let old = records.put(id, Bytes::compressed(bytes)).ok_or(ENOENT)?;
                    assert_eq!(old.payload, bytes);
                }
                _ => {}
            }
        }
        let sharers = live
            .iter()
            .map(|(_, sharers, _)| u64::from(*sharers))
            .sum::<u64>();
        assert!(live.len() > 50);
        assert_eq!(
            (records.len(), records.sharers()),
            (live.len() as u64, sharers)
        );
        let packed = |id| {
            records
                .get(id)
                .is_some_and(|of| of.bytes.form == Form::Compressed)
        };
        let compressed = live.iter().filter(|(id, ..)| packed(*id)).count();
        assert_eq!(records.compressed(), compressed as u64);
        assert!(records.drop_sharer(u32::MAX).is_err());
        Ok(())
    }

    #[test]
    fn what_a_disk_gives_back_is_refused_or_within() -> Result {
        let mut cluster = KVec::from_elem(0u8, 5000, GFP_KERNEL)?;
        let mut seed = 3;
        let mut taken = 0;
        for _ in 0..3000 {
            let random = next(&mut seed);
            let at = random as usize % 600;
            let len = next(&mut seed) >> (random >> 58);
            cluster[at..at + 8].copy_from_slice(&random.to_le_bytes());
            cluster[at + 8..at + 16].copy_from_slice(&len.to_le_bytes());
            let possible = (1..=4096).contains(&len) && at as u64 + 16 + len <= 5000;
            let found = Object::at(&cluster, at);
            assert_eq!(found.map(|found| found.seal), possible.then_some(random));
            taken += u32::from(found.is_some_and(|found| found.body.len() as u64 == len));
        }
        assert!(taken > 100);
        for offset in [5000, usize::MAX - 15, usize::MAX] {
            assert!(Object::at(&cluster, offset).is_none());
            assert!(Room::of(&mut cluster, offset, 1).is_none());
        }
        assert!(object::size(usize::MAX).is_none());
        Ok(())
    }

    #[test]
    fn times_of_any_length_are_counted() -> Result {
        let hist = AtomicHist::new();
        for us in [0, 1, 4096, u64::MAX, u64::MAX] {
            hist.record(us);
        }
        let hist = hist.snapshot();
        assert_eq!((hist.count(), hist.max), (5, u64::MAX));
        assert_eq!((hist.percentile(0), hist.percentile(100)), (0, u64::MAX));
        assert!(hist.mean() > 0);
        Ok(())
    }

    #[test]
    fn the_largest_figures_overflow_nothing() -> Result {
        const MOST: u64 = u64::MAX;
        let all = Holding {
            shares: MOST,
            pages: MOST,
            active: MOST,
            idle: MOST,
            reserved: 0,
        };
        let poor = Holding { shares: 1, ..all };
        for tax in [0, 75, 99, 100, MOST] {
            let victim = poorest([all, poor].into_iter(), tax).ok_or(EINVAL)?;
            assert_eq!((victim.place, victim.pages), (1, MOST));
            assert!((victim.with == Pages::Idle) == (tax > 0));
        }
        assert!(fair_share(MOST, MOST, MOST) > MOST / 2);
        assert_eq!(fair_share(1, 0, MOST), MOST);
        assert!(minfree_kb(MOST) > MOST / 101 && minfree_kb(0) == 0);
        let mut tracker = Tracker::new(0);
        assert!(tracker.observe(1, 0, MOST));
        assert!(tracker.state() == HostState::ALL[HostState::ALL.len() - 1]);
        let _ = tracker.observe(MOST, MOST, MOST);
        let limits = Limits {
            pages_per_sec: MOST,
            period_secs: MOST,
            cpu_max_percent: u32::MAX,
            total_pages: MOST,
        };
        let mut pacer = Pacer::new(0);
        for now in [0, MOST, 0, MOST] {
            let _ = pacer.after(&limits, now, MOST, MOST);
            assert!(pacer.batch(&limits) > 0);
        }
        let mut bucket = TokenBucket::new(0);
        assert!(bucket.take(MOST, MOST, MOST) && !bucket.take(0, MOST, MOST));
        Ok(())
    }

    #[test]
    fn each_knob_takes_its_bounds_and_no_more() -> Result {
        for knob in Iterator::chain(KNOBS.iter(), VM_KNOBS) {
            for value in [knob.min, knob.default, knob.max] {
                let text = CString::try_from_fmt(fmt!("{value}\n"))?;
                assert!(knob.parse(text.to_bytes()) == Ok(value));
            }
            if let Some(more) = knob.max.checked_add(1) {
                let text = CString::try_from_fmt(fmt!("{more}"))?;
                assert!(knob.parse(text.to_bytes()) == Err(BadValue::Range));
            }
            assert!(knob.parse(b"99999999999999999999") == Err(BadValue::Range));
            assert!(knob.parse(b"\xff\n") == Err(BadValue::Invalid));
        }
        assert!(parse_size(b"16777215T") == Ok(0xff_ffff << 40));
        assert!(parse_size(b"16777216T") == Err(BadValue::Range));
        assert!(RunMode::parse(b"2\n") == Ok(RunMode::Unshare));
        Ok(())
    }
}
