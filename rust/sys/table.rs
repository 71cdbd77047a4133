// SPDX-License-Identifier: GPL-2.0

//! Takes an empty page table out of a page table of the process that faults, so that the kernel asks
//! for a 2 MiB page there again.
//!
//! No exported function of the kernel does that. This does what `MADV_DONTNEED` does for a table that
//! it emptied (mm/memory.c: zap_pte_table_if_empty), by inlines and exported functions:
//!
//! 1. with the locks of both levels held, all 512 entries are seen to be none; the entry above is
//!    cleared;
//! 2. every CPU drops what it remembers of page tables (INVPCID, or CR3 loaded again where there are
//!    no PCIDs: the kernel's own functions are exported to KVM alone). After that none walks the
//!    table, and none is in a lockless walk that began before (they run with interrupts off);
//! 3. the table is freed after an RCU grace period: who looks at it by RCU takes its lock and sees
//!    that the entry above is another one.
//!
//! The fault lock keeps the mapping, and so everything that would take the table away, from going.
//! Processes whose page tables a device walks (SVA) are left alone: it could not be told. So are
//! Xen's paravirtual guests, and CPUs with PCIDs that lack INVPCID.

use super::{bindings, fault::Fault, slots::SLOTS};

/// Waits until all tables that were taken away are free: their callback is in this module.
pub(crate) fn wait_for_freed_tables() {
    // SAFETY: May sleep; callers hold no lock.
    unsafe { bindings::rcu_barrier() }
}

impl Fault {
    /// Takes the table of 4 KiB entries around the fault away if all of them are none. The mapping
    /// covers the whole table ([`Fault::fits_huge`]). False, with nothing changed, if it is not empty,
    /// or not there.
    pub(crate) fn drop_empty_table(&self) -> bool {
        let vmf = self.as_ptr();
        // SAFETY: By the type's invariant the mapping is locked and `pmd` is the entry of the fault's
        // address, which stays where it is. Both locks are held while the table is looked at, so it
        // is a table throughout. The entry is cleared only if nothing is in the table; it is freed by
        // RCU after all CPUs forgot it.
        unsafe {
            if !bindings::thinram_table_can_go(vmf) {
                return false;
            }
            let middle = bindings::thinram_table_lock_middle(vmf);
            if bindings::thinram_huge_middle(vmf) != 2 {
                bindings::thinram_table_unlock(middle);
                return false;
            }
            let inner = bindings::thinram_table_lock_inner(vmf, middle);
            let entries = bindings::thinram_table_entries(vmf);
            let empty = (0..SLOTS).all(|index| entries.add(index).read_volatile() == 0);
            let table = bindings::thinram_table_page(vmf);
            if empty {
                bindings::thinram_table_clear(vmf);
            }
            if inner != middle {
                bindings::thinram_table_unlock(inner);
            }
            bindings::thinram_table_unlock(middle);
            if empty {
                bindings::thinram_table_flush();
                bindings::thinram_table_free(table);
            }
            empty
        }
    }
}
