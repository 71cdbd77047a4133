// SPDX-License-Identifier: GPL-2.0

//! Directories in sysfs that stand for an object of ours.

use super::{
    bindings,
    inject::{self, Point},
};
use core::{mem::ManuallyDrop, ptr::NonNull};
use kernel::{
    error::to_result,
    prelude::*,
    str::CString,
    sync::{Arc, Completion},
    types::Opaque,
};

/// What answers for the files of a directory.
pub(crate) trait Attributes: Send + Sync + 'static {
    /// Names and modes of the files.
    fn table() -> &'static [Attribute];
    /// Writes the value of file `index` into `out`, newline included.
    fn show(&self, index: usize, out: &mut Page<'_>) -> Result;
    /// Takes what was written to file `index`.
    fn store(&self, index: usize, data: &[u8]) -> Result;
}

/// A file in sysfs, as the kernel wants it described.
#[repr(transparent)]
pub(crate) struct Attribute(Opaque<bindings::attribute>);

// SAFETY: Never written after it was made.
unsafe impl Sync for Attribute {}

impl Attribute {
    /// A file called `name`; `writable` by root.
    pub(crate) const fn new(name: &'static CStr, writable: bool) -> Attribute {
        // SAFETY: All-zero is valid for this plain structure.
        let mut attr: bindings::attribute = unsafe { core::mem::zeroed() };
        attr.name = name.to_bytes_with_nul().as_ptr().cast();
        attr.mode = if writable { 0o644 } else { 0o444 };
        Attribute(Opaque::new(attr))
    }
}

/// The page that a value is shown in.
pub(crate) struct Page<'a> {
    bytes: &'a mut [u8],
    len: usize,
}

impl core::fmt::Write for Page<'_> {
    fn write_str(&mut self, s: &str) -> core::fmt::Result {
        self.push(s.as_bytes()).map_err(|_| core::fmt::Error)
    }
}

impl Page<'_> {
    /// Adds bytes; fails when the page is full.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result {
        let end = self.len.checked_add(bytes.len()).ok_or(EOVERFLOW)?;
        self.bytes
            .get_mut(self.len..end)
            .ok_or(ENOSPC)?
            .copy_from_slice(bytes);
        self.len = end;
        Ok(())
    }
}

#[repr(C)]
#[pin_data]
struct Node {
    #[pin]
    kobj: Opaque<bindings::kobject>,
    show: fn(NonNull<Node>, usize, &mut Page<'_>) -> Result,
    store: fn(NonNull<Node>, usize, &[u8]) -> Result,
    table: &'static [Attribute],
    /// The object, as a raw Arc.
    data: *const (),
    #[pin]
    released: Completion,
}

/// A directory in sysfs; dropping it removes it and waits until nobody reads it any more.
pub(crate) struct Directory<T: Attributes> {
    node: NonNull<Node>,
    data: ManuallyDrop<Arc<T>>,
}

// SAFETY: kobjects have their own locking; the data is Send + Sync.
unsafe impl<T: Attributes> Send for Directory<T> {}
// SAFETY: As above.
unsafe impl<T: Attributes> Sync for Directory<T> {}

/// Where a directory goes.
pub(crate) enum Parent<'a, T: Attributes> {
    /// /sys/fs
    Fs,
    /// Another directory of ours.
    In(&'a Directory<T>),
}

impl<T: Attributes> Directory<T> {
    /// Makes directory `name` with the files of `T`, answered for by `data`.
    pub(crate) fn create<P: Attributes>(
        parent: Parent<'_, P>,
        name: &[u8],
        data: Arc<T>,
    ) -> Result<Directory<T>> {
        if inject::fails(Point::Kobject) {
            return Err(ENOMEM);
        }
        let name = terminated(name)?;
        let raw = Arc::as_ptr(&data).cast();
        let node = KBox::pin_init(
            pin_init!(Node {
                kobj: Opaque::zeroed(),
                show: |node, index, page| Self::data_of(&node).show(index, page),
                store: |node, index, bytes| Self::data_of(&node).store(index, bytes),
                table: T::table(),
                data: raw,
                released <- Completion::new(),
            }),
            GFP_KERNEL,
        )?;
        // SAFETY: The box is not moved: it is only turned back into a box by `drop`.
        let node =
            unsafe { NonNull::new_unchecked(KBox::into_raw(Pin::into_inner_unchecked(node))) };
        let directory = Directory {
            node,
            data: ManuallyDrop::new(data),
        };
        let parent = match parent {
            // SAFETY: fs_kobj lives as long as the kernel.
            Parent::Fs => unsafe { bindings::thinram_fs_kobj() },
            Parent::In(parent) => parent.kobj(),
        };
        // SAFETY: The kobject is zeroed and lives until its release was waited for; if adding
        // fails it must still be put, which `drop` does.
        to_result(unsafe {
            bindings::thinram_kobject_add(directory.kobj(), parent, name.as_char_ptr())
        })?;
        for attribute in T::table() {
            if inject::fails(Point::Attribute) {
                return Err(ENOMEM);
            }
            // SAFETY: The kobject was added; the attribute is static.
            to_result(unsafe {
                bindings::sysfs_create_file_ns(
                    directory.kobj(),
                    attribute.0.get(),
                    core::ptr::null(),
                )
            })?;
        }
        Ok(directory)
    }

    fn kobj(&self) -> *mut bindings::kobject {
        // SAFETY: The node lives as long as the directory.
        unsafe { self.node.as_ref() }.kobj.get()
    }

    fn data_of(node: &NonNull<Node>) -> &T {
        // SAFETY: Called from show and store of this node only: sysfs keeps the directory, and so
        // its Arc<T>, until they return, and `data` came from an Arc<T>.
        unsafe { &*node.as_ref().data.cast::<T>() }
    }

    /// The object that answers.
    pub(crate) fn data(&self) -> &T {
        &self.data
    }

    /// A means to tell who polls file `name`.
    pub(crate) fn notice(&self, name: &CStr) -> Result<FileNotice> {
        // SAFETY: The kobject was added, so it has a node until the directory is dropped.
        let node = unsafe {
            bindings::kernfs_find_and_get_ns(
                (*self.kobj()).sd,
                name.as_char_ptr(),
                core::ptr::null(),
            )
        };
        NonNull::new(node).map(FileNotice).ok_or(ENOENT)
    }

    /// Gives the directory another name.
    pub(crate) fn rename(&self, name: &[u8]) -> Result {
        let name = terminated(name)?;
        // SAFETY: The kobject was added.
        to_result(unsafe { bindings::kobject_rename(self.kobj(), name.as_char_ptr()) })
    }
}

/// Tells those who poll(2) a file in sysfs that it changed.
pub(crate) struct FileNotice(NonNull<bindings::kernfs_node>);

// SAFETY: kernfs has its own locking.
unsafe impl Send for FileNotice {}
// SAFETY: As above.
unsafe impl Sync for FileNotice {}

impl FileNotice {
    /// The file changed: who waits for it is woken. May be called with any lock held.
    pub(crate) fn changed(&self) {
        // SAFETY: We hold a reference to the node, which outlives its removal.
        unsafe { bindings::kernfs_notify(self.0.as_ptr()) }
    }
}

impl Drop for FileNotice {
    fn drop(&mut self) {
        // SAFETY: `notice` took the reference.
        unsafe { bindings::kernfs_put(self.0.as_ptr()) }
    }
}

fn terminated(name: &[u8]) -> Result<CString> {
    let name = core::str::from_utf8(name).map_err(|_| EINVAL)?;
    CString::try_from_fmt(kernel::prelude::fmt!("{name}")).map_err(|_| EINVAL)
}

impl<T: Attributes> Drop for Directory<T> {
    fn drop(&mut self) {
        // SAFETY: kobject_del waits for readers and writers; after the put and the release nobody
        // has the node, so the box is ours alone again.
        unsafe {
            bindings::kobject_del(self.kobj());
            bindings::kobject_put(self.kobj());
            self.node.as_ref().released.wait_for_completion();
            drop(KBox::from_raw(self.node.as_ptr()));
            ManuallyDrop::drop(&mut self.data);
        }
    }
}

/// The node of a kobject of ours.
fn node_of(kobj: *mut bindings::kobject) -> Option<NonNull<Node>> {
    // The kobject is the node's first field.
    NonNull::new(kobj.cast::<Node>())
}

fn index_of(table: &'static [Attribute], attr: *mut bindings::attribute) -> Option<usize> {
    table
        .iter()
        .position(|known| core::ptr::eq(known.0.get(), attr))
}

/// Shows a file. Returns the length or a negative errno.
///
/// # Safety
///
/// `kobj` and `attr` belong to a [`Directory`], `buf` is a page.
pub(crate) unsafe fn show(
    kobj: *mut bindings::kobject,
    attr: *mut bindings::attribute,
    buf: *mut u8,
) -> Result<usize> {
    let node = node_of(kobj).ok_or(EIO)?;
    // SAFETY: By the caller's promise; sysfs keeps the node while this runs.
    let (show, table) = unsafe { (node.as_ref().show, node.as_ref().table) };
    let index = index_of(table, attr).ok_or(EIO)?;
    // SAFETY: sysfs hands over a page of zeroes for the length of this call.
    let bytes = unsafe { core::slice::from_raw_parts_mut(buf, kernel::page::PAGE_SIZE) };
    let mut page = Page { bytes, len: 0 };
    show(node, index, &mut page)?;
    Ok(page.len)
}

/// Takes what was written to a file.
///
/// # Safety
///
/// `kobj` and `attr` belong to a [`Directory`], `buf` holds `count` bytes.
pub(crate) unsafe fn store(
    kobj: *mut bindings::kobject,
    attr: *mut bindings::attribute,
    buf: *const u8,
    count: usize,
) -> Result {
    let node = node_of(kobj).ok_or(EIO)?;
    // SAFETY: As in `show`.
    let (store, table) = unsafe { (node.as_ref().store, node.as_ref().table) };
    let index = index_of(table, attr).ok_or(EIO)?;
    // SAFETY: By the caller's promise.
    store(node, index, unsafe {
        core::slice::from_raw_parts(buf, count)
    })
}

/// The last reference to a kobject went.
///
/// # Safety
///
/// `kobj` belongs to a [`Directory`].
pub(crate) unsafe fn release(kobj: *mut bindings::kobject) {
    if let Some(node) = node_of(kobj) {
        // SAFETY: The directory waits for this before it frees the node.
        unsafe { node.as_ref().released.complete_all() };
    }
}
