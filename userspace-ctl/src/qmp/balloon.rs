// SPDX-License-Identifier: GPL-2.0

//! The balloon behind a QMP socket, and what the guest's driver tells.

use super::{command, Client, Nothing, QmpError};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::HashMap;

command!(
    /// How much memory the balloon leaves the guest.
    QueryBalloon<> {} = "query-balloon" -> Actual
);
command!(
    /// Asks the guest to be so large, in bytes.
    SetBalloon<> { value: u64 } = "balloon" -> Nothing
);
command!(
    /// Names and types of an object's properties.
    QomList<'a> { path: &'a str } = "qom-list" -> Vec<Property>
);
command!(
    /// A property.
    QomGet<'a> { path: &'a str, property: &'a str } = "qom-get" -> Value
);
command!(
    /// Sets a property.
    QomSet<'a> { path: &'a str, property: &'a str, value: u64 } = "qom-set" -> Nothing
);

#[derive(Debug, Deserialize)]
pub(crate) struct Actual {
    actual: u64,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Property {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Debug, Deserialize)]
struct RawStats {
    stats: HashMap<String, Value>,
    #[serde(rename = "last-update")]
    last_update: u64,
}

/// Where QEMU keeps devices with and without an id.
const SHELVES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];
const STATS: &str = "guest-stats";
const INTERVAL: &str = "guest-stats-polling-interval";

/// How far a VM can be ballooned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// It has no balloon device.
    #[default]
    None,
    /// It has one, and no driver in the guest answered so far.
    Any,
    /// A driver in the guest tells figures.
    Driver,
}

impl Driver {
    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Any => "any",
            Self::Driver => "driver",
        }
    }
}

/// What the guest's driver told last; a figure that it does not have is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GuestStats {
    /// When it told that, in seconds of the host's clock.
    pub last_update_s: u64,
    /// All memory that the guest sees.
    pub total_kb: Option<u64>,
    /// Its free memory.
    pub free_kb: Option<u64>,
    /// What its programs could still get.
    pub available_kb: Option<u64>,
    /// Its page cache.
    pub caches_kb: Option<u64>,
    /// Read from its swap since it started.
    pub swap_in_kb: Option<u64>,
    /// Written to its swap since it started.
    pub swap_out_kb: Option<u64>,
    /// Faults that had to read since it started.
    pub major_faults: Option<u64>,
}

impl GuestStats {
    /// What a QEMU's answer tells; `None` where no driver ever told anything.
    fn told(value: Value) -> Option<Self> {
        let raw: RawStats = serde_json::from_value(value).ok()?;
        (raw.last_update > 0).then(|| Self::from_raw(&raw))
    }

    fn from_raw(raw: &RawStats) -> Self {
        let number = |name: &str| known(raw.stats.get(name)?);
        let kb = |name: &str| number(name).map(|bytes| bytes / 1024);
        Self {
            last_update_s: raw.last_update,
            total_kb: kb("stat-total-memory"),
            free_kb: kb("stat-free-memory"),
            available_kb: kb("stat-available-memory"),
            caches_kb: kb("stat-disk-caches"),
            swap_in_kb: kb("stat-swap-in"),
            swap_out_kb: kb("stat-swap-out"),
            major_faults: number("stat-major-faults"),
        }
    }

    /// Net swap-out since the guest started.
    pub fn swapped_out_kb(&self) -> Option<u64> {
        Some(self.swap_out_kb?.saturating_sub(self.swap_in_kb?))
    }
}

/// A figure; QEMU tells -1, signed or not, for what the driver never told.
fn known(value: &Value) -> Option<u64> {
    value.as_u64().filter(|value| *value != u64::MAX)
}

/// The balloon of one VM.
#[derive(Debug)]
pub struct Balloon {
    client: Client,
    device: Option<String>,
}

impl Balloon {
    /// Looks for the balloon device, and has the driver tell its figures every `interval_s`.
    pub fn open(mut client: Client, interval_s: u64) -> Result<Self, QmpError> {
        let mut device = None;
        for shelf in SHELVES {
            let found = client.execute(&QomList { path: shelf })?;
            let balloon = found
                .iter()
                .find(|child| child.kind.starts_with("child<virtio-balloon"));
            if let Some(balloon) = balloon {
                device = Some(format!("{shelf}/{}", balloon.name));
                break;
            }
        }
        if let Some(path) = &device {
            client.execute(&QomSet {
                path,
                property: INTERVAL,
                value: interval_s,
            })?;
        }
        Ok(Self { client, device })
    }

    /// The connection, for its events.
    pub fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    /// Whether the VM has a balloon device.
    pub fn has_device(&self) -> bool {
        self.device.is_some()
    }

    /// What the balloon leaves the guest; `None` without a balloon device.
    pub fn actual_kb(&mut self) -> Result<Option<u64>, QmpError> {
        if self.device.is_none() {
            return Ok(None);
        }
        Ok(Some(self.client.execute(&QueryBalloon {})?.actual / 1024))
    }

    /// Asks the guest to be so large.
    pub fn set_kb(&mut self, kb: u64) -> Result<(), QmpError> {
        let value = kb.saturating_mul(1024);
        self.client.execute(&SetBalloon { value }).map(|_| ())
    }

    /// What the driver told last; `None` where no driver ever told anything.
    pub fn stats(&mut self) -> Result<Option<GuestStats>, QmpError> {
        let Some(path) = &self.device else {
            return Ok(None);
        };
        let value = match self.client.execute(&QomGet {
            path,
            property: STATS,
        }) {
            Ok(value) => value,
            // QEMU has no figures to tell before the driver's first ones.
            Err(error) if error.is_refusal() => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(GuestStats::told(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{json, Map};

    const NAMES: [&str; 7] = [
        "stat-total-memory",
        "stat-free-memory",
        "stat-available-memory",
        "stat-disk-caches",
        "stat-swap-in",
        "stat-swap-out",
        "stat-major-faults",
    ];

    /// A figure as a QEMU may tell it, and what it comes to.
    fn figure() -> impl Strategy<Value = (Value, Option<u64>)> {
        prop_oneof![
            6 => (0..u64::MAX).prop_map(|n| (json!(n), Some(n))),
            1 => Just((json!(u64::MAX), None)),
            1 => any::<i64>().prop_map(|n| (json!(n), u64::try_from(n).ok())),
            1 => any::<f64>().prop_map(|n| (json!(n), None)),
            1 => "\\PC{0,5}".prop_map(|text| (json!(text), None)),
            1 => Just((json!([7]), None)),
            1 => Just((Value::Null, None)),
        ]
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let word = "stats|last-update|stat-free-memory|\\PC{0,4}";
        let leaf = prop_oneof![
            figure().prop_map(|(value, _)| value),
            word.prop_map(Value::from)
        ];
        leaf.prop_recursive(3, 24, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map(word, inner, 0..4)
                    .prop_map(|map| Value::from(map.into_iter().collect::<Map<_, _>>())),
            ]
        })
    }

    proptest! {
        #[test]
        fn each_figure_is_that_of_its_name(
            told in prop::collection::vec(prop::option::weighted(0.8, figure()), NAMES.len()),
            noise in prop::collection::hash_map("stat-[a-z]{1,9}|[0-9]{1,4}", figure(), 0..4),
            at in 0u64..1 << 40,
        ) {
            let mut stats = Map::new();
            stats.extend(noise.into_iter().map(|(name, (value, _))| (name, value)));
            for (name, told) in NAMES.iter().zip(&told) {
                stats.remove(*name);
                if let Some((value, _)) = told {
                    stats.insert((*name).into(), value.clone());
                }
            }
            let read = GuestStats::told(json!({ "stats": stats, "last-update": at }));
            let bytes: Vec<_> = told.iter().map(|told| told.as_ref().and_then(|(_, n)| *n)).collect();
            let kb = |nth: usize| bytes[nth].map(|bytes: u64| bytes / 1024);
            let expected = GuestStats {
                last_update_s: at,
                total_kb: kb(0),
                free_kb: kb(1),
                available_kb: kb(2),
                caches_kb: kb(3),
                swap_in_kb: kb(4),
                swap_out_kb: kb(5),
                major_faults: bytes[6],
            };
            // Before the driver told anything there is no time of it.
            prop_assert_eq!(read, (at > 0).then_some(expected));
            if let Some(net) = expected.swapped_out_kb() {
                prop_assert!(net <= kb(5).unwrap());
            }
        }

        #[test]
        fn no_answer_does_harm(value in any_value()) {
            let parts = match &value {
                // serde takes a list for a struct, in the order of its fields.
                Value::Array(list) if list.len() == 2 => (&list[0], &list[1]),
                other => (&other["stats"], &other["last-update"]),
            };
            let plain = parts.0.is_object() && parts.1.as_u64() > Some(0);
            prop_assert_eq!(GuestStats::told(value).is_some(), plain);
        }
    }
}
