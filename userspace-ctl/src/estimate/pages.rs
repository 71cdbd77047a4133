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
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStringExt;
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
        let text =
            fs::read(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        let lines = text.split(|byte| *byte == b'\n');
        let mounts = lines.filter_map(|line| mount_of(root, line));
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

/// A mount of the file system, by its line in mountinfo. Other mounts' paths may be no UTF-8.
fn mount_of(root: &Path, line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|byte| *byte == b' ');
    let (major, minor) = pair(words.nth(2)?)?;
    let place = unescape(words.nth(1)?);
    // The type comes behind a dash, before which there are as many words as a mount has.
    words.find(|word| *word == b"-")?;
    if words.next()? != b"thinram" {
        return None;
    }
    let below = place.iter().position(|byte| *byte != b'/');
    let below = OsString::from_vec(place[below.unwrap_or(place.len())..].to_vec());
    Some(Mount {
        device: (number(major, 10)?, number(minor, 10)?),
        place: root.join(below),
    })
}

/// A path of mountinfo: a space is `\040` there.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let code = match (first, after) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'))
            }
            _ => None,
        };
        out.push(code.unwrap_or(*first));
        rest = &after[if code.is_some() { 3 } else { 0 }..];
    }
    out
}

/// `00:2b` of a process's map.
fn hex_device(word: &[u8]) -> Option<(u64, u64)> {
    let (major, minor) = pair(word)?;
    Some((number(major, 16)?, number(minor, 16)?))
}

/// What is before and behind a colon.
fn pair(word: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = word.iter().position(|byte| *byte == b':')?;
    Some((&word[..at], &word[at + 1..]))
}

/// Digits, and nothing else.
fn number(word: &[u8], radix: u32) -> Option<u64> {
    let word = std::str::from_utf8(word).ok()?;
    let plain = word.chars().all(|c| c.is_digit(radix));
    u64::from_str_radix(word, radix).ok().filter(|_| plain)
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
    use proptest::prelude::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn mounts_are_found() {
        let line =
            b"36 35 0:43 / /run/thin\\040ram rw,nosuid shared:1 - thinram thinram rw,domain=x";
        let mount = mount_of(Path::new("/r"), line).unwrap();
        assert_eq!(mount.device, (0, 43));
        assert_eq!(mount.place, Path::new("/r/run/thin ram"));
        let none = |line: &[u8]| assert_eq!(mount_of(Path::new("/"), line), None);
        none(b"36 35 0:43 / /x rw - tmpfs t rw");
        none(b"36 35 0:43 / /x rw - tmpfs thinram rw");
        none(b"36 35 +0:43 / /x rw - thinram thinram rw");
        none(b"garbage - thinram");
        assert_eq!(unescape(b"a\\134b\\x"), b"a\\b\\x");
        assert_eq!(unescape(b"\\777\\+40\\04"), b"\\777\\+40\\04");
        assert_eq!(hex_device(b"00:2b"), Some((0, 43)));
    }

    #[test]
    fn a_neighbours_odd_path_hides_no_mount() {
        let dir = tempfile::TempDir::new().unwrap();
        fs::create_dir_all(dir.path().join("proc/self")).unwrap();
        let mut info = b"30 1 8:1 / /mnt/gr\xfc\xdfe rw - ext4 /dev/sda1 rw\n".to_vec();
        info.extend(b"36 35 0:43 / /run/\xff rw - thinram thinram rw\n");
        fs::write(dir.path().join("proc/self/mountinfo"), info).unwrap();
        let memory = Memory::find(dir.path(), &[]).unwrap();
        let place = dir.path().join("run").join(OsStr::from_bytes(b"\xff"));
        let device = (0, 43);
        assert_eq!(memory.mounts, [Mount { device, place }]);
    }

    /// As the kernel writes a path: seq_path with " \t\n\\#".
    fn escape(path: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for byte in path {
            match byte {
                b' ' | b'\t' | b'\n' | b'\\' | b'#' => out.extend(format!("\\{byte:03o}").bytes()),
                _ => out.push(*byte),
            }
        }
        out
    }

    proptest! {
        #[test]
        fn paths_come_back(path in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(&b" \\#0413\n"[..])], 0..40)) {
            prop_assert_eq!(unescape(&escape(&path)), path);
        }

        /// Any path but those with a zero byte can be that of a mount, with any number of optional words.
        #[test]
        fn a_mount_is_found_by_its_line(
            major in 0u64..1 << 12,
            minor in 0u64..1 << 20,
            path in prop::collection::vec(prop_oneof![2 => 1u8.., 1 => prop::sample::select(&b" -\\/\n"[..])], 0..30),
            optional in prop::collection::vec("(shared|master|unbindable):?[0-9]{0,3}", 0..3),
            ours in any::<bool>(),
        ) {
            let mut line = format!("36 35 {major}:{minor} / /").into_bytes();
            line.extend(escape(&path));
            line.extend(b" rw,nosuid");
            optional.iter().for_each(|word| line.extend(format!(" {word}").bytes()));
            line.extend(if ours { &b" - thinram thinram rw"[..] } else { b" - ext4 thinram rw" });
            let mount = mount_of(Path::new("/r"), &line);
            let start = path.iter().position(|byte| *byte != b'/').unwrap_or(path.len());
            let place = Path::new("/r").join(OsStr::from_bytes(&path[start..]));
            prop_assert_eq!(mount, ours.then_some(Mount { device: (major, minor), place }));
        }

        #[test]
        fn no_line_is_taken_for_a_mount_without_saying_so(
            line in "([0-9]{1,4}|0:4[0-9]|\\+1:2|/[a-z\\\\]{0,4}|\\\\0[0-9]|-|thinram|\\PC{0,5}| ){0,14}",
        ) {
            if let Some(mount) = mount_of(Path::new("/r"), line.as_bytes()) {
                let words: Vec<&str> = line.split(' ').collect();
                let device = words[2].split_once(':').unwrap();
                let device = (device.0.parse().unwrap(), device.1.parse().unwrap());
                prop_assert_eq!(device, mount.device);
                prop_assert!(!words[2].contains('+'));
                prop_assert!(line.contains(" - thinram"), "{}", line);
                prop_assert!(mount.place.starts_with("/r"));
            }
        }

        #[test]
        fn devices_as_they_are_written(major: u32, minor: u32, word in "[0-9a-gA-F:+-]{0,8}") {
            let written = format!("{major:02x}:{minor:02x}");
            prop_assert_eq!(hex_device(written.as_bytes()), Some((major.into(), minor.into())));
            let read = hex_device(word.as_bytes());
            let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
            let is_one = word.split_once(':').is_some_and(|(a, b)| digits(a) && digits(b));
            prop_assert_eq!(read.is_some(), is_one, "{}", word);
        }
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
