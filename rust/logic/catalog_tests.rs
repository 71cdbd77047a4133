// SPDX-License-Identifier: GPL-2.0

//! The catalog against a model that keeps every entry with its whole hash.

use super::*;
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

/// Pages on the host's heap.
#[derive(Default)]
pub struct Pages(pub Vec<Box<GroupPage>>);

impl PageStore for Pages {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn page(&self, i: usize) -> Option<&GroupPage> {
        self.0.get(i).map(|page| &**page)
    }

    fn page_mut(&mut self, i: usize) -> Option<&mut GroupPage> {
        self.0.get_mut(i).map(|page| &mut **page)
    }
}

/// Numbers that look random (splitmix64, Steele 2014).
pub fn mix(n: u64) -> u64 {
    super::super::hash::mix(n.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// A catalog beside what it should hold.
struct Model {
    catalog: Catalog<Pages>,
    hints: HashMap<u32, u64>,
    stables: HashMap<u32, u64>,
    /// Hints whose owner no longer has that content.
    stale: HashSet<u32>,
    next: u32,
    /// Stable entries that growth found no place for.
    displaced: u64,
}

impl Model {
    fn new() -> Self {
        Model {
            catalog: Catalog::new(Pages::default()),
            hints: HashMap::new(),
            stables: HashMap::new(),
            stale: HashSet::new(),
            next: 0,
            displaced: 0,
        }
    }

    fn fresh(&mut self) -> u32 {
        // From both ends, so that the largest ids are used as well.
        self.next += 1;
        if self.next % 2 == 0 {
            self.next / 2 - 1
        } else {
            u32::MAX - self.next / 2
        }
    }

    fn lost(&mut self, page: u32) {
        assert!(
            self.hints.remove(&page).is_some(),
            "hint {page} told lost twice or never there"
        );
    }

    fn insert_hint(&mut self, hash: u64) -> HintOutcome {
        let page = self.fresh();
        let outcome = self.catalog.insert_hint(hash, page);
        match outcome {
            HintOutcome::Placed => {}
            HintOutcome::Evicted(old) => self.lost(old),
            HintOutcome::Refused => return outcome,
            HintOutcome::Replaced(entry) => panic!("{entry:?} for a new page"),
        }
        self.hints.insert(page, hash);
        assert_eq!(
            self.catalog.insert_hint(hash, page),
            HintOutcome::Replaced(Entry::Hint(page)),
            "the same hint once more"
        );
        outcome
    }

    fn insert_stable(&mut self, hash: u64) -> StableOutcome {
        let record = self.fresh();
        let outcome = self.catalog.insert_stable(hash, record);
        match outcome {
            StableOutcome::Placed => {}
            StableOutcome::Evicted(old) => self.lost(old),
            StableOutcome::Refused => return outcome,
        }
        self.stables.insert(record, hash);
        assert_eq!(
            self.catalog.insert_stable(hash, record),
            StableOutcome::Placed
        );
        outcome
    }

    fn remove(&mut self, entry: Entry) {
        let hash = match entry {
            Entry::Hint(page) => self.hints.remove(&page),
            Entry::Stable(record) => self.stables.remove(&record),
        };
        let hash = hash.unwrap();
        assert!(self.catalog.remove(hash, entry));
        assert!(!self.catalog.remove(hash, entry), "{entry:?} removed twice");
    }

    fn promote(&mut self, page: u32) -> bool {
        let hash = self.hints[&page];
        let record = self.fresh();
        let promoted = self.catalog.promote(hash, page, record);
        if promoted {
            self.hints.remove(&page);
            self.stables.insert(record, hash);
            assert!(!self.catalog.promote(hash, page, record));
        }
        promoted
    }

    /// One step of growth, with a page for it if it wants one.
    fn grow(&mut self, page: bool) -> bool {
        if page && self.catalog.wants_page() {
            self.catalog.store_mut().0.push(Box::default());
        }
        let (hints, stables, stale) = (&self.hints, &self.stables, &self.stale);
        let mut dropped = Vec::new();
        let grown = self.catalog.grow_step(&mut |entry| {
            let hash = match entry {
                Entry::Hint(page) if stale.contains(&page) => {
                    dropped.push(page);
                    return None;
                }
                Entry::Hint(page) => hints[&page],
                Entry::Stable(record) => stables[&record],
            };
            Some(hash as u16)
        });
        dropped.into_iter().for_each(|page| self.lost(page));
        while let Some(entry) = self.catalog.pop_displaced() {
            match entry {
                Entry::Hint(page) => self.lost(page),
                Entry::Stable(record) => {
                    assert!(self.stables.remove(&record).is_some());
                    self.displaced += 1;
                }
            }
        }
        grown
    }

    fn grow_all(&mut self) {
        while self.catalog.wants_growth() && self.grow(true) {}
    }

    /// All that was said of the catalog holds.
    fn check(&self) {
        let catalog = &self.catalog;
        let entries = self.hints.len() + self.stables.len();
        assert_eq!(catalog.entries(), entries as u64);
        assert_eq!(catalog.stable_entries(), self.stables.len() as u64);
        assert_eq!(catalog.bytes(), catalog.store.0.len() as u64 * 4096);
        assert!(catalog.groups as usize <= catalog.store.0.len() * GROUPS_PER_PAGE);
        let mut seen = HashSet::new();
        let mut meet = |item: Item, number: u32| {
            let hash = match item.entry() {
                Entry::Hint(page) => self.hints[&page],
                Entry::Stable(record) => self.stables[&record],
            };
            assert_eq!(item.tag, tag_of(hash));
            assert_eq!(
                catalog.home(hash),
                number,
                "an entry where no lookup finds it"
            );
            assert!(
                seen.insert((item.stable, item.id)),
                "{:?} twice",
                item.entry()
            );
        };
        for number in 0..catalog.store.0.len() as u32 * GROUPS_PER_PAGE as u32 {
            let page = &catalog.store.0[page_of(number)];
            let group = page.group(number).unwrap();
            assert!(number < catalog.groups || group.used == 0);
            assert!(group.stables <= group.used && group.used() <= GROUP_ENTRIES);
            (0..group.used()).for_each(|at| meet(group.get(at).unwrap(), number));
            let home = place_in_page(number) as u8;
            let spilled = (0..page.spill.used()).filter_map(|at| page.spill.get(at));
            let spilled: Vec<_> = spilled.filter(|item| item.home == home).collect();
            assert_eq!(usize::from(group.spilled), spilled.len());
            let has_place = |item: &Item| group.has_place(item.stable);
            assert!(!spilled.iter().any(has_place), "spilled without need");
            spilled.into_iter().for_each(|item| meet(item, number));
        }
        catalog
            .stash
            .as_slice()
            .iter()
            .for_each(|one| meet(one.item, one.group));
        assert_eq!(seen.len(), entries);
        for (&page, &hash) in &self.hints {
            assert!(catalog.lookup(hash).any(|entry| entry == Entry::Hint(page)));
        }
        for (&record, &hash) in &self.stables {
            assert!(catalog
                .lookup(hash)
                .any(|entry| entry == Entry::Stable(record)));
            let kinds: Vec<_> = catalog.lookup(hash).map(Entry::is_stable).collect();
            assert!(
                kinds.is_sorted_by(|a, b| a >= b),
                "stable entries come first"
            );
        }
    }
}

#[test]
fn nothing_without_pages() {
    let mut catalog = Catalog::new(Pages::default());
    assert!(catalog.wants_page() && !catalog.wants_growth());
    assert_eq!(catalog.insert_hint(1, 0), HintOutcome::Refused);
    assert_eq!(catalog.insert_stable(1, 0), StableOutcome::Refused);
    assert_eq!(catalog.lookup(1).count(), 0);
    assert!(!catalog.remove(1, Entry::Hint(0)) && !catalog.promote(1, 0, 0));
    assert!(!catalog.grow_step(&mut |_| None));
    catalog.clear_hints();
    assert_eq!(
        (catalog.entries(), catalog.capacity(), catalog.bytes()),
        (0, 0, 0)
    );
    catalog.store_mut().0.push(Box::default());
    assert!(!catalog.wants_page());
    assert_eq!(catalog.insert_hint(1, 0), HintOutcome::Placed);
    assert_eq!(catalog.lookup(1).collect::<Vec<_>>(), [Entry::Hint(0)]);
    assert_eq!(
        (catalog.capacity(), catalog.bytes()),
        (PAGE_ENTRIES as u64, 4096)
    );
}

#[test]
fn tags_are_found_in_every_place() {
    for place in 0..GROUP_ENTRIES {
        for tag in [0, 1, 0x7fff, 0x8000, 0xffff] {
            let mut group = Group::new();
            for at in 0..GROUP_ENTRIES {
                let other = tag ^ (1 << (at % 16));
                group.push(Item {
                    tag: if at == place { tag } else { other },
                    id: at as u32,
                    ..Item::default()
                });
            }
            assert_eq!(group.matches(tag), 1 << place);
        }
    }
    // What was there before a place was freed does not count.
    let mut group = Group::new();
    assert_eq!(group.matches(0), 0);
    group.push(Item {
        tag: 7,
        ..Item::default()
    });
    group.take(0);
    assert_eq!(group.matches(7), 0);
}

#[test]
fn copies_of_one_content_are_bounded() {
    let mut model = Model::new();
    model.grow(true);
    for _ in 0..SAME_TAG_MAX {
        assert_eq!(model.insert_stable(77), StableOutcome::Placed);
    }
    assert_eq!(model.insert_stable(77), StableOutcome::Refused);
    assert_eq!(model.insert_hint(77), HintOutcome::Placed);
    let page = *model.hints.keys().next().unwrap();
    assert!(!model.promote(page));
    model.check();
}

#[test]
fn a_full_group_drops_hints_but_no_stable_entry() {
    let mut model = Model::new();
    model.grow(true);
    // Column 0, all tags different.
    let hashes: Vec<u64> = (0..100).map(|i| i << TAG_SHIFT).collect();
    let room = GROUP_ENTRIES + SPILL_ENTRIES;
    for &hash in &hashes[..room] {
        assert_eq!(model.insert_hint(hash), HintOutcome::Placed);
    }
    assert!(matches!(
        model.insert_hint(hashes[room]),
        HintOutcome::Evicted(_)
    ));
    for &hash in &hashes[..room - HINTS_KEPT] {
        assert!(matches!(
            model.insert_stable(hash),
            StableOutcome::Evicted(_)
        ));
    }
    // A few more are kept aside.
    for &hash in &hashes[room..room + STASH_INSERTED] {
        assert_eq!(model.insert_stable(hash), StableOutcome::Placed);
    }
    model.check();
    assert_eq!(model.insert_stable(hashes[99]), StableOutcome::Refused);
    assert_eq!(
        (model.hints.len(), model.stables.len()),
        (HINTS_KEPT, room - HINTS_KEPT + STASH_INSERTED)
    );
    let kept = *model.hints.keys().next().unwrap();
    assert!(!model.promote(kept));
    model.check();
    // Of another group's, room in the spill is all that counts.
    assert_eq!(model.insert_hint(0xffff_0000), HintOutcome::Placed);
    model.check();
}

#[test]
fn contents_meet_in_a_group_full_of_stable_entries() {
    let mut model = Model::new();
    model.grow(true);
    // Column 0, and no place anywhere for what it has too much.
    let placed = (0..100u64)
        .filter(|tag| model.insert_stable(tag << TAG_SHIFT) == StableOutcome::Placed)
        .count();
    let places = GROUP_ENTRIES - HINTS_KEPT + SPILL_ENTRIES + STASH_INSERTED;
    assert_eq!(placed, places);
    // Two pages each: the first leaves its hint, the second comes by later in the pass.
    let mut apart: Vec<u64> = (100..105).map(|tag| tag << TAG_SHIFT).collect();
    for _pass in 0..200 {
        for &hash in &apart {
            model.insert_hint(hash);
        }
        let is_hint = |entry: Entry| !entry.is_stable();
        apart.retain(|&hash| {
            let hint = model.catalog.lookup(hash).find(|&entry| is_hint(entry));
            hint.is_none_or(|hint| {
                model.remove(hint);
                false
            })
        });
        model.check();
        model.catalog.end_pass();
    }
    assert_eq!(apart, [0; 0], "never met");
}

#[test]
fn the_highest_ranks_live_through_a_pass() {
    let room = GROUP_ENTRIES + SPILL_ENTRIES;
    let mut catalog = Catalog::new(Pages::default());
    catalog.store_mut().0.push(Box::default());
    let mut met = HashSet::new();
    for pass in 0..400 {
        let turn = catalog.turn;
        let mut alive: HashSet<u32> = HashSet::new();
        for tag in (0..1000u32).map(|i| i * 7 % 1000) {
            let page = pass * 1000 + tag;
            match catalog.insert_hint(u64::from(tag) << TAG_SHIFT, page) {
                HintOutcome::Placed => assert!(alive.insert(tag)),
                HintOutcome::Evicted(old) => {
                    alive.remove(&(old % 1000));
                    assert!(alive.insert(tag));
                }
                HintOutcome::Refused => {}
                HintOutcome::Replaced(entry) => panic!("{entry:?} twice"),
            }
        }
        let mut ranked: Vec<u32> = (0..1000).collect();
        ranked.sort_unstable_by_key(|&tag| core::cmp::Reverse(rank(tag as u16, turn)));
        assert_eq!(alive, ranked[..room].iter().copied().collect());
        met.extend(alive);
        catalog.clear_hints();
        catalog.end_pass();
        assert_eq!(
            catalog.turn == turn,
            pass % 2 == 0,
            "a turn lasts two passes"
        );
    }
    assert_eq!(met.len(), 1000, "some content never had its turn");
}

#[test]
fn hints_survive_growth() {
    let mut model = Model::new();
    model.catalog.store_mut().0.push(Box::default());
    let mut worst = 1.0f64;
    for n in 1..=1_000_000u64 {
        model.insert_hint(mix(n));
        model.grow_all();
        if n > 10_000 {
            worst = worst.min(model.catalog.entries() as f64 / n as f64);
        }
    }
    model.check();
    assert!(
        worst >= 0.985,
        "{worst} of the hints survived at the worst time"
    );
    let each = model.catalog.bytes() as f64 / model.catalog.entries() as f64;
    assert!(each < 8.0, "{each} bytes an entry");
}

#[test]
fn stable_entries_find_room_as_the_table_grows() {
    let mut model = Model::new();
    model.catalog.store_mut().0.push(Box::default());
    let mut refused = 0;
    for n in 1..=300_000u64 {
        refused += u32::from(model.insert_stable(mix(n)) == StableOutcome::Refused);
        model.grow_all();
    }
    assert!(refused <= 30, "{refused} of 300000 refused");
    assert_eq!(model.displaced, 0);
    model.check();
}

#[test]
fn stable_entries_leave_room_to_grow_into() {
    let mut model = Model::new();
    for _ in 0..64 {
        model.catalog.store_mut().0.push(Box::default());
    }
    // No further page: the table fills up.
    let mut n = 0;
    while n < 100_000 {
        n += 1;
        model.insert_stable(mix(n));
        while model.catalog.wants_growth() && model.grow(false) {}
    }
    let places = model.catalog.capacity();
    assert!(model.catalog.stable_entries() <= places * STABLE_MAX_PERCENT / 100 + 1);
    assert!(model.catalog.stable_entries() >= places * STABLE_MAX_PERCENT / 100);
    let before = model.stables.len();
    model.grow_all();
    assert_eq!((model.displaced, model.stables.len()), (0, before));
    model.check();
}

#[test]
fn growth_beyond_the_tag_asks_no_owner() {
    // A table that is made to look as if it had grown: what counts is level 16 and more.
    let mut catalog = Catalog::new(Pages::default());
    let level = 17;
    let pages = (COLUMNS_MAX << level) as usize / GROUPS_PER_PAGE;
    catalog.store_mut().0.resize_with(pages, Box::default);
    catalog.groups = COLUMNS_MAX << level;
    catalog.level = level;
    catalog.phase = Phase::Folding { pair: 0 };
    let hashes: Vec<u64> = (0..5000).map(mix).collect();
    for (&hash, record) in hashes.iter().zip(0..) {
        assert_eq!(catalog.insert_stable(hash, record), StableOutcome::Placed);
    }
    let all_there = |catalog: &Catalog<Pages>| {
        hashes.iter().zip(0..).all(|(&hash, record)| {
            catalog
                .lookup(hash)
                .any(|entry| entry == Entry::Stable(record))
        })
    };
    while catalog.level == level {
        let Phase::Folding { pair } = catalog.phase else {
            unreachable!()
        };
        assert!(catalog.fold(pair, &mut |entry| panic!("asked for {entry:?}")));
        assert!(pair % 65_536 != 0 || all_there(&catalog));
    }
    assert!(all_there(&catalog));
    assert_eq!((catalog.level, catalog.columns), (18, COLUMNS_MIN));
}

#[test]
fn what_has_no_place_after_a_step_is_kept_aside_or_told() {
    let mut model = Model::new();
    model.grow(true);
    // All of columns 0 and 1 fall into the second of two rows: more than that can hold.
    let odd = |tag: u64| (tag << TAG_SHIFT) | 1;
    let stable_places = GROUP_ENTRIES - HINTS_KEPT;
    let alike = stable_places + SPILL_ENTRIES;
    for tag in 0..alike as u64 {
        assert_eq!(model.insert_stable(odd(tag)), StableOutcome::Placed);
    }
    for tag in 0..stable_places as u64 {
        assert_eq!(
            model.insert_stable(odd(0x1000 + tag)),
            StableOutcome::Placed
        );
    }
    let mut n = 0;
    while !model.catalog.wants_growth() {
        n += 1;
        model.insert_stable(0x2000_0000 + mix(n) % 0xe000_0000);
    }
    assert!(model.grow(true));
    assert_eq!(model.catalog.stash.len, STASH_ENTRIES);
    let surplus = alike + stable_places - (stable_places + SPILL_ENTRIES + STASH_ENTRIES);
    assert_eq!(model.displaced, surplus as u64);
    model.check();
    // What is kept aside can be removed, and finds a place as soon as there is one.
    let first = model.catalog.stash.as_slice()[0].item.id;
    model.remove(Entry::Stable(first));
    model.check();
    let mut places: Vec<u32> = model.stables.keys().copied().collect();
    places.retain(|record| model.stables[record] < 0x2000_0000);
    places.retain(|record| {
        let mut stashed = model.catalog.stash.as_slice().iter();
        stashed.all(|one| one.item.id != *record)
    });
    for record in places {
        model.remove(Entry::Stable(record));
    }
    assert_eq!(model.catalog.stash.len, 0);
    model.check();
}

#[test]
fn hints_that_are_out_of_date_go_when_a_row_is_folded() {
    let mut model = Model::new();
    model.grow(true);
    let mut n = 0;
    while !model.catalog.wants_growth() {
        n += 1;
        model.insert_hint(mix(n));
    }
    model.stale = model
        .hints
        .keys()
        .copied()
        .filter(|page| page % 3 == 0)
        .collect();
    let stale = model.stale.len();
    assert!(stale > 100);
    let mut steps = 0;
    while model.catalog.level == 0 {
        // Keep it wanting to grow.
        while !model.catalog.wants_growth() {
            n += 1;
            model.insert_hint(mix(n));
        }
        assert!(model.grow(true));
        steps += 1;
    }
    assert_eq!(steps, COLUMNS_MIN);
    assert!(model
        .stale
        .iter()
        .all(|page| !model.hints.contains_key(page)));
    model.check();
}

#[test]
fn hints_whose_page_has_other_content_now_go_when_a_row_is_folded() {
    let mut catalog = Catalog::new(Pages::default());
    let mut n = 0;
    let mut step = |catalog: &mut Catalog<Pages>, changed: bool| {
        while !catalog.wants_growth() {
            n += 1;
            catalog.insert_hint(mix(n), n as u32);
        }
        if catalog.wants_page() {
            catalog.store_mut().0.push(Box::default());
        }
        let bits = |entry: Entry| mix(entry.id().into()) as u16 ^ u16::from(changed);
        assert!(catalog.grow_step(&mut |entry| Some(bits(entry))));
    };
    catalog.store_mut().0.push(Box::default());
    while catalog.level < 2 || catalog.columns < COLUMNS_MAX {
        step(&mut catalog, false);
    }
    let hash = mix(1);
    assert!(catalog.can_be_under(hash, hash as u16) && catalog.can_be_under(hash, hash as u16 ^ 4));
    assert!(!catalog.can_be_under(hash, hash as u16 ^ 1));
    let before = catalog.entries();
    step(&mut catalog, true);
    let pair = u64::from(GROUPS_PER_PAGE as u32 * 4 / 2);
    let gone = before - catalog.entries();
    assert!(
        gone > before / pair / 2,
        "{gone} of {before} hints went with one of {pair} pairs"
    );
}

#[test]
fn hints_of_pages_that_are_gone_make_way() {
    let mut model = Model::new();
    model.grow(true);
    let places = PAGE_ENTRIES as u64;
    for n in 0..3 * places {
        model.insert_hint(mix(n));
    }
    // Every hint that the table holds is of a page that is gone, but for some.
    model.stale = model.hints.keys().copied().filter(|p| p % 8 != 0).collect();
    let old: Vec<u32> = model.hints.keys().copied().collect();
    let mut purged = 0;
    for n in 3 * places..7 * places / 2 {
        let (hash, hints, stale) = (mix(n), &model.hints, &model.stale);
        purged += u32::from(model.catalog.purge(hash, &mut |entry| {
            let page = entry.id();
            (!stale.contains(&page)).then(|| hints[&page] as u16)
        }));
        let (catalog, stale) = (&model.catalog, &model.stale);
        model.hints.retain(|page, hash| {
            let there = catalog
                .lookup(*hash)
                .any(|entry| entry == Entry::Hint(*page));
            assert!(there || stale.contains(page), "a hint in use went");
            there
        });
        model.check();
        assert_eq!(model.insert_hint(hash), HintOutcome::Placed);
    }
    assert!(
        purged as usize > GROUPS_PER_PAGE / 2,
        "{purged} groups were cleared"
    );
    let kept = old.iter().filter(|page| *page % 8 == 0);
    assert!(kept.clone().count() > 0 && kept.clone().all(|page| model.hints.contains_key(page)));
}

#[test]
fn groups_that_share_a_spill_do_not_mix_up() {
    let mut catalog = Catalog::new(Pages::default());
    catalog.store_mut().0.push(Box::default());
    // At level 0 groups differ in the tag; so fill two groups, and spill one tag under both.
    catalog.level = 1;
    catalog.columns = COLUMNS_MIN;
    catalog.phase = Phase::Widening {
        row: 0,
        left: COLUMNS_MIN,
    };
    for row in 0..2 {
        for tag in 1..=GROUP_ENTRIES as u64 {
            assert_eq!(
                catalog.insert_hint((tag << TAG_SHIFT) | row, 0),
                HintOutcome::Placed
            );
        }
    }
    assert_eq!(catalog.insert_hint(0, 7), HintOutcome::Placed);
    assert_eq!(catalog.lookup(1).count(), 0);
    assert!(!catalog.remove(1, Entry::Hint(7)));
    assert_eq!(catalog.insert_hint(1, 7), HintOutcome::Placed);
    assert!(catalog.remove(1, Entry::Hint(7)));
    assert_eq!(catalog.lookup(0).collect::<Vec<_>>(), [Entry::Hint(7)]);
    assert_eq!(catalog.lookup(1).count(), 0);
}

/// What is done to a catalog and its model at once.
#[derive(Clone, Debug)]
enum Op {
    Hints { seed: u64, count: u16 },
    Stables { seed: u64, count: u16 },
    RemoveSome { seed: u64, count: u16 },
    PromoteSome { seed: u64, count: u16 },
    GoStale { seed: u64, count: u16 },
    Grow { steps: u16, pages: bool },
    ClearHints,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let some = || (any::<u64>(), 1u16..400);
    let op = prop_oneof![
        6 => some().prop_map(|(seed, count)| Op::Hints { seed, count }),
        6 => some().prop_map(|(seed, count)| Op::Stables { seed, count }),
        3 => some().prop_map(|(seed, count)| Op::RemoveSome { seed, count }),
        3 => some().prop_map(|(seed, count)| Op::PromoteSome { seed, count }),
        2 => some().prop_map(|(seed, count)| Op::GoStale { seed, count }),
        8 => (1u16..400, prop::bool::weighted(0.9)).prop_map(|(steps, pages)| Op::Grow { steps, pages }),
        1 => Just(Op::ClearHints),
    ];
    prop::collection::vec(op, 1..60)
}

fn some_of(keys: Vec<u32>, seed: u64, count: u16) -> Vec<u32> {
    let mut keys = keys;
    keys.sort_unstable();
    let len = keys.len() as u64;
    let mut picked = HashSet::new();
    for i in 0..u64::from(count).min(len) {
        picked.insert(keys[(mix(seed ^ i) % len) as usize]);
    }
    let mut picked: Vec<u32> = picked.into_iter().collect();
    picked.sort_unstable();
    picked
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// `mask` makes hashes collide in the tag, in the row, or in both.
    #[test]
    fn agrees_with_the_model(
        ops in ops(),
        mask in prop_oneof![
            4 => Just(u64::MAX),
            1 => Just(0xffff_ffff_00ff_ffff),
            1 => Just(0xffff_ffff_ffff_0003),
            1 => Just(0xffff_ffff_f803_0007),
        ],
    ) {
        let mut model = Model::new();
        for op in ops {
            match op {
                Op::Hints { seed, count } => (0..count.into()).for_each(|i| {
                    model.insert_hint(mix(seed ^ i) & mask);
                }),
                Op::Stables { seed, count } => (0..count.into()).for_each(|i| {
                    model.insert_stable(mix(seed ^ i) & mask);
                }),
                Op::RemoveSome { seed, count } => {
                    let hints = some_of(model.hints.keys().copied().collect(), seed, count);
                    hints.into_iter().for_each(|id| model.remove(Entry::Hint(id)));
                    let stables = some_of(model.stables.keys().copied().collect(), seed, count);
                    stables.into_iter().for_each(|id| model.remove(Entry::Stable(id)));
                }
                Op::PromoteSome { seed, count } => {
                    let hints = some_of(model.hints.keys().copied().collect(), seed, count);
                    hints.into_iter().for_each(|id| {
                        model.promote(id);
                    });
                }
                Op::GoStale { seed, count } => {
                    let hints = some_of(model.hints.keys().copied().collect(), seed, count);
                    model.stale.extend(hints);
                }
                Op::Grow { steps, pages } => {
                    for _ in 0..steps {
                        if !model.grow(pages) && !model.catalog.wants_growth() {
                            break;
                        }
                    }
                }
                Op::ClearHints => {
                    model.catalog.clear_hints();
                    model.hints.clear();
                }
            }
            model.check();
        }
    }
}

/// Not a test: `cargo test --release -p thinram-logic figures -- --ignored --nocapture` shows what
/// the layout and the threshold of growth rest on.
#[test]
#[ignore = "prints figures"]
fn figures() {
    println!("Plain linear hashing, groups of 40 and no spill (the average of a doubling):");
    println!("grow at | hints that survive | bytes an entry");
    for percent in [60, 70, 80, 87] {
        let (survive, bytes) = plain_linear_hashing(percent);
        println!("{percent:5} % | {:15.2} %  | {bytes:5.2}", survive * 100.0);
    }
    println!("The catalog:");
    println!("grow at | hints that live  | bytes an entry | ns an insert | ns a lookup");
    println!("        |  worst     mean  |  most    mean | grows  stays | hit   miss");
    for percent in [75, 80, 82, 85, 87] {
        catalog_figures(percent);
    }
}

/// The share of hints that survive, and the bytes of memory that each takes.
fn plain_linear_hashing(percent: u64) -> (f64, f64) {
    const LEVEL: u32 = 12;
    let mut groups: Vec<Vec<u64>> = std::vec![Vec::new(); 1 << LEVEL];
    let (mut entries, mut inserted, mut survive, mut bytes) = (0u64, 0u64, 0.0, 0.0);
    let mut samples = 0u32;
    while groups.len() < 4 << LEVEL {
        inserted += 1;
        let hash = mix(inserted);
        let level = groups.len().ilog2();
        let split = groups.len() - (1 << level);
        let mut home = hash as usize & ((1 << level) - 1);
        if home < split {
            home = hash as usize & ((2 << level) - 1);
        }
        if groups[home].len() < GROUP_ENTRIES {
            groups[home].push(hash);
            entries += 1;
        } else {
            let victim = (hash >> 32) as usize % GROUP_ENTRIES;
            groups[home][victim] = hash;
        }
        if entries * 100 > (groups.len() * GROUP_ENTRIES) as u64 * percent {
            let (up, stay) = groups[split]
                .iter()
                .partition(|&&hash| (hash >> level) & 1 == 1);
            groups[split] = stay;
            groups.push(up);
        }
        // The second doubling only: the first one starts from an even load.
        if groups.len() > 2 << LEVEL && inserted % 1024 == 0 {
            survive += entries as f64 / inserted as f64;
            bytes += (groups.len() * GROUP_ENTRIES * 6) as f64 / entries as f64;
            samples += 1;
        }
    }
    (survive / f64::from(samples), bytes / f64::from(samples))
}

fn catalog_figures(percent: u64) {
    const ENTRIES: u64 = 2_000_000;
    // The best of three, in CPU time, for others may run beside.
    let cpu_ns = || {
        let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        stat.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    let timed = |work: &mut dyn FnMut()| {
        let times = (0..3).map(|_| {
            let start = cpu_ns();
            work();
            cpu_ns() - start
        });
        times.min().unwrap() as f64 / ENTRIES as f64
    };
    let mut catalog = Catalog::new(Pages::default());
    let (mut worst, mut sum, mut most, mut bytes, mut samples) = (1.0f64, 0.0, 0.0f64, 0.0, 0u32);
    let grow_ns = timed(&mut || {
        catalog = Catalog::new(Pages::default());
        catalog.store_mut().0.push(Box::default());
        for n in 0..ENTRIES {
            catalog.insert_hint(mix(n), n as u32);
            while catalog.above(catalog.entries, percent) {
                if catalog.wants_page() {
                    catalog.store_mut().0.push(Box::default());
                }
                catalog.step(&mut |entry| Some(mix(entry.id().into()) as u16));
            }
            if n > ENTRIES / 16 && n % 1024 == 0 {
                let survive = catalog.entries() as f64 / (n + 1) as f64;
                let each = catalog.bytes() as f64 / catalog.entries() as f64;
                (worst, most) = (worst.min(survive), most.max(each));
                (sum, bytes, samples) = (sum + survive, bytes + each, samples + 1);
            }
        }
    });
    let (mut hits, mut misses) = (0, 0);
    let hit_ns = timed(&mut || {
        hits = (0..ENTRIES).map(|n| catalog.lookup(mix(n)).count()).sum();
    });
    let miss_ns = timed(&mut || {
        misses = (ENTRIES..2 * ENTRIES)
            .map(|n| catalog.lookup(mix(n)).count())
            .sum();
    });
    assert!(hits as u64 >= catalog.entries() && misses < hits / 10);
    let stay_ns = timed(&mut || {
        catalog.clear_hints();
        for n in 0..ENTRIES {
            catalog.insert_hint(mix(n), n as u32);
        }
    });
    let samples = f64::from(samples);
    println!(
        "{percent:5} % | {:6.2} %  {:6.2} % | {most:5.2}   {:5.2} | {grow_ns:5.0}    {stay_ns:5.0} | \
         {hit_ns:4.0}  {miss_ns:4.0}",
        worst * 100.0,
        sum / samples * 100.0,
        bytes / samples,
    );
}
