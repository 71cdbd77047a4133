// SPDX-License-Identifier: GPL-2.0

//! Shared records: eight bytes for each frame that several slots share.
//!
//! ```text
//!  63 62     61                                     22 21                   2 1    0
//! +--+------+-----------------------------------------+----------------------+------+
//! | 0| idle | payload: frame number, or next free (40)| sharers less one (20)| form |
//! +--+------+-----------------------------------------+----------------------+------+
//! ```
//!
//! A record has one sharer or more, so one less is stored and 2^20 sharers fit. Free records form a
//! list through their payloads, so keeping track of them takes no memory. What a payload means is
//! for the owner of the records to say, by form. Idle: no sharer touched it since it was noted.

/// Records in one page of the store.
pub const RECORDS_PER_PAGE: usize = 512;
/// The most sharers that one record can have.
pub const SHARERS_MAX: u32 = 1 << SHARERS_BITS;
/// The largest payload that a record can hold, a frame number or another.
pub const PAYLOAD_MAX: u64 = (1 << PAYLOAD_BITS) - 1;

const FORM_BITS: u32 = 2;
const SHARERS_BITS: u32 = 20;
const PAYLOAD_BITS: u32 = 40;
const SHARERS_SHIFT: u32 = FORM_BITS;
const PAYLOAD_SHIFT: u32 = FORM_BITS + SHARERS_BITS;

const IDLE: u64 = 1 << (PAYLOAD_SHIFT + PAYLOAD_BITS);

const _: () = assert!(PAYLOAD_SHIFT + PAYLOAD_BITS < u64::BITS);
// A free record's payload is the id of the next one, plus one.
const _: () = assert!(PAYLOAD_MAX > u32::MAX as u64);
const _: () = assert!(size_of::<RecordPage>() == 4096);

/// Where the bytes of a record are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Form {
    /// Nowhere: the record is not in use.
    Free,
    /// In a frame.
    Frame,
    /// In the pool of the domain, or known to be four bytes over and over.
    Compressed,
    /// In the swap file of the domain, or on the way there.
    Swapped,
}

/// The word of one record, taken apart by accessors.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Record(u64);

impl Record {
    const fn free(next: u64) -> Record {
        Record((next & PAYLOAD_MAX) << PAYLOAD_SHIFT)
    }

    const fn new(form: Form, payload: u64, sharers: u32) -> Record {
        Record(form as u64 | ((payload & PAYLOAD_MAX) << PAYLOAD_SHIFT)).with_sharers(sharers)
    }

    /// The same with another number of sharers.
    const fn with_sharers(self, sharers: u32) -> Record {
        let mask = (SHARERS_MAX as u64 - 1) << SHARERS_SHIFT;
        let less_one = sharers.wrapping_sub(1) as u64;
        Record((self.0 & !mask) | ((less_one << SHARERS_SHIFT) & mask))
    }

    /// Where the bytes are.
    #[inline]
    pub const fn form(self) -> Form {
        match self.0 & ((1 << FORM_BITS) - 1) {
            0 => Form::Free,
            1 => Form::Frame,
            2 => Form::Compressed,
            _ => Form::Swapped,
        }
    }

    /// Slots that share it; meaningless for a free record.
    #[inline]
    pub const fn sharers(self) -> u32 {
        ((self.0 >> SHARERS_SHIFT) as u32 & (SHARERS_MAX - 1)) + 1
    }

    /// Frame number, or what the form says.
    #[inline]
    pub const fn payload(self) -> u64 {
        (self.0 >> PAYLOAD_SHIFT) & PAYLOAD_MAX
    }

    /// Whether no sharer touched it since that was noted.
    #[inline]
    pub const fn is_idle(self) -> bool {
        self.0 & IDLE != 0
    }

    const fn with_idle(self, idle: bool) -> Record {
        Record(if idle { self.0 | IDLE } else { self.0 & !IDLE })
    }
}

/// One page of records, all free.
#[derive(Clone, Debug)]
pub struct RecordPage([u64; RECORDS_PER_PAGE]);

impl RecordPage {
    /// A page of free records.
    pub const fn new() -> Self {
        RecordPage([0; RECORDS_PER_PAGE])
    }
}

impl Default for RecordPage {
    fn default() -> Self {
        Self::new()
    }
}

/// Storage of the pages; it only ever grows.
pub trait RecordStore {
    /// Number of pages.
    fn len(&self) -> usize;
    /// Whether there is no page.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Page number `i`.
    fn page(&self, i: usize) -> Option<&RecordPage>;
    /// Page number `i`, to be changed.
    fn page_mut(&mut self, i: usize) -> Option<&mut RecordPage>;
}

/// Where the bytes of a record in use are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Bytes {
    /// How they are kept; never [`Form::Free`].
    pub form: Form,
    /// The frame's number, or what the form says.
    pub payload: u64,
}

impl Bytes {
    /// In frame number `pfn`.
    pub const fn frame(pfn: u64) -> Bytes {
        Bytes {
            form: Form::Frame,
            payload: pfn,
        }
    }

    /// Compressed, to be found by `payload`.
    pub const fn compressed(payload: u64) -> Bytes {
        Bytes {
            form: Form::Compressed,
            payload,
        }
    }

    /// In a swap file, to be found by `payload`.
    pub const fn swapped(payload: u64) -> Bytes {
        Bytes {
            form: Form::Swapped,
            payload,
        }
    }
}

/// What is known of a shared record.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Shared {
    /// Its bytes.
    pub bytes: Bytes,
    /// Slots that share it, one or more.
    pub sharers: u32,
}

/// A record that takes no further sharer: it has as many as it may, or is not in use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Full;

/// A record that is not in use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Unknown;

/// What is left after a sharer went.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Dropped {
    /// So many sharers.
    Left(u32),
    /// Nobody: the record is free, and these bytes are the caller's.
    Last(Bytes),
}

const fn bytes_of(record: Record) -> Bytes {
    Bytes {
        form: record.form(),
        payload: record.payload(),
    }
}

/// All shared records of the host.
#[derive(Debug)]
pub struct Records<S: RecordStore> {
    store: S,
    /// Head of the list of free records: id plus one, 0 = none.
    free: u64,
    /// Records from here on were never used.
    fresh: u64,
    live: u64,
    sharers: u64,
    compressed: u64,
    swapped: u64,
}

impl<S: RecordStore> Records<S> {
    /// Over pages of free records.
    pub fn new(store: S) -> Self {
        Self {
            store,
            free: 0,
            fresh: 0,
            live: 0,
            sharers: 0,
            compressed: 0,
            swapped: 0,
        }
    }

    /// The storage, for pages to be pushed.
    pub fn store_mut(&mut self) -> &mut S {
        &mut self.store
    }

    /// Whether no free record is left.
    #[inline]
    pub fn wants_page(&self) -> bool {
        self.free() == 0
    }

    /// Free records.
    #[inline]
    pub fn free(&self) -> u64 {
        let room = (self.store.len() as u64).saturating_mul(RECORDS_PER_PAGE as u64);
        room.min(u64::from(u32::MAX)).saturating_sub(self.live)
    }

    #[inline]
    fn word(&self, id: u64) -> Option<Record> {
        let at = usize::try_from(id).ok()?;
        let page = self.store.page(at / RECORDS_PER_PAGE)?;
        page.0.get(at % RECORDS_PER_PAGE).map(|&word| Record(word))
    }

    #[inline]
    fn set(&mut self, id: u64, record: Record) -> Option<()> {
        let at = usize::try_from(id).ok()?;
        let page = self.store.page_mut(at / RECORDS_PER_PAGE)?;
        *page.0.get_mut(at % RECORDS_PER_PAGE)? = record.0;
        Some(())
    }

    fn live(&self, id: u32) -> Option<Record> {
        self.word(id.into())
            .filter(|record| record.form() != Form::Free)
    }

    /// A record for frame `pfn` with so many sharers. `None` without a free record, and for values
    /// that a record cannot hold (no sharer, more than [`SHARERS_MAX`], a frame above [`PAYLOAD_MAX`]).
    pub fn alloc(&mut self, pfn: u64, sharers: u32) -> Option<u32> {
        if pfn > PAYLOAD_MAX || sharers == 0 || sharers > SHARERS_MAX || self.wants_page() {
            return None;
        }
        let id = if self.free == 0 {
            self.fresh
        } else {
            self.free.checked_sub(1)?
        };
        let old = self.word(id)?;
        self.set(id, Record::new(Form::Frame, pfn, sharers))?;
        if self.free == 0 {
            self.fresh = self.fresh.saturating_add(1);
        } else {
            self.free = old.payload();
        }
        self.live = self.live.saturating_add(1);
        self.sharers = self.sharers.saturating_add(sharers.into());
        u32::try_from(id).ok()
    }

    /// Bytes and sharers of a record in use.
    #[inline]
    pub fn get(&self, id: u32) -> Option<Shared> {
        let record = self.live(id)?;
        Some(Shared {
            bytes: bytes_of(record),
            sharers: record.sharers(),
        })
    }

    /// Says where the bytes of a record in use are from here on; answers where they were. `None`, and
    /// no change, for a record that is not in use and for bytes that a record cannot hold.
    pub fn put(&mut self, id: u32, bytes: Bytes) -> Option<Bytes> {
        let record = self.live(id)?;
        if bytes.form == Form::Free || bytes.payload > PAYLOAD_MAX {
            return None;
        }
        let moved = Record::new(bytes.form, bytes.payload, record.sharers());
        self.set(id.into(), moved)?;
        self.count(record.form(), bytes.form);
        Some(bytes_of(record))
    }

    /// Notes whether the record is idle; answers what it was before, false for one not in use.
    pub fn note_idle(&mut self, id: u32, idle: bool) -> bool {
        let Some(record) = self.live(id) else {
            return false;
        };
        if record.is_idle() != idle {
            self.set(id.into(), record.with_idle(idle));
        }
        record.is_idle()
    }

    fn count(&mut self, from: Form, to: Form) {
        let counted = |count: u64, which: Form| {
            let is = |form: Form| u64::from(form == which);
            count.saturating_add(is(to)).saturating_sub(is(from))
        };
        self.compressed = counted(self.compressed, Form::Compressed);
        self.swapped = counted(self.swapped, Form::Swapped);
    }

    /// Adds a sharer unless there are `max` of them; answers how many there are now.
    ///
    /// # Errors
    ///
    /// [`Full`] when it has `max` or [`SHARERS_MAX`] sharers, or is not in use.
    pub fn add_sharer(&mut self, id: u32, max: u32) -> Result<u32, Full> {
        let record = self.live(id).ok_or(Full)?;
        if record.sharers() >= max.min(SHARERS_MAX) {
            return Err(Full);
        }
        let sharers = record.sharers().saturating_add(1);
        self.set(id.into(), record.with_sharers(sharers))
            .ok_or(Full)?;
        self.sharers = self.sharers.saturating_add(1);
        Ok(sharers)
    }

    /// Takes a sharer away. The last one frees the record and leaves the frame to the caller.
    ///
    /// # Errors
    ///
    /// [`Unknown`] when the record is not in use.
    pub fn drop_sharer(&mut self, id: u32) -> Result<Dropped, Unknown> {
        let record = self.live(id).ok_or(Unknown)?;
        if record.sharers() == 1 {
            self.release(id).ok_or(Unknown)?;
            self.count(record.form(), Form::Free);
            return Ok(Dropped::Last(bytes_of(record)));
        }
        let sharers = record.sharers().saturating_sub(1);
        self.set(id.into(), record.with_sharers(sharers))
            .ok_or(Unknown)?;
        self.sharers = self.sharers.saturating_sub(1);
        Ok(Dropped::Left(sharers))
    }

    /// Frees a record that has one sharer.
    fn release(&mut self, id: u32) -> Option<()> {
        self.set(id.into(), Record::free(self.free))?;
        self.free = u64::from(id).saturating_add(1);
        self.live = self.live.saturating_sub(1);
        self.sharers = self.sharers.saturating_sub(1);
        Some(())
    }

    /// Records in use.
    pub fn len(&self) -> u64 {
        self.live
    }

    /// Whether no record is in use.
    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// Records whose bytes are compressed.
    pub fn compressed(&self) -> u64 {
        self.compressed
    }

    /// Records whose bytes are in a swap file.
    pub fn swapped(&self) -> u64 {
        self.swapped
    }

    /// Sharers of all records.
    pub fn sharers(&self) -> u64 {
        self.sharers
    }

    /// Pages that sharing saves: the sharers less one of each record.
    pub fn pages_sharing(&self) -> u64 {
        self.sharers.saturating_sub(self.live)
    }

    /// Memory of the pages, in bytes.
    pub fn bytes(&self) -> u64 {
        (self.store.len() as u64).saturating_mul(size_of::<RecordPage>() as u64)
    }

    /// The first record in use from `from` on.
    pub fn next_live(&self, from: u32) -> Option<u32> {
        let end = u32::try_from(self.fresh).unwrap_or(u32::MAX);
        (from..end).find(|&id| self.live(id).is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    #[derive(Default)]
    struct Pages(Vec<Box<RecordPage>>);

    impl RecordStore for Pages {
        fn len(&self) -> usize {
            self.0.len()
        }

        fn page(&self, i: usize) -> Option<&RecordPage> {
            self.0.get(i).map(|page| &**page)
        }

        fn page_mut(&mut self, i: usize) -> Option<&mut RecordPage> {
            self.0.get_mut(i).map(|page| &mut **page)
        }
    }

    fn with_pages(pages: usize) -> Records<Pages> {
        let mut records = Records::new(Pages::default());
        records.store_mut().0.resize_with(pages, Box::default);
        records
    }

    #[test]
    fn fields_do_not_touch_each_other() {
        for sharers in [1, 2, 65_536, SHARERS_MAX] {
            for pfn in [0, 1, PAYLOAD_MAX] {
                for form in [Form::Frame, Form::Compressed, Form::Swapped] {
                    let record = Record::new(form, pfn, sharers);
                    assert_eq!((record.form(), record.sharers()), (form, sharers));
                    assert_eq!(record.payload(), pfn);
                    assert_eq!(record.with_sharers(7), Record::new(form, pfn, 7));
                    let idle = record.with_idle(true);
                    assert!(idle.is_idle() && !record.is_idle());
                    assert_eq!((idle.payload(), idle.sharers()), (pfn, sharers));
                    assert_eq!(idle.with_idle(false), record);
                }
            }
        }
        let next = u64::from(u32::MAX) + 1;
        assert_eq!(
            (Record::free(next).form(), Record::free(next).payload()),
            (Form::Free, next)
        );
    }

    #[test]
    fn nothing_without_pages() {
        let mut records = with_pages(0);
        assert!(records.wants_page());
        assert_eq!(records.alloc(1, 2), None);
        assert_eq!(
            (records.len(), records.bytes(), records.next_live(0)),
            (0, 0, None)
        );
    }

    #[test]
    fn what_a_record_cannot_hold_is_refused() {
        let mut records = with_pages(1);
        assert_eq!(records.alloc(PAYLOAD_MAX + 1, 2), None);
        assert_eq!(records.alloc(1, 0), None);
        assert_eq!(records.alloc(1, SHARERS_MAX + 1), None);
        assert!(records.is_empty());
        let id = records.alloc(PAYLOAD_MAX, SHARERS_MAX).unwrap();
        assert_eq!(records.add_sharer(id, u32::MAX), Err(Full));
        assert_eq!(
            records.get(id),
            Some(Shared {
                bytes: Bytes::frame(PAYLOAD_MAX),
                sharers: SHARERS_MAX
            })
        );
        assert_eq!(records.put(id, Bytes::compressed(PAYLOAD_MAX + 1)), None);
        let nowhere = Bytes {
            form: Form::Free,
            payload: 0,
        };
        assert_eq!(records.put(id, nowhere), None);
        assert_eq!(
            records.put(id, Bytes::compressed(7)),
            Some(Bytes::frame(PAYLOAD_MAX))
        );
        assert_eq!((records.compressed(), records.swapped()), (1, 0));
        assert_eq!(
            records.put(id, Bytes::swapped(7)),
            Some(Bytes::compressed(7))
        );
        assert_eq!((records.compressed(), records.swapped()), (0, 1));
    }

    #[test]
    fn a_record_is_idle_until_it_is_touched() {
        let mut records = with_pages(1);
        let id = records.alloc(9, 2).unwrap();
        assert!(!records.note_idle(id, true));
        records.add_sharer(id, 9).unwrap();
        assert!(records.note_idle(id, false));
        assert!(!records.note_idle(id, true));
        // Bytes in another place were not looked at there.
        records.put(id, Bytes::compressed(3)).unwrap();
        assert!(!records.note_idle(id, false));
        assert!(!records.note_idle(id + 1, true));
    }

    #[test]
    fn unknown_ids_are_told() {
        let mut records = with_pages(1);
        let id = records.alloc(9, 1).unwrap();
        assert_eq!(records.drop_sharer(id), Ok(Dropped::Last(Bytes::frame(9))));
        for id in [id, id + 1, 512, u32::MAX] {
            assert_eq!(records.get(id), None);
            assert_eq!(records.put(id, Bytes::frame(3)), None);
            assert_eq!(records.add_sharer(id, 9), Err(Full));
            assert_eq!(records.drop_sharer(id), Err(Unknown));
        }
        assert_eq!(
            (records.len(), records.sharers(), records.pages_sharing()),
            (0, 0, 0)
        );
    }

    #[derive(Clone, Debug)]
    enum Op {
        Page,
        Alloc { pfn: u64, sharers: u32 },
        Add { pick: usize, max: u32 },
        Drop { pick: usize },
        Put { pick: usize, bytes: Bytes },
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            1 => Just(Op::Page),
            20 => (0..=PAYLOAD_MAX, 1u32..4).prop_map(|(pfn, sharers)| Op::Alloc { pfn, sharers }),
            10 => (any::<usize>(), 1u32..6).prop_map(|(pick, max)| Op::Add { pick, max }),
            20 => any::<usize>().prop_map(|pick| Op::Drop { pick }),
            10 => (any::<usize>(), 0..3, 0..=PAYLOAD_MAX).prop_map(|(pick, form, payload)| {
                let bytes = match form {
                    0 => Bytes::frame(payload),
                    1 => Bytes::compressed(payload),
                    _ => Bytes::swapped(payload),
                };
                Op::Put { pick, bytes }
            }),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_the_model(ops in prop::collection::vec(op(), 1..2000)) {
            let mut records = with_pages(0);
            let mut model: HashMap<u32, Shared> = HashMap::new();
            for op in ops {
                let picked = |pick: usize| {
                    let mut ids: Vec<u32> = model.keys().copied().collect();
                    ids.sort_unstable();
                    (!ids.is_empty()).then(|| ids[pick % ids.len()])
                };
                match op {
                    Op::Page => records.store_mut().0.push(Box::default()),
                    Op::Alloc { pfn, sharers } => {
                        let full = records.wants_page();
                        prop_assert_eq!(full, model.len() == records.store.0.len() * 512);
                        let id = records.alloc(pfn, sharers);
                        prop_assert_eq!(id.is_none(), full);
                        if let Some(id) = id {
                            let bytes = Bytes::frame(pfn);
                            let old = model.insert(id, Shared { bytes, sharers });
                            prop_assert_eq!(old, None, "a record in use given out");
                        }
                    }
                    Op::Add { pick, max } => if let Some(id) = picked(pick) {
                        let shared = model.get_mut(&id).unwrap();
                        if shared.sharers < max {
                            shared.sharers += 1;
                            prop_assert_eq!(records.add_sharer(id, max), Ok(shared.sharers));
                        } else {
                            prop_assert_eq!(records.add_sharer(id, max), Err(Full));
                        }
                    },
                    Op::Drop { pick } => if let Some(id) = picked(pick) {
                        let shared = model.get_mut(&id).unwrap();
                        shared.sharers -= 1;
                        let Shared { bytes, sharers } = *shared;
                        let dropped = if sharers > 0 {
                            Dropped::Left(sharers)
                        } else {
                            model.remove(&id);
                            Dropped::Last(bytes)
                        };
                        prop_assert_eq!(records.drop_sharer(id), Ok(dropped));
                    },
                    Op::Put { pick, bytes } => if let Some(id) = picked(pick) {
                        let shared = model.get_mut(&id).unwrap();
                        prop_assert_eq!(records.put(id, bytes), Some(shared.bytes));
                        shared.bytes = bytes;
                    },
                }
                let count = |form| model.values().filter(|shared| shared.bytes.form == form).count() as u64;
                prop_assert_eq!(records.compressed(), count(Form::Compressed));
                prop_assert_eq!(records.swapped(), count(Form::Swapped));
                let sharers = model.values().map(|shared| u64::from(shared.sharers)).sum::<u64>();
                prop_assert_eq!(records.len(), model.len() as u64);
                prop_assert_eq!(records.sharers(), sharers);
                prop_assert_eq!(records.pages_sharing(), sharers - model.len() as u64);
                prop_assert_eq!(records.free() + records.len(), records.store.0.len() as u64 * 512);
            }
            let mut live = Vec::new();
            let mut from = 0;
            while let Some(id) = records.next_live(from) {
                prop_assert_eq!(records.get(id), model.get(&id).copied());
                live.push(id);
                from = id + 1;
            }
            prop_assert_eq!(live.len(), model.len());
        }
    }
}
