// SPDX-License-Identifier: GPL-2.0

//! The swap file of one owner of a pool: a VM, or a scope for its shared pages.
//!
//! An object that leaves memory is encrypted into a buffer of the size of a cluster, and its slot has
//! its place in the file from then on. The buffer stays until it was written, so nobody ever waits
//! for a write: who wants the object finds it there. Reading brings a whole cluster into one of a few
//! buffers, from which its neighbours are served too. Nothing here does I/O: the threads of `swapper`
//! do.
//!
//! Lock order: region > index > the lock of a swap file > the queue of clusters to read. All of them sleep.

use super::host::Bell;
use crate::{
    logic::{
        bell::Request,
        clusters::{Cluster, ClusterStore, Clusters, Fill, Phase, Place, CLUSTER_BYTES},
        object::{self, Object, Room},
    },
    sys::{
        alloc, clock,
        crypt::{Key, Nonce},
        page::Frame,
        protect,
        report::bug_once,
        swapio::{Buffer, SwapDir, SwapFile},
        task,
        zs::{self, Corrupt, Scratch},
    },
};
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::{
    new_condvar, new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::UniqueArc,
    sync::{lock::mutex::MutexBackend, lock::Guard, Arc, CondVar, CondVarTimeoutResult, Mutex},
    time::msecs_to_jiffies,
};

/// Clusters that are written at a time.
pub(super) const WRITING_MAX: usize = 8;
/// Clusters that are kept after they were read, and that are read at a time.
const CACHED_MAX: usize = 8;
/// Below so many free clusters the file is made larger.
pub(super) const FREE_LOW: u32 = 2 * WRITING_MAX as u32;
/// A read that failed is not tried again for so long.
const FAILED_US: u64 = 1_000_000;

/// The clusters of a file.
pub(crate) struct Table(KVVec<Cluster>);

impl Table {
    /// No cluster, and room for `capacity`.
    pub(crate) fn with_capacity(capacity: usize) -> Result<Table> {
        Ok(Table(alloc::long_list(capacity)?))
    }

    pub(super) fn capacity(&self) -> usize {
        self.0.capacity()
    }

    /// Fills up with those of `other`, and as many free ones as fit up to `len`.
    pub(super) fn take_over(&mut self, other: &mut Table, len: usize) {
        for cluster in other.0.drain_all() {
            let _ = self.0.push_within_capacity(cluster);
        }
        self.fill_up(len);
    }

    /// Adds free clusters up to `len`, as far as there is room.
    pub(crate) fn fill_up(&mut self, len: usize) {
        while self.0.len() < len && self.0.push_within_capacity(Cluster::FREE).is_ok() {}
    }
}

impl ClusterStore for Table {
    fn len(&self) -> usize {
        self.0.len()
    }
    fn get(&self, i: usize) -> Option<&Cluster> {
        <[Cluster]>::get(&self.0, i)
    }
    fn get_mut(&mut self, i: usize) -> Option<&mut Cluster> {
        <[Cluster]>::get_mut(&mut self.0, i)
    }
}

/// A cluster that is being filled.
pub(crate) struct Filling {
    /// What of it is taken.
    pub(crate) fill: Fill,
    /// Its bytes.
    pub(crate) buffer: UniqueArc<Buffer>,
}

/// A full cluster on its way into the file.
pub(super) struct Sealed {
    pub(super) cluster: u32,
    pub(super) number: u64,
    pub(super) buffer: Arc<Buffer>,
    /// It could not be written: its objects go back to where they were.
    pub(super) failed: bool,
}

enum Held {
    /// A reader is at it.
    Reading,
    Ready(Arc<Buffer>),
    /// It could not be read, at that time.
    Failed(u64),
}

struct Cached {
    cluster: u32,
    number: u64,
    used: u64,
    content: Held,
}

/// A file and what is known of it.
pub(super) struct Volume {
    pub(super) dir: Arc<SwapDir>,
    pub(super) file: Arc<SwapFile>,
    key: Arc<Key>,
    pub(super) clusters: Clusters<Table>,
    filling: Option<Filling>,
    pub(super) sealed: [Option<Sealed>; WRITING_MAX],
    cache: [Option<Cached>; CACHED_MAX],
    uses: u64,
    spare: Option<UniqueArc<Buffer>>,
}

pub(super) struct Inner {
    pub(super) volume: Option<KBox<Volume>>,
    /// The owner is gone.
    pub(super) closed: bool,
    /// No write is tried before.
    pub(super) write_after_us: u64,
    /// The file is not made larger before.
    pub(super) grow_after_us: u64,
    /// Failures in a row.
    pub(super) failures: u32,
    /// Since then all that is in the file, which is to be let go, cannot be read; 0 if that is not so.
    pub(super) unread_since_us: u64,
}

/// Clusters that wait to be read.
const QUEUE_MAX: usize = 64;

/// Whether something can be put into a swap file now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Ready {
    /// Yes.
    Now,
    /// When what is under way is written, or the file is made or larger.
    Soon,
    /// There is no directory for it, or the disk is full or fails.
    No,
}

/// Which clusters are to be emptied.
pub(super) type Which<'a> = &'a dyn Fn(&Volume, u32) -> bool;

/// What came of looking for an object.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fetched {
    /// So many bytes of it.
    Bytes(usize),
    /// It must be read first.
    Absent,
    /// It cannot be read, or is not what was written.
    Lost,
}

/// Where the objects of one owner go when its pool is full.
#[pin_data]
pub(crate) struct Swap {
    /// The directory that its mount names, before the host's.
    #[pin]
    own_dir: Mutex<Option<Arc<SwapDir>>>,
    #[pin]
    pub(super) inner: Mutex<Inner>,
    /// Told when a cluster was read.
    #[pin]
    pub(super) loaded: CondVar,
    /// The file is to be made, or to be made larger.
    pub(super) wanted: Request,
    /// Pages that were written.
    pub(crate) outs: AtomicU64,
    /// Pages that came back.
    pub(crate) ins: AtomicU64,
}

impl Swap {
    /// Without a file, which is made when it is first needed.
    pub(crate) fn new(own_dir: Option<Arc<SwapDir>>) -> Result<Arc<Swap>> {
        alloc::counted_in_place(
            pin_init!(Swap {
                own_dir <- new_mutex!(own_dir, "thinram_swap_own_dir"),
                inner <- new_mutex!(
                    Inner {
                        volume: None,
                        closed: false,
                        write_after_us: 0,
                        grow_after_us: 0,
                        failures: 0,
                        unread_since_us: 0,
                    },
                    "thinram_swap"
                ),
                loaded <- new_condvar!("thinram_swap_loaded"),
                wanted: Request::new(),
                outs: AtomicU64::new(0),
                ins: AtomicU64::new(0),
            }),
            GFP_KERNEL,
        )
    }

    /// The directory of its own, which the host's does not change.
    pub(crate) fn own_dir(&self) -> Option<Arc<SwapDir>> {
        self.own_dir.lock().clone()
    }

    /// Another one. True if it is another.
    pub(super) fn set_own_dir(&self, dir: Option<Arc<SwapDir>>) -> bool {
        let mut own = self.own_dir.lock();
        let same = match (&dir, &*own) {
            (Some(new), Some(old)) => new.is(old),
            (None, None) => true,
            _ => false,
        };
        if same {
            return false;
        }
        let before = core::mem::replace(&mut *own, dir);
        drop(own);
        drop(before);
        true
    }

    /// The directory that its file should be in.
    pub(super) fn target(&self, work: &SwapWork) -> Option<Arc<SwapDir>> {
        self.own_dir().or_else(|| work.dir())
    }

    /// Whether its objects have somewhere to go.
    pub(crate) fn is_on(&self, work: &SwapWork) -> bool {
        self.target(work).is_some()
    }

    pub(super) fn lock(&self) -> Guard<'_, Inner, MutexBackend> {
        self.inner.lock()
    }

    /// Objects in it.
    pub(crate) fn live(&self) -> u64 {
        let inner = self.lock();
        inner.volume.as_ref().map_or(0, |v| v.clusters.live())
    }

    /// KiB that the file takes.
    pub(crate) fn file_kb(&self) -> u64 {
        let inner = self.lock();
        let clusters = inner.volume.as_ref().map_or(0, |v| v.clusters.len());
        u64::from(clusters).saturating_mul(CLUSTER_BYTES as u64 / 1024)
    }

    /// Memory that it takes.
    pub(crate) fn bytes(&self) -> u64 {
        let inner = self.lock();
        let volume = inner.volume.as_ref().map_or(0, |v| v.bytes());
        volume.saturating_add(core::mem::size_of::<Swap>() as u64)
    }

    /// Gets ready to put something in. Allocates; no lock of the engine is held.
    pub(crate) fn prepare(&self, work: &SwapWork) -> Ready {
        let Some(target) = self.target(work) else {
            return Ready::No;
        };
        let mut fresh = None;
        loop {
            let mut inner = self.lock();
            let now = clock::now_us();
            if inner.closed || inner.write_after_us > now {
                return Ready::No;
            }
            let may_grow = inner.grow_after_us <= now;
            let Some(volume) = &mut inner.volume else {
                drop(inner);
                return self.want(work, may_grow);
            };
            if !volume.dir.is(&target) {
                return Ready::Soon;
            }
            if volume.clusters.free() < FREE_LOW && may_grow {
                self.want(work, true);
            }
            if volume.spare.is_none() {
                volume.spare = fresh.take();
            }
            if volume.filling.is_none() && !volume.begin_filling() && volume.spare.is_some() {
                let all_written = volume.sealed.iter().all(Option::is_none);
                return if all_written && !may_grow {
                    Ready::No
                } else {
                    Ready::Soon
                };
            }
            if volume.spare.is_some() {
                return Ready::Now;
            }
            drop(inner);
            fresh = match Buffer::reserved() {
                Ok(buffer) => Some(buffer),
                Err(_) => return Ready::Soon,
            };
        }
    }

    fn want(&self, work: &SwapWork, may_grow: bool) -> Ready {
        if !may_grow {
            return Ready::No;
        }
        self.wanted.make();
        work.writer_bell.ring();
        Ready::Soon
    }

    /// Puts an object into the file: it is in a buffer first. `None` when [`Swap::prepare`] has to be
    /// called before. May be called with a region locked.
    pub(crate) fn stage(&self, work: &SwapWork, bytes: &[u8]) -> Option<Place> {
        let mut inner = self.lock();
        if inner.closed {
            return None;
        }
        let volume = inner.volume.as_mut()?;
        if let Some(place) = volume.put(bytes) {
            return Some(place);
        }
        if volume.seal() {
            work.writer_bell.ring();
        }
        if !volume.begin_filling() {
            return None;
        }
        volume.put(bytes)
    }

    /// The object is not needed any more.
    pub(super) fn release(&self, place: Place) {
        if place.is_lost() {
            return;
        }
        if let Some(volume) = &mut self.lock().volume {
            if !volume.clusters.release(place) {
                bug_once!("a place in a swap file was given back twice");
            }
        }
    }

    /// Copies an object into `scratch`.
    pub(super) fn fetch(&self, work: &SwapWork, place: Place, scratch: &mut Scratch) -> Fetched {
        let mut inner = self.lock();
        let Some(volume) = &mut inner.volume else {
            return Fetched::Lost;
        };
        let key = volume.key.clone();
        let (buffer, number) = match volume.find(place) {
            Found::Filling(buffer, number) => {
                return opened(open(&key, buffer, number, place, scratch), work);
            }
            Found::Buffer(buffer, number) => (buffer, number),
            Found::Failed => return Fetched::Lost,
            Found::Nothing => return Fetched::Absent,
        };
        drop(inner);
        opened(open(&key, &buffer, number, place, scratch), work)
    }

    /// Fills `frame` with the page that an object stands for; it stays where it is.
    pub(super) fn fill(
        &self,
        work: &SwapWork,
        place: Place,
        scratch: &mut Scratch,
        frame: &mut Frame,
    ) -> Fetched {
        let fetched = self.fetch(work, place, scratch);
        let Fetched::Bytes(len) = fetched else {
            return fetched;
        };
        if unpack(len, scratch, frame).is_err() {
            work.events.corrupt.fetch_add(1, Ordering::Relaxed);
            return Fetched::Lost;
        }
        fetched
    }

    /// Sees to it that the object is in memory, as far as that is possible: waits for a reader, or for
    /// a signal that kills. No lock of the engine is held.
    pub(crate) fn load(self: &Arc<Self>, work: &SwapWork, place: Place) {
        /// What is waited for comes with a word.
        const STEP_MS: u32 = 100;
        const NAP_US: u64 = 1_000;
        task::stalled_for_memory(|| {
            while self.ask(work, place) && !task::fatal_signal_pending() {
                let mut inner = self.lock();
                let absent = inner
                    .volume
                    .as_mut()
                    .is_some_and(|volume| matches!(volume.find(place), Found::Nothing));
                if !absent {
                    break;
                }
                let step = msecs_to_jiffies(STEP_MS);
                let woken = self.loaded.wait_interruptible_timeout(&mut inner, step);
                drop(inner);
                if matches!(woken, CondVarTimeoutResult::Signal { .. }) {
                    task::sleep_killable(NAP_US);
                }
            }
        });
    }

    /// Asks a reader for the object's cluster. False when there is nothing to wait for.
    pub(crate) fn ask(self: &Arc<Self>, work: &SwapWork, place: Place) -> bool {
        let mut inner = self.lock();
        let Some(volume) = &mut inner.volume else {
            return false;
        };
        if !matches!(volume.find(place), Found::Nothing) {
            return false;
        }
        let cluster = place.cluster();
        let Some(number) = volume.number_of(cluster, Phase::Written) else {
            return false;
        };
        if volume.is_reading(cluster, number) {
            return true;
        }
        let Some(entry) = volume.entry_to_replace(cluster) else {
            // As many are read as may be.
            return true;
        };
        let asked = work.ask(Ask {
            swap: self.clone(),
            cluster,
            number,
        });
        if asked {
            *entry = Some(Cached {
                cluster,
                number,
                used: u64::MAX,
                content: Held::Reading,
            });
        }
        true
    }

    /// What a reader reads from, if the cluster is still what it was.
    pub(super) fn source(&self, cluster: u32, number: u64) -> Option<Arc<SwapFile>> {
        let inner = self.lock();
        let volume = inner.volume.as_ref()?;
        (volume.number_of(cluster, Phase::Written) == Some(number)).then(|| volume.file.clone())
    }

    /// A reader is done: with a buffer, or (`None`) it could not be read. `tried`: from which file, if it
    /// was. Another file that there is meanwhile has clusters of the same numbers.
    pub(super) fn was_read(
        &self,
        cluster: u32,
        number: u64,
        buffer: Option<Arc<Buffer>>,
        tried: Option<&Arc<SwapFile>>,
    ) {
        let mut inner = self.lock();
        let volume = inner.volume.as_mut();
        let is_its = |volume: &&mut KBox<Volume>| {
            !protect::armed(protect::Protection::SwapFile)
                || tried.is_none_or(|file| Arc::ptr_eq(file, &volume.file))
        };
        if let Some(volume) = volume.filter(is_its) {
            volume.uses = volume.uses.saturating_add(1);
            let used = volume.uses;
            for place in &mut volume.cache {
                let Some(entry) = place else { continue };
                let is_it = entry.cluster == cluster && entry.number == number;
                if !is_it || !matches!(entry.content, Held::Reading) {
                    continue;
                }
                match (&buffer, tried) {
                    (Some(buffer), _) => entry.content = Held::Ready(buffer.clone()),
                    (None, Some(_)) => entry.content = Held::Failed(clock::now_us()),
                    (None, None) => {
                        *place = None;
                        continue;
                    }
                }
                entry.used = used;
            }
        }
        drop(inner);
        self.loaded.notify_all();
    }

    /// The owner is gone, and all places were given back: the file goes.
    pub(crate) fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        let volume = inner.volume.take();
        drop(inner);
        self.loaded.notify_all();
        drop(volume);
    }

    /// A new file, unless there is one or the owner is gone.
    pub(super) fn set_volume(&self, volume: KBox<Volume>) {
        let mut inner = self.lock();
        if inner.closed || inner.volume.is_some() {
            drop(inner);
            drop(volume);
        } else {
            inner.volume = Some(volume);
        }
    }

    /// Lets the file go if nothing is in it.
    pub(super) fn drop_empty(&self) -> bool {
        let mut inner = self.lock();
        let is_empty = inner.volume.as_ref().is_some_and(|volume| {
            volume.clusters.live() == 0 && volume.sealed.iter().all(Option::is_none)
        });
        let volume = if is_empty { inner.volume.take() } else { None };
        drop(inner);
        drop(volume);
        is_empty
    }
}

/// Fills `frame` with the page whose `len` bytes are in `scratch`.
pub(super) fn unpack(len: usize, scratch: &Scratch, frame: &mut Frame) -> Result<(), Corrupt> {
    if len == PAGE_SIZE {
        frame.overwrite(scratch.bytes());
        return Ok(());
    }
    zs::decompress(scratch.bytes().get(..len).unwrap_or(&[]), frame)
}

fn opened(len: Option<usize>, work: &SwapWork) -> Fetched {
    match len {
        Some(len) => Fetched::Bytes(len),
        None => {
            work.events.corrupt.fetch_add(1, Ordering::Relaxed);
            Fetched::Lost
        }
    }
}

/// Where a cluster is in memory.
enum Found<'a> {
    Filling(&'a Buffer, u64),
    Buffer(Arc<Buffer>, u64),
    Failed,
    Nothing,
}

impl Volume {
    /// A new file in `dir`.
    pub(super) fn new(dir: Arc<SwapDir>) -> Result<KBox<Volume>> {
        let file = alloc::counted(dir.make_file()?)?;
        Ok(alloc::boxed(Volume {
            dir,
            file,
            key: alloc::counted(Key::new())?,
            clusters: Clusters::new(Table::with_capacity(0)?),
            filling: None,
            sealed: Default::default(),
            cache: Default::default(),
            uses: 0,
            spare: None,
        })?)
    }

    fn bytes(&self) -> u64 {
        let cached = self.cache.iter().flatten().count();
        let sealed = self.sealed.iter().flatten().count();
        let own = usize::from(self.filling.is_some()) + usize::from(self.spare.is_some());
        let buffers = (cached + sealed + own).saturating_mul(CLUSTER_BYTES);
        let table = (self.clusters.len() as usize).saturating_mul(core::mem::size_of::<Cluster>());
        (buffers.saturating_add(table) as u64).saturating_add(core::mem::size_of::<Self>() as u64)
    }

    /// Takes a free cluster, if there will be room to keep it while it is written.
    fn begin_filling(&mut self) -> bool {
        if self.filling.is_some() {
            return true;
        }
        if self.spare.is_none() || self.sealed.iter().all(Option::is_some) {
            return false;
        }
        let Some(fill) = self.clusters.take() else {
            return false;
        };
        match self.spare.take() {
            Some(buffer) => {
                self.filling = Some(Filling { fill, buffer });
                true
            }
            None => false,
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Option<Place> {
        put(&self.key, &mut self.clusters, self.filling.as_mut()?, bytes)
    }

    /// Ends the filling of a cluster. True when there is one more to be written.
    fn seal(&mut self) -> bool {
        let Some(slot) = self.sealed.iter_mut().find(|slot| slot.is_none()) else {
            return false;
        };
        let Some(Filling { fill, buffer }) = self.filling.take() else {
            return false;
        };
        let (cluster, number) = (fill.cluster(), fill.number());
        if !self.clusters.seal(fill) {
            self.spare = Some(buffer);
            return false;
        }
        *slot = Some(Sealed {
            cluster,
            number,
            buffer: buffer.into(),
            failed: false,
        });
        true
    }

    /// A buffer that is not needed any more.
    pub(super) fn give_spare(&mut self, buffer: Arc<Buffer>) {
        if self.spare.is_none() {
            if let Some(buffer) = Arc::into_unique_or_drop(buffer) {
                self.spare = Some(Pin::into_inner(buffer));
            }
        }
    }

    fn number_of(&self, cluster: u32, phase: Phase) -> Option<u64> {
        let entry = self.clusters.get(cluster)?;
        (entry.phase() == phase).then(|| entry.number())
    }

    fn find(&mut self, place: Place) -> Found<'_> {
        let cluster = place.cluster();
        let Some(number) = self.clusters.get(cluster).map(Cluster::number) else {
            return Found::Failed;
        };
        if let Some(filling) = &self.filling {
            if filling.fill.cluster() == cluster {
                return Found::Filling(&filling.buffer, number);
            }
        }
        for sealed in self.sealed.iter().flatten() {
            if sealed.cluster == cluster && sealed.number == number {
                return Found::Buffer(sealed.buffer.clone(), number);
            }
        }
        self.uses = self.uses.saturating_add(1);
        for entry in self.cache.iter_mut().flatten() {
            if entry.cluster != cluster || entry.number != number {
                continue;
            }
            match &entry.content {
                Held::Ready(buffer) => {
                    entry.used = self.uses;
                    return Found::Buffer(buffer.clone(), number);
                }
                Held::Failed(at) if clock::now_us().saturating_sub(*at) < FAILED_US => {
                    return Found::Failed
                }
                Held::Failed(_) | Held::Reading => return Found::Nothing,
            }
        }
        Found::Nothing
    }

    fn is_reading(&self, cluster: u32, number: u64) -> bool {
        self.cache.iter().flatten().any(|entry| {
            entry.cluster == cluster
                && entry.number == number
                && matches!(entry.content, Held::Reading)
        })
    }

    /// The place in the cache of what is known of that cluster, else of what was not used for
    /// longest; `None` while all are being read.
    fn entry_to_replace(&mut self, cluster: u32) -> Option<&mut Option<Cached>> {
        let age = |entry: &Option<Cached>| match entry {
            Some(entry) if entry.cluster == cluster => 0,
            Some(entry) => entry.used.max(1),
            None => 1,
        };
        let oldest = self.cache.iter_mut().min_by_key(|entry| age(entry))?;
        match oldest {
            Some(entry) if matches!(entry.content, Held::Reading) => None,
            _ => Some(oldest),
        }
    }
}

fn nonce(number: u64, place: Place) -> Nonce {
    Nonce {
        number,
        offset: place.offset() as u32,
    }
}

/// Encrypts an object into the cluster that is being filled; `None` when it is full.
pub(crate) fn put(
    key: &Key,
    clusters: &mut Clusters<Table>,
    filling: &mut Filling,
    bytes: &[u8],
) -> Option<Place> {
    let place = clusters.place(&mut filling.fill, object::size(bytes.len())?)?;
    let nonce = nonce(filling.fill.number(), place);
    let room = Room::of(&mut filling.buffer.0[..], place.offset(), bytes.len())?;
    room.body.copy_from_slice(bytes);
    key.apply(nonce, room.body);
    let seal = key.seal(nonce, room.body);
    room.close(seal);
    Some(place)
}

/// Copies an object out of a cluster; `None` when it is not what was put in.
pub(crate) fn open(
    key: &Key,
    buffer: &Buffer,
    number: u64,
    place: Place,
    scratch: &mut Scratch,
) -> Option<usize> {
    let object = Object::at(&buffer.0[..], place.offset())?;
    let nonce = nonce(number, place);
    if protect::armed(protect::Protection::Checksum) && key.seal(nonce, object.body) != object.seal
    {
        return None;
    }
    let out = scratch.bytes_mut().get_mut(..object.body.len())?;
    out.copy_from_slice(object.body);
    key.apply(nonce, out);
    Some(object.body.len())
}

/// What swapping counts.
#[derive(Default)]
pub(crate) struct SwapEvents {
    /// Pages that were written.
    pub(crate) outs: AtomicU64,
    /// Pages that came back.
    pub(crate) ins: AtomicU64,
    /// Clusters that were written.
    pub(crate) writes: AtomicU64,
    /// Clusters that were read.
    pub(crate) reads: AtomicU64,
    /// Clusters that could not be written; their pages stayed.
    pub(crate) writes_failed: AtomicU64,
    /// Clusters that could not be read.
    pub(crate) reads_failed: AtomicU64,
    /// Times that the disk had no room for a larger file.
    pub(crate) no_space: AtomicU64,
    /// Objects that were not what had been written.
    pub(crate) corrupt: AtomicU64,
    /// Pages that were given up with the file that they could not be read from.
    pub(crate) lost: AtomicU64,
}

/// A cluster that somebody waits for.
pub(super) struct Ask {
    pub(super) swap: Arc<Swap>,
    pub(super) cluster: u32,
    pub(super) number: u64,
}

/// What the threads work from.
#[pin_data]
pub(crate) struct SwapWork {
    #[pin]
    dir: Mutex<Option<Arc<SwapDir>>>,
    #[pin]
    queue: Mutex<KVec<Ask>>,
    /// Wakes the thread that writes.
    #[pin]
    pub(crate) writer_bell: Bell,
    /// Wakes those that read.
    #[pin]
    pub(crate) reader_bell: Bell,
    /// Counters.
    pub(crate) events: SwapEvents,
}

impl SwapWork {
    /// Nothing to do, and no directory.
    pub(super) fn new() -> impl PinInit<SwapWork, Error> {
        try_pin_init!(SwapWork {
            dir <- new_mutex!(None, "thinram_swap_dir"),
            queue <- new_mutex!(alloc::list(QUEUE_MAX)?, "thinram_swap_queue"),
            writer_bell <- Bell::new(),
            reader_bell <- Bell::new(),
            events: SwapEvents::default(),
        })
    }

    /// `swap_dir`
    pub(crate) fn dir(&self) -> Option<Arc<SwapDir>> {
        self.dir.lock().clone()
    }

    pub(super) fn set_dir(&self, dir: Option<Arc<SwapDir>>) {
        let before = core::mem::replace(&mut *self.dir.lock(), dir);
        drop(before);
        self.writer_bell.ring();
    }

    /// False when too many wait already.
    pub(super) fn ask(&self, ask: Ask) -> bool {
        let mut queue = self.queue.lock();
        let taken = queue.len() < QUEUE_MAX && queue.push_within_capacity(ask).is_ok();
        drop(queue);
        self.reader_bell.ring();
        taken
    }

    pub(super) fn next_ask(&self) -> Option<Ask> {
        let mut queue = self.queue.lock();
        if queue.is_empty() {
            return None;
        }
        queue.remove(0).ok()
    }
}
