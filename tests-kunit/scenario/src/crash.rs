// SPDX-License-Identifier: GPL-2.0

//! The host panics while guests are in swap, and boots again with the same disk: the swap files are
//! gone, and nobody can read what their blocks still hold, for the keys went with the memory.
//!
//! Two cases in two boots. What the first one found out lies in files on the disk for the second.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};

use crate::check::{eq, within};
use crate::cold::merged_from;
use crate::contention::force;
use crate::ctx::{tool, Ctx};
use crate::harness::Case;
use crate::swap::{
    dense, disk_bytes, found, map_again, scratch, stamp, stamped, until_vm, write_stamps, Disk,
};
use crate::sys::{self, PAGE};

/// They are none of a usual run: one ends the machine, the other needs what that left.
pub const CASES: &[Case] = &[
    Case::thinram(
        "crash/panic",
        "guests go to swap, then the host panics",
        panic,
    ),
    Case::thinram(
        "crash/after",
        "no swap file is left, and its blocks tell nothing",
        after,
    ),
];

/// Pages of the VM that shares nothing.
const OWN: usize = 1024;
/// Pages that two VMs share, with stamps of their own.
const SHARED: usize = 512;
/// Stamps in plain files: one that is there after the crash, and one that was deleted before.
const PLAIN: usize = 64;
const KEPT: usize = OWN + SHARED;
const DELETED: usize = KEPT + PLAIN;
const SOON: f64 = 40.0;

/// The last words before the panic, which say that it was reached.
const READY: &str = "all is in swap, here comes the panic";

/// A digest of a block, to tell whether it is what it was.
fn digest(block: &[u8]) -> u64 {
    block.chunks(8).fold(0, |sum, word| {
        let word = word
            .iter()
            .fold(0, |word, byte| (word << 8) | u64::from(*byte));
        crate::content::mix(sum ^ word)
    })
}

fn panic(ctx: &Ctx) -> Result<()> {
    let sys = ctx.sys();
    let disk = Disk::new(ctx)?;
    write_stamps(&disk.path.join("kept"), KEPT..KEPT + PLAIN)?;
    let deleted = disk.path.join("deleted");
    write_stamps(&deleted, DELETED..DELETED + PLAIN)?;
    let before = disk.bytes()?;
    let used = disk.used_blocks()?;

    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let own = mount.guest("own", OWN)?;
    for page in 0..OWN {
        own.map.write_page(page, &stamped(page));
    }
    let twins = merged_from(ctx, &mount, &["one", "two"], SHARED, |page| {
        stamped(OWN + page)
    })?;
    sys.set("compress_max_percent", 0)?;
    force(ctx, "hard")?;
    until_vm(ctx, &own, "swapped_kb", |kb| kb == 4 * OWN as u64)?;
    // All but what is not yet a full cluster.
    until_vm(ctx, &own, "swap_outs", |n| n + 64 >= OWN as u64)?;
    ctx.until_is("shared_swapped_kb", 4 * SHARED as u64, SOON)?;
    ctx.until_least("shared_swap_outs", SHARED as u64 - 64, SOON)?;

    let bytes = disk.bytes()?;
    let blocks = dense(&before, &bytes);
    let least = (OWN + SHARED) / 2;
    within("blocks of swap", blocks.len(), least, 2 * (OWN + SHARED))?;
    let mut lines = format!("used {used}\n");
    for block in blocks {
        let at = block * PAGE;
        lines += &format!("{block} {}\n", digest(&bytes[at..at + PAGE]));
    }
    let record = disk.path.join("record");
    fs::write(&record, lines)?;
    fs::File::open(&record)?.sync_all()?;
    // Late, or swap would take its block.
    fs::remove_file(&deleted)?;
    // The directory, and with it that there are files without a name.
    fs::File::open(&disk.path)?.sync_all()?;

    // A process of each uses its memory while the end comes.
    let guests = [&own, &twins[0], &twins[1]];
    for guest in guests {
        let child = sys::fork(|| {
            let map = map_again(guest)?;
            loop {
                for page in (0..map.pages()).step_by(256) {
                    std::hint::black_box(map.get(page, 0));
                    thread::sleep(Duration::from_millis(5));
                }
            }
        })?;
        std::mem::forget(child);
    }
    thread::sleep(Duration::from_millis(100));
    println!("{READY}");
    thread::sleep(Duration::from_millis(500));
    fs::write("/proc/sysrq-trigger", "c").context("the panic by sysrq")?;
    bail!("the host goes on after a panic")
}

/// What the case before the panic wrote down: blocks in use before anything went to swap, and digests
/// of the blocks that swap took.
struct Record {
    used: u64,
    blocks: HashMap<usize, u64>,
}

impl Record {
    fn read(path: &Path) -> Result<Record> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let mut lines = text.lines();
        let used = lines.next().and_then(|line| line.strip_prefix("used "));
        let used = used.context("the record has no first line")?.parse()?;
        let blocks = lines.map(|line| {
            let (block, digest) = line.split_once(' ').context("a line of the record")?;
            Ok((block.parse()?, digest.parse()?))
        });
        Ok(Record {
            used,
            blocks: blocks.collect::<Result<_>>()?,
        })
    }
}

fn after(ctx: &Ctx) -> Result<()> {
    let device = scratch(ctx)?;
    // As the panic left it: before anybody mounts it.
    let raw = disk_bytes(&device)?;
    let disk = Disk::found(ctx, "disk")?;
    let record = Record::read(&disk.path.join("record"))?;
    let mut names: Vec<String> = fs::read_dir(&disk.path)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    eq(
        "files on the disk",
        names,
        ["kept", "lost+found", "record"].map(String::from).to_vec(),
    )?;
    let found_again = fs::read_dir(disk.path.join("lost+found"))?.count();
    eq("files in lost+found", found_again, 0)?;
    // The record itself, and what a file system takes for its own.
    const SLACK: u64 = 32;
    let used = disk.used_blocks()?;
    within("blocks in use", used, 1, record.used + SLACK)?;
    let log = Command::new(tool("dmesg")?).output().context("dmesg")?;
    ensure!(
        String::from_utf8_lossy(&log.stdout).contains("orphan inode"),
        "there was no file without a name for the kernel to delete"
    );

    // What swap held is there still: nobody overwrote it.
    let same = record.blocks.iter().filter(|(block, digest)| {
        let at = *block * PAGE;
        raw.get(at..at + PAGE)
            .is_some_and(|bytes| self::digest(bytes) == **digest)
    });
    let (same, of) = (same.count(), record.blocks.len());
    println!("{same} of {of} blocks of swap are what they were");
    ensure!(same * 10 >= of * 9, "only {same} of {of} blocks are left");
    // A search finds what is plain, also in blocks that are free by now.
    let stamps = |first: usize, count: usize| (first..first + count).map(stamp).collect::<Vec<_>>();
    eq("stamps of a file", found(&raw, &stamps(KEPT, PLAIN)), PLAIN)?;
    let deleted = found(&raw, &stamps(DELETED, PLAIN));
    eq("stamps of a deleted file", deleted, PLAIN)?;
    // And nothing of what was a guest's.
    eq("stamps of guests", found(&raw, &stamps(0, KEPT)), 0)?;

    // The disk serves again.
    disk.on()?;
    let mount = ctx.mount("m", "size=64M,domain=lab")?;
    let guest = mount.guest("own", OWN)?;
    guest.fill_noise(0, OWN);
    crate::swap::push_out(ctx, &guest, OWN)?;
    guest.holds_noise(0, OWN)?;
    drop(guest);
    drop(mount);
    disk.unmount()
}
