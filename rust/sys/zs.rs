// SPDX-License-Identifier: GPL-2.0

//! Compressed pages: LZ4, and the kernel's zsmalloc to keep what comes out.

use super::{
    bindings,
    inject::{self, Point},
    live::Lent,
    page::{Frame, PageRef},
};
use crate::logic::slot::Slot;
use core::{
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};
use kernel::{
    alloc::flags::{__GFP_NOWARN, __GFP_ZERO},
    page::PAGE_SIZE,
    prelude::*,
    sync::{Arc, SetOnce},
};

/// Bytes of working memory that LZ4 asks for.
const WORK_BYTES: usize = bindings::THINRAM_LZ4_WORK as usize;

/// What LZ4 works in.
pub(crate) struct Compressor {
    work: KVBox<[u8; WORK_BYTES]>,
    out: KBox<[u8; PAGE_SIZE]>,
}

impl Compressor {
    /// Allocates it.
    pub(crate) fn new() -> Result<Compressor> {
        if inject::fails(Point::Scratch) {
            return Err(ENOMEM);
        }
        // SAFETY: Zeroed bytes.
        unsafe {
            Ok(Compressor {
                work: KVBox::new_uninit(GFP_KERNEL | __GFP_ZERO)?.assume_init(),
                out: KBox::new_uninit(GFP_KERNEL | __GFP_ZERO)?.assume_init(),
            })
        }
    }

    /// Compresses a page, whose bytes must not change meanwhile, to at most `max` bytes; `None` if
    /// it does not get that small.
    pub(crate) fn compress(&mut self, page: PageRef<'_>, max: usize) -> Option<&[u8]> {
        let max = max.min(Slot::LENGTH_MAX as usize);
        // SAFETY: The page is PAGE_SIZE long, `out` is longer than `max`, and the working memory is
        // as long as LZ4 asks for.
        let len = unsafe {
            bindings::LZ4_compress_default(
                page.address().cast(),
                self.out.as_mut_ptr().cast(),
                PAGE_SIZE as i32,
                max as i32,
                self.work.as_mut_ptr().cast(),
            )
        };
        match usize::try_from(len) {
            Ok(0) | Err(_) => None,
            Ok(len) => self.out.get(..len),
        }
    }
}

/// Decompresses `bytes` into `to`.
pub(crate) fn decompress(bytes: &[u8], to: &mut Frame) -> Result<(), Corrupt> {
    if inject::fails(Point::Decompress) {
        return Err(Corrupt);
    }
    let len = i32::try_from(bytes.len()).map_err(|_| Corrupt)?;
    // SAFETY: At most PAGE_SIZE bytes come out, into a frame that the caller owns alone.
    let filled = unsafe {
        bindings::LZ4_decompress_safe(
            bytes.as_ptr().cast(),
            to.as_ref().address().cast(),
            len,
            PAGE_SIZE as i32,
        )
    };
    if usize::try_from(filled) == Ok(PAGE_SIZE) {
        Ok(())
    } else {
        Err(Corrupt)
    }
}

/// Room for a compressed page that lies in two pieces.
pub(crate) struct Scratch(KBox<[u8; PAGE_SIZE]>);

impl Scratch {
    /// Allocates it; `None` without memory.
    pub(crate) fn new() -> Option<Scratch> {
        if inject::fails(Point::Scratch) {
            return None;
        }
        let scratch = KBox::new_uninit(GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN).ok()?;
        // SAFETY: Zeroed bytes.
        Some(Scratch(unsafe { scratch.assume_init() }))
    }

    /// Its bytes, to be written.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8; PAGE_SIZE] {
        &mut self.0
    }

    /// Its bytes.
    pub(crate) fn bytes(&self) -> &[u8; PAGE_SIZE] {
        &self.0
    }
}

/// What was kept is not what was put in.
#[derive(Debug)]
pub(crate) struct Corrupt;

/// Why an object was not kept.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum NoRoom {
    /// No memory for it.
    Memory,
    /// The store would be larger than it may be.
    Full,
}

/// A zsmalloc pool; no object is left when it is dropped.
struct Pool(NonNull<bindings::zs_pool>);

impl Pool {
    fn new() -> Option<Pool> {
        // SAFETY: The name is copied.
        let pool = NonNull::new(unsafe { bindings::zs_create_pool(c"thinram".as_char_ptr()) })?;
        Lent::Pool.out();
        Some(Pool(pool))
    }
}

// SAFETY: zsmalloc has its own locking.
unsafe impl Send for Pool {}
// SAFETY: As above.
unsafe impl Sync for Pool {}

impl Drop for Pool {
    fn drop(&mut self) {
        Lent::Pool.back();
        // SAFETY: The slots that own objects hold the store, so none of them is left.
        unsafe { bindings::zs_destroy_pool(self.0.as_ptr()) }
    }
}

/// The compressed pages of a VM, or of a domain's shared ones. Its pool, some tens of KiB when it is
/// empty, is made when it is first needed.
pub(crate) struct Store {
    pool: SetOnce<Pool>,
    objects: AtomicU64,
}

/// A compressed page in a store.
///
/// # Invariants
///
/// The handle is a live object of the store that its owner keeps.
pub(super) struct Object {
    handle: usize,
    len: u16,
}

impl Object {
    /// As a slot; the slot is the object's owner then.
    pub(super) fn into_slot(self) -> Slot {
        // SAFETY: Handles lie in the direct map: they come from a slab.
        let address = unsafe { bindings::thinram_virt_to_phys(self.handle as *const _) };
        Slot::compressed(address, self.len)
    }

    /// Handle and length; whoever has them owns the object.
    pub(super) fn into_parts(self) -> (usize, u16) {
        (self.handle, self.len)
    }

    /// The reverse.
    ///
    /// # Safety
    ///
    /// The parts came from [`Object::into_parts`], and the object was not freed.
    pub(super) unsafe fn from_parts(handle: usize, len: u16) -> Object {
        // INVARIANT: by the caller's promise.
        Object { handle, len }
    }

    /// The object of a Compressed slot.
    ///
    /// # Safety
    ///
    /// `slot` came from [`Object::into_slot`], and the object was not freed.
    pub(super) unsafe fn of_slot(slot: Slot) -> Object {
        // SAFETY: The address came from virt_to_phys.
        let handle = unsafe { bindings::thinram_phys_to_virt(slot.object_address()) };
        // INVARIANT: by the caller's promise.
        Object {
            handle: handle as usize,
            len: slot.object_len(),
        }
    }
}

impl Store {
    /// Without a pool yet.
    pub(crate) fn new() -> Result<Arc<Store>> {
        Ok(Arc::new(
            Store {
                pool: SetOnce::new(),
                objects: AtomicU64::new(0),
            },
            GFP_KERNEL,
        )?)
    }

    /// Whether there is a pool.
    pub(crate) fn is_open(&self) -> bool {
        self.pool.as_ref().is_some()
    }

    /// Makes the pool if there is none; allocates.
    pub(crate) fn open(&self) -> Result {
        if self.is_open() {
            return Ok(());
        }
        if inject::fails(Point::Pool) {
            return Err(ENOMEM);
        }
        // Whoever came first made the pool; this one is dropped then.
        self.pool.populate(Pool::new().ok_or(ENOMEM)?);
        Ok(())
    }

    /// Pages of memory that the objects take.
    pub(crate) fn pages(&self) -> u64 {
        self.pool.as_ref().map_or(0, |pool| {
            // SAFETY: The pool is alive.
            unsafe { bindings::zs_get_total_pages(pool.0.as_ptr()) as u64 }
        })
    }

    /// Objects that it keeps.
    pub(crate) fn objects(&self) -> u64 {
        self.objects.load(Ordering::Relaxed)
    }

    /// Moves objects together, so that memory between them comes free. May take a while.
    pub(crate) fn compact(&self) {
        if let Some(pool) = self.pool.as_ref() {
            // SAFETY: The pool is alive.
            unsafe { bindings::zs_compact(pool.0.as_ptr()) };
        }
    }

    /// Keeps `bytes` if the objects take no more than `max_pages` then. Does not wait for memory.
    pub(super) fn put(&self, bytes: &[u8], node: i32, max_pages: u64) -> Result<Object, NoRoom> {
        let pool = self.pool.as_ref().ok_or(NoRoom::Memory)?.0.as_ptr();
        let len = u16::try_from(bytes.len()).map_err(|_| NoRoom::Memory)?;
        if inject::fails(Point::Object) {
            return Err(NoRoom::Memory);
        }
        // SAFETY: The pool is alive; the flags are a constant of helpers.c.
        let handle =
            unsafe { bindings::zs_malloc(pool, bytes.len(), bindings::thinram_gfp_pool, node) };
        // SAFETY: Looks at a number.
        if unsafe { bindings::thinram_is_err(handle) } {
            return Err(NoRoom::Memory);
        }
        self.objects.fetch_add(1, Ordering::Relaxed);
        Lent::Object.out();
        // INVARIANT: just made in this store.
        let object = Object { handle, len };
        // SAFETY: As in `into_slot`.
        let address = unsafe { bindings::thinram_virt_to_phys(handle as *const _) };
        if !Slot::can_hold(address, len) {
            self.free(object);
            return Err(NoRoom::Memory);
        }
        if self.pages() > max_pages {
            self.free(object);
            return Err(NoRoom::Full);
        }
        // SAFETY: The object is as long as `bytes`, and nobody else knows it.
        unsafe {
            bindings::zs_obj_write(pool, handle, bytes.as_ptr().cast_mut().cast(), bytes.len())
        };
        Ok(object)
    }

    /// Decompresses an object into `to`. Does not sleep.
    pub(super) fn get(
        &self,
        object: &Object,
        scratch: &mut Scratch,
        to: &mut Frame,
    ) -> Result<(), Corrupt> {
        self.with(object, scratch, |bytes| decompress(bytes, to))
            .unwrap_or(Err(Corrupt))
    }

    /// Copies an object into `scratch`. Does not sleep.
    pub(super) fn read<'a>(&self, object: &Object, scratch: &'a mut Scratch) -> Option<&'a [u8]> {
        let len = usize::from(object.len);
        let local = scratch.0.as_mut_ptr();
        let pool = self.pool.as_ref()?.0.as_ptr();
        // SAFETY: As in `with`. The object lies elsewhere, or was put into the scratch already.
        unsafe {
            let from = bindings::zs_obj_read_begin(pool, object.handle, len, local.cast());
            core::ptr::copy(from.cast::<u8>(), local.cast::<u8>(), len);
            bindings::zs_obj_read_end(pool, object.handle, len, from);
        }
        scratch.0.get(..len)
    }

    /// Runs `f` on the bytes of an object.
    fn with<R>(
        &self,
        object: &Object,
        scratch: &mut Scratch,
        f: impl FnOnce(&[u8]) -> R,
    ) -> Option<R> {
        let pool = self.pool.as_ref()?.0.as_ptr();
        let len = usize::from(object.len);
        let local = scratch.0.as_mut_ptr();
        // SAFETY: By the object's invariant it is alive, and `len` long; the scratch is longer.
        unsafe {
            let from = bindings::zs_obj_read_begin(pool, object.handle, len, local.cast());
            let result = f(core::slice::from_raw_parts(from.cast(), len));
            bindings::zs_obj_read_end(pool, object.handle, len, from);
            Some(result)
        }
    }

    /// Forgets an object.
    pub(super) fn free(&self, object: Object) {
        self.objects.fetch_sub(1, Ordering::Relaxed);
        if let Some(pool) = self.pool.as_ref() {
            Lent::Object.back();
            // SAFETY: By the object's invariant; nobody has it any more.
            unsafe { bindings::zs_free(pool.0.as_ptr(), object.handle) }
        }
    }
}
