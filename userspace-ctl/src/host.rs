// SPDX-License-Identifier: GPL-2.0

//! One snapshot of the host's part of the module.

use crate::figures::figures;
use crate::knobs::{Knob, Scope};
use crate::sysfs::{Dir, Error};
use serde::ser::{Serialize, SerializeMap, Serializer};
use std::collections::BTreeMap;

figures! {
    /// The host's counters; one that the module does not have is `None`.
    pub struct HostFigures {
        /// What `state` is measured on.
        available_kb,
        /// What it is measured by: `minfree_kb`, or what was computed.
        minfree_effective_kb,
        /// Pages looked at since the module was loaded.
        pages_scanned,
        /// Passes over all memory.
        full_scans,
        /// Shared pages with one sharer or more, in any form.
        pages_shared,
        /// Sum of (sharers - 1) over all shared pages.
        pages_sharing,
        /// Slots that are zero.
        zero_pages,
        /// Memory that sharing and zero pages save, in KiB.
        saved_kb,
        /// Frames of shared pages, in KiB.
        shared_frames_kb,
        /// Shared pages that are compressed, in KiB of what they were.
        shared_compressed_kb,
        /// What these take in the pools of their domains, in KiB.
        shared_compressed_pool_kb,
        /// Shared pages that are swapped, in KiB of what they were.
        shared_swapped_kb,
        /// Length of their swap files, in KiB.
        shared_swap_file_kb,
        /// Pages that were checked and are unique.
        pages_unshared,
        /// Pages that changed since the last pass.
        pages_volatile,
        /// Pages that were not looked at, for they changed too often.
        pages_skipped,
        /// Shared and zero pages that were written and copied.
        cow_breaks,
        /// Write faults on pages that the scanner had protected.
        protect_faults,
        /// 2 MiB pages that were split.
        splits,
        /// Pages of 4 KiB that splits gave back.
        split_pages_gained,
        /// Time that splits took, in us.
        split_us,
        /// 2 MiB pages that were made of pages of 4 KiB.
        collapses,
        /// Time that this took, in us.
        collapse_us,
        /// Page tables that were taken away for it.
        collapse_tables_freed,
        /// Pages that were compressed.
        compressions,
        /// Pages that were brought back.
        decompressions,
        /// Shared pages that were compressed, once for all sharers.
        shared_compressions,
        /// Shared pages that were brought back.
        shared_decompressions,
        /// Pages that could not be brought back.
        decompressions_failed,
        /// Times that the kernel's own reclaim asked for memory.
        shrinker_calls,
        /// Pages that it got at once.
        shrinker_freed_pages,
        /// Pages that were written to swap.
        swap_outs,
        /// Pages that were read from swap.
        swap_ins,
        /// Those of `swap_outs` that are shared, each once for all sharers.
        shared_swap_outs,
        /// Those of `swap_ins` that are shared.
        shared_swap_ins,
        /// Writes to swap files.
        swap_writes,
        /// Reads from swap files.
        swap_reads,
        /// Writes that failed; their pages stay in memory.
        swap_writes_failed,
        /// Reads that failed; their pages are lost.
        swap_reads_failed,
        /// Pages that could not be read when their swap file was let go.
        swap_pages_lost,
        /// Pages whose checksum was wrong when they were read.
        swap_objects_corrupt,
        /// Periods of sampling that are over.
        active_samples,
        /// CPU time of the reclaimer, in ms.
        reclaim_cpu_ms,
        /// Faults and scans that had to wait for memory.
        waits_for_memory,
        /// Times that the scanner made way for a fault.
        scan_yields,
        /// Memory of the module's own bookkeeping, in bytes.
        metadata_bytes,
        /// CPU time of the scanner, in ms.
        scan_cpu_ms,
        /// Time in each state since the module was loaded, in ms.
        state_high_ms,
        /// The same for `clear`.
        state_clear_ms,
        /// The same for `soft`.
        state_soft_ms,
        /// The same for `hard`.
        state_hard_ms,
        /// The same for `low`.
        state_low_ms,
    }
}

/// What the module says about the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// `high`, `clear`, `soft`, `hard` or `low`.
    pub state: Option<String>,
    /// The counters.
    pub figures: HostFigures,
    /// Saved bytes less metadata.
    pub general_profit: Option<i64>,
    /// Knobs that the module has, by name.
    pub knobs: BTreeMap<&'static str, String>,
    /// Counters of refusals, by name.
    pub refusals: BTreeMap<String, u64>,
}

/// Whether a file of the host directory counts a reason of refusal.
pub fn is_refusal(name: &str) -> bool {
    name.split('_')
        .any(|part| matches!(part, "refused" | "refusals"))
}

impl Host {
    /// Reads everything that is there.
    pub fn read(dir: &Dir) -> Result<Self, Error> {
        let mut host = Self {
            state: dir.read("state")?,
            general_profit: dir.signed("general_profit")?,
            knobs: read_knobs(dir, Scope::Host)?,
            ..Self::default()
        };
        for name in HostFigures::NAMES {
            if let Some(value) = dir.number(name)? {
                host.figures.set(name, value);
            }
        }
        for name in dir.files()? {
            let Some(name) = name.to_str().filter(|name| is_refusal(name)) else {
                continue;
            };
            if let Some(value) = dir.number(name)? {
                host.refusals.insert(name.to_owned(), value);
            }
        }
        Ok(host)
    }
}

/// Reads the knobs of a scope that are there.
pub(crate) fn read_knobs(dir: &Dir, scope: Scope) -> Result<BTreeMap<&'static str, String>, Error> {
    let mut knobs = BTreeMap::new();
    for knob in Knob::all(scope) {
        if let Some(value) = dir.read(knob.name)? {
            if knob.is_number() {
                dir.number(knob.name)?;
            }
            knobs.insert(knob.name, value);
        }
    }
    Ok(knobs)
}

/// A knob's value as JSON: numbers as numbers.
pub fn knob_json(knob: &Knob, value: &str) -> serde_json::Value {
    match value.parse::<u64>() {
        Ok(number) if knob.is_number() => number.into(),
        _ => value.into(),
    }
}

/// Puts the knobs into a JSON object.
pub(crate) fn serialize_knobs<M: SerializeMap>(
    map: &mut M,
    scope: Scope,
    knobs: &BTreeMap<&'static str, String>,
) -> Result<(), M::Error> {
    for knob in Knob::all(scope) {
        if let Some(value) = knobs.get(knob.name) {
            map.serialize_entry(knob.name, &knob_json(knob, value))?;
        }
    }
    Ok(())
}

impl Serialize for Host {
    /// One object: every figure and knob under its sysfs name.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if let Some(state) = &self.state {
            map.serialize_entry("state", state)?;
        }
        for name in HostFigures::NAMES {
            if let Some(value) = self.figures.get(name) {
                map.serialize_entry(name, &value)?;
            }
        }
        if let Some(profit) = self.general_profit {
            map.serialize_entry("general_profit", &profit)?;
        }
        for (name, value) in &self.refusals {
            map.serialize_entry(name, value)?;
        }
        serialize_knobs(&mut map, Scope::Host, &self.knobs)?;
        map.end()
    }
}
