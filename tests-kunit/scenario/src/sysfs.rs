// SPDX-License-Identifier: GPL-2.0

//! The module's files under `/sys/fs/thinram`.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context, Result};

/// The controls that a case may change and the harness puts back.
pub const CONTROLS: [&str; 18] = [
    "run",
    "scan_pages_per_sec",
    "scan_period_secs",
    "scan_cpu_max_percent",
    "share_scope",
    "zero_only",
    "merge_across_nodes",
    "max_page_sharing",
    "large_pages",
    "split_holes_percent",
    "collapse_after_secs",
    "collapse_per_sec",
    "compress_max_percent",
    "compress_max_object_percent",
    "idle_tax_percent",
    "minfree_kb",
    "active_sample_pages",
    "active_sample_period_secs",
];

/// One directory of values, a bare word a file.
#[derive(Debug, Clone)]
pub struct Node {
    dir: PathBuf,
}

impl Node {
    /// The directory `dir`; it need not exist yet.
    pub fn new(dir: &Path) -> Node {
        Node {
            dir: dir.to_owned(),
        }
    }

    /// Whether the directory is there.
    pub fn exists(&self) -> bool {
        self.dir.is_dir()
    }

    /// Whether it holds `name`.
    pub fn has(&self, name: &str) -> bool {
        self.dir.join(name).exists()
    }

    /// The value of `name` without its newline.
    pub fn word(&self, name: &str) -> Result<String> {
        let path = self.dir.join(name);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        match text.strip_suffix('\n') {
            Some(word) => Ok(word.to_owned()),
            None => bail!("{}: {text:?} does not end in a newline", path.display()),
        }
    }

    /// The value of `name` as a number.
    pub fn get(&self, name: &str) -> Result<u64> {
        let word = self.word(name)?;
        word.parse().with_context(|| {
            format!(
                "{}: expected a bare number, seen {word:?}",
                self.dir.join(name).display()
            )
        })
    }

    /// Writes `value` in one call.
    pub fn try_set(&self, name: &str, value: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).open(self.dir.join(name))?;
        match file.write(value)? {
            n if n == value.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Writes `value`, which must be accepted.
    pub fn set(&self, name: &str, value: impl ToString) -> Result<()> {
        let value = value.to_string();
        self.try_set(name, value.as_bytes())
            .with_context(|| format!("write {value:?} to {}", self.dir.join(name).display()))
    }
}

/// `/sys/fs/thinram`.
#[derive(Debug, Clone)]
pub struct Sys {
    node: Node,
    dir: PathBuf,
}

impl std::ops::Deref for Sys {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

impl Sys {
    /// The tree at `dir`.
    pub fn new(dir: &Path) -> Sys {
        Sys {
            node: Node::new(dir),
            dir: dir.to_owned(),
        }
    }

    /// The VM `name`, which need not exist.
    pub fn vm(&self, name: &str) -> Vm {
        Vm {
            node: Node::new(&self.dir.join("vms").join(name)),
            name: name.to_owned(),
        }
    }

    /// Names of all VMs.
    pub fn vms(&self) -> Result<Vec<String>> {
        let dir = self.dir.join("vms");
        let mut names = Vec::new();
        for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    /// What counts within `time`, to say why a wait is in vain: `full_scans +12, ..`.
    pub fn counting(&self, time: Duration) -> Result<String> {
        let before = self.numbers()?;
        thread::sleep(time);
        let grown: Vec<String> = self
            .numbers()?
            .into_iter()
            .filter_map(|(name, now)| {
                let more = now.checked_sub(*before.get(&name)?)?;
                (more > 0).then(|| format!("{name} +{more}"))
            })
            .collect();
        Ok(grown.join(", "))
    }

    /// Every file of the host that is a number.
    fn numbers(&self) -> Result<BTreeMap<String, u64>> {
        let files = fs::read_dir(&self.dir).with_context(|| format!("list {}", self.dir.display()));
        let number = |entry: io::Result<fs::DirEntry>| {
            let entry = entry.ok()?;
            let text = fs::read_to_string(entry.path()).ok()?;
            let name = entry.file_name().to_string_lossy().into_owned();
            Some((name, text.trim().parse().ok()?))
        };
        Ok(files?.filter_map(number).collect())
    }

    /// The present value of every control that this module has.
    pub fn snapshot(&self) -> BTreeMap<&'static str, String> {
        CONTROLS
            .into_iter()
            .filter_map(|name| Some((name, self.word(name).ok()?)))
            .collect()
    }

    /// Puts back what [`Sys::snapshot`] took; returns what could not be put back.
    pub fn restore(&self, old: &BTreeMap<&'static str, String>) -> Vec<String> {
        let mut failed = Vec::new();
        for (name, value) in old {
            if self.word(name).is_ok_and(|now| now == *value) {
                continue;
            }
            if let Err(e) = self.set(name, value) {
                failed.push(format!("{e:#}"));
            }
        }
        failed
    }

    /// Scans without any ceiling.
    pub fn flat_out(&self) -> Result<()> {
        self.set("scan_pages_per_sec", 0)?;
        self.flat_out_but_pages()
    }

    /// Scans without any ceiling but `scan_pages_per_sec` as it is.
    pub fn flat_out_but_pages(&self) -> Result<()> {
        self.set("scan_cpu_max_percent", 100)?;
        // No target time where the module has such a value, else the shortest.
        if self.try_set("scan_period_secs", b"0").is_err() {
            self.set("scan_period_secs", 1)?;
        }
        self.set("run", 1)
    }
}

/// `vms/<name>`.
#[derive(Debug, Clone)]
pub struct Vm {
    node: Node,
    /// The VM's name.
    pub name: String,
}

impl std::ops::Deref for Vm {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

impl Vm {
    /// One snapshot of all states.
    pub fn stat(&self) -> Result<Stat> {
        let path = self.node.dir.join("stat");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        Stat::parse(&text).with_context(|| path.display().to_string())
    }
}

/// One snapshot of a VM's states, all in KiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat(BTreeMap<String, u64>);

impl Stat {
    fn parse(text: &str) -> Result<Stat> {
        let mut values = BTreeMap::new();
        for line in text.lines() {
            let Some((name, value)) = line.split_once(' ') else {
                bail!("expected `name value`, seen {line:?}");
            };
            let value = value
                .parse()
                .with_context(|| format!("value of {line:?}"))?;
            if values.insert(name.to_owned(), value).is_some() {
                bail!("{name} is there twice");
            }
        }
        Ok(Stat(values))
    }

    /// The value of `name`; a state that this module does not know yet is an error.
    pub fn get(&self, name: &str) -> Result<u64> {
        match self.0.get(name) {
            Some(value) => Ok(*value),
            None => bail!("stat has no {name}"),
        }
    }

    /// The states add up to the size.
    pub fn check_sum(&self) -> Result<()> {
        let mut sum = 0;
        for name in ["empty_kb", "zero_kb", "private_kb", "shared_kb"] {
            sum += self.get(name)?;
        }
        // Builds without these states leave them out.
        for name in ["huge_kb", "compressed_kb", "swapped_kb"] {
            sum += self.0.get(name).copied().unwrap_or(0);
        }
        let size = self.get("size_kb")?;
        if sum != size {
            bail!(
                "states add up to {sum} KiB, size is {size} KiB: {:?}",
                self.0
            );
        }
        Ok(())
    }
}
