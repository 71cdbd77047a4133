// SPDX-License-Identifier: GPL-2.0

//! Where things lie inside the sysroot, and which kernel is used.

use anyhow::{bail, Context, Result};
use std::path::{Path, PathBuf};

/// The checkout, as `scripts/bootstrap` binds it.
pub const SRC: &str = "/src";
/// The cache: safe to delete, shared by all checkouts of this user.
pub const CACHE: &str = "/cache";
/// The compiler that CONFIG_CC_VERSION_TEXT of the stock kernel names.
pub const CC: &str = "CC=x86_64-linux-gnu-gcc-14";

/// A path below the checkout.
pub fn src(rel: impl AsRef<Path>) -> PathBuf {
    Path::new(SRC).join(rel)
}

/// A path below the cache.
pub fn cache(rel: impl AsRef<Path>) -> PathBuf {
    Path::new(CACHE).join(rel)
}

/// A path below `target/`: what belongs to this checkout.
pub fn target(rel: impl AsRef<Path>) -> PathBuf {
    src("target").join(rel)
}

/// Fails outside the sysroot, where none of the paths above exist.
pub fn require_sysroot() -> Result<()> {
    if std::env::var_os("THINRAM_SYSROOT").is_none() {
        bail!("cargo xtask runs inside the sysroot: use `scripts/bootstrap ARGS` or `make`");
    }
    Ok(())
}

/// True on a build server, where nobody watches a terminal.
pub fn ci() -> bool {
    std::env::var_os("CI").is_some()
}

/// Reads a small text file, trimmed; the error names it.
pub fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    Ok(text.trim().to_string())
}

/// Writes a file, making its folder.
pub fn write(path: impl AsRef<Path>, text: impl AsRef<[u8]>) -> Result<()> {
    let path = path.as_ref();
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
    }
    std::fs::write(path, text).with_context(|| format!("{}", path.display()))
}

/// The release of the kernel that runs now.
pub fn output_of_uname() -> Result<String> {
    read("/proc/sys/kernel/osrelease")
}

/// The processors that long builds use.
pub fn jobs() -> String {
    let n = std::thread::available_parallelism().map_or(1, usize::from);
    format!("-j{n}")
}

/// A Debian kernel: what `uname -r` says, and the package version it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// `7.3.4+deb13-amd64`
    pub abi: String,
    /// `7.3.4-1~bpo13+1`
    pub version: String,
}

impl Kernel {
    /// The version in characters that make and shells leave alone.
    pub fn slug(&self) -> String {
        self.version
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || c == '.' {
                    c
                } else {
                    '-'
                }
            })
            .collect()
    }
    /// The unpacked, unbuilt source.
    pub fn source(&self) -> PathBuf {
        cache(format!("linux-{}", self.slug()))
    }
    /// The stock kernel's files, unpacked: `usr/lib/modules/ABI/...`.
    pub fn stock(&self) -> PathBuf {
        cache(format!("stock-{}", self.abi))
    }
    /// The stock kernel's modules folder.
    pub fn modules(&self) -> PathBuf {
        self.stock().join("usr/lib/modules").join(&self.abi)
    }
    /// The stock kernel's image.
    pub fn vmlinuz(&self) -> PathBuf {
        self.modules().join("vmlinuz")
    }
    /// A build directory for external modules of the stock kernel.
    pub fn kdir(&self) -> PathBuf {
        cache(format!("kdir-{}", self.abi))
    }
}

#[cfg(test)]
mod tests {
    use super::Kernel;

    #[test]
    fn slug_is_safe_in_make() {
        let k = Kernel {
            abi: "7.3.4+deb13-amd64".into(),
            version: "7.3.4-1~bpo13+1".into(),
        };
        assert_eq!(k.slug(), "7.3.4-1-bpo13-1");
    }
}
