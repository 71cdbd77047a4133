// SPDX-License-Identifier: GPL-2.0

//! The catalog: one table from content hashes to pages that might have that content (hints) and to
//! shared records that do (stable entries). KSM needs two trees for this.
//!
//! An entry is six bytes: a tag of 16 hash bits and an id of 32. Entries lie in groups of 40, and
//! what does not fit into a group goes to a smaller group that all groups of its page spill into:
//!
//! ```text
//! page (4096 bytes) = 16 groups of 40 entries + 1 spill of 26
//! group             = 40 tags | entries used, stable, spilled | 40 ids
//!                     [stable, stable, .. | hint, hint, .. | free, ..]
//! spill             = 28 tags | 26 ids | 26 homes | used, stable
//! ```
//!
//! Hints are lossy: a full group drops one for a new one. A stable entry never makes way for another.
//! Pages change and VMs end without a word to the table; [`Catalog::purge`] clears a group of the
//! hints that they leave behind.
//!
//! # Who is dropped
//!
//! Two pages with one content find each other if the hint of the first is there when the second comes
//! by, up to a pass later. In a table that is much too small, a hint that any later one can push out
//! never lives that long. So hints are ranked by their tags (two of one content rank alike), and the
//! lowest is dropped or not let in: the highest live through the whole pass. The ranks change every
//! other pass, so that each content has its turn.
//!
//! # Growth
//!
//! The table grows without a stall by linear hashing (Litwin 1980), and because a plain one has
//! groups of twice the load of others (so that a table that is 87 % full drops a tenth of its
//! hints), with partial expansions (Larson 1980). A group's number is `column * 2^level + row`:
//!
//! ```text
//! hash bit     0                    16          31
//!             +-----------------------+-----------+
//!             | row: the low level bits (may go on into the tag)
//!             +-----------------------+-----------+
//!                                     | tag       |
//!                                     +-----------+
//! column = tag * columns / 2^16: grows with the tag, so columns are ranges of tags
//! ```
//!
//! *Widening*: row by row, a ninth column (then a tenth, to the sixteenth) is added; each column
//! passes the upper part of its tags on to the next one, from the last column down. The tag tells
//! what moves. *Folding*: a row of sixteen columns becomes two rows of eight; that moves entries
//! between two neighbour columns only, by one more hash bit, which is asked from the entry's owner
//! while it is below the tag. One step is one move between two groups.

/// Entries of a group.
pub const GROUP_ENTRIES: usize = 40;
/// Groups of a page.
pub const GROUPS_PER_PAGE: usize = 16;
/// Entries that the groups of a page share for what does not fit.
pub const SPILL_ENTRIES: usize = 26;
/// Entries of a page.
pub const PAGE_ENTRIES: usize = GROUPS_PER_PAGE * GROUP_ENTRIES + SPILL_ENTRIES;
/// Stable entries that may have the same group and tag: the copies of one content beyond that are
/// not worth a place.
pub const SAME_TAG_MAX: usize = 32;
/// Above this many percent of all places in use, the table wants to grow.
pub const GROW_PERCENT: u64 = 82;
/// The same for stable entries alone: they cannot make way for each other, so they need more room.
pub const GROW_STABLE_PERCENT: u64 = 70;
/// No stable entry is taken above this, for then growth would not find places for all of them.
pub const STABLE_MAX_PERCENT: u64 = 85;

/// Places of a group that stable entries leave to hints: without one, its other contents would never
/// find their equals. With one, each has its turn.
const HINTS_KEPT: usize = 1;

const COLUMNS_MIN: u32 = 8;
const COLUMNS_MAX: u32 = 16;
/// Enough for 2^30 groups.
const LEVEL_MAX: u32 = 26;
const TAG_SHIFT: u32 = 16;
/// Stable entries that insertion or a growth step found no place for.
const STASH_ENTRIES: usize = 24;
/// So many of them at most were inserted: in a table of tens of thousands of entries hardly any other
/// finds its page full, and each look-up of a larger one passes them.
const STASH_INSERTED: usize = 8;
/// The most entries that one step moves: all of two groups, their spills, and the stash.
const MOVED_MAX: usize = 2 * (GROUP_ENTRIES + SPILL_ENTRIES) + STASH_ENTRIES;

const _: () = assert!(size_of::<GroupPage>() <= 4096);
const _: () = assert!(GROUPS_PER_PAGE as u32 == COLUMNS_MAX);
const _: () = assert!(COLUMNS_MAX == 2 * COLUMNS_MIN);

/// What a hash leads to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Entry {
    /// A page that had the content when it was last looked at.
    Hint(u32),
    /// A shared record.
    Stable(u32),
}

impl Entry {
    fn id(self) -> u32 {
        match self {
            Entry::Hint(id) | Entry::Stable(id) => id,
        }
    }

    fn is_stable(self) -> bool {
        matches!(self, Entry::Stable(_))
    }
}

/// What became of a hint that was inserted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HintOutcome {
    /// It has a place of its own.
    Placed,
    /// It was there already.
    Replaced(Entry),
    /// It has the place of this page's hint, which is gone.
    Evicted(u32),
    /// There is no page yet, or the group is full and it is not this hint's turn.
    Refused,
}

/// What became of a stable entry that was inserted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StableOutcome {
    /// It has a place of its own, or was there already.
    Placed,
    /// It has the place of this page's hint, which is gone.
    Evicted(u32),
    /// There is no page yet, stable entries fill the group, its spill and what may be kept aside, or
    /// [`STABLE_MAX_PERCENT`] of the table, or [`SAME_TAG_MAX`] have that tag.
    Refused,
}

/// An entry on its way.
#[derive(Clone, Copy, Default)]
struct Item {
    id: u32,
    tag: u16,
    /// In a spill: the group it belongs to. On its way: which of two groups it comes from.
    home: u8,
    stable: bool,
}

impl Item {
    fn new(hash: u64, entry: Entry) -> Self {
        Item {
            id: entry.id(),
            tag: tag_of(hash),
            home: 0,
            stable: entry.is_stable(),
        }
    }

    fn entry(self) -> Entry {
        if self.stable {
            Entry::Stable(self.id)
        } else {
            Entry::Hint(self.id)
        }
    }

    fn is(&self, tag: u16, entry: Entry) -> bool {
        self.tag == tag && self.id == entry.id() && self.stable == entry.is_stable()
    }
}

#[inline]
const fn tag_of(hash: u64) -> u16 {
    (hash >> TAG_SHIFT) as u16
}

/// How high a hint stands while others want its place. Multiplied, for what lies low in its column
/// would else be dropped first, and the load of the columns get uneven as they grow.
#[inline]
const fn rank(tag: u16, turn: u16) -> u16 {
    (tag ^ turn).wrapping_mul(0x9e37)
}

/// `N` places, of which the first hold stable entries and the next hints. `W` words hold the tags,
/// two each; `H` is `N` where entries of several groups meet, else 0.
#[derive(Clone, Debug)]
#[repr(C)]
struct Shelf<const N: usize, const W: usize, const H: usize> {
    tags: [u32; W],
    used: u8,
    stables: u8,
    /// Of a group: its entries in the page's spill.
    spilled: u8,
    ids: [u32; N],
    homes: [u8; H],
}

type Group = Shelf<GROUP_ENTRIES, 20, 0>;
type Spill = Shelf<SPILL_ENTRIES, 14, SPILL_ENTRIES>;

impl<const N: usize, const W: usize, const H: usize> Shelf<N, W, H> {
    const fn new() -> Self {
        Shelf {
            tags: [0; W],
            used: 0,
            stables: 0,
            spilled: 0,
            ids: [0; N],
            homes: [0; H],
        }
    }

    #[inline]
    fn used(&self) -> usize {
        self.used.into()
    }

    #[inline]
    fn stables(&self) -> usize {
        self.stables.into()
    }

    #[inline]
    fn is_full(&self) -> bool {
        self.used() >= N
    }

    /// The places in use whose tag is `tag`, one bit each.
    ///
    /// Four tags at a time in a general register: the kernel has no vector registers. Most groups
    /// hold no such tag, which one branch at the end finds out.
    #[inline]
    fn matches(&self, tag: u16) -> u64 {
        const LOW: u64 = 0x7fff_7fff_7fff_7fff;
        let pattern = u64::from(tag).wrapping_mul(0x0001_0001_0001_0001);
        let equal = |pair: &[u32]| {
            let lanes = match pair {
                [low, high] => u64::from(*low) | (u64::from(*high) << 32),
                _ => 0,
            };
            let differ = lanes ^ pattern;
            !((differ & LOW).wrapping_add(LOW) | differ | LOW)
        };
        let pairs = self.tags.chunks_exact(2);
        if pairs.clone().fold(0, |any, pair| any | equal(pair)) == 0 {
            return 0;
        }
        let found = pairs.enumerate().fold(0u64, |found, (i, pair)| {
            // Gathers bits 15, 31, 47, 63 in the top four.
            let four = (equal(pair) >> 15).wrapping_mul(0x0001_0002_0004_0008) >> 48;
            found | ((four & 0xf) << (4 * i))
        });
        found & ((1u64 << self.used()) - 1)
    }

    #[inline]
    fn id(&self, at: usize) -> u32 {
        self.ids.get(at).copied().unwrap_or(0)
    }

    fn get(&self, at: usize) -> Option<Item> {
        if at >= self.used() {
            return None;
        }
        let pair = *self.tags.get(at / 2)?;
        Some(Item {
            id: *self.ids.get(at)?,
            tag: (pair >> (16 * (at % 2))) as u16,
            home: self.homes.get(at).copied().unwrap_or(0),
            stable: at < self.stables(),
        })
    }

    fn put(&mut self, at: usize, item: Item) {
        if let (Some(pair), Some(id)) = (self.tags.get_mut(at / 2), self.ids.get_mut(at)) {
            let shift = 16 * (at % 2);
            *pair = (*pair & !(0xffff << shift)) | (u32::from(item.tag) << shift);
            *id = item.id;
        }
        if let Some(home) = self.homes.get_mut(at) {
            *home = item.home;
        }
    }

    /// Whether one more of this kind has a free place.
    #[inline]
    fn has_place(&self, stable: bool) -> bool {
        !(self.is_full() || stable && self.is_kept_for_hints())
    }

    /// Whether all places left are the hints'.
    #[inline]
    fn is_kept_for_hints(&self) -> bool {
        H == 0 && self.stables() >= N - HINTS_KEPT
    }

    /// Fills `to` with what is at `from`.
    fn copy(&mut self, from: usize, to: usize) {
        if let Some(item) = self.get(from) {
            self.put(to, item);
        }
    }

    /// Gives an entry a free place; false without one.
    #[inline]
    fn push(&mut self, item: Item) -> bool {
        if !self.has_place(item.stable) {
            return false;
        }
        let mut at = self.used();
        if item.stable {
            let first_hint = self.stables();
            self.copy(first_hint, at);
            at = first_hint;
            self.stables += 1;
        }
        self.put(at, item);
        self.used += 1;
        true
    }

    /// Takes an entry out.
    fn take(&mut self, at: usize) -> Option<Item> {
        let item = self.get(at)?;
        let last = self.used().saturating_sub(1);
        if item.stable {
            let last_stable = self.stables().saturating_sub(1);
            self.copy(last_stable, at);
            self.copy(last, last_stable);
            self.stables = self.stables.saturating_sub(1);
        } else {
            self.copy(last, at);
        }
        self.used = self.used.saturating_sub(1);
        Some(item)
    }

    /// Keeps the entries that `stays` says yes to.
    #[inline]
    fn retain(&mut self, mut stays: impl FnMut(&Item) -> bool) {
        let (mut used, mut stables) = (0, 0);
        for at in 0..self.used() {
            let Some(item) = self.get(at).filter(|item| stays(item)) else {
                continue;
            };
            if usize::from(used) != at {
                self.put(used.into(), item);
            }
            used += 1;
            stables += u8::from(item.stable);
        }
        (self.used, self.stables) = (used, stables);
    }

    /// Gives an entry the place of the hint whose turn is farthest, unless that is its own.
    fn swap_hint(&mut self, item: Item, turn: u16) -> Option<Item> {
        if item.stable && self.is_kept_for_hints() {
            return None;
        }
        // Rank and place in one number, so that the least is found without branches.
        let hints = self.stables()..self.used();
        let key = |tag: u32, at: usize| {
            let key = (u32::from(rank(tag as u16, turn)) << 8) | at as u32;
            if hints.contains(&at) {
                key
            } else {
                u32::MAX
            }
        };
        let pairs = self.tags.iter().enumerate();
        let keys = pairs.map(|(i, &pair)| key(pair, 2 * i).min(key(pair >> 16, 2 * i + 1)));
        let lowest = keys.min().filter(|&key| key < u32::MAX)?;
        if !item.stable && u32::from(rank(item.tag, turn)) <= lowest >> 8 {
            return None;
        }
        let at = (lowest & 0xff) as usize;
        let out = self.take(at)?;
        self.push(item);
        Some(out)
    }

    /// The place of an entry, in a spill of group `home`.
    fn find(&self, tag: u16, entry: Entry, home: u8) -> Option<usize> {
        Places(self.matches(tag)).find(|&at| {
            self.get(at)
                .is_some_and(|item| item.is(tag, entry) && (H == 0 || item.home == home))
        })
    }

    fn make_stable(&mut self, at: usize, record: u32) {
        if let Some(item) = self.take(at) {
            self.push(Item {
                id: record,
                stable: true,
                ..item
            });
        }
    }
}

/// The places of a mask, lowest first.
#[derive(Clone, Copy)]
struct Places(u64);

impl Iterator for Places {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        let at = self.0.trailing_zeros();
        self.0 &= self.0.wrapping_sub(1);
        (at < u64::BITS).then_some(at as usize)
    }
}

/// One page of the table.
#[derive(Clone, Debug)]
pub struct GroupPage {
    groups: [Group; GROUPS_PER_PAGE],
    spill: Spill,
}

impl GroupPage {
    /// A page without entries.
    pub const fn new() -> Self {
        GroupPage {
            groups: [const { Group::new() }; GROUPS_PER_PAGE],
            spill: Spill::new(),
        }
    }

    #[inline]
    fn group(&self, number: u32) -> Option<&Group> {
        self.groups.get(place_in_page(number))
    }

    #[inline]
    fn group_mut(&mut self, number: u32) -> Option<&mut Group> {
        self.groups.get_mut(place_in_page(number))
    }

    /// The entries of a group in the spill that have this tag.
    #[inline]
    fn spilled(&self, number: u32, tag: u16) -> u64 {
        let home = place_in_page(number) as u8;
        let alike = Places(self.spill.matches(tag));
        let ours = alike.filter(|&at| self.spill.homes.get(at) == Some(&home));
        ours.fold(0, |mask, at| mask | (1 << at))
    }

    fn add_spilled(&mut self, number: u32, by: i8) {
        if let Some(group) = self.group_mut(number) {
            group.spilled = group.spilled.saturating_add_signed(by);
        }
    }

    /// Gives an entry of group `number` a place: a free one, or that of a hint. The group keeps its
    /// highest ranks, and lower ones spill.
    #[inline]
    fn settle(&mut self, number: u32, item: Item, turn: u16) -> Settled {
        let Some(group) = self.group_mut(number) else {
            return Settled::NoRoom;
        };
        if group.push(item) {
            return Settled::Placed;
        }
        let displaced = group.swap_hint(item, turn);
        let home = place_in_page(number) as u8;
        let spilled = Item {
            home,
            ..displaced.unwrap_or(item)
        };
        if self.spill.push(spilled) {
            self.add_spilled(number, 1);
            return Settled::Placed;
        }
        if let Some(out) = self.spill.swap_hint(spilled, turn) {
            self.add_spilled(out.home.into(), -1);
            self.add_spilled(number, 1);
            return Settled::Evicted(out.id);
        }
        displaced.map_or(Settled::NoRoom, |out| Settled::Evicted(out.id))
    }

    /// Takes entries back from the spill as far as the group has room.
    fn refill(&mut self, number: u32) {
        let home = place_in_page(number) as u8;
        while let Some(group) = self.group(number).filter(|group| group.spilled > 0) {
            let may_return = |item: Item| item.home == home && group.has_place(item.stable);
            let used = self.spill.used();
            let at = (0..used).find(|&at| self.spill.get(at).is_some_and(may_return));
            let Some(item) = at.and_then(|at| self.spill.take(at)) else {
                return;
            };
            self.add_spilled(number, -1);
            if let Some(group) = self.group_mut(number) {
                group.push(item);
            }
        }
    }
}

impl Default for GroupPage {
    fn default() -> Self {
        Self::new()
    }
}

enum Settled {
    Placed,
    Evicted(u32),
    NoRoom,
}

#[inline]
const fn place_in_page(number: u32) -> usize {
    number as usize % GROUPS_PER_PAGE
}

#[inline]
const fn page_of(number: u32) -> usize {
    number as usize / GROUPS_PER_PAGE
}

/// Storage of the pages; it only ever grows.
pub trait PageStore {
    /// Number of pages.
    fn len(&self) -> usize;
    /// Whether there is no page.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Page number `i`.
    fn page(&self, i: usize) -> Option<&GroupPage>;
    /// Page number `i`, to be changed.
    fn page_mut(&mut self, i: usize) -> Option<&mut GroupPage>;
}

/// A list of bounded length.
struct Bounded<T, const N: usize> {
    items: [T; N],
    len: usize,
}

impl<T: Copy + Default, const N: usize> Bounded<T, N> {
    fn new() -> Self {
        Bounded {
            items: [T::default(); N],
            len: 0,
        }
    }

    fn push(&mut self, item: T) -> bool {
        let Some(place) = self.items.get_mut(self.len) else {
            return false;
        };
        *place = item;
        self.len += 1;
        true
    }

    fn pop(&mut self) -> Option<T> {
        self.len = self.len.checked_sub(1)?;
        self.items.get(self.len).copied()
    }

    fn as_slice(&self) -> &[T] {
        self.items.get(..self.len).unwrap_or(&[])
    }

    /// Takes the item at `at`; the last one gets its place.
    fn swap_take(&mut self, at: usize) -> Option<T> {
        let item = *self.as_slice().get(at)?;
        let last = self.pop()?;
        if let Some(place) = self.items.get_mut(at) {
            *place = last;
        }
        Some(item)
    }
}

/// A stable entry for which its group had no place.
#[derive(Clone, Copy, Default)]
struct Stashed {
    group: u32,
    item: Item,
}

/// How far growth has come.
#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Rows before `row` have a column more, and so have, in `row` itself, the columns from `left`
    /// on, counted before they passed anything on.
    Widening { row: u32, left: u32 },
    /// Pairs of columns before this one belong to two rows.
    Folding { pair: u32 },
}

/// What a step does with an entry that it comes by.
enum Fate {
    Stays,
    Moves,
    Goes,
}

/// The table.
pub struct Catalog<S: PageStore> {
    store: S,
    /// Groups in use, numbered from 0.
    groups: u32,
    level: u32,
    columns: u32,
    phase: Phase,
    entries: u64,
    stables: u64,
    /// Ranks the hints.
    turn: u16,
    /// Whether the turn is over with the next pass.
    turn_ends: bool,
    stash: Bounded<Stashed, STASH_ENTRIES>,
    /// What a step moves, and afterwards what it found no place for.
    moved: Bounded<Item, MOVED_MAX>,
}

impl<S: PageStore> Catalog<S> {
    /// A table without entries. It needs a page in `store` before anything can be inserted.
    pub fn new(store: S) -> Self {
        let mut catalog = Catalog {
            store,
            groups: 0,
            level: 0,
            columns: COLUMNS_MAX,
            phase: Phase::Folding { pair: 0 },
            entries: 0,
            stables: 0,
            turn: 0,
            turn_ends: false,
            stash: Bounded::new(),
            moved: Bounded::new(),
        };
        catalog.start();
        catalog
    }

    /// The storage, for pages to be pushed.
    pub fn store_mut(&mut self) -> &mut S {
        &mut self.store
    }

    /// The first page is used as a whole, for it is there anyway.
    fn start(&mut self) -> bool {
        if self.groups == 0 && self.store.len() > 0 {
            self.groups = COLUMNS_MAX;
        }
        self.groups > 0
    }

    /// Whether the next step of growth (or the first insertion) needs a page that is not there.
    pub fn wants_page(&self) -> bool {
        let begins = match self.phase {
            Phase::Widening { left, .. } => left == self.columns,
            Phase::Folding { .. } => self.groups == 0,
        };
        begins && page_of(self.groups) >= self.store.len()
    }

    /// The group that a hash belongs to.
    #[inline]
    fn home(&self, hash: u64) -> u32 {
        let tag = u32::from(tag_of(hash));
        let row = hash as u32 & ((1 << self.level) - 1);
        let column = match self.phase {
            Phase::Widening { row: at, left } => {
                let narrow = (tag * self.columns) >> 16;
                if row < at || (row == at && narrow >= left) {
                    (tag * (self.columns + 1)) >> 16
                } else {
                    narrow
                }
            }
            Phase::Folding { pair } => {
                let half = tag >> 13;
                if ((half << self.level) | row) < pair {
                    (half << 1) | ((hash >> self.level) as u32 & 1)
                } else {
                    tag >> 12
                }
            }
        };
        (column << self.level) | row
    }

    /// The entries with a hash like this one, stable ones first: their tags are equal, the rest has
    /// to be compared.
    #[inline]
    pub fn lookup(&self, hash: u64) -> Matches<'_, S> {
        let tag = tag_of(hash);
        let number = self.home(hash);
        let page = self.store.page(page_of(number));
        let group = page.and_then(|page| page.group(number));
        let (mut in_group, mut in_spill) = (0, 0);
        if let (Some(page), Some(group)) = (page, group) {
            in_group = group.matches(tag);
            if group.spilled > 0 {
                in_spill = page.spilled(number, tag);
            }
        }
        Matches {
            catalog: self,
            page,
            number,
            tag,
            in_group,
            in_spill,
            stashed: 0,
        }
    }

    /// Whether a hint that was found under `hash` can be up to date when its owner has these low 16
    /// bits of a hash now. If not, the owner changed, and the hint may be removed; if so, it may well
    /// be the hint of another hash with the same tag, which its owner relies on.
    #[inline]
    pub fn can_be_under(&self, hash: u64, owner_bits: u16) -> bool {
        let row = (1u32 << self.level.min(TAG_SHIFT)) - 1;
        (hash as u32 ^ u32::from(owner_bits)) & row == 0
    }

    /// Takes note that a page has this content.
    #[inline]
    pub fn insert_hint(&mut self, hash: u64, page: u32) -> HintOutcome {
        if !self.start() {
            return HintOutcome::Refused;
        }
        let item = Item::new(hash, Entry::Hint(page));
        let number = self.home(hash);
        let Some(pages) = self.store.page_mut(page_of(number)) else {
            return HintOutcome::Refused;
        };
        let entry = item.entry();
        let home = place_in_page(number) as u8;
        let known = pages.group(number).is_some_and(|group| {
            group.find(item.tag, entry, 0).is_some()
                || group.spilled > 0 && pages.spill.find(item.tag, entry, home).is_some()
        });
        if known {
            return HintOutcome::Replaced(entry);
        }
        match pages.settle(number, item, self.turn) {
            Settled::Placed => {
                self.entries = self.entries.saturating_add(1);
                HintOutcome::Placed
            }
            Settled::Evicted(page) => HintOutcome::Evicted(page),
            Settled::NoRoom => HintOutcome::Refused,
        }
    }

    /// Makes room in the group of this hash, if it is full, by forgetting hints that are out of date:
    /// those whose owner (asked as in [`Self::grow_step`]) changed or is gone. True if there were any.
    pub fn purge(&mut self, hash: u64, owner_bits: &mut dyn FnMut(Entry) -> Option<u16>) -> bool {
        let number = self.home(hash);
        let page = self.store.page(page_of(number));
        let group = page.and_then(|page| page.group(number));
        if !group.is_some_and(|group| group.is_full()) {
            return false;
        }
        let before = self.entries;
        let row = (1u32 << self.level.min(TAG_SHIFT)) - 1;
        self.lift(number, 0, |item| match owner_bits(item.entry()) {
            _ if item.stable => Fate::Stays,
            Some(bits) if (u32::from(bits) ^ hash as u32) & row == 0 => Fate::Stays,
            _ => Fate::Goes,
        });
        if let Some(page) = self.store.page_mut(page_of(number)) {
            page.refill(number);
        }
        self.unstash();
        self.entries < before
    }

    /// Takes note that a record has this content, for good.
    pub fn insert_stable(&mut self, hash: u64, record: u32) -> StableOutcome {
        if !self.start() {
            return StableOutcome::Refused;
        }
        let item = Item::new(hash, Entry::Stable(record));
        let alike = self.lookup(hash).take_while(|entry| entry.is_stable());
        let (mut same, mut known) = (0, false);
        for entry in alike {
            same += 1;
            known |= entry == item.entry();
        }
        if known {
            return StableOutcome::Placed;
        }
        if self.above(self.stables, STABLE_MAX_PERCENT) {
            return StableOutcome::Refused;
        }
        let number = self.home(hash);
        let page = self
            .store
            .page_mut(page_of(number))
            .filter(|_| same < SAME_TAG_MAX);
        let Some(page) = page else {
            return StableOutcome::Refused;
        };
        let outcome = match page.settle(number, item, self.turn) {
            Settled::Placed => StableOutcome::Placed,
            Settled::Evicted(page) => StableOutcome::Evicted(page),
            Settled::NoRoom if self.stash.len < STASH_INSERTED => {
                self.stash.push(Stashed {
                    group: number,
                    item,
                });
                StableOutcome::Placed
            }
            Settled::NoRoom => return StableOutcome::Refused,
        };
        if outcome == StableOutcome::Placed {
            self.entries = self.entries.saturating_add(1);
        }
        self.stables = self.stables.saturating_add(1);
        outcome
    }

    /// Forgets an entry; false if it is not there.
    pub fn remove(&mut self, hash: u64, entry: Entry) -> bool {
        let removed = self.take(hash, entry);
        if removed {
            self.uncount(entry.is_stable());
            if self.stash.len > 0 {
                self.unstash();
            }
        }
        removed
    }

    fn uncount(&mut self, stable: bool) {
        self.entries = self.entries.saturating_sub(1);
        self.stables = self.stables.saturating_sub(stable.into());
    }

    fn take(&mut self, hash: u64, entry: Entry) -> bool {
        let tag = tag_of(hash);
        let number = self.home(hash);
        let Some(page) = self.store.page_mut(page_of(number)) else {
            return false;
        };
        let Some(group) = page.group_mut(number) else {
            return false;
        };
        if let Some(at) = group.find(tag, entry, 0) {
            group.take(at);
            page.refill(number);
            return true;
        }
        if group.spilled > 0 {
            if let Some(at) = page.spill.find(tag, entry, place_in_page(number) as u8) {
                page.spill.take(at);
                page.add_spilled(number, -1);
                return true;
            }
        }
        let mut stashed = self.stash.as_slice().iter();
        let at = stashed.position(|one| one.group == number && one.item.is(tag, entry));
        at.and_then(|at| self.stash.swap_take(at)).is_some()
    }

    /// Turns the hint of a page into the stable entry of a record, in its place. False if the hint is
    /// not there, [`SAME_TAG_MAX`] stable entries have the tag, or the group needs its last hints.
    pub fn promote(&mut self, hash: u64, hint: u32, record: u32) -> bool {
        let tag = tag_of(hash);
        let number = self.home(hash);
        let same = self
            .lookup(hash)
            .take_while(|entry| entry.is_stable())
            .count();
        let page = self
            .store
            .page_mut(page_of(number))
            .filter(|_| same < SAME_TAG_MAX);
        let Some(page) = page else { return false };
        let Some(group) = page.group_mut(number) else {
            return false;
        };
        let hint = Entry::Hint(hint);
        if let Some(at) = group.find(tag, hint, 0) {
            if group.is_kept_for_hints() {
                return false;
            }
            group.make_stable(at, record);
        } else if let Some(at) = page.spill.find(tag, hint, place_in_page(number) as u8) {
            page.spill.make_stable(at, record);
        } else {
            return false;
        }
        self.stables = self.stables.saturating_add(1);
        true
    }

    fn above(&self, entries: u64, percent: u64) -> bool {
        entries.saturating_mul(100) > self.capacity().saturating_mul(percent)
    }

    /// Whether the table is so full that it should grow.
    pub fn wants_growth(&self) -> bool {
        let at_end = self.level >= LEVEL_MAX && matches!(self.phase, Phase::Folding { .. });
        let full = self.above(self.entries, GROW_PERCENT) || self.is_crowded();
        self.groups > 0 && full && !at_end
    }

    /// Whether that is for the stable entries alone, however few contents there are besides.
    pub fn is_crowded(&self) -> bool {
        self.above(self.stables, GROW_STABLE_PERCENT)
    }

    /// Takes one step of growth, between two groups, if the table is full enough to want it and the
    /// storage has the page; true if it did. Sixteen steps or fewer make room for one group.
    ///
    /// `owner_bits` answers the low 16 bits of the hash that the entry's owner has now: `None` drops
    /// a hint that is out of date (or a stable entry whose content is lost). Entries for which no
    /// room was left are told by [`Self::pop_displaced`] until the next step.
    pub fn grow_step(&mut self, owner_bits: &mut dyn FnMut(Entry) -> Option<u16>) -> bool {
        self.moved.len = 0;
        self.wants_growth() && self.step(owner_bits)
    }

    fn step(&mut self, owner_bits: &mut dyn FnMut(Entry) -> Option<u16>) -> bool {
        self.unstash();
        match self.phase {
            Phase::Widening { row, left } => self.widen(row, left),
            Phase::Folding { pair } => self.fold(pair, owner_bits),
        }
    }

    /// An entry that the last step found no place for. That is a hint now and then; a stable entry
    /// only where a great many have alike hashes.
    pub fn pop_displaced(&mut self) -> Option<Entry> {
        self.moved.pop().map(Item::entry)
    }

    fn widen(&mut self, row: u32, left: u32) -> bool {
        let begins = left == self.columns;
        if begins && self.store.page(page_of(self.groups)).is_none() {
            return false;
        }
        let Some(column) = left.checked_sub(1) else {
            return false;
        };
        let from = (column << self.level) | row;
        let to = ((column + 1) << self.level) | row;
        let columns = self.columns + 1;
        self.lift(from, 0, |item| {
            if (u32::from(item.tag) * columns) >> 16 > column {
                Fate::Moves
            } else {
                Fate::Stays
            }
        });
        self.land([from, to]);
        if begins {
            self.groups = self.groups.saturating_add(1);
        }
        self.phase = if column > 0 {
            Phase::Widening { row, left: column }
        } else if row + 1 < 1 << self.level {
            Phase::Widening {
                row: row + 1,
                left: self.columns,
            }
        } else {
            self.columns = columns;
            if columns < COLUMNS_MAX {
                Phase::Widening {
                    row: 0,
                    left: columns,
                }
            } else {
                Phase::Folding { pair: 0 }
            }
        };
        true
    }

    fn fold(&mut self, pair: u32, owner_bits: &mut dyn FnMut(Entry) -> Option<u16>) -> bool {
        let level = self.level;
        let mask = (1u32 << level) - 1;
        let row = pair & mask;
        let half = pair >> level;
        let both = [((2 * half) << level) | row, ((2 * half + 1) << level) | row];
        for (number, side) in both.into_iter().zip(0u8..) {
            self.lift(number, side, |item| {
                let bits = if level < TAG_SHIFT {
                    let Some(bits) = owner_bits(item.entry()) else {
                        return Fate::Goes;
                    };
                    let bits = u32::from(bits);
                    if !item.stable && (bits ^ row) & mask != 0 {
                        return Fate::Goes;
                    }
                    bits
                } else {
                    u32::from(item.tag) << TAG_SHIFT
                };
                if (bits >> level) & 1 == side.into() {
                    Fate::Stays
                } else {
                    Fate::Moves
                }
            });
        }
        self.land(both);
        let pairs = COLUMNS_MIN << level;
        self.phase = if pair + 1 < pairs {
            Phase::Folding { pair: pair + 1 }
        } else {
            self.level += 1;
            self.columns = COLUMNS_MIN;
            Phase::Widening {
                row: 0,
                left: COLUMNS_MIN,
            }
        };
        true
    }

    /// Takes the entries of group `number` that move; those that go are forgotten.
    fn lift(&mut self, number: u32, side: u8, mut fate: impl FnMut(&Item) -> Fate) {
        let home = place_in_page(number) as u8;
        let moved = &mut self.moved;
        let (mut gone, mut gone_stable) = (0u64, 0u64);
        let mut stays = |item: &Item| match fate(item) {
            Fate::Stays => true,
            Fate::Moves => !moved.push(Item {
                home: side,
                ..*item
            }),
            Fate::Goes => {
                gone = gone.saturating_add(1);
                gone_stable = gone_stable.saturating_add(item.stable.into());
                false
            }
        };
        if let Some(page) = self.store.page_mut(page_of(number)) {
            let mut spilled = 0;
            if let Some(group) = page.group_mut(number) {
                group.retain(&mut stays);
                spilled = group.spilled;
            }
            if spilled > 0 {
                let before = page.spill.used;
                page.spill.retain(|item| item.home != home || stays(item));
                let after = spilled.saturating_sub(before.saturating_sub(page.spill.used));
                if let Some(group) = page.group_mut(number) {
                    group.spilled = after;
                }
            }
        }
        for at in (0..self.stash.len).rev() {
            let one = self.stash.as_slice().get(at);
            if one.is_some_and(|one| one.group == number && !stays(&one.item)) {
                self.stash.swap_take(at);
            }
        }
        self.entries = self.entries.saturating_sub(gone);
        self.stables = self.stables.saturating_sub(gone_stable);
    }

    /// Gives each lifted entry a place in the other one of two groups, and keeps those that lost
    /// theirs, at most one for each. Those of the first group come first, as they were lifted.
    fn land(&mut self, both: [u32; 2]) {
        let Self {
            store,
            stash,
            moved,
            turn,
            ..
        } = self;
        let count = core::mem::take(&mut moved.len);
        let (mut at, mut lost_stables) = (0, 0u64);
        for (side, &number) in both.iter().rev().enumerate() {
            let mut page = store.page_mut(page_of(number));
            while at < count {
                let next = moved
                    .items
                    .get(at)
                    .filter(|item| usize::from(item.home) == side);
                let Some(&item) = next else { break };
                at += 1;
                let settled = page
                    .as_deref_mut()
                    .map(|page| page.settle(number, item, *turn));
                let lost = match settled {
                    Some(Settled::Placed) => continue,
                    Some(Settled::Evicted(id)) => Item {
                        id,
                        stable: false,
                        ..item
                    },
                    _ if item.stable
                        && stash.push(Stashed {
                            group: number,
                            item,
                        }) =>
                    {
                        continue
                    }
                    _ => item,
                };
                moved.push(lost);
                lost_stables = lost_stables.saturating_add(lost.stable.into());
            }
            if let Some(page) = page {
                page.refill(number);
            }
        }
        self.entries = self.entries.saturating_sub(self.moved.len as u64);
        self.stables = self.stables.saturating_sub(lost_stables);
    }

    /// Gives stashed entries a free place in their groups.
    fn unstash(&mut self) {
        for at in (0..self.stash.len).rev() {
            let Some(one) = self.stash.as_slice().get(at).copied() else {
                return;
            };
            let Some(page) = self.store.page_mut(page_of(one.group)) else {
                continue;
            };
            let home = place_in_page(one.group) as u8;
            let placed = if page
                .group_mut(one.group)
                .is_some_and(|group| group.push(one.item))
            {
                true
            } else if page.spill.push(Item { home, ..one.item }) {
                page.add_spilled(one.group, 1);
                true
            } else {
                false
            };
            if placed {
                self.stash.swap_take(at);
            }
        }
    }

    /// To be called after each full pass of the scan: see "who is dropped" above.
    pub fn end_pass(&mut self) {
        let turn_ends = self.turn_ends;
        self.turn_ends = !turn_ends;
        if turn_ends {
            // A linear congruential generator that comes by each of the 2^16 turns.
            self.turn = self.turn.wrapping_mul(25_173).wrapping_add(13_849);
        }
    }

    /// Forgets all hints.
    pub fn clear_hints(&mut self) {
        for i in 0..self.store.len() {
            let Some(page) = self.store.page_mut(i) else {
                continue;
            };
            for at in (page.spill.stables()..page.spill.used()).rev() {
                if let Some(item) = page.spill.take(at) {
                    page.add_spilled(item.home.into(), -1);
                }
            }
            for number in 0..GROUPS_PER_PAGE as u32 {
                if let Some(group) = page.group_mut(number) {
                    group.used = group.stables;
                }
                page.refill(number);
            }
        }
        self.moved.len = 0;
        self.entries = self.stables;
        self.unstash();
    }

    /// Entries of both kinds.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Stable entries.
    pub fn stable_entries(&self) -> u64 {
        self.stables
    }

    /// Places of the groups in use.
    pub fn capacity(&self) -> u64 {
        u64::from(self.groups) * PAGE_ENTRIES as u64 / GROUPS_PER_PAGE as u64
    }

    /// Memory of the pages, in bytes.
    pub fn bytes(&self) -> u64 {
        (self.store.len() as u64).saturating_mul(size_of::<GroupPage>() as u64)
    }
}

/// The entries that [`Catalog::lookup`] found.
pub struct Matches<'a, S: PageStore> {
    catalog: &'a Catalog<S>,
    page: Option<&'a GroupPage>,
    number: u32,
    tag: u16,
    in_group: u64,
    in_spill: u64,
    /// Entries of the stash that were looked at.
    stashed: usize,
}

impl<S: PageStore> Matches<'_, S> {
    fn stashed(&mut self) -> Option<Entry> {
        while let Some(one) = self.catalog.stash.as_slice().get(self.stashed) {
            self.stashed += 1;
            if one.group == self.number && one.item.tag == self.tag {
                return Some(one.item.entry());
            }
        }
        None
    }
}

/// The lowest place of a mask, if it is below `end`.
#[inline]
fn pop_below(mask: &mut u64, end: usize) -> Option<usize> {
    let mut places = Places(*mask);
    let at = places.next().filter(|&at| at < end)?;
    *mask = places.0;
    Some(at)
}

impl<S: PageStore> Iterator for Matches<'_, S> {
    type Item = Entry;

    #[inline]
    fn next(&mut self) -> Option<Entry> {
        if self.in_group | self.in_spill == 0 && self.stashed >= self.catalog.stash.len {
            return None;
        }
        let page = self.page?;
        let group = page.group(self.number)?;
        let spill = &page.spill;
        if let Some(at) = pop_below(&mut self.in_group, group.stables()) {
            return Some(Entry::Stable(group.id(at)));
        }
        if let Some(at) = pop_below(&mut self.in_spill, spill.stables()) {
            return Some(Entry::Stable(spill.id(at)));
        }
        if let Some(entry) = self.stashed() {
            return Some(entry);
        }
        if let Some(at) = pop_below(&mut self.in_group, GROUP_ENTRIES) {
            return Some(Entry::Hint(group.id(at)));
        }
        pop_below(&mut self.in_spill, SPILL_ENTRIES).map(|at| Entry::Hint(spill.id(at)))
    }
}

#[cfg(test)]
#[path = "catalog_tests.rs"]
pub(super) mod tests;
