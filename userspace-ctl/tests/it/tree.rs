// SPDX-License-Identifier: GPL-2.0

//! A fake `/sys/fs/thinram` in a temporary directory.

use assert_cmd::Command;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Knobs and figures of a host with some sharing.
const HOST: &[(&str, &str)] = &[
    ("run", "1"),
    ("scan_pages_per_sec", "0"),
    ("scan_period_secs", "200"),
    ("scan_cpu_max_percent", "20"),
    ("share_scope", "domain"),
    ("zero_only", "0"),
    ("merge_across_nodes", "1"),
    ("max_page_sharing", "65536"),
    ("large_pages", "always"),
    ("compress_max_percent", "10"),
    ("compress_max_object_percent", "50"),
    ("idle_tax_percent", "75"),
    ("minfree_kb", "0"),
    ("swap_dir", ""),
    ("state", "high"),
    ("pages_scanned", "1482113"),
    ("full_scans", "12"),
    ("pages_shared", "23914"),
    ("pages_sharing", "81233"),
    ("saved_kb", "369008"),
    ("shared_frames_kb", "95656"),
    ("shared_compressed_kb", "0"),
    ("shared_swapped_kb", "0"),
    ("pages_unshared", "40211"),
    ("pages_volatile", "3120"),
    ("pages_skipped", "77"),
    ("zero_pages", "11019"),
    ("cow_breaks", "19562"),
    ("general_profit", "375000000"),
    ("metadata_bytes", "2864192"),
    ("scan_cpu_ms", "3241"),
    ("merges_refused_pinned", "17"),
    ("merges_refused_busy", "0"),
    ("splits_refused_trylock", "2"),
    ("a_file_of_a_newer_module", "whatever"),
];

const VM: &[(&str, &str)] = &[
    ("share", "1"),
    ("scan_pages_per_sec", "0"),
    ("shares", "1000"),
    ("reservation_kb", "0"),
    ("limit_kb", "0"),
    ("compress_max_percent", "0"),
    ("large_pages", ""),
    ("active_kb", "100000"),
    ("faults", "70123"),
    ("refaults", "0"),
    ("cow_breaks", "12"),
    ("decompressions", "0"),
    ("swap_ins", "0"),
    ("swap_outs", "0"),
    ("stall_us", "1500"),
    ("owner_pid", "4711"),
];

/// The tree; it is removed when dropped.
pub struct Tree {
    root: TempDir,
}

impl Tree {
    /// No module.
    pub fn bare() -> Self {
        Self {
            root: TempDir::new().unwrap(),
        }
    }

    /// A module without VMs.
    pub fn empty() -> Self {
        let tree = Self::bare();
        fs::create_dir_all(tree.dir().join("vms")).unwrap();
        for (name, value) in HOST {
            tree.write(name, format!("{value}\n"));
        }
        tree
    }

    /// A module with three VMs.
    pub fn full() -> Self {
        let tree = Self::empty();
        tree.vm(
            "web1",
            "lab",
            [1_048_576, 300_000, 200_000, 20_000, 528_576],
        );
        tree.vm(
            "web2",
            "lab",
            [1_048_576, 310_000, 200_588, 20_076, 517_912],
        );
        let db = "a-database-with-a-long-name";
        tree.vm(db, "", [2_097_152, 1_500_000, 20_000, 4_000, 573_152]);
        tree
    }

    pub fn root(&self) -> &Path {
        self.root.path()
    }

    pub fn dir(&self) -> PathBuf {
        self.root().join("sys/fs/thinram")
    }

    pub fn write(&self, name: impl AsRef<Path>, content: impl AsRef<[u8]>) {
        fs::write(self.dir().join(name), content).unwrap();
    }

    pub fn read(&self, name: impl AsRef<Path>) -> String {
        fs::read_to_string(self.dir().join(name)).unwrap()
    }

    /// Adds a VM, all at once: size, private, shared, zero, empty in KiB.
    pub fn vm(&self, name: impl AsRef<OsStr>, domain: &str, kb: [u64; 5]) {
        let dir = self.root().join("new-vm");
        fs::create_dir(&dir).unwrap();
        for (name, value) in VM.iter().chain(&[("domain", domain)]) {
            fs::write(dir.join(name), format!("{value}\n")).unwrap();
        }
        let [size, private, shared, zero, empty] = kb;
        let stat = format!(
            "size_kb {size}\nresident_kb {private}\nprivate_kb {private}\nshared_kb {shared}\n\
             zero_kb {zero}\nhuge_kb 0\nempty_kb {empty}\nsplittable_kb 0\ncompressed_kb 0\n\
             compressed_pool_kb 0\nswapped_kb 0\nbusy 0\nof_a_newer_module maybe\n"
        );
        fs::write(dir.join("stat"), stat).unwrap();
        fs::rename(dir, self.dir().join("vms").join(name.as_ref())).unwrap();
    }

    /// Runs thinramctl on it: exit code, output, complaints.
    pub fn ctl(&self, args: &[&str]) -> (Option<i32>, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_thinramctl"))
            .env_remove("COLUMNS")
            .arg("--root")
            .arg(self.root())
            .args(args)
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    }
}
