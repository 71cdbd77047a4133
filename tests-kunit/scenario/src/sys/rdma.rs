// SPDX-License-Identifier: GPL-2.0

//! RDMA: memory that is registered with a device for its reads or writes. The device is the kernel's
//! own in software (rdma_rxe) on the loopback interface; the calls are those of
//! `/dev/infiniband/uverbsN` (include/uapi/rdma/ib_user_verbs.h).

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;

use super::{Map, PAGE};
use crate::check::skip;

const NAME: &str = "thinram-rxe";

const GET_CONTEXT: u32 = 0;
const ALLOC_PD: u32 = 3;
const REG_MR: u32 = 9;
const DEREG_MR: u32 = 13;

/// What the device may do with registered memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Send what is in it.
    Read = 0,
    /// Put into it what it receives.
    Write = 1,
}

/// The device, opened, and a protection domain in it. Gone with the value.
pub struct Device {
    verbs: File,
    /// Where the kernel writes its answers.
    answer: Map,
    domain: u32,
}

impl Device {
    /// Makes the device; a skip where the kernel has none.
    pub fn new() -> Result<Device> {
        if !Path::new("/sys/module/rdma_rxe").exists()
            || !Path::new("/sys/module/ib_uverbs").exists()
        {
            return Err(skip("rdma_rxe and ib_uverbs are not loaded"));
        }
        rdma(&["link", "add", NAME, "type", "rxe", "netdev", "lo"])?;
        Device::open().inspect_err(|_| remove())
    }

    fn open() -> Result<Device> {
        let mut device = Device {
            verbs: File::options().read(true).write(true).open(node()?)?,
            answer: Map::anonymous(PAGE)?,
            domain: 0,
        };
        device.call(GET_CONTEXT, &[], true).context("GET_CONTEXT")?;
        device.domain = device.call(ALLOC_PD, &[], true).context("ALLOC_PD")?;
        Ok(device)
    }

    /// Registers all of `map`, which pins it until [`Device::release`] with the handle returned.
    pub fn register(&self, map: &Map, access: Access) -> nix::Result<u32> {
        let at = map.addr() as u64;
        let length = (map.pages() * PAGE) as u64;
        let mut words = Vec::new();
        for number in [at, length, at] {
            words.extend(halves(number));
        }
        words.extend([self.domain, access as u32]);
        self.call(REG_MR, &words, true)
    }

    /// Ends a registration.
    pub fn release(&self, handle: u32) -> nix::Result<()> {
        self.call(DEREG_MR, &[handle], false).map(drop)
    }

    /// One command with its request, whose first field is where the answer goes, where there is one.
    /// Returns the first word of the answer.
    fn call(&self, command: u32, request: &[u32], answered: bool) -> nix::Result<u32> {
        let mut body = Vec::new();
        if answered {
            body.extend(halves(self.answer.addr() as u64));
        }
        body.extend(request);
        let words = body.len() as u32 + 2;
        let room = if answered { 16 } else { 0 };
        let mut message = vec![command, words | (room << 16)];
        message.extend(body);
        let bytes: Vec<u8> = message.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let done = (&self.verbs).write(&bytes);
        done.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))?;
        Ok(self.answer.words()[0].load(Ordering::SeqCst) as u32)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        remove();
    }
}

/// A number as two words, the lower one first.
fn halves(number: u64) -> [u32; 2] {
    [number as u32, (number >> 32) as u32]
}

fn rdma(args: &[&str]) -> Result<()> {
    let out = Command::new("rdma").args(args).output().context("rdma")?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "rdma {args:?}: {said}");
    Ok(())
}

fn remove() {
    if let Err(e) = rdma(&["link", "delete", NAME]) {
        eprintln!("{e:#}");
    }
}

/// The device's node.
fn node() -> Result<std::path::PathBuf> {
    for entry in fs::read_dir("/sys/class/infiniband_verbs")? {
        let path = entry?.path();
        let device = fs::read_to_string(path.join("ibdev")).unwrap_or_default();
        if device.trim() == NAME {
            let name = path.file_name().context("a device has a name")?;
            return Ok(Path::new("/dev/infiniband").join(name));
        }
    }
    anyhow::bail!("no verbs for {NAME}")
}
