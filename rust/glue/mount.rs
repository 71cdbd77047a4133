// SPDX-License-Identifier: GPL-2.0

//! Mounting: options, superblocks, statfs.

use super::{
    fs,
    node::{self, Mount},
};
use crate::{
    engine::{backing::PAGE, host::Host, vm::VmDefaults},
    logic::{
        counts::pages_to_kb,
        options::{self, Fixed, Text},
        tunables::{Shown, Takes},
    },
    sys::{alloc, bindings, swapio::SwapDir},
};
use core::ptr::NonNull;
use kernel::{
    ffi::c_int,
    prelude::*,
    str::{CStr, CString},
    sync::{Arc, ArcBorrow},
};

kernel::sync::global_lock! {
    // SAFETY: Initialized in `set_host`, which the module's init calls before the file system can
    // be found.
    unsafe(uninit) static HOST: Mutex<Option<Arc<Host>>> = None;
}

/// Makes the host known to the file system, and initializes what holds it.
///
/// # Safety
///
/// Called once, before anything else in `glue`.
pub(crate) unsafe fn set_host(host: Arc<Host>) {
    // SAFETY: By the caller's promise.
    unsafe { HOST.init() };
    *HOST.lock() = Some(host);
}

/// Forgets the host; no mount is left by then.
pub(crate) fn forget_host() {
    let host = HOST.lock().take();
    drop(host);
}

/// The order of thinram_parameters in helpers.c.
const OPT_SIZE: c_int = 0;
const OPT_MODE: c_int = 1;
const OPT_UID: c_int = 2;
const OPT_GID: c_int = 3;
const OPT_DOMAIN: c_int = 4;
const OPT_SHARE: c_int = 5;
const OPT_SCAN_PAGES: c_int = 6;
const OPT_LARGE_PAGES: c_int = 7;
const OPT_SWAP_DIR: c_int = 8;

const ENOPARAM: c_int = -519;

/// "thnr"
const MAGIC: usize = 0x7468_6e72;

/// What was asked for.
#[derive(Default)]
struct Options {
    given: options::Options<KVec<u8>>,
    swap_dir: Option<Arc<SwapDir>>,
}

fn refuse(fc: *mut bindings::fs_context, why: kernel::fmt::Arguments<'_>) -> Error {
    if let Ok(why) = CString::try_from_fmt(why) {
        // SAFETY: The context is the kernel's and alive.
        unsafe { bindings::thinram_fc_error(fc, why.as_char_ptr()) };
    }
    EINVAL
}

/// Refuses the value of an option.
fn refuse_value(fc: *mut bindings::fs_context, option: &str, value: &[u8]) -> Error {
    let (value, takes) = (Shown(value), Takes(option));
    refuse(fc, fmt!("{option}={value}: it takes {takes}"))
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_init_fs_context(fc: *mut bindings::fs_context) -> c_int {
    match alloc::boxed(Options::default()) {
        Ok(options) => {
            // SAFETY: The context is fresh; `free` takes the box back.
            unsafe { bindings::thinram_fc_setup(fc, KBox::into_raw(options).cast()) };
            0
        }
        Err(_) => ENOMEM.to_errno(),
    }
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_free_fc(fc: *mut bindings::fs_context) {
    // SAFETY: The options are the box that init_fs_context put there, or null.
    unsafe {
        let options = bindings::thinram_fc_options(fc).cast::<Options>();
        if !options.is_null() {
            drop(KBox::from_raw(options));
        }
    }
}

/// # Safety
///
/// `fc` is a context that thinram_rs_init_fs_context set up.
unsafe fn options<'a>(fc: *mut bindings::fs_context) -> &'a mut Options {
    // SAFETY: By the caller's promise; the kernel serializes the calls on one context.
    unsafe { &mut *bindings::thinram_fc_options(fc).cast::<Options>() }
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_parse_param(
    fc: *mut bindings::fs_context,
    param: *mut bindings::fs_parameter,
) -> c_int {
    // SAFETY: All-zero is valid for this plain structure.
    let mut result: bindings::fs_parse_result = unsafe { core::mem::zeroed() };
    // SAFETY: All three are valid for the call.
    let opt = unsafe { bindings::thinram_fs_parse(fc, param, &mut result) };
    if opt == ENOPARAM {
        // SAFETY: As above.
        return unsafe { bindings::vfs_parse_fs_param_source(fc, param) };
    }
    if opt < 0 {
        return opt;
    }
    // SAFETY: A string parameter's value is a C string; the union is read as the option says.
    let parsed = unsafe {
        let text = bindings::thinram_param_string(param);
        let text = if text.is_null() {
            &[][..]
        } else {
            CStr::from_char_ptr(text).to_bytes()
        };
        parse(fc, options(fc), opt, text, &result)
    };
    super::errno(parsed)
}

fn own(name: &str) -> Option<KVec<u8>> {
    alloc::copied(name.as_bytes()).ok()
}

/// Takes an option whose value is a text.
fn take(
    fc: *mut bindings::fs_context,
    given: &mut options::Options<KVec<u8>>,
    option: Text,
    text: &[u8],
) -> Result {
    given
        .take(option, text, PAGE, own)
        .map_err(|bad| match bad {
            Some(_) => refuse_value(fc, option.name(), text),
            None => ENOMEM,
        })
}

/// # Safety
///
/// `value` holds what option `opt` takes.
unsafe fn parse(
    fc: *mut bindings::fs_context,
    options: &mut Options,
    opt: c_int,
    text: &[u8],
    value: &bindings::fs_parse_result,
) -> Result {
    let given = &mut options.given;
    // SAFETY: By the caller's promise.
    unsafe {
        match opt {
            OPT_SIZE => take(fc, given, Text::Size, text)?,
            OPT_MODE => given
                .take_mode(bindings::thinram_result_u32(value))
                .map_err(|_| refuse_value(fc, "mode", text))?,
            OPT_UID => given.uid = Some(bindings::thinram_result_uid(value).val),
            OPT_GID => given.gid = Some(bindings::thinram_result_gid(value).val),
            OPT_DOMAIN => take(fc, given, Text::Domain, text)?,
            OPT_SHARE => given.share = Some(bindings::thinram_result_bool(value)),
            OPT_SCAN_PAGES => take(fc, given, Text::ScanPagesPerSec, text)?,
            OPT_LARGE_PAGES => take(fc, given, Text::LargePages, text)?,
            OPT_SWAP_DIR => {
                let dir = SwapDir::open(text).inspect_err(|&error| {
                    let (dir, why) = (Shown(text), super::sysfs::swap_dir_error(error));
                    refuse(fc, fmt!("swap_dir={dir}: {why}"));
                })?;
                options.swap_dir = Some(alloc::counted(dir)?);
            }
            _ => return Err(EINVAL),
        }
    }
    Ok(())
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_get_tree(fc: *mut bindings::fs_context) -> c_int {
    // SAFETY: The context is ours.
    unsafe { bindings::get_tree_nodev(fc, Some(fill_super)) }
}

/// # Safety
///
/// Called by the kernel with a new superblock.
unsafe extern "C" fn fill_super(
    sb: *mut bindings::super_block,
    fc: *mut bindings::fs_context,
) -> c_int {
    // SAFETY: By the caller.
    super::errno(unsafe { fill(sb, options(fc)) })
}

/// # Safety
///
/// `sb` is new and empty.
unsafe fn fill(sb: *mut bindings::super_block, options: &mut Options) -> Result {
    let host = HOST.lock().clone().ok_or(ENODEV)?;
    let given = &mut options.given;
    let defaults = VmDefaults {
        share: given.share.unwrap_or(true),
        scan_pages_per_sec: given.scan_pages_per_sec.unwrap_or(0),
        large_pages: given.large_pages,
        swap_dir: options.swap_dir.take(),
    };
    let mode = given.mode.unwrap_or(0o700);
    let limit = given.size_pages.unwrap_or(0);
    let owner = (
        given.uid.map(|val| bindings::kuid_t { val }),
        given.gid.map(|val| bindings::kgid_t { val }),
    );
    let mount = Mount::new(host, given.domain.take(), defaults, mode, owner, limit)?;
    // SAFETY: The superblock is ours alone; kill_sb takes the Arc back.
    unsafe {
        (*sb).s_fs_info = mount.into_raw().cast_mut().cast();
        (*sb).s_maxbytes = (crate::engine::backing::MAX_PAGES * PAGE) as i64;
        (*sb).s_blocksize = PAGE as usize;
        (*sb).s_blocksize_bits = bindings::PAGE_SHIFT as u8;
        (*sb).s_magic = MAGIC;
        bindings::thinram_sb_setup(sb);
        let root = fs::new_dir(sb, core::ptr::null(), mode, b"/", true)?;
        if let Some(uid) = owner.0 {
            (*root).i_uid = uid;
        }
        if let Some(gid) = owner.1 {
            (*root).i_gid = gid;
        }
        (*sb).s_root = bindings::d_make_root(root);
        if (*sb).s_root.is_null() {
            return Err(ENOMEM);
        }
    }
    Ok(())
}

/// # Safety
///
/// Called by the kernel on remount.
#[no_mangle]
unsafe extern "C" fn thinram_rs_reconfigure(fc: *mut bindings::fs_context) -> c_int {
    // SAFETY: The context's root is one of our superblocks.
    let (options, mount) = unsafe { (options(fc), node::of_sb(bindings::thinram_fc_super(fc))) };
    super::errno(remount(fc, options, mount))
}

fn remount(
    fc: *mut bindings::fs_context,
    options: &Options,
    mount: ArcBorrow<'_, Mount>,
) -> Result {
    let now = options::Options {
        size_pages: None,
        mode: Some(mount.mode),
        uid: mount.owner.0.map(|uid| uid.val),
        gid: mount.owner.1.map(|gid| gid.val),
        domain: mount.domain.as_deref(),
        share: Some(mount.defaults.share),
        scan_pages_per_sec: Some(mount.defaults.scan_pages_per_sec),
        large_pages: mount.defaults.large_pages,
    };
    let other_dir = options.swap_dir.as_ref().is_some_and(|new| {
        let old = mount.defaults.swap_dir.as_ref();
        !old.is_some_and(|old| old.is(new))
    });
    let fixed = options.given.fixed(&now);
    if let Some(fixed) = fixed.or(other_dir.then_some(Fixed::Defaults)) {
        let why = fixed.why();
        return Err(refuse(fc, fmt!("{why}")));
    }
    if let Some(pages) = options.given.size_pages {
        mount.set_limit(pages).map_err(|_| {
            let (new, used) = (pages_to_kb(pages), pages_to_kb(mount.usage().1));
            refuse(fc, fmt!("size={new}k is less than the files have: {used}k"))
        })?;
    }
    Ok(())
}

/// # Safety
///
/// Called by the kernel when the last user of a superblock went.
#[no_mangle]
unsafe extern "C" fn thinram_rs_kill_sb(sb: *mut bindings::super_block) {
    // SAFETY: After kill_anon_super no inode is left, so the Arc is not borrowed any more.
    unsafe {
        let mount = (*sb).s_fs_info.cast::<Mount>();
        bindings::kill_anon_super(sb);
        if let Some(mount) = NonNull::new(mount) {
            drop(Arc::from_raw(mount.as_ptr()));
        }
    }
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_statfs(
    dentry: *mut bindings::dentry,
    buf: *mut bindings::kstatfs,
) -> c_int {
    // SAFETY: A dentry of ours; the buffer is the kernel's.
    unsafe {
        let mount = node::of_sb((*dentry).d_sb);
        let error = bindings::simple_statfs(dentry, buf);
        if error != 0 {
            return error;
        }
        let (limit, used) = mount.usage();
        bindings::thinram_statfs_set(buf, limit, limit.saturating_sub(used));
    }
    0
}

/// Shows an option whose value is a text.
///
/// # Safety
///
/// `seq` is the kernel's seq_file.
unsafe fn show_text(seq: *mut bindings::seq_file, name: &CStr, value: &[u8]) {
    let mut text = KVec::new();
    let copied = text
        .extend_from_slice(value, GFP_KERNEL)
        .and_then(|()| text.push(0, GFP_KERNEL))
        .is_ok();
    if copied {
        // SAFETY: The text ends with a zero byte; seq_show_option escapes what it must.
        unsafe { bindings::thinram_sb_option(seq, name.as_char_ptr(), text.as_ptr().cast()) };
    }
}

/// # Safety
///
/// Called by the kernel for /proc/mounts.
#[no_mangle]
unsafe extern "C" fn thinram_rs_show_options(
    seq: *mut bindings::seq_file,
    root: *mut bindings::dentry,
) -> c_int {
    // SAFETY: A dentry of ours, and the kernel's seq_file.
    let (mount, out) = unsafe {
        (
            node::of_sb((*root).d_sb),
            kernel::seq_file::SeqFile::from_raw(seq),
        )
    };
    let (limit, _) = mount.usage();
    if limit != 0 {
        kernel::seq_print!(out, ",size={}k", pages_to_kb(limit));
    }
    kernel::seq_print!(out, ",mode={:04o}", mount.mode);
    if let Some(uid) = mount.owner.0 {
        kernel::seq_print!(out, ",uid={}", uid.val);
    }
    if let Some(gid) = mount.owner.1 {
        kernel::seq_print!(out, ",gid={}", gid.val);
    }
    if let Some(domain) = &mount.domain {
        // SAFETY: The kernel's seq_file.
        unsafe { show_text(seq, c"domain", domain) };
    }
    if let Some(dir) = &mount.defaults.swap_dir {
        // SAFETY: The kernel's seq_file.
        unsafe { show_text(seq, c"swap_dir", dir.name()) };
    }
    if !mount.defaults.share {
        kernel::seq_print!(out, ",share=0");
    }
    if mount.defaults.scan_pages_per_sec != 0 {
        kernel::seq_print!(
            out,
            ",scan_pages_per_sec={}",
            mount.defaults.scan_pages_per_sec
        );
    }
    if let Some(large_pages) = mount.defaults.large_pages {
        kernel::seq_print!(out, ",large_pages={}", large_pages.as_str());
    }
    0
}
