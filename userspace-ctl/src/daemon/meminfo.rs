// SPDX-License-Identifier: GPL-2.0

//! The host's memory, from `/proc/meminfo`.

use crate::snapshot::HostSample;
use std::fs;
use std::path::Path;

/// Reads it; an error is a sentence.
pub fn read(root: &Path) -> Result<HostSample, String> {
    let path = root.join("proc/meminfo");
    let text = fs::read_to_string(&path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let figure = |name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|value| value.trim().strip_suffix(" kB")?.parse().ok())
            .ok_or_else(|| format!("{} has no figure {name}", path.display()))
    };
    Ok(HostSample {
        total_kb: figure("MemTotal")?,
        available_kb: figure("MemAvailable")?,
        reserved_kb: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn figures_and_what_is_missing() {
        let dir = tempfile::TempDir::new().unwrap();
        assert!(read(dir.path()).unwrap_err().contains("cannot read"));
        fs::create_dir(dir.path().join("proc")).unwrap();
        let file = dir.path().join("proc/meminfo");
        fs::write(
            &file,
            "MemTotal:       16 kB\nMemFree:   1 kB\nMemAvailable:    7 kB\n",
        )
        .unwrap();
        assert_eq!(
            read(dir.path()),
            Ok(HostSample {
                total_kb: 16,
                available_kb: 7,
                reserved_kb: 0,
            })
        );
        fs::write(&file, "MemTotal:       16 kB\nMemAvailable: many kB\n").unwrap();
        assert!(read(dir.path())
            .unwrap_err()
            .contains("has no figure MemAvailable"));
        assert!(read(Path::new("/")).is_ok());
    }

    proptest! {
        #[test]
        fn figures_or_the_name_of_what_is_missing(text in "((MemTotal|MemAvailable|MemFree): {0,3}[0-9x]{0,22}( kB)?\n){0,5}") {
            let dir = tempfile::TempDir::new().unwrap();
            fs::create_dir(dir.path().join("proc")).unwrap();
            fs::write(dir.path().join("proc/meminfo"), &text).unwrap();
            match read(dir.path()) {
                Ok(sample) => {
                    for (name, kb) in [("MemTotal", sample.total_kb), ("MemAvailable", sample.available_kb)] {
                        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
                        let digits = line.trim_start_matches(|c: char| !c.is_ascii_digit());
                        prop_assert_eq!(digits.trim_end_matches(" kB").parse(), Ok(kb));
                    }
                }
                Err(error) => prop_assert!(error.contains("has no figure Mem"), "{}", error),
            }
        }
    }
}
