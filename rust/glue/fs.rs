// SPDX-License-Identifier: GPL-2.0

//! Directories and inodes: which VM a file belongs to.

use super::{
    node::{self, Dir, Node},
    sysfs,
};
use crate::{
    engine::{backing::Backing, data, vm::Vm},
    logic::tunables::{self, Shown, Takes},
    sys::{
        alloc, bindings,
        inject::{self, Point},
        mapping::MappingSource,
        task,
    },
};
use core::ptr::NonNull;
use kernel::{
    error::to_result,
    ffi::{c_int, c_uint},
    new_mutex,
    prelude::*,
    str::CString,
    sync::{Arc, Mutex},
};

type Inode = *mut bindings::inode;

/// Name of a dentry whose parent is locked, so that it cannot change meanwhile.
///
/// # Safety
///
/// `dentry` is alive and its name stable for `'a`.
unsafe fn name_of<'a>(dentry: *const bindings::dentry) -> &'a [u8] {
    // SAFETY: By the caller's promise.
    unsafe {
        core::slice::from_raw_parts(
            bindings::thinram_dentry_name(dentry),
            bindings::thinram_dentry_name_len(dentry) as usize,
        )
    }
}

/// A VM's name must do as a name in sysfs.
fn check_vm_name(name: &[u8]) -> Result {
    if tunables::parse_name(name).is_ok() {
        return Ok(());
    }
    if task::may_log() {
        let (name, takes) = (Shown(name), Takes("domain"));
        pr_warn!("`{name}` is no name for a VM: that is {takes}\n");
    }
    Err(EINVAL)
}

/// A new inode with `node` on it.
///
/// # Safety
///
/// `sb` is a superblock of ours; `dir` is null or a directory in it.
unsafe fn new_inode(
    sb: *mut bindings::super_block,
    dir: *const bindings::inode,
    mode: u16,
) -> Result<Inode> {
    // SAFETY: By the caller's promise.
    unsafe {
        let inode = bindings::new_inode(sb);
        if inode.is_null() {
            return Err(ENOMEM);
        }
        (*inode).i_ino = u64::from(bindings::get_next_ino());
        bindings::inode_init_owner(&raw mut bindings::nop_mnt_idmap, inode, dir, mode);
        bindings::simple_inode_init_ts(inode);
        Ok(inode)
    }
}

/// Hangs `node` on `inode`; eviction takes it back.
///
/// # Safety
///
/// `inode` is new.
unsafe fn hang(inode: Inode, node: Node) -> Result {
    let node = alloc::counted(node)?;
    // SAFETY: By the caller's promise.
    unsafe { (*inode).i_private = node.into_raw().cast_mut().cast() };
    Ok(())
}

/// A new directory's inode.
///
/// # Safety
///
/// As [`new_inode`].
pub(super) unsafe fn new_dir(
    sb: *mut bindings::super_block,
    parent: *const bindings::inode,
    mode: u16,
    name: &[u8],
    is_root: bool,
) -> Result<Inode> {
    let dir = Dir::new(name, is_root)?;
    // SAFETY: By the caller's promise; an inode that fails half-way is put.
    unsafe {
        let inode = new_inode(sb, parent, mode | bindings::S_IFDIR as u16)?;
        bindings::thinram_inode_setup_dir(inode);
        if let Err(error) = hang(inode, Node::Dir(dir)) {
            bindings::iput(inode);
            return Err(error);
        }
        Ok(inode)
    }
}

/// A new file's inode, and with the first file of a directory its VM.
///
/// # Safety
///
/// `dir` is a directory of ours, locked; `name` is the new file's.
unsafe fn new_file(dir: Inode, mode: u16, name: &[u8]) -> Result<Inode> {
    // SAFETY: By the caller's promise.
    let (sb, parent, mount) =
        unsafe { ((*dir).i_sb, node::of_inode(dir)?, node::of_sb((*dir).i_sb)) };
    let parent = parent.dir()?;
    let own_place: Pin<KBox<Mutex<Option<Arc<Vm>>>>> =
        KBox::pin_init(new_mutex!(None, "thinram_file_vm"), GFP_KERNEL)?;
    let dir_name = parent.name.lock();
    let (place, vm_name) = if parent.is_root {
        (&*own_place, name)
    } else {
        (&parent.vm, &dir_name[..])
    };
    check_vm_name(vm_name)?;
    // SAFETY: As above; what fails half-way is undone.
    unsafe {
        let inode = new_inode(sb, dir, mode)?;
        let attached = mount.host.attach(
            place,
            vm_name,
            mount.domain.as_deref(),
            mount.defaults.clone(),
            &sysfs::make_vm_directory,
        );
        let vm = match attached {
            Ok(vm) => vm,
            Err(error) => {
                bindings::iput(inode);
                if error == EEXIST && task::may_log() {
                    let name = Shown(vm_name);
                    pr_warn!("a VM `{name}` is there already (names count over all mounts)\n");
                }
                return Err(error);
            }
        };
        let made = NonNull::new(inode)
            .and_then(|inode| MappingSource::of_inode(inode))
            .ok_or(EIO)
            .and_then(|source| Backing::new(mount.host.clone(), vm.clone(), source))
            .and_then(|backing| hang(inode, Node::File(backing)));
        if let Err(error) = made {
            mount.host.vms().detach(&vm);
            bindings::iput(inode);
            return Err(error);
        }
        bindings::thinram_inode_setup_file(inode);
        Ok(inode)
    }
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_create(
    _idmap: *mut bindings::mnt_idmap,
    dir: Inode,
    dentry: *mut bindings::dentry,
    mode: bindings::umode_t,
) -> c_int {
    // SAFETY: The directory is locked, so the new name is stable.
    unsafe {
        match new_file(dir, mode | bindings::S_IFREG as u16, name_of(dentry)) {
            Ok(inode) => {
                bindings::d_make_persistent(dentry, inode);
                bindings::thinram_inode_stamp(dir);
                0
            }
            Err(error) => error.to_errno(),
        }
    }
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_mkdir(
    _idmap: *mut bindings::mnt_idmap,
    dir: Inode,
    dentry: *mut bindings::dentry,
    mode: bindings::umode_t,
) -> *mut bindings::dentry {
    // SAFETY: As above.
    let made = unsafe {
        let name = name_of(dentry);
        check_vm_name(name).and_then(|()| new_dir((*dir).i_sb, dir, mode, name, false))
    };
    match made {
        Ok(inode) => {
            // SAFETY: As above.
            unsafe {
                bindings::d_make_persistent(dentry, inode);
                bindings::inc_nlink(dir);
                bindings::thinram_inode_stamp(dir);
            }
            core::ptr::null_mut()
        }
        Err(error) => error.to_ptr(),
    }
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_tmpfile(
    _idmap: *mut bindings::mnt_idmap,
    dir: Inode,
    file: *mut bindings::file,
    mode: bindings::umode_t,
) -> c_int {
    // SAFETY: The kernel holds the directory and the new open file.
    unsafe {
        // In the root it is a VM of its own and has no name to take.
        let name = CString::try_from_fmt(fmt!("#{}", bindings::get_next_ino()));
        let made = match &name {
            Ok(name) => new_file(dir, mode, name.to_bytes()),
            Err(_) => Err(ENOMEM),
        };
        if let Ok(inode) = made {
            bindings::d_tmpfile(file, inode);
        }
        bindings::thinram_finish_tmpfile(file, super::errno(made))
    }
}

/// The VM of a file, and whether a directory (or the root) is where that VM's files are.
///
/// # Safety
///
/// Both are inodes of ours.
unsafe fn may_move(file: Inode, to_dir: Inode) -> Result {
    // SAFETY: By the caller's promise.
    let (file, dir) = unsafe { (node::of_inode(file)?, node::of_inode(to_dir)?) };
    let (vm, dir) = (file.file()?.vm(), dir.dir()?);
    let here = dir.vm.lock();
    match &*here {
        Some(other) if Arc::ptr_eq(other, vm) => Ok(()),
        _ => Err(EXDEV),
    }
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_link(
    old: *mut bindings::dentry,
    dir: Inode,
    dentry: *mut bindings::dentry,
) -> c_int {
    // SAFETY: The kernel holds and locks what it passes.
    unsafe {
        let inode = (*old).d_inode;
        let same_root = (*(*old).d_parent).d_inode == dir;
        if !same_root {
            if let Err(error) = may_move(inode, dir) {
                return error.to_errno();
            }
        }
        bindings::simple_link(old, dir, dentry)
    }
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_rename(
    idmap: *mut bindings::mnt_idmap,
    old_dir: Inode,
    old: *mut bindings::dentry,
    new_dir: Inode,
    new: *mut bindings::dentry,
    flags: c_uint,
) -> c_int {
    if flags & !bindings::RENAME_NOREPLACE != 0 {
        return EINVAL.to_errno();
    }
    // SAFETY: The kernel holds and locks what it passes.
    let result = unsafe {
        if bindings::simple_empty(new) == 0 {
            return ENOTEMPTY.to_errno();
        }
        rename_vm(old_dir, (*old).d_inode, new_dir, name_of(old), name_of(new)).and_then(|undo| {
            let error = bindings::simple_rename(idmap, old_dir, old, new_dir, new, flags);
            if error != 0 {
                undo();
            }
            to_result(error)
        })
    };
    super::errno(result)
}

/// Checks a rename and gives the VM its new name; returns what takes that back.
///
/// # Safety
///
/// All are inodes of ours.
unsafe fn rename_vm<'a>(
    old_dir: Inode,
    inode: Inode,
    new_dir: Inode,
    old_name: &'a [u8],
    new_name: &'a [u8],
) -> Result<impl FnOnce() + 'a> {
    // SAFETY: By the caller's promise. The nodes outlive the rename, during which the kernel holds
    // their inodes.
    let (mount, node, parent) = unsafe {
        (
            node::of_sb((*inode).i_sb),
            node::of_inode::<'a>(inode)?,
            node::of_inode(old_dir)?,
        )
    };
    let host = mount.host.clone();
    let in_root = parent.dir()?.is_root;
    match &*node {
        Node::File(_) if old_dir != new_dir => return Err(EXDEV),
        Node::File(_) if !in_root => {}
        _ => check_vm_name(new_name)?,
    }
    let rename = move |name: &[u8]| -> Result {
        match &*node {
            Node::Dir(dir) => {
                let owned = alloc::copied(name)?;
                // Held throughout, so that a first file made meanwhile meets the old name or the new.
                let mut dir_name = dir.name.lock();
                let vm = dir.vm.lock().clone();
                if let Some(vm) = vm {
                    host.vms().rename(&vm, name)?;
                }
                *dir_name = owned;
                Ok(())
            }
            Node::File(backing) if in_root => host.vms().rename(backing.vm(), name),
            Node::File(_) => Ok(()),
        }
    };
    rename(new_name)?;
    Ok(move || {
        // The old name was free a moment ago; if it is not, the new one stays.
        let _ = rename(old_name);
    })
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_setattr(
    idmap: *mut bindings::mnt_idmap,
    dentry: *mut bindings::dentry,
    attr: *mut bindings::iattr,
) -> c_int {
    // SAFETY: The kernel holds and locks what it passes.
    unsafe {
        let inode = (*dentry).d_inode;
        let error = bindings::setattr_prepare(idmap, dentry, attr);
        if error != 0 {
            if error == EFBIG.to_errno() && task::may_log() {
                let size = (*attr).ia_size;
                pr_warn!("a file of {size} bytes was refused: 8 TiB at most, or RLIMIT_FSIZE\n");
            }
            return error;
        }
        if (*attr).ia_valid & bindings::ATTR_SIZE != 0 {
            if let Err(error) = super::file::truncate(inode, (*attr).ia_size) {
                return error.to_errno();
            }
            // truncate(2) leaves that to us, ftruncate(2) does not.
            bindings::thinram_inode_stamp(inode);
        }
        bindings::setattr_copy(idmap, inode, attr);
    }
    0
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_getattr(
    idmap: *mut bindings::mnt_idmap,
    path: *const bindings::path,
    stat: *mut bindings::kstat,
    mask: u32,
    _flags: c_uint,
) -> c_int {
    // SAFETY: The kernel holds what it passes.
    unsafe {
        let inode = (*(*path).dentry).d_inode;
        bindings::generic_fillattr(idmap, mask, inode, stat);
        if let Ok(node) = node::of_inode(inode) {
            if let Ok(backing) = node.file() {
                (*stat).blocks = data::allocated_pages(backing).saturating_mul(8);
            }
        }
    }
    0
}

/// # Safety
///
/// Called by the kernel.
#[no_mangle]
unsafe extern "C" fn thinram_rs_evict_inode(inode: Inode) {
    // SAFETY: The inode is going: nobody else uses it or what hangs on it.
    unsafe {
        bindings::truncate_inode_pages_final(&raw mut (*inode).i_data);
        bindings::clear_inode(inode);
        let private = core::mem::replace(&mut (*inode).i_private, core::ptr::null_mut());
        let Some(private) = NonNull::new(private.cast::<Node>()) else {
            return;
        };
        let node = Arc::from_raw(private.as_ptr());
        if let Node::File(backing) = &*node {
            let mount = node::of_sb((*inode).i_sb);
            let pages = backing.pages();
            backing.evict();
            // Shrinking is never refused.
            let _ = mount.resize(pages, 0);
            mount.host.vms().detach(backing.vm());
        }
    }
}

/// Makes the file system known to the kernel.
pub(crate) fn register() -> Result {
    if inject::fails(Point::FileSystem) {
        return Err(ENOMEM);
    }
    // SAFETY: The type is static; the module unregisters it before it goes.
    to_result(unsafe { bindings::thinram_register_fs() })
}

/// The reverse; no mount is left, because each holds the module.
pub(crate) fn unregister() {
    // SAFETY: Registered by `register`.
    unsafe { bindings::thinram_unregister_fs() }
}
