// SPDX-License-Identifier: GPL-2.0

//! What hangs on inodes and superblocks: `i_private` is an `Arc<Node>`, `s_fs_info` an `Arc<Mount>`.

use crate::{
    engine::{
        backing::{Backing, MAX_PAGES},
        host::Host,
        vm::{Vm, VmDefaults},
    },
    sys::{alloc, bindings},
};
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{Arc, ArcBorrow, Mutex},
};

/// `uid=` and `gid=` of a mount.
pub(crate) type Owner = (Option<bindings::kuid_t>, Option<bindings::kgid_t>);

/// One mount: the trust boundary.
pub(crate) struct Mount {
    /// The host.
    pub(crate) host: Arc<Host>,
    /// The domain of its VMs; `None` = each VM is a domain of its own.
    pub(crate) domain: Option<KVec<u8>>,
    /// For new VMs.
    pub(crate) defaults: VmDefaults,
    /// Mode of the root, as it was mounted.
    pub(crate) mode: u16,
    /// Its owner and group, where they were given.
    pub(crate) owner: Owner,
    /// Pages that all files may have together, 0 = no limit.
    limit_pages: AtomicU64,
    /// Pages that they have.
    used_pages: AtomicU64,
}

impl Mount {
    /// A mount without files.
    pub(crate) fn new(
        host: Arc<Host>,
        domain: Option<KVec<u8>>,
        defaults: VmDefaults,
        mode: u16,
        owner: Owner,
        limit_pages: u64,
    ) -> Result<Arc<Mount>> {
        let (limit_pages, used_pages) = (AtomicU64::new(limit_pages), AtomicU64::new(0));
        let mount = Mount {
            host,
            domain,
            defaults,
            mode,
            owner,
            limit_pages,
            used_pages,
        };
        Ok(alloc::counted(mount)?)
    }

    /// Limit and use in pages.
    pub(crate) fn usage(&self) -> (u64, u64) {
        (
            self.limit_pages.load(Ordering::Relaxed),
            self.used_pages.load(Ordering::Relaxed),
        )
    }

    /// Another limit; refused when the files have more already.
    pub(crate) fn set_limit(&self, pages: u64) -> Result {
        if pages != 0 && self.used_pages.load(Ordering::Relaxed) > pages {
            return Err(EINVAL);
        }
        self.limit_pages.store(pages, Ordering::Relaxed);
        Ok(())
    }

    /// A file goes from `old` to `new` pages. ENOSPC beyond the limit.
    pub(crate) fn resize(&self, old: u64, new: u64) -> Result {
        let limit = match self.limit_pages.load(Ordering::Relaxed) {
            0 => u64::MAX,
            limit => limit,
        };
        let change = |used: u64| {
            let used = used.saturating_sub(old).checked_add(new)?;
            (new <= old || used <= limit).then_some(used)
        };
        match self
            .used_pages
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, change)
        {
            Ok(_) => Ok(()),
            Err(_) => Err(ENOSPC),
        }
    }
}

/// A directory.
#[pin_data]
pub(crate) struct Dir {
    /// Its name, which is its VM's.
    #[pin]
    pub(crate) name: Mutex<KVec<u8>>,
    /// The VM of the files that it holds directly.
    #[pin]
    pub(crate) vm: Mutex<Option<Arc<Vm>>>,
    /// The root holds no VM: each file in it is one.
    pub(crate) is_root: bool,
}

impl Dir {
    /// A directory without files.
    pub(crate) fn new(name: &[u8], is_root: bool) -> Result<Arc<Dir>> {
        let owned = alloc::copied(name)?;
        alloc::counted_in_place(
            pin_init!(Dir {
                name <- new_mutex!(owned, "thinram_dir_name"),
                vm <- new_mutex!(None, "thinram_dir_vm"),
                is_root,
            }),
            GFP_KERNEL,
        )
    }
}

/// What an inode stands for.
pub(crate) enum Node {
    /// A directory.
    Dir(Arc<Dir>),
    /// A file of guest memory.
    File(Arc<Backing>),
}

impl Node {
    /// The file's backing.
    pub(crate) fn file(&self) -> Result<&Arc<Backing>> {
        match self {
            Node::File(backing) => Ok(backing),
            Node::Dir(_) => Err(EISDIR),
        }
    }

    /// The directory.
    pub(crate) fn dir(&self) -> Result<&Arc<Dir>> {
        match self {
            Node::Dir(dir) => Ok(dir),
            Node::File(_) => Err(ENOTDIR),
        }
    }
}

/// The node of an inode.
///
/// # Safety
///
/// `inode` is a live inode of ours, and stays so for `'a`.
pub(crate) unsafe fn of_inode<'a>(inode: *const bindings::inode) -> Result<ArcBorrow<'a, Node>> {
    // SAFETY: By the caller's promise.
    let private = unsafe { (*inode).i_private };
    if private.is_null() {
        return Err(EIO);
    }
    // SAFETY: i_private of our inodes is an Arc<Node> that eviction alone takes back.
    Ok(unsafe { ArcBorrow::from_raw(private.cast::<Node>()) })
}

/// The mount of a superblock.
///
/// # Safety
///
/// `sb` is a filled superblock of ours, and stays so for `'a`.
pub(crate) unsafe fn of_sb<'a>(sb: *const bindings::super_block) -> ArcBorrow<'a, Mount> {
    // SAFETY: s_fs_info of our superblocks is an Arc<Mount> until kill_sb.
    unsafe { ArcBorrow::from_raw((*sb).s_fs_info.cast::<Mount>()) }
}

/// Size in pages of a file of `bytes` bytes. EFBIG beyond the largest file.
pub(crate) fn pages_of(bytes: i64) -> Result<u64> {
    let bytes = u64::try_from(bytes).map_err(|_| EINVAL)?;
    let pages = bytes.div_ceil(kernel::page::PAGE_SIZE as u64);
    if pages > MAX_PAGES {
        return Err(EFBIG);
    }
    Ok(pages)
}
