// SPDX-License-Identifier: GPL-2.0

//! `scripts/preflight` against build directories that lack one thing each.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const VERSION: &str = "rustc 1.85.1 (4eb161250 2025-03-15) (built from a source tarball)";

struct Host {
    dir: PathBuf,
}

impl Host {
    /// A build directory and tools with which everything is fine.
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("preflight-{name}-{}", std::process::id()));
        fs::create_dir_all(dir.join("kdir/rust")).unwrap();
        let host = Self { dir };
        host.config(&format!(
            "CONFIG_RUST=y\nCONFIG_RUSTC_VERSION_TEXT=\"{VERSION}\"\n\
             CONFIG_BINDGEN_VERSION_TEXT=\"bindgen 0.71.1\"\n"
        ));
        fs::write(host.dir.join("kdir/rust/libkernel.rmeta"), "").unwrap();
        host.tool("rustc", VERSION);
        host.tool("bindgen", "bindgen 0.71.1");
        host
    }

    fn config(&self, text: &str) {
        fs::write(self.dir.join("kdir/.config"), text).unwrap();
    }

    fn tool(&self, name: &str, says: &str) {
        let path = self.dir.join(name);
        fs::write(&path, format!("#!/bin/sh\necho '{says}'\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.dir.join(name)).unwrap();
    }

    /// What it complains of; None if it does not.
    fn check(&self, kdir: &str) -> Option<String> {
        self.check_with(kdir, &[])
    }

    /// The same with these variables as well.
    fn check_with(&self, kdir: &str, variables: &[(&str, &str)]) -> Option<String> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../preflight");
        let out = Command::new(script)
            .env("KDIR", self.dir.join(kdir))
            .env("KVER", "7.3.4+deb13-amd64")
            .env("RUSTC", self.dir.join("rustc"))
            .env("BINDGEN", self.dir.join("bindgen"))
            .env("SRC", "/src")
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let text = String::from_utf8(out.stderr).unwrap();
        if out.status.success() {
            assert_eq!(text, "");
            return None;
        }
        assert_eq!(text.lines().count(), 1, "more than one line: {text}");
        Some(text)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

#[test]
fn a_complete_host_passes() {
    assert_eq!(Host::new("good").check("kdir"), None);
}

#[test]
fn a_missing_directory_names_the_package() {
    let text = Host::new("nodir").check("nowhere").unwrap();
    assert!(text.contains("nowhere does not exist"), "{text}");
    assert!(text.contains("linux-headers-7.3.4+deb13-amd64"), "{text}");
}

#[test]
fn a_kernel_without_rust_is_refused() {
    let host = Host::new("norust");
    host.config("CONFIG_RUST_IS_AVAILABLE=y\n");
    assert!(host.check("kdir").unwrap().contains("CONFIG_RUST=y"));
    host.remove("kdir/.config");
    assert!(host.check("kdir").unwrap().contains("no .config"));
}

#[test]
fn headers_without_metadata_lead_to_make_kdir() {
    let host = Host::new("rmeta");
    host.remove("kdir/rust/libkernel.rmeta");
    assert!(host.check("kdir").unwrap().contains("make kdir"));
}

#[test]
fn tools_of_another_system_are_noticed() {
    let host = Host::new("tools");
    fs::create_dir_all(host.dir.join("kdir/scripts/mod")).unwrap();
    let modpost = host.dir.join("kdir/scripts/mod/modpost");
    fs::copy("/bin/true", &modpost).unwrap();
    assert_eq!(host.check("kdir"), None);
    // A library of that name is nowhere.
    let mut program = fs::read(&modpost).unwrap();
    let at = program.windows(9).position(|w| w == b"libc.so.6").unwrap();
    program[at + 3] = b'z';
    fs::write(&modpost, program).unwrap();
    let text = host.check("kdir").unwrap();
    assert!(
        text.contains("do not run") && text.contains("make module"),
        "{text}"
    );
}

#[test]
fn another_rustc_is_named_with_the_one_that_is_wanted() {
    let host = Host::new("rustc");
    host.tool("rustc", "rustc 1.90.0 (abc 2025-09-01)");
    let text = host.check("kdir").unwrap();
    assert!(text.contains("1.90.0") && text.contains(VERSION), "{text}");
    host.remove("rustc");
    assert!(host.check("kdir").unwrap().contains("'none'"));
}

#[test]
fn only_the_first_line_of_another_rustc_is_shown() {
    let host = Host::new("lines");
    host.tool("rustc", "something else\nof two lines");
    let text = host.check("kdir").unwrap();
    assert!(text.contains("'something else'"), "{text}");
}

#[test]
fn paths_that_the_kernel_splits_are_refused() {
    let host = Host::new("paths");
    fs::create_dir_all(host.dir.join("a b")).unwrap();
    assert!(host.check("a b").unwrap().contains("a b' has a space"));
    for (variable, value, says) in [
        (
            "SRC",
            "/home/me/thin ram",
            "checkout '/home/me/thin ram' has a space",
        ),
        ("SRC", "/home/me/a:b", "has a space or colon"),
        ("KDIR", "", "KDIR= is empty"),
        ("DESTDIR", "/tmp/a b", "DESTDIR= '/tmp/a b' has a space"),
        ("DESTDIR", "here", "DESTDIR='here' is no absolute path"),
        ("PREFIX", "usr", "PREFIX='usr' is no absolute path"),
    ] {
        let text = host.check_with("kdir", &[(variable, value)]);
        let text = text.unwrap_or_else(|| panic!("{variable}={value} passes"));
        assert!(text.contains(says), "{text}");
    }
    let good = [("DESTDIR", "/tmp/root"), ("PREFIX", "/usr")];
    assert_eq!(host.check_with("kdir", &good), None);
}

#[test]
fn a_missing_bindgen_is_named() {
    let host = Host::new("bindgen");
    host.remove("bindgen");
    let text = host.check("kdir").unwrap();
    assert!(
        text.contains("bindgen is missing") && text.contains("0.71.1"),
        "{text}"
    );
}
