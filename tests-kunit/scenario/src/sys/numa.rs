// SPDX-License-Identifier: GPL-2.0

//! NUMA: where pages lie, and the calls that say where they should.

use std::ffi::{c_int, c_void};
use std::fs;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;

use super::{Map, PAGE};
use crate::check::skip;

const MPOL_BIND: c_int = 2;
/// `MPOL_MF_STRICT`
pub const STRICT: c_int = 1;
/// `MPOL_MF_MOVE`
pub const MOVE: c_int = 2;

/// Binds a mapping to one node, as QEMU does for `host-nodes=`.
pub fn bind(map: &Map, node: u32, flags: c_int) -> nix::Result<()> {
    let nodes = 1u64.checked_shl(node).ok_or(Errno::EINVAL)?;
    // SAFETY: the node mask has as many bits as the call says.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_mbind,
            map.addr(),
            map.pages() * PAGE,
            MPOL_BIND,
            &nodes,
            64,
            flags,
        )
    })
    .map(drop)
}

/// The node of each page, `None` where nothing is mapped.
pub fn nodes(map: &Map) -> Result<Vec<Option<u32>>> {
    let pages: Vec<*const c_void> = (0..map.pages())
        .map(|page| (map.addr() + page * PAGE) as *const c_void)
        .collect();
    let mut status: Vec<c_int> = vec![0; pages.len()];
    let none: *const c_int = std::ptr::null();
    // SAFETY: both vectors have as many entries as the call says; without target nodes nothing
    // is moved.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            pages.len(),
            pages.as_ptr(),
            none,
            status.as_mut_ptr(),
            0,
        )
    })
    .context("move_pages")?;
    status
        .into_iter()
        .map(|node| match u32::try_from(node) {
            Ok(node) => Ok(Some(node)),
            Err(_) if node == -libc::ENOENT => Ok(None),
            Err(_) => bail!("move_pages: status {node}"),
        })
        .collect()
}

/// The nodes that have memory; a skip where there is only one.
pub fn several_nodes() -> Result<Vec<u32>> {
    let path = "/sys/devices/system/node/has_memory";
    let Ok(text) = fs::read_to_string(path) else {
        return Err(skip("this kernel has no NUMA"));
    };
    let mut nodes = Vec::new();
    for part in text.trim_end().split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (u32, u32) = (from.parse()?, to.parse()?);
        nodes.extend(from..=to);
    }
    if nodes.len() < 2 {
        return Err(skip("this machine has one NUMA node"));
    }
    Ok(nodes)
}

/// Lets this thread run on the CPUs of `node` only.
pub fn run_on(node: u32) -> Result<()> {
    let path = format!("/sys/devices/system/node/node{node}/cpulist");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    // SAFETY: a set of CPUs is plain bits, none of which is set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let mut some = false;
    for part in text.trim_end().split(',').filter(|part| !part.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        for cpu in from.parse::<usize>()?..=to.parse()? {
            // SAFETY: a CPU beyond the set is left out by the macro.
            unsafe { libc::CPU_SET(cpu, &mut set) };
            some = true;
        }
    }
    if !some {
        return Err(skip(format!("node {node} has no CPU")));
    }
    // SAFETY: the set has the size that the call says.
    Errno::result(unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) })
        .with_context(|| format!("sched_setaffinity to node {node}"))
        .map(drop)
}
