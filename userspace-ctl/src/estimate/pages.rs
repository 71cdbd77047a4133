// SPDX-License-Identifier: GPL-2.0

//! The pages of a VM: through its process's mappings of the mount's files, for a file whose name is
//! gone has no other way in, and through the mount for files that nobody maps.
//!
//! Reading changes nothing: a page that was never written stays so, and holes are passed over.

use super::Collector;
use crate::vm::Vm;
use rustix::fs::{seek, SeekFrom};
use rustix::io::Errno;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes that are read at once.
const STRIDE: usize = 1 << 20;

/// A mount of the file system.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    /// `major:minor`, decimal.
    device: (u64, u64),
    /// Where it is, below the root.
    place: PathBuf,
}

/// The files that hold VMs' memory.
#[derive(Debug)]
pub struct Memory {
    root: PathBuf,
    mounts: Vec<Mount>,
    /// Processes that own more than one VM.
    shared_owners: HashSet<u64>,
}

impl Memory {
    /// Looks for the mounts. An error is a sentence.
    pub fn find(root: &Path, vms: &[Vm]) -> Result<Self, String> {
        let path = root.join("proc/self/mountinfo");
        let text = fs::read_to_string(&path)
            .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        let mounts = text.lines().filter_map(|line| mount_of(root, line));
        let mut owners = HashSet::new();
        let shared_owners = vms
            .iter()
            .filter_map(|vm| vm.figures.owner_pid)
            .filter(|pid| !owners.insert(*pid))
            .collect();
        Ok(Self {
            root: root.to_owned(),
            mounts: mounts.collect(),
            shared_owners,
        })
    }

    /// The files of a VM, each once. An error is a sentence.
    fn files(&self, vm: &Vm) -> Result<Vec<File>, String> {
        let mut seen = HashSet::new();
        let mut files = Vec::new();
        let mut add = |path: &Path| -> Result<(), String> {
            let failed = |error: io::Error| {
                let hint = match error.kind() {
                    io::ErrorKind::PermissionDenied => ": run as root",
                    _ => "",
                };
                format!("cannot open {}: {error}{hint}", path.display())
            };
            let file = match File::open(path) {
                Ok(file) => file,
                // The mapping or the file went away meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(failed(error)),
            };
            let meta = file.metadata().map_err(failed)?;
            if meta.is_file() && seen.insert((meta.dev(), meta.ino())) {
                files.push(file);
            }
            Ok(())
        };
        if let Some(pid) = vm.figures.owner_pid.filter(|pid| *pid > 0) {
            for path in self.mapped(vm, pid) {
                add(&path)?;
            }
        }
        let name = vm.name.raw();
        for mount in &self.mounts {
            for path in named(&mount.place, &mount.place.join(name)) {
                add(&path)?;
            }
            // libvirt's directories.
            let deep = mount.place.join("libvirt/qemu").join(name);
            for path in named(&mount.place, &deep) {
                add(&path)?;
            }
        }
        Ok(files)
    }

    /// Links to what a process maps of the mounts.
    fn mapped(&self, vm: &Vm, pid: u64) -> Vec<PathBuf> {
        let process = self.root.join(format!("proc/{pid}"));
        let Ok(maps) = fs::read(process.join("maps")) else {
            return Vec::new();
        };
        let ambiguous = self.shared_owners.contains(&pid);
        let name = vm.name.raw().as_encoded_bytes();
        let mut found = Vec::new();
        for line in maps.split(|byte| *byte == b'\n') {
            let mut words = line.splitn(6, |byte| *byte == b' ');
            let range = words.next().unwrap_or_default();
            let device = words.nth(2).unwrap_or_default();
            let path = words.nth(1).unwrap_or_default();
            let (Ok(range), Some(device)) = (std::str::from_utf8(range), hex_device(device)) else {
                continue;
            };
            if !self.mounts.iter().any(|mount| mount.device == device) {
                continue;
            }
            let is_its = || {
                path.split(|byte| *byte == b'/')
                    .any(|part| part.trim_ascii() == name)
            };
            if !ambiguous || is_its() {
                found.push(process.join("map_files").join(range));
            }
        }
        found
    }
}

/// The file of that path, or the files directly in it; a directory of directories is no VM.
fn named(mount: &Path, path: &Path) -> Vec<PathBuf> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => vec![path.to_owned()],
        Ok(meta) if meta.is_dir() && path != mount => {
            let entries = fs::read_dir(path).into_iter().flatten().flatten();
            let paths = entries.map(|entry| entry.path());
            paths.filter(|path| path.is_file()).collect()
        }
        _ => Vec::new(),
    }
}

fn mount_of(root: &Path, line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    if right.split(' ').next()? != "thinram" {
        return None;
    }
    let mut words = left.split(' ');
    let (major, minor) = words.nth(2)?.split_once(':')?;
    let place = unescape(words.nth(1)?);
    Some(Mount {
        device: (major.parse().ok()?, minor.parse().ok()?),
        place: root.join(place.trim_start_matches('/')),
    })
}

/// A path of mountinfo: a space is `\040` there.
fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let code = after
            .get(..3)
            .and_then(|code| u8::from_str_radix(code, 8).ok());
        match code {
            Some(code) => {
                out.push(char::from(code));
                rest = &after[3..];
            }
            None => {
                out.push('\\');
                rest = after;
            }
        }
    }
    out + rest
}

/// `00:2b` of a process's map.
fn hex_device(word: &[u8]) -> Option<(u64, u64)> {
    let (major, minor) = std::str::from_utf8(word).ok()?.split_once(':')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(major)?, number(minor)?))
}

/// Tells `into` the pages of a VM: all of them, or a sample of so many in 65536, drawn by `seed`.
/// `false` says that no memory of it was found. An error is a sentence.
pub fn read_vm(
    memory: &Memory,
    vm: &Vm,
    sample: u32,
    seed: u64,
    into: &mut Collector,
) -> Result<bool, String> {
    let files = memory.files(vm)?;
    into.vm(&vm.name.shown(), vm.domain());
    let mut buffer = vec![0; STRIDE];
    for (nth, file) in files.iter().enumerate() {
        let failed = |error: io::Error| format!("memory of {}: {error}", vm.name.shown());
        let size = file.metadata().map_err(failed)?.len();
        let draw = xxh3_64_with_seed(&(nth as u64).to_le_bytes(), seed);
        let mut at = 0;
        while let Some((from, to)) = next_data(file, at, size).map_err(failed)? {
            at = to;
            read_range(file, from, to, (sample, draw), &mut buffer, into).map_err(failed)?;
        }
    }
    Ok(!files.is_empty())
}

/// The next stretch that is no hole, in whole pages.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    let page = PAGE as u64;
    if at >= size {
        return Ok(None);
    }
    let from = match seek(file, SeekFrom::Data(at)) {
        Ok(from) => from / page * page,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let to = seek(file, SeekFrom::Hole(from))?;
    // Rounded up, and always further than it was.
    let to = to.div_ceil(page) * page;
    Ok(Some((from.max(at), to.max(from + page))))
}

fn read_range(
    file: &File,
    from: u64,
    to: u64,
    (sample, draw): (u32, u64),
    buffer: &mut [u8],
    into: &mut Collector,
) -> io::Result<()> {
    let mut at = from;
    while at < to {
        let whole = sample >= 1 << 16;
        if !whole && xxh3_64_with_seed(&at.to_le_bytes(), draw) >> 48 >= u64::from(sample) {
            at += PAGE as u64;
            continue;
        }
        let want = if whole {
            buffer.len() as u64
        } else {
            PAGE as u64
        };
        let want = usize::try_from(want.min(to - at)).unwrap_or(PAGE);
        let got = file.read_at(&mut buffer[..want], at)?;
        if got == 0 {
            return Ok(());
        }
        for page in buffer[..got].chunks(PAGE) {
            let zero = page.iter().all(|byte| *byte == 0);
            into.page((!zero).then(|| xxh3_64(page)));
        }
        at += (got as u64).div_ceil(PAGE as u64) * PAGE as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found() {
        let line =
            "36 35 0:43 / /run/thin\\040ram rw,nosuid shared:1 - thinram thinram rw,domain=x";
        let mount = mount_of(Path::new("/r"), line).unwrap();
        assert_eq!(mount.device, (0, 43));
        assert_eq!(mount.place, Path::new("/r/run/thin ram"));
        assert_eq!(
            mount_of(Path::new("/"), "36 35 0:43 / /x rw - tmpfs t rw"),
            None
        );
        assert_eq!(mount_of(Path::new("/"), "garbage - thinram"), None);
        assert_eq!(unescape("a\\134b\\x"), "a\\b\\x");
        assert_eq!(hex_device(b"00:2b"), Some((0, 43)));
    }

    #[test]
    fn holes_are_passed_over() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * PAGE as u64 + 100).unwrap();
        file.write_at(&[1; PAGE], 2 * PAGE as u64).unwrap();
        file.write_at(&[0; PAGE], 3 * PAGE as u64).unwrap();
        file.write_at(&[1; 50], 8 * PAGE as u64).unwrap();
        let size = file.metadata().unwrap().len();
        let mut into = Collector::new(1.0);
        into.vm("a", None);
        let mut at = 0;
        let mut buffer = vec![0; STRIDE];
        while let Some((from, to)) = next_data(&file, at, size).unwrap() {
            read_range(&file, from, to, (1 << 16, 0), &mut buffer, &mut into).unwrap();
            at = to;
        }
        let result = into.finish(0);
        // What the file system keeps around data may be read as zeroes.
        let vm = &result.vms[0];
        assert_eq!(vm.memory_kb - vm.zero_kb, 8);
        assert!(vm.zero_kb >= 4 && vm.memory_kb <= 36, "{vm:?}");
    }
}
