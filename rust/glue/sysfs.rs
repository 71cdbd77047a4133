// SPDX-License-Identifier: GPL-2.0

//! /sys/fs/thinram: one bare value a file. The names are a promise (docs/abi.md).

use crate::{
    engine::{
        host::Host,
        regroup::Change,
        vm::{Vm, VmCounts},
    },
    logic::{
        counts::pages_to_kb,
        huge::Refusal,
        state::HostState,
        tunables::{self, BadValue, Knob, LargePages, RunMode, ShareScope, Shown, Takes},
    },
    sys::{
        alloc, bindings,
        kobj::{self, Attribute, Attributes, Directory, Page, Parent},
        memory, task,
    },
};
use core::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering},
};
use kernel::{ffi::c_char, prelude::*, sync::Arc};

/// One file of a directory for `T`.
struct File<T> {
    name: &'static str,
    show: fn(&T, &mut Page<'_>) -> Result,
    store: Option<fn(&T, &[u8]) -> Result>,
}

fn refused(bad: BadValue) -> Error {
    match bad {
        BadValue::Invalid => EINVAL,
        BadValue::Range => ERANGE,
    }
}

fn knob(name: &str, bytes: &[u8]) -> Result<u64> {
    taken(Knob::find(name), bytes)
}

/// The value of a VM's number, from its file or a mount option.
fn vm_knob(name: &str, bytes: &[u8]) -> Result<u64> {
    taken(Knob::find_vm(name), bytes)
}

fn taken(knob: Option<&Knob>, bytes: &[u8]) -> Result<u64> {
    knob.ok_or(EINVAL)?.parse(bytes).map_err(refused)
}

impl<T> File<T> {
    fn store(&self, owner: &T, value: &[u8]) -> Result {
        self.store.ok_or(EPERM)?(owner, value)
    }

    /// One line in the log about a value that was refused; `vm` is empty for the host's files.
    fn log_refusal(&self, vm: &[u8], value: &[u8], error: Error) {
        // Who was killed, or whose VM went, knows.
        if matches!(error, EINTR | ENODEV) || !task::may_log() {
            return;
        }
        let (name, value, vm) = (self.name, Shown(value), Shown(vm));
        let slash = if vm.0.is_empty() { "" } else { "/" };
        match error {
            _ if name == "swap_dir" => {
                let why = swap_dir_error(error);
                pr_warn!("{vm}{slash}{name}: `{value}` was refused: {why}\n");
            }
            EINVAL | ERANGE => {
                let takes = Takes(name);
                pr_warn!("{vm}{slash}{name}: `{value}` was refused: it takes {takes}\n");
            }
            ENOMEM => pr_warn!("{vm}{slash}{name}: no memory for what `{value}` needs\n"),
            _ => pr_warn!("{vm}{slash}{name}: `{value}` was refused: {error:?}\n"),
        }
    }
}

fn line(page: &mut Page<'_>, value: impl core::fmt::Display) -> Result {
    writeln!(page, "{value}").map_err(|_| ENOSPC)
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// Makes the table of a directory: `name: show` or `name: show, store`.
macro_rules! files {
    ($attributes:ident, $files:ident: $owner:ty;
     $($name:literal: $show:expr $(, $store:expr)?;)*) => {
        static $attributes: [Attribute; [$($name),*].len()] = [
            $(Attribute::new(
                match core::ffi::CStr::from_bytes_with_nul(concat!($name, "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => panic!("a name with a zero byte"),
                },
                files!(@writable $($store)?),
            )),*
        ];
        static $files: &[File<$owner>] =
            &[$(File { name: $name, show: $show, store: files!(@store $($store)?) }),*];
    };
    (@writable $store:expr) => { true };
    (@writable) => { false };
    (@store $store:expr) => { Some($store) };
    (@store) => { None };
}

/// A knob that is a plain number.
macro_rules! number {
    ($name:literal, $field:ident) => {
        number!($name, $field, scanner_bell)
    };
    ($name:literal, $field:ident, $bell:ident) => {
        number!($name, $field => |host: &Host| host.$bell.ring())
    };
    ($name:literal, $field:ident => $tell:expr) => {
        |host: &HostFiles, bytes: &[u8]| {
            let value = knob($name, bytes)?;
            host.0.knobs.$field.store(value, Ordering::Relaxed);
            $tell(&host.0);
            Ok(())
        }
    };
}

/// The host, as sysfs shows it.
pub(crate) struct HostFiles(Arc<Host>);

files! {
    HOST_ATTRIBUTES, HOST_FILES: HostFiles;
    "run": |h, page| line(page, h.0.run_mode().index()),
        |h, bytes| {
            h.0.set_run_mode(RunMode::parse(bytes).map_err(refused)?)
        };
    "scan_pages_per_sec": |h, page| line(page, load(&h.0.knobs.scan_pages_per_sec)),
        number!("scan_pages_per_sec", scan_pages_per_sec);
    "scan_period_secs": |h, page| line(page, load(&h.0.knobs.scan_period_secs)),
        number!("scan_period_secs", scan_period_secs);
    "scan_cpu_max_percent": |h, page| line(page, load(&h.0.knobs.scan_cpu_max_percent)),
        number!("scan_cpu_max_percent", scan_cpu_max_percent);
    "merge_across_nodes": |h, page| line(page, load(&h.0.knobs.merge_across_nodes)),
        number!("merge_across_nodes", merge_across_nodes => Host::merge_rules_changed);
    "max_page_sharing": |h, page| line(page, load(&h.0.knobs.max_page_sharing)),
        number!("max_page_sharing", max_page_sharing => Host::merge_rules_changed);
    "split_holes_percent": |h, page| line(page, load(&h.0.knobs.split_holes_percent)),
        |h, bytes| {
            h.0.set_split_holes_percent(knob("split_holes_percent", bytes)?);
            Ok(())
        };
    "collapse_after_secs": |h, page| line(page, load(&h.0.knobs.collapse_after_secs)),
        number!("collapse_after_secs", collapse_after_secs, splitter_bell);
    "collapse_per_sec": |h, page| line(page, load(&h.0.knobs.collapse_per_sec)),
        number!("collapse_per_sec", collapse_per_sec, splitter_bell);
    "share_scope": |h, page| line(page, h.0.policy().share_scope.as_str()),
        |h, bytes| {
            let scope = ShareScope::parse(bytes).map_err(refused)?;
            h.0.regroup(&Change::ShareScope(scope))
        };
    "zero_only": |h, page| line(page, u8::from(h.0.policy().zero_only)),
        |h, bytes| {
            let value = knob("zero_only", bytes)?;
            h.0.set_zero_only(value != 0);
            Ok(())
        };
    "minfree_kb": |h, page| line(page, h.0.pressure.minfree_kb()),
        |h, bytes| {
            let value = knob("minfree_kb", bytes)?;
            if h.0.pressure.set_minfree_kb(value) {
                h.0.reclaimer_bell.ring();
            }
            Ok(())
        };
    "compress_max_percent": |h, page| line(page, load(&h.0.knobs.compress_max_percent)),
        |h, bytes| {
            let value = knob("compress_max_percent", bytes)?;
            h.0.set_compress_max_percent(value)
        };
    "compress_max_object_percent": |h, page| {
            line(page, load(&h.0.knobs.compress_max_object_percent))
        },
        number!("compress_max_object_percent", compress_max_object_percent => Host::try_anew);
    "swap_dir": |h, page| {
            if let Some(dir) = h.0.swap.dir() {
                page.push(dir.name())?;
            }
            page.push(b"\n")
        },
        |h, bytes| h.0.set_swap_dir(tunables::without_newline(bytes));
    "idle_tax_percent": |h, page| line(page, load(&h.0.knobs.idle_tax_percent)),
        number!("idle_tax_percent", idle_tax_percent, reclaimer_bell);
    "active_sample_pages": |h, page| line(page, load(&h.0.knobs.active_sample_pages)),
        number!("active_sample_pages", active_sample_pages, reclaimer_bell);
    "active_sample_period_secs": |h, page| {
            line(page, load(&h.0.knobs.active_sample_period_secs))
        },
        number!("active_sample_period_secs", active_sample_period_secs, reclaimer_bell);
    "state": |h, page| line(page, h.0.state().as_str());
    "available_kb": |_, page| line(page, memory::available_kb());
    "minfree_effective_kb": |h, page| line(page, h.0.pressure.effective_minfree_kb());
    "state_high_ms": |h, page| line(page, spent_ms(h, HostState::High));
    "state_clear_ms": |h, page| line(page, spent_ms(h, HostState::Clear));
    "state_soft_ms": |h, page| line(page, spent_ms(h, HostState::Soft));
    "state_hard_ms": |h, page| line(page, spent_ms(h, HostState::Hard));
    "state_low_ms": |h, page| line(page, spent_ms(h, HostState::Low));
    "large_pages": |h, page| line(page, h.0.large_pages().as_str()),
        |h, bytes| {
            h.0.set_large_pages(LargePages::parse(bytes).map_err(refused)?);
            Ok(())
        };
    "pages_scanned": |h, page| line(page, load(&h.0.events.pages_scanned));
    "pages_skipped": |h, page| line(page, load(&h.0.events.pages_skipped));
    "full_scans": |h, page| line(page, load(&h.0.events.full_scans));
    "pages_shared": |h, page| line(page, h.0.figures().pages_shared);
    "pages_sharing": |h, page| line(page, h.0.figures().pages_sharing);
    "pages_unshared": |h, page| line(page, h.0.totals().unshared);
    "pages_volatile": |h, page| line(page, h.0.totals().volatile);
    "zero_pages": |h, page| line(page, h.0.totals().zero);
    "shared_frames_kb": |h, page| {
        let figures = h.0.figures();
        let away = figures.packed.saturating_add(figures.swapped);
        line(page, pages_to_kb(figures.pages_shared.saturating_sub(away)))
    };
    "shared_compressed_kb": |h, page| line(page, pages_to_kb(h.0.figures().packed));
    "shared_swapped_kb": |h, page| line(page, pages_to_kb(h.0.figures().swapped));
    "shared_swap_file_kb": |h, page| line(page, h.0.shared_pools.file_kb());
    "shared_swap_outs": |h, page| line(page, load(&h.0.events.shared_swap_outs));
    "shared_swap_ins": |h, page| line(page, load(&h.0.events.shared_swap_ins));
    "shared_compressed_pool_kb": |h, page| line(page, pages_to_kb(h.0.shared_pools.pages()));
    "saved_kb": |h, page| line(page, pages_to_kb(saved_pages(&h.0)));
    "general_profit": |h, page| {
        let saved = i128::from(saved_pages(&h.0)).saturating_mul(4096);
        line(page, saved.saturating_sub(i128::from(h.0.metadata_bytes())))
    };
    "metadata_bytes": |h, page| line(page, h.0.metadata_bytes());
    "cow_breaks": |h, page| line(page, load(&h.0.events.cow_breaks));
    "protect_faults": |h, page| line(page, load(&h.0.events.protect_faults));
    "scan_cpu_ms": |h, page| line(page, load(&h.0.events.scan_cpu_us) / 1000);
    "scan_yields": |h, page| line(page, load(&h.0.events.scan_yields));
    "waits_for_memory": |h, page| line(page, load(&h.0.events.waits_for_memory));
    "large_pages_refused_no_memory": |h, page| {
        line(page, load(&h.0.events.large_pages_refused_no_memory))
    };
    "active_samples": |h, page| line(page, load(&h.0.events.active_samples));
    "compressions": |h, page| line(page, load(&h.0.events.compressions));
    "decompressions": |h, page| line(page, load(&h.0.events.decompressions));
    "shrinker_calls": |h, page| line(page, load(&h.0.shrinking.asked));
    "shrinker_freed_pages": |h, page| line(page, load(&h.0.shrinking.freed));
    "shared_compressions": |h, page| line(page, load(&h.0.events.shared_compressions));
    "shared_decompressions": |h, page| line(page, load(&h.0.events.shared_decompressions));
    "decompressions_failed": |h, page| line(page, load(&h.0.events.decompressions_failed));
    "reclaim_cpu_ms": |h, page| line(page, load(&h.0.events.reclaim_cpu_us) / 1000);
    "compressions_refused_pinned": |h, page| line(page, load(&h.0.compress_refusals.pinned));
    "compressions_refused_incompressible": |h, page| {
        line(page, load(&h.0.compress_refusals.incompressible))
    };
    "compressions_refused_pool_full": |h, page| line(page, load(&h.0.compress_refusals.pool_full));
    "compressions_refused_no_memory": |h, page| line(page, load(&h.0.compress_refusals.no_memory));
    "compressions_refused_poisoned": |h, page| line(page, load(&h.0.compress_refusals.poisoned));
    "swap_outs": |h, page| line(page, load(&h.0.swap.events.outs));
    "swap_ins": |h, page| line(page, load(&h.0.swap.events.ins));
    "swap_writes": |h, page| line(page, load(&h.0.swap.events.writes));
    "swap_reads": |h, page| line(page, load(&h.0.swap.events.reads));
    "swap_writes_failed": |h, page| line(page, load(&h.0.swap.events.writes_failed));
    "swap_reads_failed": |h, page| line(page, load(&h.0.swap.events.reads_failed));
    "swap_objects_corrupt": |h, page| line(page, load(&h.0.swap.events.corrupt));
    "swap_pages_lost": |h, page| line(page, load(&h.0.swap.events.lost));
    "swap_outs_refused_no_space": |h, page| line(page, load(&h.0.swap.events.no_space));
    "splits": |h, page| line(page, load(&h.0.splits.splits));
    "split_pages_gained": |h, page| line(page, load(&h.0.splits.gained));
    "split_us": |h, page| line(page, load(&h.0.splits.took_us));
    "splits_refused_pinned": |h, page| line(page, load(&h.0.splits.pinned));
    "splits_refused_no_memory": |h, page| line(page, load(&h.0.splits.no_memory));
    "splits_refused_poisoned": |h, page| line(page, load(&h.0.splits.poisoned));
    "collapses": |h, page| line(page, load(&h.0.collapses.collapses));
    "collapse_us": |h, page| line(page, load(&h.0.collapses.took_us));
    "collapse_tables_freed": |h, page| line(page, load(&h.0.collapses.tables));
    "collapses_refused_pinned": |h, page| line(page, load(&h.0.collapses.pinned));
    "collapses_refused_no_memory": |h, page| line(page, load(&h.0.collapses.no_memory));
    "collapses_refused_poisoned": |h, page| line(page, load(&h.0.collapses.poisoned));
    "collapses_refused_shared": |h, page| line(page, unworthy(h, Refusal::Shared));
    "collapses_refused_holes": |h, page| line(page, unworthy(h, Refusal::Holes));
    "collapses_refused_compressed": |h, page| line(page, unworthy(h, Refusal::Compressed));
    "collapses_refused_zeroes": |h, page| line(page, unworthy(h, Refusal::Zeroes));
    "collapses_refused_unscanned": |h, page| line(page, unworthy(h, Refusal::Unscanned));
    "collapses_refused_cold": |h, page| line(page, unworthy(h, Refusal::Cold));
    "merges_refused_pinned": |h, page| line(page, load(&h.0.refusals.pinned));
    "merges_refused_differs": |h, page| line(page, load(&h.0.refusals.differs));
    "merges_refused_full": |h, page| line(page, load(&h.0.refusals.full));
    "merges_refused_busy": |h, page| line(page, load(&h.0.refusals.busy));
    "merges_refused_no_memory": |h, page| line(page, load(&h.0.refusals.no_memory));
    "merges_refused_nodes": |h, page| line(page, load(&h.0.refusals.nodes));
    "merges_refused_no_hint": |h, page| line(page, load(&h.0.refusals.no_hint));
    "merges_refused_poisoned": |h, page| line(page, load(&h.0.refusals.poisoned));
    "merges_refused_swapped": |h, page| line(page, load(&h.0.refusals.swapped));
}

/// Why a directory is none to swap to, and what to do.
pub(super) fn swap_dir_error(error: Error) -> &'static str {
    match error {
        EOPNOTSUPP => "it lacks O_TMPFILE or O_DIRECT, or is memory; choose ext4, XFS or btrfs",
        EINVAL => "give the absolute path of a directory that is not on thinram itself",
        ENOENT => "there is no such directory",
        ENOTDIR => "it is not a directory",
        EROFS => "it is mounted read-only",
        ENOSPC => "there is no room on it",
        ENOMEM => {
            "what is in swap would not fit into memory, or into limit_kb; nothing was changed"
        }
        _ => "no file could be made and written in it; nothing was changed",
    }
}

fn spent_ms(host: &HostFiles, state: HostState) -> u64 {
    let spent = host.0.pressure.spent_ms();
    spent.get(state.index()).copied().unwrap_or(0)
}

fn unworthy(host: &HostFiles, refusal: Refusal) -> u64 {
    host.0
        .collapses
        .unworthy
        .get(refusal as usize)
        .map_or(0, load)
}

fn saved_pages(host: &Host) -> u64 {
    host.figures()
        .pages_sharing
        .saturating_add(host.totals().zero)
}

impl Attributes for HostFiles {
    fn table() -> &'static [Attribute] {
        &HOST_ATTRIBUTES
    }
    fn show(&self, index: usize, out: &mut Page<'_>) -> Result {
        (HOST_FILES.get(index).ok_or(EIO)?.show)(self, out)
    }
    fn store(&self, index: usize, data: &[u8]) -> Result {
        let file = HOST_FILES.get(index).ok_or(EIO)?;
        file.store(self, data)
            .inspect_err(|&error| file.log_refusal(b"", data, error))
    }
}

files! {
    VM_ATTRIBUTES, VM_FILES: Vm;
    "share": |vm, page| line(page, u8::from(vm.shares())),
        |vm, bytes| {
            let share = vm_knob("share", bytes)? != 0;
            change(vm, |host, vm| host.regroup(&Change::Share(vm, share)))
        };
    "domain": |vm, page| {
            page.push(vm.domain().name())?;
            page.push(b"\n")
        },
        |vm, bytes| {
            let bytes = tunables::without_newline(bytes);
            if !bytes.is_empty() {
                tunables::parse_name(bytes).map_err(refused)?;
            }
            change(vm, |host, vm| {
                if vm.domain().name() == bytes {
                    return Ok(());
                }
                let domain = host.vms().domain(bytes)?;
                host.regroup(&Change::Domain(vm, domain))
            })
        };
    "scan_pages_per_sec": |vm, page| line(page, load(&vm.scan_pages_per_sec)),
        |vm, bytes| {
            let value = vm_knob("scan_pages_per_sec", bytes)?;
            vm.scan_pages_per_sec.store(value, Ordering::Relaxed);
            change(vm, |host, _| { host.scanner_bell.ring(); Ok(()) })
        };
    "large_pages": |vm, page| line(page, vm.large_pages().map_or("", LargePages::as_str)),
        |vm, bytes| {
            vm.set_large_pages(match tunables::without_newline(bytes) {
                b"" => None,
                _ => Some(LargePages::parse(bytes).map_err(refused)?),
            });
            Ok(())
        };
    "shares": |vm, page| line(page, load(&vm.claims.shares)),
        |vm, bytes| {
            let shares = vm_knob("shares", bytes)?;
            vm.claims.shares.store(shares, Ordering::Relaxed);
            Ok(())
        };
    "reservation_kb": |vm, page| line(page, load(&vm.claims.reservation_kb)),
        |vm, bytes| {
            let kb = vm_knob("reservation_kb", bytes)?;
            vm.claims.reservation_kb.store(kb, Ordering::Relaxed);
            Ok(())
        };
    "limit_kb": |vm, page| line(page, load(&vm.claims.limit_kb)),
        |vm, bytes| {
            let kb = vm_knob("limit_kb", bytes)?;
            vm.claims.limit_kb.store(kb, Ordering::Relaxed);
            change(vm, |host, vm| { host.try_vm_anew(vm); Ok(()) })
        };
    "compress_max_percent": |vm, page| line(page, load(&vm.claims.compress_max_percent)),
        |vm, bytes| {
            let value = vm_knob("compress_max_percent", bytes)?;
            change(vm, |host, vm| host.set_vm_compress_max_percent(vm, value))
        };
    "size_kb": |vm, page| line(page, vm.snapshot().pages.size_kb());
    "resident_kb": |vm, page| line(page, vm.resident_kb());
    "private_kb": |vm, page| line(page, vm.snapshot().pages.private_kb());
    "shared_kb": |vm, page| line(page, vm.snapshot().pages.shared_kb());
    "zero_kb": |vm, page| line(page, vm.snapshot().pages.zero_kb());
    "huge_kb": |vm, page| line(page, vm.snapshot().pages.huge_kb());
    "splittable_kb": |vm, page| line(page, pages_to_kb(vm.snapshot().splittable));
    "empty_kb": |vm, page| line(page, vm.snapshot().pages.empty_kb());
    "compressed_kb": |vm, page| line(page, vm.snapshot().pages.compressed_kb());
    "compressed_pool_kb": |vm, page| line(page, vm.pool_kb());
    "active_kb": |vm, page| line(page, active_kb(vm));
    "swap_file_kb": |vm, page| line(page, vm.swap().file_kb());
    "swap_ins": |vm, page| line(page, load(&vm.swap().ins));
    "swap_outs": |vm, page| line(page, load(&vm.swap().outs));
    "swapped_kb": |vm, page| line(page, vm.snapshot().pages.swapped_kb());
    "stat": |vm, page| stat(vm, page);
    "pages_unshared": |vm, page| line(page, vm.snapshot().unshared);
    "pages_volatile": |vm, page| line(page, vm.snapshot().volatile);
    "faults": |vm, page| line(page, load(&vm.events.faults));
    "cow_breaks": |vm, page| line(page, load(&vm.events.cow_breaks));
    "protect_faults": |vm, page| line(page, load(&vm.events.protect_faults));
    "compressions": |vm, page| line(page, load(&vm.events.compressions));
    "decompressions": |vm, page| line(page, load(&vm.events.decompressions));
    "stalls": |vm, page| line(page, load(&vm.events.stalls));
    "stall_us": |vm, page| line(page, load(&vm.events.stall_us));
    "mappings": |vm, page| line(page, load(&vm.mappings));
    "owner_pid": |vm, page| line(page, vm.owner_pid());
}

/// Asking makes the next estimates better.
fn active_kb(vm: &Vm) -> u64 {
    vm.sample.ask();
    pages_to_kb(vm.sample.active_pages(vm.filled_pages()))
}

/// All states of a VM in one snapshot.
fn stat(vm: &Vm, page: &mut Page<'_>) -> Result {
    let VmCounts {
        pages,
        unshared,
        volatile,
        splittable,
    } = vm.snapshot();
    let pool_kb = vm.pool_kb();
    let mut row = |name: &str, value: u64| writeln!(page, "{name} {value}").map_err(|_| ENOSPC);
    row("size_kb", pages.size_kb())?;
    row("resident_kb", pages.resident_kb(pool_kb))?;
    row("empty_kb", pages.empty_kb())?;
    row("zero_kb", pages.zero_kb())?;
    row("private_kb", pages.private_kb())?;
    row("shared_kb", pages.shared_kb())?;
    row("huge_kb", pages.huge_kb())?;
    row("compressed_kb", pages.compressed_kb())?;
    row("compressed_pool_kb", pool_kb)?;
    row("swapped_kb", pages.swapped_kb())?;
    row("swap_ins", load(&vm.swap().ins))?;
    row("swap_outs", load(&vm.swap().outs))?;
    row("splittable_kb", pages_to_kb(splittable))?;
    row("pages_unshared", unshared)?;
    row("pages_volatile", volatile)
}

impl Attributes for Vm {
    fn table() -> &'static [Attribute] {
        &VM_ATTRIBUTES
    }
    fn show(&self, index: usize, out: &mut Page<'_>) -> Result {
        (VM_FILES.get(index).ok_or(EIO)?.show)(self, out)
    }
    fn store(&self, index: usize, data: &[u8]) -> Result {
        let file = VM_FILES.get(index).ok_or(EIO)?;
        file.store(self, data).inspect_err(|&error| {
            self.with_name(|name| file.log_refusal(name, data, error));
        })
    }
}

/// The directory that holds the VMs' directories; it has no files.
pub(crate) struct VmsFiles;

impl Attributes for VmsFiles {
    fn table() -> &'static [Attribute] {
        &[]
    }
    fn show(&self, _index: usize, _out: &mut Page<'_>) -> Result {
        Err(EIO)
    }
    fn store(&self, _index: usize, _data: &[u8]) -> Result {
        Err(EIO)
    }
}

/// /sys/fs/thinram and /sys/fs/thinram/vms. Dropping it removes both; no VM is left by then.
pub(crate) struct Tree {
    // Dropped in this order: children first.
    vms: Directory<VmsFiles>,
    host: Directory<HostFiles>,
}

kernel::sync::global_lock! {
    // SAFETY: Initialized in `make_tree`, which the module's init calls before a VM can be made.
    unsafe(uninit) static TREE: Mutex<Option<Tree>> = None;
}

/// Makes /sys/fs/thinram.
///
/// # Safety
///
/// Called once.
pub(crate) unsafe fn make_tree(host: &Arc<Host>) -> Result {
    // SAFETY: By the caller's promise.
    unsafe { TREE.init() };
    let files = alloc::counted(HostFiles(host.clone()))?;
    let host = Directory::create(Parent::<HostFiles>::Fs, b"thinram", files)?;
    host.data().0.pressure.tell(host.notice(c"state")?);
    let vms = Directory::create(Parent::In(&host), b"vms", alloc::counted(VmsFiles)?)?;
    *TREE.lock() = Some(Tree { vms, host });
    Ok(())
}

/// Removes /sys/fs/thinram.
pub(crate) fn remove_tree() {
    let tree = TREE.lock().take();
    drop(tree);
}

/// Makes the directory of a VM.
pub(crate) fn make_vm_directory(vm: &Arc<Vm>, name: &[u8]) -> Result<Directory<Vm>> {
    let tree = TREE.lock();
    let tree = tree.as_ref().ok_or(ENODEV)?;
    Directory::create(Parent::In(&tree.vms), name, vm.clone())
}

/// Runs `f` on the host and the VM's own Arc.
fn change(vm: &Vm, f: impl FnOnce(&Host, &Arc<Vm>) -> Result) -> Result {
    let host = {
        let tree = TREE.lock();
        tree.as_ref().ok_or(ENODEV)?.host.data().0.clone()
    };
    let mut own = None;
    host.vms().for_each(|other| {
        if other.id() == vm.id() {
            own = Some(other.clone());
        }
    });
    f(&host, &own.ok_or(ENODEV)?)
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_sysfs_show(
    kobj: *mut bindings::kobject,
    attr: *mut bindings::attribute,
    buf: *mut c_char,
) -> isize {
    // SAFETY: All of our kobjects are Directories.
    super::length(unsafe { kobj::show(kobj, attr, buf.cast()) })
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_sysfs_store(
    kobj: *mut bindings::kobject,
    attr: *mut bindings::attribute,
    buf: *const c_char,
    count: usize,
) -> isize {
    // SAFETY: As above.
    super::length(unsafe { kobj::store(kobj, attr, buf.cast(), count) }.map(|()| count))
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_sysfs_release(kobj: *mut bindings::kobject) {
    // SAFETY: As above.
    unsafe { kobj::release(kobj) }
}
