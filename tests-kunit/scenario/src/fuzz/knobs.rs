// SPDX-License-Identifier: GPL-2.0

//! Writes to the module's knobs: none of them changes what a page holds.

use anyhow::{bail, Result};
use nix::errno::Errno;

use crate::check::{eq, fails_any, Code};
use crate::sysfs::{Node, Sys, Vm};

/// Name and value; an entry that stands twice is drawn twice as often.
const HOST: &[(&str, &str)] = &[
    ("run", "0"),
    ("run", "1"),
    ("run", "1"),
    ("run", "1"),
    ("run", "2"),
    ("share_scope", "vm"),
    ("share_scope", "domain"),
    ("share_scope", "domain"),
    ("share_scope", "host"),
    ("zero_only", "1"),
    ("zero_only", "0"),
    ("zero_only", "0"),
    ("merge_across_nodes", "0"),
    ("merge_across_nodes", "1"),
    ("max_page_sharing", "2"),
    ("max_page_sharing", "17"),
    ("max_page_sharing", "65536"),
    ("large_pages", "never"),
    ("large_pages", "always"),
    ("large_pages", "always"),
    ("split_holes_percent", "1"),
    ("split_holes_percent", "50"),
    ("split_holes_percent", "100"),
    ("compress_max_percent", "0"),
    ("compress_max_percent", "10"),
    ("compress_max_percent", "100"),
    ("compress_max_object_percent", "0"),
    ("compress_max_object_percent", "50"),
    ("compress_max_object_percent", "100"),
    ("idle_tax_percent", "0"),
    ("idle_tax_percent", "99"),
    ("active_sample_pages", "0"),
    ("active_sample_pages", "1000"),
    ("active_sample_period_secs", "1"),
    ("scan_pages_per_sec", "1000"),
    ("scan_pages_per_sec", "0"),
    ("scan_period_secs", "1"),
    ("scan_period_secs", "0"),
    ("scan_cpu_max_percent", "30"),
    ("scan_cpu_max_percent", "100"),
];

const VM: &[(&str, &str)] = &[
    ("share", "0"),
    ("share", "1"),
    ("share", "1"),
    ("domain", "other"),
    ("domain", "lab"),
    ("domain", "lab"),
    ("domain", ""),
    ("limit_kb", "0"),
    ("limit_kb", "0"),
    ("limit_kb", "64"),
    ("limit_kb", "1000000"),
    ("reservation_kb", "0"),
    ("reservation_kb", "100"),
    ("shares", "1"),
    ("shares", "4294967295"),
    ("compress_max_percent", "0"),
    ("compress_max_percent", "1"),
    ("compress_max_percent", "100"),
    ("large_pages", "never"),
    ("large_pages", "always"),
    ("large_pages", ""),
    ("scan_pages_per_sec", "100"),
    ("scan_pages_per_sec", "0"),
];

/// Name, value, and the errno of what no knob takes.
const BAD: &[(&str, &[u8], Errno)] = &[
    ("run", b"3", Errno::ERANGE),
    ("run", b"-1", Errno::EINVAL),
    ("run", b"1 ", Errno::EINVAL),
    ("share_scope", b"all", Errno::EINVAL),
    ("share_scope", b"vm\0", Errno::EINVAL),
    ("zero_only", b"2", Errno::ERANGE),
    ("max_page_sharing", b"1", Errno::ERANGE),
    ("max_page_sharing", b"0x10", Errno::EINVAL),
    ("large_pages", b"ALWAYS", Errno::EINVAL),
    (
        "compress_max_percent",
        b"99999999999999999999999",
        Errno::ERANGE,
    ),
    ("scan_cpu_max_percent", b"0", Errno::ERANGE),
    ("minfree_kb", b"4k", Errno::EINVAL),
];

const BAD_VM: &[(&str, &[u8], Errno)] = &[
    ("share", b"2", Errno::ERANGE),
    ("share", b"yes", Errno::EINVAL),
    ("domain", b"a/b", Errno::EINVAL),
    ("domain", b"..", Errno::EINVAL),
    ("domain", b"\xff", Errno::EINVAL),
    ("shares", b"0", Errno::ERANGE),
    ("limit_kb", b"1M", Errno::EINVAL),
    ("reservation_kb", b"99999999999999999999", Errno::ERANGE),
    ("large_pages", b"sometimes", Errno::EINVAL),
];

fn set(node: &Node, table: &[(&str, &str)], number: usize) -> Result<()> {
    let (name, value) = table[number % table.len()];
    if !node.has(name) {
        return Ok(());
    }
    match node.try_set(name, value.as_bytes()) {
        Ok(()) => Ok(()),
        // There is no memory for what the change would bring back.
        Err(e) if e.code() == Errno::ENOMEM => Ok(()),
        Err(e) => bail!("{value:?} to {name}: {e}"),
    }
}

fn refuse(node: &Node, table: &[(&str, &[u8], Errno)], number: usize) -> Result<()> {
    let (name, value, errno) = table[number % table.len()];
    let before = node.word(name)?;
    let text = String::from_utf8_lossy(value);
    fails_any(
        format!("{text:?} to {name}"),
        node.try_set(name, value),
        &[errno],
    )?;
    eq(format!("{name} after {text:?}"), node.word(name)?, before)
}

/// Changes something of the host.
pub fn host(sys: &Sys, number: usize) -> Result<()> {
    set(sys, HOST, number)
}

/// Changes something of a VM.
pub fn vm(vm: &Vm, number: usize) -> Result<()> {
    set(vm, VM, number)
}

/// A bad value for the host, which changes nothing.
pub fn bad(sys: &Sys, number: usize) -> Result<()> {
    refuse(sys, BAD, number)
}

/// A bad value for a VM, which changes nothing.
pub fn bad_vm(vm: &Vm, number: usize) -> Result<()> {
    refuse(vm, BAD_VM, number)
}
