// SPDX-License-Identifier: GPL-2.0

//! The steps from an empty cache to kernels that boot: packages, sources, the
//! stock kernel, a KDIR for modules, User-Mode Linux, the small guest kernel.

use crate::env::{cache, jobs, read, src, target, write, Kernel, CC};
use crate::step::{lock, output, run, say, stamp, step, tied};
use anyhow::{bail, Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The stock kernel that ThinRAM is tested with.
const PIN: &str = "7.3.4+deb13-amd64";
/// The series to look in when the mirror has dropped the pin.
const SERIES: &str = "7.3";

const TOOLS: &[&str] = &[
    "bc",
    "bindgen",
    "binutils",
    "bison",
    "busybox-static",
    "clang",
    "cpio",
    "e2fsprogs",
    "flex",
    "gcc-14",
    "gdb",
    "iproute2",
    "kmod",
    "libclang-dev",
    "libdw-dev",
    "libelf-dev",
    "libssl-dev",
    "libvirt-clients",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "lld",
    "llvm",
    "pahole",
    "perl-base",
    "procps",
    "python3",
    "rsync",
    "rust-src",
    "strace",
    "xz-utils",
    "zstd",
];

/// Packages inside the sysroot, then the kernel that they brought.
pub fn packages() -> Result<Kernel> {
    let stamp = Path::new("/var/lib/thinram/packages");
    let inputs = format!("{PIN} {SERIES} {}", TOOLS.join(" "));
    step("packages", stamp, &inputs, || {
        let log = cache("logs/packages.log");
        run(&log, apt().arg("update"))?;
        let kernel = choose()?;
        let common = ["install", "-y", "--no-install-recommends"];
        run(&log, apt().args(common).args(TOOLS))?;
        run(
            &log,
            apt()
                .args(common)
                .args(["-t", "trixie-backports", "qemu-system-x86"])
                .args([
                    format!("linux-source-{SERIES}={}", kernel.version),
                    format!("linux-headers-{}={}", kernel.abi, kernel.version),
                ]),
        )?;
        run(&log, apt().arg("clean"))?;
        write(
            "/var/lib/thinram/kernel",
            format!("{} {}", kernel.abi, kernel.version),
        )
    })?;
    let text = read("/var/lib/thinram/kernel")?;
    let (abi, version) = text
        .split_once(' ')
        .context("/var/lib/thinram/kernel is damaged")?;
    Ok(Kernel {
        abi: abi.into(),
        version: version.into(),
    })
}

fn apt() -> Command {
    let mut c = tied("apt-get");
    c.args([
        "-q",
        "-o",
        "APT::Sandbox::User=root",
        "-o",
        "Acquire::Retries=3",
    ]);
    c
}

/// The pinned kernel where the mirror has it and its source, else the newest of the series.
fn choose() -> Result<Kernel> {
    let sources = versions(&format!("linux-source-{SERIES}"))?;
    let names = output(Command::new("apt-cache").args(["pkgnames", "linux-headers-7."]))?;
    let mut found = Vec::new();
    for name in names.lines() {
        let Some(abi) = name.strip_prefix("linux-headers-") else {
            continue;
        };
        let wanted = abi.starts_with(&format!("{SERIES}."))
            && abi.ends_with("-amd64")
            && !abi.contains("-rt-")
            && !abi.contains("-cloud-");
        if !wanted {
            continue;
        }
        for version in versions(name)? {
            if sources.contains(&version) {
                found.push(Kernel {
                    abi: abi.into(),
                    version,
                });
            }
        }
    }
    pick(found)
}

fn pick(mut found: Vec<Kernel>) -> Result<Kernel> {
    found.sort_by_key(|k| (number(&k.version), k.version.clone()));
    if let Some(pinned) = found.iter().rev().find(|k| k.abi == PIN) {
        return Ok(pinned.clone());
    }
    let Some(newest) = found.pop() else {
        bail!("the mirror has no Debian kernel {SERIES} with its source in trixie-backports");
    };
    say(format!(
        "the mirror has no kernel {PIN}: using {} instead",
        newest.abi
    ));
    Ok(newest)
}

/// The patch level of `7.3.12-1~bpo13+1`, so that 7.3.12 is newer than 7.3.4.
fn number(version: &str) -> u32 {
    let upstream = version.split('-').next().unwrap_or("");
    upstream
        .rsplit('.')
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

fn versions(package: &str) -> Result<Vec<String>> {
    let text = output(Command::new("apt-cache").args(["madison", package]))?;
    let version = |l: &str| l.split('|').nth(1).map(|v| v.trim().to_string());
    Ok(text.lines().filter_map(version).collect())
}

/// Makes a directory at `dest` through a temporary name, so that it is whole or absent.
fn whole(dest: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let name = dest.file_name().context("a directory without a name")?;
    let tmp = dest.with_file_name(format!("tmp-{}", name.to_string_lossy()));
    for dir in [&tmp, dest] {
        if dir.exists() {
            fs::remove_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
        }
    }
    fs::create_dir_all(&tmp)?;
    fill(&tmp)?;
    fs::rename(&tmp, dest).with_context(|| format!("{}", dest.display()))
}

/// The kernel's source, unpacked.
pub fn source(k: &Kernel) -> Result<PathBuf> {
    let dest = k.source();
    let name = format!("source of linux {}", k.version);
    let stamp = stamp(&format!("linux-{}", k.slug()));
    step(&name, &stamp, &k.version, || {
        whole(&dest, |tmp| {
            let tarball = format!("/usr/src/linux-source-{SERIES}.tar.xz");
            let mut tar = tied("tar");
            tar.args(["--strip-components=1", "-xf", &tarball, "-C"])
                .arg(tmp);
            run(cache("logs/source.log"), &mut tar)
        })
    })?;
    Ok(dest)
}

/// A tree of its own that shares its files with the source until they are replaced.
fn tree(k: &Kernel, dest: &Path) -> Result<()> {
    let from = source(k)?;
    whole(dest, |tmp| {
        let mut cp = tied("cp");
        cp.arg("-alT").arg(&from).arg(tmp);
        run(cache("logs/tree.log"), &mut cp)
    })
}

/// Packages of the mirror, unpacked into a directory and not installed.
fn unpack(log: &Path, dir: &Path, packages: &[impl AsRef<std::ffi::OsStr>]) -> Result<()> {
    let debs = dir.join("debs");
    fs::create_dir(&debs)?;
    run(log, apt().arg("download").args(packages).current_dir(&debs))?;
    for deb in fs::read_dir(&debs)? {
        run(log, tied("dpkg-deb").arg("-x").arg(deb?.path()).arg(dir))?;
    }
    fs::remove_dir_all(&debs).with_context(|| format!("{}", debs.display()))
}

/// A package of which only files are needed, by a few tests: unpacked in the cache.
pub fn unpacked(package: &str) -> Result<PathBuf> {
    let dest = cache(format!("package-{package}"));
    let name = format!("package {package}");
    step(&name, &stamp(&format!("package-{package}")), "", || {
        whole(&dest, |tmp| {
            let log = cache("logs/unpacked.log");
            run(&log, apt().arg("update"))?;
            unpack(&log, tmp, &[package])
        })
    })?;
    Ok(dest)
}

/// The stock kernel's image and modules, unpacked (installing would run its hooks).
pub fn stock(k: &Kernel) -> Result<()> {
    let dest = k.stock();
    let name = format!("stock kernel {}", k.abi);
    step(
        &name,
        &stamp(&format!("stock-{}", k.abi)),
        &k.version,
        || {
            whole(&dest, |tmp| {
                let log = cache("logs/stock.log");
                let wanted = ["binary", "modules", "base"]
                    .map(|part| format!("linux-{part}-{}={}", k.abi, k.version));
                unpack(&log, tmp, &wanted)?;
                run(
                    &log,
                    tied("depmod").arg("-b").arg(tmp.join("usr")).arg(&k.abi),
                )
            })
        },
    )?;
    Ok(())
}

/// A build directory for Rust modules of the stock kernel: Debian's headers hold no
/// Rust metadata, so the source is configured as they say and prepared.
pub fn kdir(k: &Kernel) -> Result<PathBuf> {
    let dest = k.kdir();
    let headers = PathBuf::from(format!("/usr/src/linux-headers-{}", k.abi));
    let name = format!("build directory for modules of {} (2 min)", k.abi);
    step(
        &name,
        &stamp(&format!("kdir-{}", k.abi)),
        &k.version,
        || {
            let log = cache("logs/kdir.log");
            if !dest.join("Makefile").exists() {
                tree(k, &dest)?;
            }
            fs::copy(headers.join(".config"), dest.join(".config"))?;
            let release = format!("KERNELRELEASE={}", k.abi);
            let make = || {
                let mut c = tied("make");
                c.arg("-C").arg(&dest).args([CC, &release, &jobs()]);
                c
            };
            run(&log, make().arg("olddefconfig"))?;
            run(&log, make().arg("modules_prepare"))?;
            if !read(dest.join(".config"))?.contains("CONFIG_RUST=y") {
                bail!(
                    "{} lost CONFIG_RUST=y: see {}",
                    dest.display(),
                    log.display()
                );
            }
            fs::copy(headers.join("Module.symvers"), dest.join("Module.symvers"))?;
            Ok(())
        },
    )?;
    Ok(dest)
}

/// The lines of a configuration fragment that have to hold in the end.
fn lost(fragment: &str, config: &str) -> Vec<String> {
    let have: std::collections::HashSet<&str> = config.lines().collect();
    let wanted = |l: &&str| l.starts_with("CONFIG_") || l.ends_with(" is not set");
    let held = |l: &&str| {
        have.contains(l)
            || l.strip_prefix("# ")
                .and_then(|l| l.strip_suffix(" is not set"))
                .is_some_and(|name| !config.lines().any(|c| c.starts_with(&format!("{name}="))))
    };
    fragment
        .lines()
        .filter(wanted)
        .filter(|l| !held(l))
        .map(str::to_string)
        .collect()
}

/// Configures a kernel: a base target, then a fragment, every line of which must hold.
fn configure(
    log: &Path,
    make: &dyn Fn() -> Command,
    build: &Path,
    base: &str,
    fragment: &str,
) -> Result<()> {
    run(log, make().arg(base))?;
    let path = build.join(".config");
    let mut config = fs::read_to_string(&path)?;
    config.push_str(fragment);
    write(&path, config)?;
    run(log, make().arg("olddefconfig"))?;
    let lost = lost(fragment, &read(&path)?);
    if !lost.is_empty() {
        bail!(
            "the kernel's configuration did not accept: {}",
            lost.join(", ")
        );
    }
    Ok(())
}

/// The small guest kernel's image.
pub fn guest_kernel(k: &Kernel) -> Result<PathBuf> {
    let dest = cache("guest");
    let image = dest.join("arch/x86/boot/bzImage");
    let fragment = read(src("scripts/kernel/guest.config"))?;
    let inputs = format!("{}\n{fragment}", k.version);
    step(
        "small guest kernel (6 min)",
        &stamp("guest-kernel"),
        &inputs,
        || {
            let log = cache("logs/guest-kernel.log");
            let source = source(k)?;
            fs::create_dir_all(&dest)?;
            let make = || {
                let mut c = tied("nice");
                c.args(["make", "-C"])
                    .arg(&source)
                    .arg(format!("O={}", dest.display()));
                c.args([CC, &jobs()]);
                c
            };
            configure(&log, &make, &dest, "tinyconfig", &fragment)?;
            run(&log, make().arg("bzImage"))
        },
    )?;
    Ok(image)
}

/// Graphics drivers select this on a PC: the module needs it, and kernels made here have none.
const MODULE_KCONFIG: &str = "\nconfig THINRAM\n\tdef_bool y\n\tselect MAPPING_DIRTY_HELPERS\n";

/// UML accounts CPU time by ticks of 10 ms, longer than what the benchmark measures.
const UML_CLOCK: &str = "\nunsigned long long sched_clock(void)\n{\n\treturn os_nsecs();\n}\n";

/// Where clang puts data of the large code model, the linker script knows nothing of: it would lie
/// behind the end of the kernel, and neither lockdep nor kmemleak would take it for data.
const UML_BSS: [&str; 2] = ["*(.bss .bss.* .gnu", "*(.bss .bss.* .lbss .lbss.* .gnu"];

/// Its flush walks the mappings of processes under a lock of page tables alone, of which PROVE_LOCKING
/// warns: mappings may come and go. They are freed by RCU.
const UML_FLUSH: [&str; 2] = [
    "\tfor_each_vma(vmi, vma)\n\t\tum_tlb_mark",
    "\tguard(rcu)();\n\tfor_each_vma(vmi, vma)\n\t\tum_tlb_mark",
];

/// By how much DEBUG_KOBJECT_RELEASE defers an end: up to a fifth of a second, not one second to four,
/// as each case ends mounts and VMs.
const KOBJECT_DELAY: [&str; 2] = [
    "HZ + HZ * get_random_u32_below(4)",
    "1 + get_random_u32_below(HZ / 5)",
];

/// Where lockdep watches the locks of page tables they are objects of their own, which inlined functions
/// let go: for the module that frees one this has to be exported.
const PTLOCK: &str = "\nEXPORT_SYMBOL_GPL(ptlock_free);\n";

/// A User-Mode Linux with the module built in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uml {
    /// As a distribution would build it.
    Plain,
    /// The same with a module whose protections can be taken out one at a time.
    Debug,
    /// That module, in a kernel that watches memory and locks (KASAN, lockdep and others).
    Kasan,
}

impl Uml {
    /// The executable, in this checkout.
    pub fn image(self) -> PathBuf {
        target(match self {
            Uml::Plain => "uml/linux",
            Uml::Debug => "uml/linux-debug",
            Uml::Kasan => "uml/linux-kasan",
        })
    }

    /// The name of the tree that it is built in, and of its stamp.
    fn tree(self) -> &'static str {
        match self {
            Uml::Plain | Uml::Debug => "uml",
            Uml::Kasan => "uml-kasan",
        }
    }

    fn fragment(self) -> Result<String> {
        match self {
            Uml::Plain | Uml::Debug => read(src("scripts/kernel/uml.config")),
            Uml::Kasan => sanitized("uml"),
        }
    }
}

/// A configuration of scripts/kernel with what watches memory and locks.
fn sanitized(name: &str) -> Result<String> {
    let own = read(src(format!("scripts/kernel/{name}.config")))?;
    Ok(own + "\n" + &read(src("scripts/kernel/sanitizers.config"))?)
}

/// The kernel for x86_64 that watches memory and locks: its image, and where it was built, which is a
/// build directory for modules as well.
pub fn debug_kernel(k: &Kernel) -> Result<(PathBuf, PathBuf)> {
    let dest = debug_tree(k);
    let fragment = sanitized("debug")?;
    let delay = KOBJECT_DELAY.join("\n");
    let inputs = format!("{}\n{fragment}\n{MODULE_KCONFIG}{delay}{PTLOCK}", k.version);
    let log = cache("logs/debug-kernel.log");
    // KASAN and Rust together need clang.
    let make = || {
        let mut c = tied("nice");
        c.args(["make", "-C"]).arg(&dest).args(["LLVM=1", &jobs()]);
        c
    };
    step(
        "debug kernel: configuration",
        &stamp("debug-kernel-config"),
        &inputs,
        || {
            if !dest.join("Makefile").exists() {
                tree(k, &dest)?;
            }
            append(&dest.join("drivers/Kconfig"), MODULE_KCONFIG)?;
            let [from, to] = KOBJECT_DELAY;
            replace(&dest.join("lib/kobject.c"), from, to)?;
            append(&dest.join("mm/memory.c"), PTLOCK)?;
            configure(&log, &make, &dest, "tinyconfig", &fragment)
        },
    )?;
    step(
        "debug kernel: build (tens of minutes)",
        &stamp("debug-kernel"),
        &inputs,
        || run(&log, make().args(["bzImage", "modules"])),
    )?;
    Ok((debug_image(k), dest))
}

fn debug_tree(k: &Kernel) -> PathBuf {
    cache(format!("debug-{}", k.slug()))
}

/// The image of [`debug_kernel`].
pub fn debug_image(k: &Kernel) -> PathBuf {
    debug_tree(k).join("arch/x86/boot/bzImage")
}

/// `target/module-sanitized/thinram.ko` for that kernel, a debug build.
pub fn sanitized_module(k: &Kernel) -> Result<PathBuf> {
    let (_, kdir) = debug_kernel(k)?;
    let out = target("module-sanitized");
    let log = target("module-sanitized.log");
    make_module(&kdir, &out, &log, &["LLVM=1", "THINRAM_DEBUG=y"])
}

/// User-Mode Linux, built.
///
/// The trees are those of all checkouts; the module's files are copied into them by
/// content, so that only what differs is compiled again.
pub fn uml(k: &Kernel, kind: Uml) -> Result<PathBuf> {
    let name = kind.tree();
    let dest = cache(format!("{name}-{}", k.slug()));
    let log = cache(format!("logs/{name}.log"));
    let fragment = kind.fragment()?;
    let mut inputs = format!("{}\n{fragment}\n{MODULE_KCONFIG}{UML_CLOCK}", k.version);
    if kind == Uml::Kasan {
        inputs += &[UML_BSS, UML_FLUSH, KOBJECT_DELAY].concat().join("\n");
    }
    let make = || {
        let mut c = tied("nice");
        c.args(["make", "-C"])
            .arg(&dest)
            .args(["ARCH=um", "THINRAM_BUILTIN=y", &jobs()])
            // KASAN and Rust together need clang.
            .arg(if kind == Uml::Kasan { "LLVM=1" } else { CC })
            .arg(if kind == Uml::Plain {
                "THINRAM_DEBUG="
            } else {
                "THINRAM_DEBUG=y"
            });
        c
    };
    let _lock = lock(name)?;
    step(
        &format!("User-Mode Linux ({name}): configuration"),
        &stamp(name),
        &inputs,
        || {
            if !dest.join("Makefile").exists() {
                tree(k, &dest)?;
            }
            append(&dest.join("drivers/Makefile"), "\nobj-y += thinram/\n")?;
            append(&dest.join("drivers/Kconfig"), MODULE_KCONFIG)?;
            append(&dest.join("arch/um/kernel/time.c"), UML_CLOCK)?;
            if kind == Uml::Kasan {
                let [from, to] = UML_BSS;
                replace(&dest.join("arch/um/kernel/dyn.lds.S"), from, to)?;
                let [from, to] = UML_FLUSH;
                replace(&dest.join("arch/um/kernel/tlb.c"), from, to)?;
                let [from, to] = KOBJECT_DELAY;
                replace(&dest.join("lib/kobject.c"), from, to)?;
            }
            configure(&log, &make, &dest, "defconfig", &fragment)
        },
    )?;
    copy_module(&dest)?;
    let built = dest.join("linux");
    if built.exists() {
        say(format!("User-Mode Linux ({name}): build"));
    } else {
        let minutes = match kind {
            Uml::Kasan => "20",
            _ => "7",
        };
        say(format!(
            "User-Mode Linux ({name}): build (about {minutes} min the first time)"
        ));
    }
    run(&log, make().arg("linux"))?;
    let linux = kind.image();
    fs::create_dir_all(linux.parent().context("target/uml")?)?;
    run(&log, tied("rsync").args(["-c"]).arg(&built).arg(&linux))?;
    Ok(linux)
}

/// Puts the module's sources at drivers/thinram; what is built there stays.
fn copy_module(tree: &Path) -> Result<()> {
    let dir = tree.join("drivers/thinram");
    fs::create_dir_all(&dir)?;
    let mut rsync = tied("rsync");
    rsync.args([
        "-rc",
        "--delete",
        "--exclude=.*",
        "--exclude=*_generated.rs",
    ]);
    rsync.args(
        ["*.o", "*.a", "*.d", "*.mod", "*.order", "*.rmeta"].map(|p| format!("--exclude={p}")),
    );
    run(
        cache("logs/uml-sync.log"),
        rsync
            .arg("--exclude=scenario")
            .arg(src("rust"))
            .arg(src("tests-kunit"))
            .arg(src("Kbuild"))
            .arg(&dir),
    )
}

/// Appends to a file that is shared with another tree, by replacing it.
fn append(path: &Path, extra: &str) -> Result<()> {
    let text = fs::read_to_string(path)?;
    if text.contains(extra) {
        return Ok(());
    }
    let tmp = path.with_extension("tmp");
    write(&tmp, text + extra)?;
    fs::rename(&tmp, path).with_context(|| format!("{}", path.display()))
}

/// Replaces a piece of such a file, which has to be there.
fn replace(path: &Path, from: &str, to: &str) -> Result<()> {
    let text = fs::read_to_string(path)?;
    if text.contains(to) {
        return Ok(());
    }
    if !text.contains(from) {
        bail!("{} has no {from:?}", path.display());
    }
    let tmp = path.with_extension("tmp");
    write(&tmp, text.replace(from, to))?;
    fs::rename(&tmp, path).with_context(|| format!("{}", path.display()))
}

/// `target/module/thinram.ko` for the stock kernel.
pub fn module(k: &Kernel) -> Result<PathBuf> {
    say("module");
    build_module(k, &target("module"), &target("module.log"), &[])
}

/// Builds the module into `out` with further make variables.
pub fn build_module(k: &Kernel, out: &Path, log: &Path, extra: &[&str]) -> Result<PathBuf> {
    let release = format!("KERNELRELEASE={}", k.abi);
    let all: Vec<&str> = [CC, &release].iter().chain(extra).copied().collect();
    make_module(&kdir(k)?, out, log, &all)
}

fn make_module(kdir: &Path, out: &Path, log: &Path, variables: &[&str]) -> Result<PathBuf> {
    fs::create_dir_all(out)?;
    let mut make = tied("make");
    make.arg("-C").arg(kdir).arg(jobs()).args(variables);
    make.args(["M=/src", &format!("MO={}", out.display()), "modules"]);
    run(log, &mut make)?;
    Ok(out.join("thinram.ko"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(abi: &str, version: &str) -> Kernel {
        Kernel {
            abi: abi.into(),
            version: version.into(),
        }
    }

    #[test]
    fn the_pin_wins_over_newer_ones() {
        let pin = kernel(PIN, "7.3.4-1~bpo13+1");
        let newer = kernel("7.3.9+deb13-amd64", "7.3.9-1~bpo13+1");
        assert_eq!(pick(vec![newer, pin.clone()]).unwrap(), pin);
    }

    #[test]
    fn without_the_pin_the_newest_by_number() {
        let nine = kernel("7.3.9+deb13-amd64", "7.3.9-1~bpo13+1");
        let twelve = kernel("7.3.12+deb13-amd64", "7.3.12-1~bpo13+1");
        assert_eq!(pick(vec![twelve.clone(), nine]).unwrap(), twelve);
        assert!(pick(Vec::new()).is_err());
    }

    #[test]
    fn lost_options_are_found() {
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=m\n";
        assert!(lost("# text\nCONFIG_A=y\n# CONFIG_B is not set\n", config).is_empty());
        assert_eq!(lost("CONFIG_C=y\n", config), ["CONFIG_C=y"]);
        assert_eq!(
            lost("# CONFIG_A is not set\n", config),
            ["# CONFIG_A is not set"]
        );
    }
}
