// SPDX-License-Identifier: GPL-2.0

//! What sharing would save, by VM and by pair of VMs, without merging anything.
//!
//! Pages are hashed; equal hashes are taken for equal pages, which is good enough for an estimate and
//! for nothing else. To bound the memory that this needs, only hashes of one residue class are kept,
//! and half of them are dropped whenever there are too many: what is left stands for all. A sample of
//! the pages costs less time; what is found in both VMs of a pair is then scaled up by how likely it
//! was to be found. That takes a content for as frequent as it was seen, so a sample says too much of
//! contents that VMs hold several times.

mod pages;

pub use pages::{read_vm, Memory, PAGE};

use crate::files;
use crate::table::{self, Column};
use crate::text::paragraph;
use crate::units::{long_kb, short_kb};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// Hashes that are kept.
const KEPT: usize = 4 << 20;
const PAGE_KB: f64 = 4.0;
/// Pairs that a table shows.
const PAIRS_SHOWN: usize = 20;

/// Where the last result is kept for `status`.
pub fn path(root: &Path) -> PathBuf {
    root.join("run/thinramctl-estimate.json")
}

/// What was seen of one VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Seen {
    name: String,
    domain: Option<String>,
    pages: u64,
    zero: u64,
}

/// Takes in pages, one VM after the other.
#[derive(Debug, Clone)]
pub struct Collector {
    vms: Vec<Seen>,
    /// Hash and VM of each page that is kept.
    kept: Vec<(u64, u32)>,
    /// Of so many low bits a hash must have none to be kept.
    bits: u32,
    most: usize,
    sample: f64,
}

impl Collector {
    /// One that is told this part of the pages, above 0 and at most 1.
    pub fn new(sample: f64) -> Self {
        Self {
            vms: Vec::new(),
            kept: Vec::new(),
            bits: 0,
            most: KEPT,
            sample,
        }
    }

    /// Begins the next VM.
    pub fn vm(&mut self, name: &str, domain: Option<&str>) {
        self.vms.push(Seen {
            name: name.to_owned(),
            domain: domain.map(str::to_owned),
            ..Seen::default()
        });
    }

    /// Takes in a page of the VM that was begun last; `None` is a page of zeroes.
    pub fn page(&mut self, hash: Option<u64>) {
        let at = self.vms.len().saturating_sub(1);
        let Some(vm) = self.vms.get_mut(at) else {
            return;
        };
        vm.pages += 1;
        let Some(hash) = hash else {
            vm.zero += 1;
            return;
        };
        if !is_kept(hash, self.bits) {
            return;
        }
        self.kept
            .push((hash, u32::try_from(at).unwrap_or(u32::MAX)));
        while self.kept.len() > self.most && self.bits < 40 {
            self.bits += 1;
            let bits = self.bits;
            self.kept.retain(|(hash, _)| is_kept(*hash, bits));
        }
    }

    /// What came of it.
    pub fn finish(mut self, at_s: u64) -> Estimate {
        self.kept.sort_unstable();
        let count = self.vms.len();
        let scale = 2f64.powi(i32::try_from(self.bits).unwrap_or(0));
        // How likely a content of which so many pages were seen was to be seen at all.
        let sample = self.sample;
        let likely = |seen: u64| 1.0 - (1.0 - sample).powf(seen as f64);
        let mut distinct = vec![0.0; count];
        let mut elsewhere = vec![0.0; count];
        let mut pairs = vec![0.0; count * count];
        let mut all = 0.0;
        let mut rest = self.kept.as_slice();
        let mut copies: Vec<(usize, u64)> = Vec::new();
        while let Some((hash, _)) = rest.first() {
            let end = rest.partition_point(|(other, _)| other == hash);
            let (same, after) = rest.split_at(end);
            rest = after;
            copies.clear();
            for (_, vm) in same {
                let vm = *vm as usize;
                match copies.last_mut() {
                    Some((last, seen)) if *last == vm => *seen += 1,
                    _ => copies.push((vm, 1)),
                }
            }
            all += scale / likely(same.len() as u64);
            for (nth, (vm, seen)) in copies.iter().enumerate() {
                let own = likely(*seen);
                distinct[*vm] += scale / own;
                let others = same.len() as u64 - seen;
                if others > 0 {
                    elsewhere[*vm] += scale / (own * likely(others));
                }
                for (other, its) in &copies[nth + 1..] {
                    pairs[vm * count + other] += scale / (own * likely(*its));
                }
            }
        }
        let kb = |pages: f64| (pages * PAGE_KB).round().max(0.0) as u64;
        let full = |pages: u64| pages as f64 / sample;
        let mut result = Estimate {
            at_s,
            sample_percent: sample * 100.0,
            contents_one_in: 1 << self.bits,
            vms: Vec::new(),
            pairs: Vec::new(),
            all_kb: 0,
        };
        // No more can be in common than there is.
        let fits = |vm: usize, pages: f64| pages.min(full(self.vms[vm].pages - self.vms[vm].zero));
        let mut zeroes = 0.0;
        let mut others = 0.0;
        for (at, vm) in self.vms.iter().enumerate() {
            let pages = full(vm.pages - vm.zero);
            zeroes += full(vm.zero);
            others += pages;
            result.vms.push(VmEstimate {
                name: vm.name.clone(),
                domain: vm.domain.clone(),
                memory_kb: kb(full(vm.pages)),
                zero_kb: kb(full(vm.zero)),
                within_kb: kb(pages - distinct[at]),
                opening_kb: kb(fits(at, elsewhere[at])),
            });
        }
        result.all_kb = kb(zeroes + others - all);
        for a in 0..count {
            for b in a + 1..count {
                let saved_kb = kb(fits(a, fits(b, pairs[a * count + b])));
                if saved_kb > 0 {
                    result.pairs.push(PairEstimate {
                        a: self.vms[a].name.clone(),
                        b: self.vms[b].name.clone(),
                        saved_kb,
                    });
                }
            }
        }
        result.pairs.sort_by(|x, y| y.saved_kb.cmp(&x.saved_kb));
        result
    }
}

fn is_kept(hash: u64, bits: u32) -> bool {
    hash & ((1 << bits) - 1) == 0
}

/// What sharing would save.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// When, in seconds since 1970.
    pub at_s: u64,
    /// Part of the pages that was read.
    pub sample_percent: f64,
    /// Of so many contents one was kept.
    pub contents_one_in: u64,
    /// Each VM.
    pub vms: Vec<VmEstimate>,
    /// Each pair with something in common, most first.
    pub pairs: Vec<PairEstimate>,
    /// What would be saved if all these VMs were one domain, zeroes included.
    pub all_kb: u64,
}

/// What one VM has to share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmEstimate {
    /// Its name.
    pub name: String,
    /// Its domain; `None` is one of its own.
    pub domain: Option<String>,
    /// Memory that it ever used and did not give back.
    pub memory_kb: u64,
    /// Pages of zeroes.
    pub zero_kb: u64,
    /// Pages that it has more than once.
    pub within_kb: u64,
    /// Contents that other VMs have as well: what one domain with them would save in it.
    pub opening_kb: u64,
}

/// What two VMs have in common, beyond what each has twice itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairEstimate {
    /// One.
    pub a: String,
    /// The other.
    pub b: String,
    /// What one domain of both would save.
    pub saved_kb: u64,
}

impl Estimate {
    /// The last result that was kept; `None` where there is none that can be read.
    pub fn load(root: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path(root)).ok()?).ok()
    }

    /// Keeps it for `status`.
    pub fn save(&self, root: &Path) -> std::io::Result<()> {
        // Who has what in common with whom is nobody's business but root's.
        files::replace_private(&path(root), self)
    }

    /// What opening a VM's domain of its own would save.
    pub fn opening_kb(&self, vm: &str) -> Option<u64> {
        self.vms
            .iter()
            .find(|seen| seen.name == vm)
            .map(|seen| seen.opening_kb)
    }

    /// As it is shown.
    pub fn render(&self, width: usize) -> String {
        let columns = [
            Column::text("VM", 12, 0),
            Column::text("domain", 8, 3),
            Column::number("memory", 1),
            Column::number("zeroes", 2),
            Column::number("within", 1),
            Column::number("with others", 0),
        ];
        let rows: Vec<Vec<String>> = self
            .vms
            .iter()
            .map(|vm| {
                let mut row = vec![
                    vm.name.clone(),
                    vm.domain.clone().unwrap_or_else(|| "(own)".to_owned()),
                ];
                let sizes = [vm.memory_kb, vm.zero_kb, vm.within_kb, vm.opening_kb];
                row.extend(sizes.map(short_kb));
                row
            })
            .collect();
        let mut out = table::render(&columns, &rows, width);
        if !self.pairs.is_empty() {
            let columns = [
                Column::text("pair", 12, 0),
                Column::text("", 12, 0),
                Column::number("in common", 0),
            ];
            let shown = &self.pairs[..self.pairs.len().min(PAIRS_SHOWN)];
            let rows: Vec<Vec<String>> = shown
                .iter()
                .map(|pair| vec![pair.a.clone(), pair.b.clone(), short_kb(pair.saved_kb)])
                .collect();
            out.push('\n');
            out.push_str(&table::render(&columns, &rows, width));
            if self.pairs.len() > PAIRS_SHOWN {
                let more = self.pairs.len() - PAIRS_SHOWN;
                out.push_str(&format!("and {more} pairs with less in common\n"));
            }
        }
        let said = format!(
            "All of them in one domain would save {}. {}",
            long_kb(self.all_kb),
            if self.sample_percent < 100.0 {
                format!("Estimated from {:.0}% of the pages.", self.sample_percent)
            } else {
                "Every page was read.".to_owned()
            }
        );
        out.push('\n');
        out.push_str(&paragraph(&said, 0, width));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use xxhash_rust::xxh3::xxh3_64;

    fn hash(content: u64) -> Option<u64> {
        Some(xxh3_64(&content.to_le_bytes()))
    }

    fn near(got: u64, want: u64, percent: u64) -> bool {
        got.abs_diff(want) * 100 <= want * percent
    }

    #[test]
    fn exact_when_all_is_read() {
        let mut all = Collector::new(1.0);
        all.vm("a", None);
        for content in [1, 2, 3, 3, 3] {
            all.page(hash(content));
        }
        all.page(None);
        all.vm("b", Some("lab"));
        for content in [3, 3, 4, 1] {
            all.page(hash(content));
        }
        all.vm("c", None);
        all.page(hash(9));
        let result = all.finish(7);
        let kb = |pages: u64| pages * 4;
        let a = &result.vms[0];
        assert_eq!(
            (a.memory_kb, a.zero_kb, a.within_kb, a.opening_kb),
            (kb(6), kb(1), kb(2), kb(2))
        );
        assert_eq!(result.vms[1].within_kb, kb(1));
        assert_eq!(result.vms[2].opening_kb, 0);
        let pair = PairEstimate {
            a: "a".into(),
            b: "b".into(),
            saved_kb: kb(2),
        };
        assert_eq!(result.pairs, [pair]);
        // Ten pages that are not zero have the contents 1, 2, 3, 4 and 9.
        assert_eq!(result.all_kb, kb(1 + 10 - 5));
        let shown = result.render(80);
        assert!(
            shown.contains("in common") && shown.contains("would save 24 KiB"),
            "{shown}"
        );
    }

    fn big(sample: f64, most: usize) -> Estimate {
        let mut all = Collector::new(sample);
        all.most = most;
        let mut turn = 0u64;
        for (name, from, to) in [("a", 0, 100_000), ("b", 60_000, 160_000)] {
            all.vm(name, None);
            for content in from..to {
                // Every fourth page of the common part is there twice.
                let copies = if content % 4 == 0 { 2 } else { 1 };
                for _ in 0..copies {
                    turn += 1;
                    let picked = xxh3_64(&(turn ^ 0xABCD).to_le_bytes()) as f64 / u64::MAX as f64;
                    if picked < sample {
                        all.page(hash(content));
                    }
                }
            }
        }
        all.finish(0)
    }

    #[test]
    fn near_the_truth_when_few_contents_are_kept() {
        let result = big(1.0, 5_000);
        assert!(result.contents_one_in >= 32);
        assert!(near(result.pairs[0].saved_kb, 160_000, 10), "{result:?}");
        assert!(near(result.vms[0].within_kb, 100_000, 10), "{result:?}");
    }

    #[test]
    fn a_sample_may_say_too_much_but_not_much_too_little() {
        for sample in [0.5, 0.2] {
            let result = big(sample, KEPT);
            let pair = result.pairs[0].saved_kb;
            assert!((130_000..320_000).contains(&pair), "{sample} {result:?}");
            let memory = result.vms[0].memory_kb;
            assert!(near(memory, 500_000, 3), "{sample} {result:?}");
        }
    }

    #[test]
    fn nothing_at_all() {
        let mut none = Collector::new(1.0);
        none.page(hash(1));
        let result = none.finish(0);
        assert!(result.vms.is_empty() && result.all_kb == 0);
        assert!(result.render(80).contains("would save 0 KiB"));
    }

    fn any_estimate() -> impl Strategy<Value = Estimate> {
        let kb = || prop_oneof![3 => 0u64..1 << 40, 1 => any::<u64>()];
        let name = || "[a-z0-9-]{1,20}|\\PC{0,8}";
        let vm = (name(), prop::option::of(name()), [kb(), kb(), kb(), kb()]).prop_map(
            |(name, domain, [memory_kb, zero_kb, within_kb, opening_kb])| VmEstimate {
                name,
                domain,
                memory_kb,
                zero_kb,
                within_kb,
                opening_kb,
            },
        );
        let pair = (name(), name(), kb());
        let pair = pair.prop_map(|(a, b, saved_kb)| PairEstimate { a, b, saved_kb });
        let vms = prop::collection::vec(vm, 0..6);
        let pairs = prop::collection::vec(pair, 0..30);
        (vms, pairs, kb(), 1u32..800).prop_map(|(vms, pairs, all_kb, eighths)| Estimate {
            at_s: all_kb / 2,
            sample_percent: f64::from(eighths) / 8.0,
            contents_one_in: 1,
            vms,
            pairs,
            all_kb,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_kept_is_read_and_shown(estimate in any_estimate(), width in 20usize..200) {
            let root = tempfile::TempDir::new().unwrap();
            std::fs::create_dir(root.path().join("run")).unwrap();
            estimate.save(root.path()).unwrap();
            let read = Estimate::load(root.path());
            prop_assert_eq!(read.as_ref(), Some(&estimate));
            let shown = estimate.render(width);
            prop_assert!(shown.contains("domain would") || width < 40, "{}", shown);
            for vm in &estimate.vms {
                let first = estimate.vms.iter().find(|other| other.name == vm.name).unwrap();
                prop_assert_eq!(estimate.opening_kb(&vm.name), Some(first.opening_kb));
            }
            // Cut anywhere, it is none.
            let bytes = std::fs::read(path(root.path())).unwrap();
            let cut = width * bytes.len() / 200;
            std::fs::write(path(root.path()), &bytes[..cut]).unwrap();
            prop_assert_eq!(Estimate::load(root.path()), None);
        }

        #[test]
        fn no_file_does_harm(bytes in prop::collection::vec(any::<u8>(), 0..200), text in "[{}\\[\\]\":,0-9a-z_.e-]{0,60}") {
            let root = tempfile::TempDir::new().unwrap();
            std::fs::create_dir(root.path().join("run")).unwrap();
            for bytes in [&bytes[..], text.as_bytes()] {
                std::fs::write(path(root.path()), bytes).unwrap();
                prop_assert_eq!(Estimate::load(root.path()), None);
            }
        }
    }
}
