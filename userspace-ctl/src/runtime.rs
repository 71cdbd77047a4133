// SPDX-License-Identifier: GPL-2.0

//! What the daemon was told while it ran: VMs added, changed and removed, sizes by hand, and
//! reservations.
//!
//! It lies over the configuration file, which nobody but the operator writes. It is kept below
//! `/run`, so that it outlives the daemon and a reload but not the host.

use crate::admission::Reservations;
use crate::config::{self, Config, VmConfig};
use crate::files;
use crate::text::escape;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Value that takes a setting away, so that its default holds.
pub const DEFAULT: &str = "default";

/// What was told about one VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// The file's table of it is passed over.
    #[serde(default)]
    pub removed: bool,
    /// Settings, as an operator writes them; [`DEFAULT`] takes the file's away.
    #[serde(default)]
    pub set: BTreeMap<String, String>,
}

/// All that was told.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Runtime {
    /// By VM.
    #[serde(default)]
    pub vms: BTreeMap<String, Told>,
    /// Sizes by hand, in KiB.
    #[serde(default)]
    pub sizes: BTreeMap<String, u64>,
    /// What is kept for VMs that start; their time is in seconds since 1970.
    #[serde(default)]
    pub reservations: Reservations,
}

/// Where it is kept.
pub fn path(root: &Path) -> PathBuf {
    root.join("run/thinramctl.json")
}

impl Runtime {
    /// Reads it; nothing where there is no file. An error is a sentence.
    pub fn load(path: &Path) -> Result<Self, String> {
        match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| format!("{}: {error}", path.display())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(format!("cannot read {}: {error}", path.display())),
        }
    }

    /// Replaces the file, all at once.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        files::replace_private(path, self)
    }

    /// The configuration with what was told laid over it, and what of that does not fit any more.
    pub fn over(&self, file: &Config) -> (Config, Vec<String>) {
        let mut config = file.clone();
        let mut misfits = Vec::new();
        for (name, told) in &self.vms {
            if told.removed {
                config.vms.retain(|vm| vm.name != *name);
            }
            if told.set.is_empty() {
                continue;
            }
            match self.vm(file, name) {
                Ok(vm) => match config.vms.iter_mut().find(|old| old.name == *name) {
                    Some(old) => *old = vm,
                    None => config.vms.push(vm),
                },
                Err(error) => misfits.push(format!("VM {}: {error}", escape(name.as_bytes()))),
            }
        }
        (config, misfits)
    }

    /// One VM with what was told about it.
    fn vm(&self, file: &Config, name: &str) -> Result<VmConfig, String> {
        let told = self.vms.get(name);
        let from_file = file
            .vm(name)
            .filter(|_| told.is_none_or(|told| !told.removed));
        let mut settings = from_file.map(|vm| vm.given.clone()).unwrap_or_default();
        for (key, value) in told.into_iter().flat_map(|told| &told.set) {
            if value == DEFAULT {
                settings.remove(key);
            } else {
                settings.insert(key.clone(), value.clone());
            }
        }
        config::vm_from_settings(name, &settings)
    }

    /// Adds a VM that is not in `now`, the configuration that holds.
    pub fn add(
        &mut self,
        file: &Config,
        now: &Config,
        name: &str,
        settings: &BTreeMap<String, String>,
    ) -> Result<(), String> {
        if now.vm(name).is_some() {
            return Err(format!("VM {name} is there already: change it with vm set"));
        }
        let before = self.vms.insert(
            name.to_owned(),
            Told {
                removed: file.vm(name).is_some(),
                set: settings.clone(),
            },
        );
        self.checked(file, name, before)
    }

    /// Changes a setting of a VM that is in the configuration.
    pub fn set(&mut self, file: &Config, name: &str, key: &str, value: &str) -> Result<(), String> {
        let before = self.vms.get(name).cloned();
        let told = self.vms.entry(name.to_owned()).or_default();
        told.set.insert(key.to_owned(), value.to_owned());
        self.checked(file, name, before)
    }

    /// Keeps what was changed about a VM if it is good, else puts it back.
    fn checked(&mut self, file: &Config, name: &str, before: Option<Told>) -> Result<(), String> {
        let checked = self
            .vm(file, name)
            .and_then(|_| match self.over(file).0.shared_socket() {
                Some((_, error)) => Err(error),
                None => Ok(()),
            });
        if checked.is_err() {
            match before {
                Some(told) => self.vms.insert(name.to_owned(), told),
                None => self.vms.remove(name),
            };
        }
        checked
    }

    /// Removes a VM.
    pub fn remove(&mut self, file: &Config, name: &str) {
        if file.vm(name).is_some() {
            let told = Told {
                removed: true,
                set: BTreeMap::new(),
            };
            self.vms.insert(name.to_owned(), told);
        } else {
            self.vms.remove(name);
        }
        self.sizes.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Reservation;
    use proptest::prelude::*;

    fn file() -> Config {
        Config::parse(
            "[[vm]]\nname = 'a'\ndynamic_min = '1G'\ndynamic_max = '2G'\npriority = 7\namr = true\n\
             entitlement = '1G'\n",
        )
        .unwrap()
    }

    fn settings(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn a_vm_is_changed_and_keeps_the_rest() {
        let file = file();
        let mut runtime = Runtime::default();
        runtime.set(&file, "a", "dynamic_max", "4G").unwrap();
        let (config, misfits) = runtime.over(&file);
        assert!(misfits.is_empty());
        let vm = config.vm("a").unwrap();
        assert_eq!(
            (vm.dynamic_max_kb, vm.static_max_kb, vm.priority, vm.amr),
            (4 << 20, 4 << 20, 7, true)
        );
        runtime.set(&file, "a", "priority", DEFAULT).unwrap();
        assert_eq!(runtime.over(&file).0.vm("a").unwrap().priority, 1);

        let good = runtime.clone();
        for (key, value, said) in [
            ("dynamic_min", "8G", "is above dynamic_max"),
            ("dynamic_min", "lots", "`lots` is no size"),
            ("frob", "1", "`frob` is no setting of a VM"),
            ("amr", "maybe", "`maybe`"),
            ("guest_control", "on", "guest_control excludes amr"),
            ("priority", "-3", "`-3`"),
            ("policy", "fair", "unknown variant `fair`"),
            ("dynamic_min", DEFAULT, "dynamic_min is missing"),
        ] {
            let error = runtime.set(&file, "a", key, value).unwrap_err();
            assert!(error.contains(said), "{key} {value}: {error}");
            assert_eq!(runtime, good);
        }
    }

    #[test]
    fn a_vm_is_added_and_removed() {
        let file = file();
        let mut runtime = Runtime::default();
        let both = settings(&[("dynamic_min", "1G"), ("dynamic_max", "3G"), ("amr", "off")]);
        runtime.add(&file, &file, "b", &both).unwrap();
        let now = runtime.over(&file).0;
        assert_eq!(now.vms.len(), 2);
        assert!(runtime
            .add(&file, &now, "b", &both)
            .unwrap_err()
            .contains("already"));
        assert!(runtime.add(&file, &now, "a", &both).is_err());
        assert!(runtime.add(&file, &now, "x/y", &both).is_err());
        let mut socket = both.clone();
        socket.insert("qmp".into(), "/run/q".into());
        runtime.set(&file, "b", "qmp", "/run/q").unwrap();
        let error = runtime.add(&file, &now, "d", &socket).unwrap_err();
        assert!(error.contains("socket of VM `b` as well"), "{error}");
        assert!(!runtime.vms.contains_key("d"));
        assert!(runtime.add(&file, &now, "c", &settings(&[])).is_err());
        runtime.remove(&file, "b");
        runtime.remove(&file, "a");
        assert!(runtime.over(&file).0.vms.is_empty());
        // Added again, the file's table counts no more.
        runtime
            .add(&file, &Config::parse("").unwrap(), "a", &both)
            .unwrap();
        let now = runtime.over(&file).0;
        assert_eq!(
            (now.vms[0].priority, now.vms[0].dynamic_max_kb),
            (1, 3 << 20)
        );
    }

    #[test]
    fn what_does_not_fit_a_new_file_is_said_and_left_out() {
        let mut runtime = Runtime::default();
        runtime.set(&file(), "a", "entitlement", "2G").unwrap();
        let smaller = "[[vm]]\nname = 'a'\ndynamic_min = '512M'\ndynamic_max = '1G'\n";
        let smaller = Config::parse(smaller).unwrap();
        let (config, misfits) = runtime.over(&smaller);
        assert_eq!(config, smaller);
        assert!(
            misfits[0].contains("entitlement (2G) is not within"),
            "{misfits:?}"
        );
    }

    #[test]
    fn kept_in_a_file() {
        let dir = tempfile::TempDir::new().unwrap();
        let file = dir.path().join("run.json");
        assert_eq!(Runtime::load(&file), Ok(Runtime::default()));
        let mut runtime = Runtime::default();
        runtime.sizes.insert("a".into(), 7);
        runtime.save(&file).unwrap();
        assert_eq!(Runtime::load(&file), Ok(runtime));
        fs::write(&file, "{").unwrap();
        assert!(Runtime::load(&file).unwrap_err().contains("run.json: EOF"));
    }

    fn any_runtime() -> impl Strategy<Value = Runtime> {
        let name = || "[ab]|[a-z0-9-]{1,8}|\\PC{0,6}";
        let key = prop_oneof![
            4 => prop::sample::select(&["entitlement", "dynamic_min", "dynamic_max", "qmp"][..])
                .prop_map(String::from),
            1 => "\\PC{0,9}",
        ];
        let set = prop::collection::btree_map(key, "default|[0-9]{1,4}[MG]|\\PC{0,9}", 0..4);
        let told = (any::<bool>(), set).prop_map(|(removed, set)| Told { removed, set });
        let reservation = (name(), any::<u64>(), 0u32..1 << 30, any::<bool>());
        (
            prop::collection::btree_map(name(), told, 0..5),
            prop::collection::btree_map(name(), any::<u64>(), 0..4),
            prop::collection::vec(reservation, 0..4),
        )
            .prop_map(|(vms, sizes, kept)| {
                let mut reservations = Reservations::default();
                for (name, min_kb, eighths, admitted) in kept {
                    reservations.put(Reservation {
                        name,
                        min_kb,
                        until_s: f64::from(eighths) / 8.0,
                        admitted,
                    });
                }
                Runtime {
                    vms,
                    sizes,
                    reservations,
                }
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_was_told_is_read_again(runtime in any_runtime(), cut in 0usize..100) {
            let dir = tempfile::TempDir::new().unwrap();
            let path = dir.path().join("run.json");
            runtime.save(&path).unwrap();
            prop_assert_eq!(Runtime::load(&path), Ok(runtime));
            // Cut anywhere, it is refused, and by its name.
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() * cut / 100]).unwrap();
            prop_assert!(Runtime::load(&path).unwrap_err().contains("run.json: "));
        }

        #[test]
        fn what_was_told_holds_or_is_named(runtime in any_runtime()) {
            let file = file();
            let (config, misfits) = runtime.over(&file);
            for (name, told) in &runtime.vms {
                let vm = config.vm(name);
                let misfit = misfits.iter().any(|said| said.starts_with(&format!("VM {}: ", escape(name.as_bytes()))));
                if told.set.is_empty() {
                    let stays = file.vm(name).filter(|_| !told.removed);
                    prop_assert_eq!(vm, stays);
                } else {
                    let given = vm.is_some_and(|vm| {
                        let mut kept = told.set.iter().filter(|(_, value)| *value != DEFAULT);
                        kept.all(|(key, value)| vm.given.get(key) == Some(value))
                    });
                    prop_assert!(given || misfit, "{} {:?}", name, told);
                }
            }
            let told = |vm: &&VmConfig| !runtime.vms.contains_key(&vm.name);
            let untold: Vec<_> = config.vms.iter().filter(told).collect();
            prop_assert_eq!(untold, file.vms.iter().filter(told).collect::<Vec<_>>());
        }

        #[test]
        fn no_file_does_harm(
            bytes in prop::collection::vec(any::<u8>(), 0..100),
            text in "(\\{|\\}|\"vms\":|\"sizes\":|\"reservations\":|\"a\":|\"set\":|1e999|-1|7|,|\\PC){0,12}",
        ) {
            let dir = tempfile::TempDir::new().unwrap();
            let path = dir.path().join("run.json");
            for bytes in [&bytes[..], text.as_bytes()] {
                fs::write(&path, bytes).unwrap();
                match Runtime::load(&path) {
                    // What is taken says the same when it is written.
                    Ok(runtime) => {
                        runtime.save(&path).unwrap();
                        prop_assert_eq!(Runtime::load(&path), Ok(runtime));
                    }
                    Err(said) => prop_assert!(said.contains("run.json: "), "{}", said),
                }
            }
        }
    }
}
