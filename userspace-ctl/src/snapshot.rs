// SPDX-License-Identifier: GPL-2.0

//! What a policy decides from: the host and its guests at one time.

use crate::files;
use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// More than the figures of any host take.
const MOST_BYTES: u64 = 64 << 20;

/// Why a snapshot cannot be used.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The file cannot be read.
    #[error("cannot read {path}: {cause}")]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// It is no JSON, or not of this shape.
    #[error("{path}: {cause}")]
    Json {
        /// Which file.
        path: PathBuf,
        /// What, and in which line and column.
        cause: serde_json::Error,
    },
    /// Two VMs of one name.
    #[error("{path}: there are two VMs named `{name}`")]
    Twice {
        /// Which file.
        path: PathBuf,
        /// The name.
        name: String,
    },
}

/// The host and its guests at one time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Seconds since some fixed time.
    pub now_s: f64,
    /// The host.
    pub host: HostSample,
    /// The guests, each name once.
    pub vms: Vec<VmSample>,
}

/// The host's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSample {
    /// All memory.
    pub total_kb: u64,
    /// What can be had without swapping.
    pub available_kb: u64,
    /// Part of it that is kept for VMs that start.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub reserved_kb: u64,
}

fn is_zero(kb: &u64) -> bool {
    *kb == 0
}

/// One guest; a figure that nobody could tell is `None` (absent, `null` or -1).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSample {
    /// Its name.
    pub name: String,
    /// What its balloon leaves it.
    #[serde(
        default,
        deserialize_with = "kb_or_nothing",
        skip_serializing_if = "Option::is_none"
    )]
    pub current_kb: Option<u64>,
    /// What its programs have asked for; without it, it is estimated.
    #[serde(
        default,
        deserialize_with = "kb_or_nothing",
        skip_serializing_if = "Option::is_none"
    )]
    pub committed_kb: Option<u64>,
    /// All memory that it sees.
    #[serde(
        default,
        deserialize_with = "kb_or_nothing",
        skip_serializing_if = "Option::is_none"
    )]
    pub guest_total_kb: Option<u64>,
    /// Its free memory.
    #[serde(
        default,
        deserialize_with = "kb_or_nothing",
        skip_serializing_if = "Option::is_none"
    )]
    pub guest_free_kb: Option<u64>,
    /// What its programs could still get.
    #[serde(
        default,
        deserialize_with = "kb_or_nothing",
        skip_serializing_if = "Option::is_none"
    )]
    pub guest_available_kb: Option<u64>,
    /// What it lately used.
    #[serde(
        default,
        deserialize_with = "kb_or_nothing",
        skip_serializing_if = "Option::is_none"
    )]
    pub active_kb: Option<u64>,
    /// Host memory that it holds.
    #[serde(
        default,
        deserialize_with = "kb_or_nothing",
        skip_serializing_if = "Option::is_none"
    )]
    pub resident_kb: Option<u64>,
    /// Net swap-out since the guest started, part of the estimate of its committed memory.
    #[serde(
        default,
        deserialize_with = "kb_or_nothing",
        skip_serializing_if = "Option::is_none"
    )]
    pub swapped_out_kb: Option<u64>,
    /// Resident memory that the module's reclaim leaves it.
    #[serde(
        default,
        deserialize_with = "kb_or_nothing",
        skip_serializing_if = "Option::is_none"
    )]
    pub reservation_kb: Option<u64>,
    /// Resident memory that the module lets it have; 0 is no limit.
    #[serde(
        default,
        deserialize_with = "kb_or_nothing",
        skip_serializing_if = "Option::is_none"
    )]
    pub limit_kb: Option<u64>,
}

/// A guest about which everything is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    /// What its balloon leaves it.
    pub current_kb: u64,
    /// What its programs have asked for.
    pub committed_kb: u64,
    /// Whether that is an estimate.
    pub estimated: bool,
    /// All memory that it sees.
    pub guest_total_kb: u64,
    /// What it lately used.
    pub active_kb: u64,
    /// Host memory that it holds.
    pub resident_kb: u64,
    /// Resident memory that the module's reclaim leaves it.
    pub reservation_kb: u64,
    /// Resident memory that the module lets it have.
    pub limit_kb: u64,
}

impl VmSample {
    /// All figures, or the names of those that are missing.
    pub fn figures(&self) -> Result<Figures, Vec<&'static str>> {
        let mut missing = Vec::new();
        let mut need = |name, value: Option<u64>| {
            if value.is_none() {
                missing.push(name);
            }
            value.unwrap_or(0)
        };
        let current_kb = need("current_kb", self.current_kb);
        let guest_total_kb = need("guest_total_kb", self.guest_total_kb);
        let guest_available_kb = need("guest_available_kb", self.guest_available_kb);
        need("guest_free_kb", self.guest_free_kb);
        let active_kb = need("active_kb", self.active_kb);
        let resident_kb = need("resident_kb", self.resident_kb);
        if !missing.is_empty() {
            return Err(missing);
        }
        let used = guest_total_kb.saturating_sub(guest_available_kb);
        let estimate = used.saturating_add(self.swapped_out_kb.unwrap_or(0));
        Ok(Figures {
            current_kb,
            committed_kb: self.committed_kb.unwrap_or(estimate),
            estimated: self.committed_kb.is_none(),
            guest_total_kb,
            active_kb,
            resident_kb,
            reservation_kb: self.reservation_kb.unwrap_or(0),
            limit_kb: self.limit_kb.filter(|kb| *kb > 0).unwrap_or(u64::MAX),
        })
    }
}

impl Figures {
    /// Committed memory as a percentage of what the guest sees.
    pub fn pressure_percent(&self) -> u64 {
        if self.guest_total_kb == 0 {
            return u64::MAX;
        }
        let percent = u128::from(self.committed_kb) * 100 / u128::from(self.guest_total_kb);
        u64::try_from(percent).unwrap_or(u64::MAX)
    }
}

impl Snapshot {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self, SnapshotError> {
        let bytes = files::read(path, MOST_BYTES).map_err(|cause| SnapshotError::Read {
            path: path.to_owned(),
            cause,
        })?;
        let snapshot: Self =
            serde_json::from_slice(&bytes).map_err(|cause| SnapshotError::Json {
                path: path.to_owned(),
                cause,
            })?;
        let mut seen = HashSet::new();
        match snapshot.vms.iter().find(|vm| !seen.insert(&vm.name)) {
            Some(vm) => Err(SnapshotError::Twice {
                path: path.to_owned(),
                name: vm.name.clone(),
            }),
            None => Ok(snapshot),
        }
    }
}

/// What virtio-balloon, and whoever records it, says for a figure that is not known.
const NOT_KNOWN: i64 = -1;

fn kb_or_nothing<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    match Option::<i64>::deserialize(deserializer)? {
        None | Some(NOT_KNOWN) => Ok(None),
        Some(value) => u64::try_from(value)
            .map(Some)
            .map_err(|_| de::Error::custom(format_args!("`{value}` is no size in KiB"))),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(text: &str) -> VmSample {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn what_is_missing_is_named() {
        let vm = sample(
            r#"{"name": "a", "current_kb": 1000, "guest_total_kb": null, "active_kb": -1,
                "guest_free_kb": 5, "guest_available_kb": 7, "resident_kb": 900, "more": [1]}"#,
        );
        assert_eq!(vm.figures(), Err(vec!["guest_total_kb", "active_kb"]));
        for bad in [
            r#"{"name": "a", "current_kb": -2}"#,
            r#"{"name": "a", "current_kb": "1G"}"#,
        ] {
            assert!(serde_json::from_str::<VmSample>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn committed_memory_is_estimated_where_it_is_not_told() {
        let mut vm = VmSample {
            name: "a".into(),
            current_kb: Some(1000),
            committed_kb: None,
            guest_total_kb: Some(900),
            guest_free_kb: Some(100),
            guest_available_kb: Some(300),
            active_kb: Some(200),
            resident_kb: Some(800),
            swapped_out_kb: Some(50),
            ..VmSample::default()
        };
        let figures = vm.figures().unwrap();
        assert_eq!((figures.committed_kb, figures.estimated), (650, true));
        assert_eq!(figures.pressure_percent(), 72);
        vm.committed_kb = Some(1800);
        let figures = vm.figures().unwrap();
        assert_eq!((figures.committed_kb, figures.estimated), (1800, false));
        assert_eq!(figures.pressure_percent(), 200);
        vm.guest_total_kb = Some(0);
        assert_eq!(vm.figures().unwrap().pressure_percent(), u64::MAX);
    }

    fn kb() -> impl Strategy<Value = Option<u64>> {
        let most = i64::MAX as u64;
        prop_oneof![
            Just(None),
            Just(Some(most)),
            (0..=most).prop_map(Some),
            (0..1u64 << 30).prop_map(Some)
        ]
    }

    /// Any host with any guests, as far as a file can hold them.
    pub(crate) fn any_snapshot() -> impl Strategy<Value = Snapshot> {
        let vm =
            ("[a-c]|\\PC{1,8}", prop::array::uniform10(kb())).prop_map(|(name, kb)| VmSample {
                name,
                current_kb: kb[0],
                committed_kb: kb[1],
                guest_total_kb: kb[2],
                guest_free_kb: kb[3],
                guest_available_kb: kb[4],
                active_kb: kb[5],
                resident_kb: kb[6],
                swapped_out_kb: kb[7],
                reservation_kb: kb[8],
                limit_kb: kb[9],
            });
        let host = (any::<u64>(), any::<u64>(), 0..1u64 << 40).prop_map(
            |(total_kb, available_kb, reserved_kb)| HostSample {
                total_kb,
                available_kb,
                reserved_kb,
            },
        );
        // Eighths of seconds: JSON has them exactly.
        let time = any::<u32>().prop_map(|eighths| f64::from(eighths) / 8.0);
        (time, host, prop::collection::vec(vm, 0..5)).prop_map(|(now_s, host, vms)| Snapshot {
            now_s,
            host,
            vms,
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(snapshot in any_snapshot()) {
            let text = serde_json::to_string(&snapshot).unwrap();
            let read: Snapshot = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(&read, &snapshot);
            for vm in &read.vms {
                match vm.figures() {
                    Ok(figures) => prop_assert_eq!(Some(figures.current_kb), vm.current_kb),
                    Err(missing) => prop_assert!(!missing.is_empty()),
                }
            }
        }

        #[test]
        fn a_file_that_is_not_whole_says_where(snapshot in any_snapshot(), cut in any::<usize>(), noise in "[a-z{}\",:\\[\\]]{1,4}") {
            let dir = tempfile::TempDir::new().unwrap();
            let path = dir.path().join("snapshot.json");
            let mut text = serde_json::to_string_pretty(&snapshot).unwrap();
            let at = text.char_indices().nth(cut % text.chars().count()).unwrap().0;
            text.insert_str(at, &noise);
            std::fs::write(&path, &text).unwrap();
            match Snapshot::load(&path) {
                // The noise stands in a name, or in a key that means nothing then.
                Ok(read) => {
                    let mut names = HashSet::new();
                    prop_assert!(read.vms.iter().all(|vm| names.insert(&vm.name)));
                    prop_assert_eq!(read.vms.len(), snapshot.vms.len());
                }
                Err(error) => {
                    let said = error.to_string();
                    prop_assert!(said.contains("snapshot.json"));
                    prop_assert!(said.contains("line ") || said.contains("two VMs"), "{}", said);
                }
            }
        }
    }
}
