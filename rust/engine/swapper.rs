// SPDX-License-Identifier: GPL-2.0

//! The threads that do the I/O of all swap files: one that writes, makes files larger and takes pages
//! out of them again, and a few that read for those who wait.
//!
//! Lock order: none of the engine's is held during I/O.

use super::{
    cold,
    host::Host,
    pools::SharedPool,
    region::Region,
    swap::{self, Back},
    vm::Vm,
    volume::{Ask, Sealed, Swap, SwapWork, Table, Volume, Which, FREE_LOW},
};
use crate::{
    logic::{
        bell::Ear,
        clusters::{Place, CLUSTERS_MAX, CLUSTER_BYTES},
        slot::State,
    },
    sys::{
        clock, inject,
        page::Frame,
        protect,
        slots::{Content, SLOTS},
        swapio::{Buffer, SwapDir, SwapFile},
        task::{self, Work},
        zs::Scratch,
    },
};
use core::sync::atomic::Ordering;
use kernel::{prelude::*, sync::Arc};

/// Threads that read.
pub(crate) const READERS: usize = 3;
/// A file grows by so many clusters, 4 MiB, or by fewer where the disk is almost full.
const CHUNK: u32 = 128;
/// After a failure nothing is tried for so long; twice as long after the next one.
const PAUSE_US: u64 = 1_000_000;
/// And so on, so many times.
const PAUSE_DOUBLINGS: u32 = 5;
/// What cannot be read for so long is given up when its file is to be let go.
const GIVE_UP_US: u64 = 5_000_000;
/// When there is something to come back to.
const AGAIN_US: u64 = 500_000;
/// When there is not.
const IDLE_US: u64 = 60_000_000;
/// Gaps in a file of fewer clusters than this are not worth the work.
const SPARSE_SLACK: u32 = CHUNK;

/// A thread that reads.
pub(crate) struct Reader(pub(crate) Arc<Host>);

impl Work for Reader {
    fn run(&self) {
        let work = &self.0.swap;
        let mut ear = Ear::new();
        while !task::should_stop() {
            match work.next_ask() {
                Some(ask) => read(work, &ask),
                None => (work.reader_bell).sleep(&mut ear, IDLE_US, task::should_stop),
            }
        }
    }

    fn wake(&self) {
        self.0.swap.reader_bell.ring();
    }
}

fn read(work: &SwapWork, ask: &Ask) {
    let Ask {
        swap,
        cluster,
        number,
    } = ask;
    let (cluster, number) = (*cluster, *number);
    let (Some(file), Ok(mut buffer)) = (swap.source(cluster, number), Buffer::new()) else {
        task::sleep_killable(1_000);
        return swap.was_read(cluster, number, None, None);
    };
    let answer = file.read(offset(cluster), &mut buffer);
    inject::hold_answer();
    match answer {
        Ok(()) => {
            work.events.reads.fetch_add(1, Ordering::Relaxed);
            swap.was_read(cluster, number, Some(buffer.into()), Some(&file));
        }
        Err(error) => {
            work.events.reads_failed.fetch_add(1, Ordering::Relaxed);
            if task::may_log() {
                pr_err!(
                    "swap: a cluster could not be read ({}); its pages are poisoned until it can\n",
                    error.to_errno()
                );
            }
            swap.was_read(cluster, number, None, Some(&file));
        }
    }
}

fn offset(cluster: u32) -> u64 {
    u64::from(cluster).saturating_mul(CLUSTER_BYTES as u64)
}

/// Whose a swap file is.
enum Owner<'a> {
    Vm(&'a Arc<Vm>),
    /// A scope, for its shared pages.
    Scope(&'a SharedPool),
}

impl Owner<'_> {
    fn swap(&self) -> &Arc<Swap> {
        match self {
            Owner::Vm(vm) => vm.swap(),
            Owner::Scope(pool) => &pool.swap,
        }
    }

    /// Pages that its pool has.
    fn pool_pages(&self) -> u64 {
        match self {
            Owner::Vm(vm) => vm.store().pages(),
            Owner::Scope(pool) => pool.store.pages(),
        }
    }

    /// Pages that it may have.
    fn pool_cap(&self, host: &Host) -> u64 {
        match self {
            Owner::Vm(vm) => vm.pool_cap_pages(&host.knobs),
            // Without memory to add it up nothing goes into the pool.
            Owner::Scope(pool) => cold::pool_cap_pages(host, pool.scope).unwrap_or(0),
        }
    }

    fn opens(&self) -> bool {
        match self {
            Owner::Vm(vm) => vm.store().open().is_ok(),
            Owner::Scope(_) => true,
        }
    }

    /// Runs `f` on its name, for the log.
    fn with_name(&self, f: impl FnOnce(&str)) {
        match self {
            Owner::Vm(vm) => vm.with_name(|name| f(core::str::from_utf8(name).unwrap_or("?"))),
            Owner::Scope(_) => f("a domain's shared memory"),
        }
    }

    fn count_outs(&self, host: &Host, pages: u64) {
        host.swap.events.outs.fetch_add(pages, Ordering::Relaxed);
        self.swap().outs.fetch_add(pages, Ordering::Relaxed);
        if let Owner::Scope(_) = self {
            let shared = &host.events.shared_swap_outs;
            shared.fetch_add(pages, Ordering::Relaxed);
        }
    }
}

/// The thread that writes.
pub(crate) struct Writer(pub(crate) Arc<Host>);

impl Work for Writer {
    fn run(&self) {
        let host = &self.0;
        let mut scratch = None;
        let mut ear = Ear::new();
        while !task::should_stop() {
            if scratch.is_none() {
                scratch = Scratch::new();
            }
            let mut again = scratch.is_none();
            if let (Some(scratch), Ok(vms)) = (&mut scratch, host.vms().all()) {
                for vm in &vms {
                    again |= serve(host, &Owner::Vm(vm), scratch);
                }
                match host.shared_pools.all() {
                    Ok(pools) => {
                        for pool in &pools {
                            again |= serve(host, &Owner::Scope(pool), scratch);
                        }
                    }
                    Err(_) => again = true,
                }
            }
            let us = if again { AGAIN_US } else { IDLE_US };
            (host.swap.writer_bell).sleep(&mut ear, us, task::should_stop);
        }
    }

    fn wake(&self) {
        self.0.swap.writer_bell.ring();
    }
}

/// Does what is to be done for one file. True when there is more to come back to.
fn serve(host: &Host, owner: &Owner<'_>, scratch: &mut Scratch) -> bool {
    let swap = owner.swap();
    let target = swap.target(&host.swap);
    let (retires, failed) = {
        let inner = swap.lock();
        match &inner.volume {
            Some(volume) => {
                let stays = target.as_ref().is_some_and(|dir| volume.dir.is(dir));
                (!stays, volume.sealed.iter().flatten().any(|s| s.failed))
            }
            None => (false, false),
        }
    };
    let wanted = swap.wanted.take();
    if let (true, false, Some(dir)) = (wanted, retires, target) {
        make_room(host, owner, dir);
        host.reclaimer_bell.ring();
    }
    let mut again = !write_all(host, owner) || failed;
    if retires {
        let cap = owner.pool_cap(host);
        let gives_up = {
            let since = swap.lock().unread_since_us;
            since > 0 && clock::now_us().saturating_sub(since) >= GIVE_UP_US
        };
        let all = bring_back(host, owner, scratch, (cap, gives_up), &|_, _| true);
        note_unread(host, owner, all, gives_up);
        again |= !(all.is_some() && swap.drop_empty());
        host.reclaimer_bell.ring();
    } else {
        let (failed, sparse) = {
            let inner = swap.lock();
            inner.volume.as_ref().map_or((false, false), |volume| {
                (
                    volume.sealed.iter().flatten().any(|s| s.failed),
                    volume.clusters.is_sparse(SPARSE_SLACK),
                )
            })
        };
        if failed {
            // As they were: in the pool, whatever its cap.
            let into = (u64::MAX, false);
            bring_back(host, owner, scratch, into, &|volume, cluster| {
                let mut sealed = volume.sealed.iter().flatten();
                sealed.any(|s| s.failed && s.cluster == cluster)
            });
            again = true;
        } else if sparse {
            // They go out again, packed, once the pool is full.
            let cap = owner.pool_cap(host);
            let into = (u64::MAX, false);
            bring_back(host, owner, scratch, into, &|volume, cluster| {
                owner.pool_pages() < cap && volume.clusters.is_gappy(cluster)
            });
        }
    }
    again
}

/// Notes how it went with a file that is to be let go: `unread` pages of it could not be read (`None`:
/// not all were tried), and were given up if it `gave_up`.
fn note_unread(host: &Host, owner: &Owner<'_>, unread: Option<u64>, gave_up: bool) {
    let mut inner = owner.swap().lock();
    inner.unread_since_us = match (unread, inner.unread_since_us) {
        (Some(1..), since) if gave_up || since > 0 => since,
        (Some(1..), _) => clock::now_us(),
        (None, since) => since,
        (Some(0), _) => 0,
    };
    drop(inner);
    let Some(pages) = unread.filter(|pages| gave_up && *pages > 0) else {
        return;
    };
    host.swap.events.lost.fetch_add(pages, Ordering::Relaxed);
    owner.with_name(|name| {
        pr_err!(
            "swap: {pages} pages of {name} cannot be read; they are lost, their file is let go\n"
        );
    });
}

/// Makes the file, or makes it larger.
fn make_room(host: &Host, owner: &Owner<'_>, dir: Arc<SwapDir>) {
    let swap = owner.swap();
    let known = {
        let inner = swap.lock();
        inner.volume.as_ref().map(|volume| {
            (
                volume.file.clone(),
                volume.clusters.len(),
                volume.clusters.free(),
            )
        })
    };
    let made = match known {
        Some((_, _, free)) if free >= FREE_LOW => return,
        Some((file, len, _)) => grow(swap, &file, len),
        None => Volume::new(dir).and_then(|volume| {
            let file = volume.file.clone();
            swap.set_volume(volume);
            grow(swap, &file, 0)
        }),
    };
    let mut inner = swap.lock();
    let error = match made {
        Ok(()) => {
            inner.grow_after_us = 0;
            return;
        }
        // Its owner ended meanwhile: nothing is to go there any more.
        Err(_) if inner.closed => return,
        Err(error) => error,
    };
    inner.grow_after_us = clock::now_us().saturating_add(PAUSE_US << PAUSE_DOUBLINGS.min(3));
    drop(inner);
    host.swap.events.no_space.fetch_add(1, Ordering::Relaxed);
    if task::may_log() {
        owner.with_name(|name| {
            pr_warn!(
                "swap: no room for more pages of {name} ({}); they stay in memory\n",
                error.to_errno()
            );
        });
    }
}

/// Makes the file larger than `len` clusters: reserves the room and writes it once, so that the
/// file system has nothing to note when pages are written in the middle of reclaim.
fn grow(swap: &Swap, file: &SwapFile, len: u32) -> Result {
    let zeroes = Buffer::new()?;
    let mut chunk = CHUNK.min(CLUSTERS_MAX.saturating_sub(len));
    let mut last = ENOSPC;
    while chunk > 0 {
        match fill_up(file, len, chunk, &zeroes) {
            Ok(()) => break,
            Err(error) => last = error,
        }
        chunk /= 4;
    }
    if chunk == 0 {
        return Err(last);
    }
    let end = len.saturating_add(chunk) as usize;
    let capacity = {
        let inner = swap.lock();
        let volume = inner.volume.as_ref().ok_or(ENODEV)?;
        volume.clusters.store().capacity()
    };
    let mut larger = None;
    if capacity < end {
        larger = Some(Table::with_capacity(end.saturating_add(end / 2))?);
    }
    let mut inner = swap.lock();
    let volume = inner.volume.as_mut().ok_or(ENODEV)?;
    let table = volume.clusters.store_mut();
    if let Some(larger) = &mut larger {
        larger.take_over(table, end);
        core::mem::swap(table, larger);
    } else {
        table.fill_up(end);
    }
    volume.clusters.add(chunk);
    drop(inner);
    drop(larger);
    Ok(())
}

fn fill_up(file: &SwapFile, len: u32, chunk: u32, zeroes: &Buffer) -> Result {
    let bytes = u64::from(chunk).saturating_mul(CLUSTER_BYTES as u64);
    file.reserve(offset(len), bytes)?;
    for cluster in len..len.saturating_add(chunk) {
        file.write(offset(cluster), zeroes)?;
    }
    Ok(())
}

/// Writes what is full. False when something is left to be tried later.
fn write_all(host: &Host, owner: &Owner<'_>) -> bool {
    let swap = owner.swap();
    let mut wrote = false;
    loop {
        let mut inner = swap.lock();
        let waits = inner.write_after_us > clock::now_us();
        let Some(volume) = inner.volume.as_deref_mut() else {
            break;
        };
        // What nobody needs any more is not written.
        let clusters = &mut volume.clusters;
        for entry in &mut volume.sealed {
            let is_empty = |cluster| clusters.get(cluster).is_some_and(|c| c.live() == 0);
            if let Some(cluster) = entry.as_ref().map(|s| s.cluster).filter(|&c| is_empty(c)) {
                clusters.written(cluster);
                *entry = None;
            }
        }
        let Some(next) = volume.sealed.iter().flatten().next() else {
            break;
        };
        if waits {
            return false;
        }
        let (cluster, number, buffer) = (next.cluster, next.number, next.buffer.clone());
        let file = volume.file.clone();
        drop(inner);
        let result = file.write(offset(cluster), &buffer);
        wrote = true;
        if !was_written(host, owner, cluster, number, buffer, result) {
            return false;
        }
    }
    if wrote {
        host.reclaimer_bell.ring();
    }
    true
}

fn was_written(
    host: &Host,
    owner: &Owner<'_>,
    cluster: u32,
    number: u64,
    buffer: Arc<Buffer>,
    result: Result,
) -> bool {
    let swap = owner.swap();
    let events = &host.swap.events;
    let mut inner = swap.lock();
    let failures = inner.failures;
    let Some(volume) = &mut inner.volume else {
        return true;
    };
    let is_it = |s: &Sealed| s.cluster == cluster && s.number == number;
    let Some(entry) = volume
        .sealed
        .iter_mut()
        .find(|entry| entry.as_ref().is_some_and(is_it))
    else {
        return true;
    };
    match result {
        Err(error) if protect::armed(protect::Protection::WriteResult) => {
            if let Some(sealed) = entry {
                sealed.failed = true;
            }
            let pause = PAUSE_US << failures.min(PAUSE_DOUBLINGS);
            inner.failures = failures.saturating_add(1);
            inner.write_after_us = clock::now_us().saturating_add(pause);
            drop(inner);
            events.writes_failed.fetch_add(1, Ordering::Relaxed);
            if task::may_log() {
                owner.with_name(|name| {
                    pr_err!(
                        "swap: pages of {name} could not be written ({}); they stay in memory\n",
                        error.to_errno()
                    );
                });
            }
            false
        }
        _ => {
            let sealed = entry.take();
            let pages = volume.clusters.written(cluster);
            drop(sealed);
            volume.give_spare(buffer);
            inner.failures = 0;
            drop(inner);
            events.writes.fetch_add(1, Ordering::Relaxed);
            owner.count_outs(host, pages);
            true
        }
    }
}

/// Takes the pages that lie in such clusters out of the file, into the pool while that has fewer
/// pages than the first of `into`. What cannot be read stays, and is counted; if the second says so, it
/// is lost for good. `None` when memory is short, or the thread is to stop.
fn bring_back(
    host: &Host,
    owner: &Owner<'_>,
    scratch: &mut Scratch,
    into: (u64, bool),
    which: Which<'_>,
) -> Option<u64> {
    if !owner.opens() {
        return None;
    }
    match owner {
        Owner::Vm(vm) => bring_slots_back(host, vm, scratch, into, which),
        Owner::Scope(pool) => cold::bring_in(host, pool, scratch, into, which),
    }
}

fn bring_slots_back(
    host: &Host,
    vm: &Arc<Vm>,
    scratch: &mut Scratch,
    into: (u64, bool),
    which: Which<'_>,
) -> Option<u64> {
    let (mut spare, mut unread) = (None, 0u64);
    for id in 0..host.registry().end() {
        let Some(region) = host.registry().get(id) else {
            continue;
        };
        if region.vm().id() != vm.id() {
            continue;
        }
        for index in 0..SLOTS {
            if region.peek(index).state() != State::Swapped {
                continue;
            }
            if task::should_stop() {
                return None;
            }
            let came = bring_one(host, &region, (index, into), scratch, &mut spare, which)?;
            unread = unread.saturating_add(u64::from(!came));
            task::cond_resched();
        }
    }
    Some(unread)
}

/// The same for one slot: whether it could be read, if it is one to come back.
fn bring_one(
    host: &Host,
    region: &Region,
    (index, (pool_pages, gives_up)): (usize, (u64, bool)),
    scratch: &mut Scratch,
    spare: &mut Option<Frame>,
    which: Which<'_>,
) -> Option<bool> {
    let vm = region.vm();
    loop {
        let mut guard = region.lock();
        let slot = guard.slot(index);
        let gone = slot.state() != State::Swapped || slot.place().is_lost();
        if gone || guard.is_retired() {
            return Some(true);
        }
        let wanted = {
            let inner = vm.swap().lock();
            let volume = inner.volume.as_ref();
            volume.is_some_and(|volume| which(volume, slot.place().cluster()))
        };
        if !wanted {
            return Some(true);
        }
        match swap::bring_back(host, &mut guard, index, scratch, spare, pool_pages) {
            Back::Done => return Some(true),
            Back::Lost => {
                if gives_up {
                    host.release(guard.set(index, Content::Swapped(Place::LOST), 0));
                }
                return Some(false);
            }
            Back::NoMemory => return None,
            Back::Absent => {
                drop(guard);
                if task::should_stop() {
                    return None;
                }
                vm.swap().load(&host.swap, slot.place());
            }
            Back::NeedsFrame => {
                drop(guard);
                *spare = region.returned_frame();
                spare.as_ref()?;
            }
        }
    }
}
