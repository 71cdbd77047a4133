// SPDX-License-Identifier: GPL-2.0

//! The room of a swap file: clusters, and what lies in them.
//!
//! Objects of all lengths are packed one after the other into clusters of 32 KiB, each of which is
//! written once, as a whole, and read as a whole. A cluster is free again when the last of its objects
//! is gone; nothing in it is ever overwritten before. So no map of free bytes is needed, an object is
//! known by 40 bits, and the objects themselves cost no memory: only clusters do, 16 bytes each.
//!
//! ```text
//! Free --take--> Filling --seal--> Writing --written--> Written --last object gone--> Free
//! ```
//!
//! Each time that a cluster is taken it gets a number that no other has had before: with the place
//! inside the cluster that makes a nonce that is never used twice.

/// Bytes of a cluster.
pub const CLUSTER_BYTES: usize = 32 << 10;
/// Objects begin at multiples of this.
pub const UNIT: usize = 16;
/// Clusters of one file at most: 8 TiB.
pub const CLUSTERS_MAX: u32 = 1 << CLUSTER_BITS;

const UNIT_BITS: u32 = 11;
const CLUSTER_BITS: u32 = 28;
/// The end of the list of free clusters.
const NONE: u32 = u32::MAX;

const _: () = assert!(CLUSTER_BYTES == UNIT << UNIT_BITS);
const _: () = assert!(UNIT_BITS + CLUSTER_BITS < super::slot::PAYLOAD_BITS);
const _: () = assert!(size_of::<Cluster>() == 16);

/// Where an object lies: its cluster, and its first unit in that.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Place(u64);

impl Place {
    /// Of an object that could not be read when its file was let go: in no cluster.
    pub const LOST: Place = Place(1 << (UNIT_BITS + CLUSTER_BITS));

    /// Whether it is [`Place::LOST`].
    #[inline]
    pub const fn is_lost(self) -> bool {
        self.0 == Self::LOST.0
    }

    /// Unit `unit` of a cluster.
    const fn new(cluster: u32, unit: usize) -> Place {
        Place(((cluster as u64) << UNIT_BITS) | unit as u64)
    }

    /// As a number that fits the payload of a slot or of a shared record.
    #[inline]
    pub const fn payload(self) -> u64 {
        self.0
    }

    /// From [`Place::payload`].
    #[inline]
    pub const fn from_payload(payload: u64) -> Place {
        Place(payload & super::slot::PAYLOAD_MAX)
    }

    /// The cluster.
    #[inline]
    pub const fn cluster(self) -> u32 {
        (self.0 >> UNIT_BITS) as u32
    }

    /// Bytes from the start of the cluster.
    #[inline]
    pub const fn offset(self) -> usize {
        (self.0 as usize & ((1 << UNIT_BITS) - 1)) * UNIT
    }
}

/// What a cluster is used for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Phase {
    /// Nothing.
    Free,
    /// Objects are put into it, in memory.
    Filling,
    /// It is being written, and is still in memory.
    Writing,
    /// It is in the file.
    Written,
}

/// One cluster.
#[derive(Clone, Copy, Debug)]
pub struct Cluster {
    /// The number of this use; the next free cluster while it is free.
    number: u64,
    /// Objects that are in it.
    live: u16,
    /// Objects that were put into it.
    placed: u16,
    phase: Phase,
}

impl Cluster {
    /// A cluster that is not in any list.
    pub const FREE: Cluster = Cluster {
        number: NONE as u64,
        live: 0,
        placed: 0,
        phase: Phase::Free,
    };

    /// What it is used for.
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// Objects that are in it.
    pub const fn live(&self) -> u16 {
        self.live
    }

    /// The number of this use.
    pub const fn number(&self) -> u64 {
        self.number
    }
}

/// Storage of the clusters; it only ever grows, and what it grows by is [`Cluster::FREE`].
pub trait ClusterStore {
    /// Number of clusters.
    fn len(&self) -> usize;
    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Cluster number `i`.
    fn get(&self, i: usize) -> Option<&Cluster>;
    /// Cluster number `i`, to be changed.
    fn get_mut(&mut self, i: usize) -> Option<&mut Cluster>;
}

/// All clusters of one file.
#[derive(Debug)]
pub struct Clusters<S: ClusterStore> {
    store: S,
    /// Clusters that were given room in the file.
    known: u32,
    free_list: u32,
    free: u32,
    /// Objects in all of them.
    live: u64,
    /// Objects that were put into those that are in use.
    placed: u64,
    next_number: u64,
}

impl<S: ClusterStore> Clusters<S> {
    /// Over an empty store.
    pub fn new(store: S) -> Self {
        Clusters {
            store,
            known: 0,
            free_list: NONE,
            free: 0,
            live: 0,
            placed: 0,
            next_number: 1,
        }
    }

    /// The storage.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// The storage, to be grown.
    pub fn store_mut(&mut self) -> &mut S {
        &mut self.store
    }

    /// Clusters that have room in the file.
    pub fn len(&self) -> u32 {
        self.known
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.known == 0
    }

    /// Clusters that nothing is in.
    pub fn free(&self) -> u32 {
        self.free
    }

    /// Objects in all of them.
    pub fn live(&self) -> u64 {
        self.live
    }

    /// One of them.
    pub fn get(&self, cluster: u32) -> Option<&Cluster> {
        if cluster >= self.known {
            return None;
        }
        self.store.get(usize::try_from(cluster).ok()?)
    }

    fn get_mut(&mut self, cluster: u32) -> Option<&mut Cluster> {
        if cluster >= self.known {
            return None;
        }
        self.store.get_mut(usize::try_from(cluster).ok()?)
    }

    /// The file has room for `count` more, for which the store was grown before; those that there
    /// is no place for are left out. Returns how many came.
    pub fn add(&mut self, count: u32) -> u32 {
        let room = u32::try_from(self.store.len()).unwrap_or(u32::MAX);
        let count = count.min(room.min(CLUSTERS_MAX).saturating_sub(self.known));
        let first = self.known;
        self.known = first.saturating_add(count);
        // The last ones first, so that the file is filled from its start.
        for cluster in (first..self.known).rev() {
            self.put_free(cluster);
        }
        count
    }

    fn put_free(&mut self, cluster: u32) {
        let next = self.free_list;
        let Some(entry) = self.get_mut(cluster) else {
            return;
        };
        *entry = Cluster {
            number: next.into(),
            ..Cluster::FREE
        };
        self.free_list = cluster;
        self.free = self.free.saturating_add(1);
    }

    /// Takes a free cluster to be filled, and its number.
    pub fn take(&mut self) -> Option<Fill> {
        let cluster = self.free_list;
        let number = self.next_number;
        let entry = self.get_mut(cluster)?;
        let next = u32::try_from(entry.number).unwrap_or(NONE);
        *entry = Cluster {
            number,
            live: 0,
            placed: 0,
            phase: Phase::Filling,
        };
        self.next_number = number.saturating_add(1);
        self.free_list = next;
        self.free = self.free.saturating_sub(1);
        Some(Fill {
            cluster,
            number,
            units: 0,
        })
    }

    /// Room for an object of `bytes` bytes in a cluster that is being filled; `None` when it is full.
    pub fn place(&mut self, fill: &mut Fill, bytes: usize) -> Option<Place> {
        let end = fill.units.checked_add(bytes.div_ceil(UNIT))?;
        if bytes == 0 || end > CLUSTER_BYTES / UNIT {
            return None;
        }
        let entry = self.get_mut(fill.cluster)?;
        if entry.phase != Phase::Filling {
            return None;
        }
        entry.live = entry.live.checked_add(1)?;
        entry.placed = entry.placed.saturating_add(1);
        self.live = self.live.saturating_add(1);
        self.placed = self.placed.saturating_add(1);
        let place = Place::new(fill.cluster, fill.units);
        fill.units = end;
        Some(place)
    }

    /// No more goes into it. True when it has to be written; else all of it is gone, and it is free.
    pub fn seal(&mut self, fill: Fill) -> bool {
        if let Some(entry) = self.get_mut(fill.cluster) {
            entry.phase = Phase::Writing;
        }
        !self.free_if_empty(fill.cluster)
    }

    /// It is in the file. Returns how many objects were put into it. When all of it is gone
    /// meanwhile, it is free.
    pub fn written(&mut self, cluster: u32) -> u64 {
        let Some(entry) = self.get_mut(cluster) else {
            return 0;
        };
        entry.phase = Phase::Written;
        let placed = entry.placed.into();
        self.free_if_empty(cluster);
        placed
    }

    fn free_if_empty(&mut self, cluster: u32) -> bool {
        let Some(&Cluster {
            live: 0, placed, ..
        }) = self.get(cluster)
        else {
            return false;
        };
        self.placed = self.placed.saturating_sub(placed.into());
        self.put_free(cluster);
        true
    }

    /// The object is gone. False for a place that holds none.
    pub fn release(&mut self, place: Place) -> bool {
        let cluster = place.cluster();
        let Some(entry) = self.get_mut(cluster) else {
            return false;
        };
        let Some(left) = entry.live.checked_sub(1) else {
            return false;
        };
        entry.live = left;
        let written = entry.phase == Phase::Written;
        self.live = self.live.saturating_sub(1);
        if written {
            self.free_if_empty(cluster);
        }
        true
    }

    /// Whether so much of the file is gaps that it should be packed anew: more than half of what
    /// was put into clusters is gone, and that is more than `slack` clusters.
    pub fn is_sparse(&self, slack: u32) -> bool {
        let used = self.known.saturating_sub(self.free);
        used > slack && self.live < self.placed / 2
    }

    /// Whether a cluster is one of those that are worth emptying: written, and more than half gone.
    pub fn is_gappy(&self, cluster: u32) -> bool {
        self.get(cluster)
            .is_some_and(|entry| entry.phase == Phase::Written && entry.live < entry.placed / 2)
    }
}

/// A cluster that is being filled.
#[derive(Debug, Eq, PartialEq)]
pub struct Fill {
    cluster: u32,
    number: u64,
    units: usize,
}

impl Fill {
    /// The cluster.
    pub fn cluster(&self) -> u32 {
        self.cluster
    }

    /// The number of this use of the cluster.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Bytes that are in use.
    pub fn bytes(&self) -> usize {
        self.units.saturating_mul(UNIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slot::Slot;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    impl ClusterStore for Vec<Cluster> {
        fn len(&self) -> usize {
            Vec::len(self)
        }
        fn get(&self, i: usize) -> Option<&Cluster> {
            <[Cluster]>::get(self, i)
        }
        fn get_mut(&mut self, i: usize) -> Option<&mut Cluster> {
            <[Cluster]>::get_mut(self, i)
        }
    }

    fn with(count: u32) -> Clusters<Vec<Cluster>> {
        let mut clusters = Clusters::new(Vec::new());
        grow(&mut clusters, count);
        clusters
    }

    fn grow(clusters: &mut Clusters<Vec<Cluster>>, count: u32) {
        for _ in 0..count {
            clusters.store_mut().push(Cluster::FREE);
        }
        assert_eq!(clusters.add(count), count);
    }

    #[test]
    fn a_place_keeps_its_parts() {
        for cluster in [0, 1, 77, CLUSTERS_MAX - 1] {
            for unit in [0, 1, CLUSTER_BYTES / UNIT - 1] {
                let place = Place::new(cluster, unit);
                assert!(place.payload() <= crate::slot::PAYLOAD_MAX);
                assert_eq!(Place::from_payload(place.payload()), place);
                assert_eq!((place.cluster(), place.offset()), (cluster, unit * UNIT));
            }
        }
    }

    #[test]
    fn a_lost_object_is_in_no_cluster() {
        let lost = Place::from_payload(Place::LOST.payload());
        assert!(lost.is_lost() && Slot::swapped(lost).place().is_lost());
        assert!(lost.cluster() >= CLUSTERS_MAX);
        assert!(!Place::new(CLUSTERS_MAX - 1, CLUSTER_BYTES / UNIT - 1).is_lost());
        assert!(!with(1).release(lost));
    }

    #[test]
    fn without_room_nothing_is_taken() {
        let mut clusters = with(1);
        assert_eq!(clusters.add(1), 0, "the store was not grown");
        let mut fill = clusters.take().unwrap();
        assert_eq!(clusters.take(), None);
        assert_eq!(clusters.place(&mut fill, 0), None);
        assert_eq!(clusters.place(&mut fill, CLUSTER_BYTES + 1), None);
        assert!(clusters.place(&mut fill, CLUSTER_BYTES).is_some());
        assert_eq!(clusters.place(&mut fill, 1), None);
        assert_eq!(fill.bytes(), CLUSTER_BYTES);
    }

    #[test]
    fn a_cluster_is_free_only_when_it_is_written_and_empty() {
        let mut clusters = with(1);
        let mut fill = clusters.take().unwrap();
        let first = clusters.place(&mut fill, 100).unwrap();
        let second = clusters.place(&mut fill, 100).unwrap();
        assert_eq!((first.offset(), second.offset()), (0, 112));
        assert!(clusters.release(first));
        assert_eq!(clusters.free(), 0);
        assert!(clusters.seal(fill));
        assert!(clusters.release(second));
        assert_eq!(clusters.free(), 0, "it is being written");
        assert_eq!(clusters.written(0), 2);
        assert_eq!((clusters.free(), clusters.live()), (1, 0));
        assert!(!clusters.release(second));
        assert!(!clusters.release(Place::new(9, 0)));
    }

    #[test]
    fn what_is_gone_before_it_was_written_is_not_written() {
        let mut clusters = with(1);
        let mut fill = clusters.take().unwrap();
        let place = clusters.place(&mut fill, 10).unwrap();
        clusters.release(place);
        assert!(!clusters.seal(fill));
        assert_eq!(clusters.free(), 1);
    }

    #[test]
    fn a_file_of_gaps_is_told_from_a_full_one() {
        let mut clusters = with(4);
        let mut places = Vec::new();
        for _ in 0..4 {
            let mut fill = clusters.take().unwrap();
            let cluster = fill.cluster();
            while let Some(place) = clusters.place(&mut fill, 4096) {
                places.push(place);
            }
            assert!(clusters.seal(fill));
            clusters.written(cluster);
        }
        assert!(!clusters.is_sparse(0));
        for place in &places[..6] {
            clusters.release(*place);
        }
        assert!(clusters.is_gappy(places[0].cluster()));
        assert!(!clusters.is_gappy(places[31].cluster()));
        assert!(!clusters.is_sparse(0));
        for place in places.iter().skip(8).filter(|p| p.offset() != 0) {
            clusters.release(*place);
        }
        assert!(clusters.is_sparse(3) && !clusters.is_sparse(4));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Put(usize),
        Seal,
        Written,
        Release(usize),
        Grow(u32),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            6 => (1usize..4200).prop_map(Op::Put),
            1 => Just(Op::Seal),
            2 => Just(Op::Written),
            4 => any::<usize>().prop_map(Op::Release),
            1 => (1u32..4).prop_map(Op::Grow),
        ]
    }

    proptest! {
        // Against a model that keeps every byte: no two live objects share one, a cluster is not
        // taken again while anything in it lives, and no number comes twice.
        #[test]
        fn objects_never_overlap(ops in prop::collection::vec(op(), 1..400)) {
            let mut clusters = with(2);
            let mut model: BTreeMap<u64, (Place, usize)> = BTreeMap::new();
            let mut numbers = BTreeSet::new();
            let mut fill: Option<Fill> = None;
            let mut writing = Vec::new();
            for op in ops {
                match op {
                    Op::Put(bytes) => {
                        if fill.is_none() {
                            fill = clusters.take();
                            if let Some(fill) = &fill {
                                prop_assert!(numbers.insert(fill.number()));
                                let cluster = fill.cluster();
                                prop_assert!(model.values().all(|(p, _)| p.cluster() != cluster));
                            }
                        }
                        let place = fill.as_mut().and_then(|fill| clusters.place(fill, bytes));
                        if let Some(place) = place {
                            let (from, to) = (place.offset(), place.offset() + bytes);
                            prop_assert!(to <= CLUSTER_BYTES);
                            for (other, len) in model.values() {
                                prop_assert!(other.cluster() != place.cluster()
                                    || other.offset() >= to || other.offset() + len <= from);
                            }
                            model.insert(place.payload(), (place, bytes));
                        }
                    }
                    Op::Seal => if let Some(fill) = fill.take() {
                        let cluster = fill.cluster();
                        if clusters.seal(fill) {
                            writing.push(cluster);
                        }
                    },
                    Op::Written => if let Some(cluster) = writing.pop() {
                        clusters.written(cluster);
                    },
                    Op::Release(which) => if !model.is_empty() {
                        let key = *model.keys().nth(which % model.len()).unwrap();
                        let (place, _) = model.remove(&key).unwrap();
                        prop_assert!(clusters.release(place));
                    },
                    Op::Grow(count) => grow(&mut clusters, count),
                }
                prop_assert_eq!(clusters.live(), model.len() as u64);
                let in_use: BTreeSet<u32> = model.values().map(|(p, _)| p.cluster())
                    .chain(writing.iter().copied())
                    .chain(fill.iter().map(Fill::cluster)).collect();
                prop_assert_eq!(clusters.len() - clusters.free(), in_use.len() as u32);
            }
        }
    }
}
