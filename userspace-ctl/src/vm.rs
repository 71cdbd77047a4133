// SPDX-License-Identifier: GPL-2.0

//! One snapshot of each VM.

use crate::figures::figures;
use crate::host::{read_knobs, serialize_knobs, HostFigures};
use crate::knobs::Scope;
use crate::sysfs::{Dir, Error};
use crate::text::escape;
use serde::ser::{Serialize, SerializeMap, Serializer};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

figures! {
    /// A VM's figures; one that the module does not have is `None`.
    pub struct VmFigures {
        /// Sum of all states.
        size_kb,
        /// Private, huge and pool: what the VM costs by itself.
        resident_kb,
        /// Frames of the VM's own.
        private_kb,
        /// Slots that share a page, whatever form that has.
        shared_kb,
        /// Slots that are zero.
        zero_kb,
        /// Slots in 2 MiB pages.
        huge_kb,
        /// Slots never touched, or given back.
        empty_kb,
        /// What splitting the 2 MiB pages would save.
        splittable_kb,
        /// Compressed slots, as large as they were.
        compressed_kb,
        /// What these take in the pool.
        compressed_pool_kb,
        /// Swapped slots.
        swapped_kb,
        /// What its swap file takes.
        swap_file_kb,
        /// What the VM lately used, an estimate by samples.
        active_kb,
        /// What the VM saves by sharing; where the module tells it.
        saved_kb,
        /// Pages that were checked and are unique.
        pages_unshared,
        /// Pages that changed since the last pass.
        pages_volatile,
        /// Faults served.
        faults,
        /// Faults on pages that a sample or reclaim had taken away.
        refaults,
        /// Shared and zero pages that were written and copied.
        cow_breaks,
        /// Pages that were compressed.
        compressions,
        /// Pages that were decompressed.
        decompressions,
        /// Pages that were read from swap.
        swap_ins,
        /// Pages that were written to swap.
        swap_outs,
        /// Tasks that waited, for its limit or a host that is low.
        stalls,
        /// Time that faults waited, in us.
        stall_us,
        /// Write faults on pages that the scanner had protected.
        protect_faults,
        /// Mappings of the memory.
        mappings,
        /// Process that maps the memory.
        owner_pid,
    }
}

/// States that add up to the size.
pub const STATES: [&str; 7] = [
    "private_kb",
    "shared_kb",
    "zero_kb",
    "huge_kb",
    "compressed_kb",
    "swapped_kb",
    "empty_kb",
];

/// Figures that are true together only when they come from one reading of `stat`.
const SNAPSHOT: [&str; 11] = [
    "size_kb",
    "resident_kb",
    "private_kb",
    "shared_kb",
    "zero_kb",
    "huge_kb",
    "empty_kb",
    "splittable_kb",
    "compressed_kb",
    "compressed_pool_kb",
    "swapped_kb",
];

/// A VM's name: bytes, as the mount has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct VmName(OsString);

impl VmName {
    /// Takes the name of a directory of `vms/`.
    pub fn new(name: impl Into<OsString>) -> Self {
        Self(name.into())
    }

    /// As it is shown.
    pub fn shown(&self) -> String {
        escape(self.0.as_bytes())
    }

    /// As it is.
    pub fn raw(&self) -> &OsStr {
        &self.0
    }
}

/// What the module says about a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    /// Its name.
    pub name: VmName,
    /// Its figures.
    pub figures: VmFigures,
    /// Whether the states are from one snapshot.
    pub one_snapshot: bool,
    /// Knobs that the module has, by name.
    pub knobs: BTreeMap<&'static str, String>,
}

/// Result of adding up a VM's states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct SumCheck {
    /// The VM's size.
    pub size_kb: u64,
    /// Sum of its states; one that is absent counts as 0.
    pub states_kb: u64,
    /// Whether they are equal.
    pub ok: bool,
}

impl Vm {
    /// Reads one VM; `None` says that it ended meanwhile or never was.
    pub fn read(vms: &Dir, name: &VmName) -> Result<Option<Self>, Error> {
        let dir = vms.child(name.raw());
        let vm = match Self::read_dir(&dir, name) {
            Ok(vm) => vm,
            Err(Error::Gone(_)) => return Ok(None),
            Err(_) if !dir.exists() => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(dir.exists().then_some(vm))
    }

    fn read_dir(dir: &Dir, name: &VmName) -> Result<Self, Error> {
        let mut figures = VmFigures::default();
        let one_snapshot = dir.stat("stat", |name, value| match value {
            Some(value) => figures.set(name, value),
            None => VmFigures::NAMES.contains(&name),
        })?;
        for name in VmFigures::NAMES {
            let in_stat = one_snapshot && SNAPSHOT.contains(name);
            if figures.get(name).is_none() && !in_stat {
                if let Some(value) = dir.number(name)? {
                    figures.set(name, value);
                }
            }
        }
        let knobs = read_knobs(dir, Scope::Vm)?;
        Ok(Self {
            name: name.clone(),
            figures,
            one_snapshot,
            knobs,
        })
    }

    /// Every VM, sorted by name; those that end while they are read are left out.
    pub fn read_all(vms: &Dir) -> Result<Vec<Self>, Error> {
        let mut all = Vec::new();
        for name in vms.dirs()? {
            all.extend(Self::read(vms, &VmName::new(name))?);
        }
        Ok(all)
    }

    /// The domain that it shares with, `None` for one of its own.
    pub fn domain(&self) -> Option<&str> {
        let domain = self.knobs.get("domain").map(String::as_str)?;
        let own = domain.is_empty() || self.name.raw() == OsStr::new(domain);
        (!own).then_some(domain)
    }

    /// Whether it shares with nobody but itself, though the module has domains.
    pub fn is_alone(&self) -> bool {
        self.knobs.contains_key("domain") && self.domain().is_none()
    }

    /// Adds the states up; `None` where the size is not known.
    pub fn sum_check(&self) -> Option<SumCheck> {
        let size_kb = self.figures.size_kb?;
        let states = STATES.iter().filter_map(|name| self.figures.get(name));
        let states_kb = states.fold(0, u64::saturating_add);
        Some(SumCheck {
            size_kb,
            states_kb,
            ok: size_kb == states_kb,
        })
    }

    /// What sharing saves in this VM: the module's figure, or the zero pages and the VM's part of
    /// what sharing saves on the whole host, so that the VMs add up to the host's figure.
    pub fn saved_kb(&self, host: &HostFigures) -> Option<u64> {
        if self.figures.saved_kb.is_some() {
            return self.figures.saved_kb;
        }
        let zero = self.figures.zero_kb?;
        let shared = u128::from(self.figures.shared_kb?);
        let sharing = u128::from(host.pages_sharing?);
        let slots = sharing + u128::from(host.pages_shared?);
        let part = (shared * sharing).checked_div(slots).unwrap_or(0);
        Some(zero.saturating_add(u64::try_from(part).unwrap_or(u64::MAX)))
    }
}

impl SumCheck {
    /// One sentence.
    pub fn sentence(&self) -> String {
        let off = self.states_kb.abs_diff(self.size_kb);
        match self.states_kb.cmp(&self.size_kb) {
            Ordering::Equal => format!("the states add up to the size, {} KiB", self.size_kb),
            Ordering::Less => format!(
                "WRONG: the states add up to {} KiB, {off} KiB less than the size, {} KiB",
                self.states_kb, self.size_kb
            ),
            Ordering::Greater => format!(
                "WRONG: the states add up to {} KiB, {off} KiB more than the size, {} KiB",
                self.states_kb, self.size_kb
            ),
        }
    }
}

impl Serialize for Vm {
    /// One object: `name`, and every figure and knob under its sysfs name.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", &self.name.shown())?;
        for name in VmFigures::NAMES {
            if let Some(value) = self.figures.get(name) {
                map.serialize_entry(name, &value)?;
            }
        }
        serialize_knobs(&mut map, Scope::Vm, &self.knobs)?;
        map.end()
    }
}
