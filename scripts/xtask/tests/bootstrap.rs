// SPDX-License-Identifier: GPL-2.0

//! `scripts/bootstrap` where it cannot go on: one line that says what is missing.

use std::path::Path;
use std::process::Command;

/// What it says with these variables, where HOME is a directory that there is.
fn says(home: Option<&Path>, variables: &[(&str, &str)]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bootstrap");
    let mut command = Command::new("timeout");
    command.arg("20").arg(script).arg("kdir");
    for name in ["HOME", "XDG_CACHE_HOME"] {
        command.env_remove(name);
    }
    command.envs(home.map(|home| ("HOME", home)));
    let out = command.envs(variables.iter().copied()).output().unwrap();
    let text = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert_eq!(text.lines().count(), 1, "more than one line: {text}");
    text
}

#[test]
fn no_place_for_the_cache_is_told() {
    let text = says(None, &[]);
    assert!(
        text.contains("neither HOME nor XDG_CACHE_HOME is set"),
        "{text}"
    );
    let text = says(None, &[("XDG_CACHE_HOME", "/proc/nowhere")]);
    assert!(text.contains("the cache /proc/nowhere/thinram"), "{text}");
}

#[test]
fn too_little_room_is_told_before_anything_is_fetched() {
    let home = std::env::temp_dir().join(format!("bootstrap-{}", std::process::id()));
    std::fs::create_dir_all(&home).unwrap();
    let mirror = ("THINRAM_MIRROR", "http://mirror.invalid/debian");
    let text = says(Some(&home), &[("THINRAM_ROOM", "999999999"), mirror]);
    assert!(text.contains("999999999 are needed"), "{text}");
    assert!(text.contains("or set XDG_CACHE_HOME"), "{text}");
    std::fs::remove_dir_all(&home).unwrap();
}
