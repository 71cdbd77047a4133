// SPDX-License-Identifier: GPL-2.0

//! Small objects and lists of them: what engine and glue allocate beside pages goes through here, so
//! that a test can refuse it. All of these may sleep.

use super::inject::{self, Point};
use kernel::{
    alloc::{AllocError, Flags},
    prelude::*,
    sync::Arc,
    types::ForeignOwnable,
    xarray,
};

fn may_fail() -> Result<(), AllocError> {
    if inject::fails(Point::Memory) {
        return Err(AllocError);
    }
    Ok(())
}

/// A value of its own.
pub(crate) fn boxed<T>(value: T) -> Result<KBox<T>, AllocError> {
    may_fail()?;
    KBox::new(value, GFP_KERNEL)
}

/// A value that is counted.
pub(crate) fn counted<T>(value: T) -> Result<Arc<T>, AllocError> {
    may_fail()?;
    Arc::new(value, GFP_KERNEL)
}

/// The same of what stays where it is made.
pub(crate) fn counted_in_place<T, E>(init: impl PinInit<T, E>, flags: Flags) -> Result<Arc<T>>
where
    Error: From<E>,
{
    may_fail()?;
    Arc::pin_init(init, flags)
}

/// An empty list with room for `capacity`.
pub(crate) fn list<T>(capacity: usize) -> Result<KVec<T>, AllocError> {
    may_fail()?;
    KVec::with_capacity(capacity, GFP_KERNEL)
}

/// The same for so many that they may not be had in one piece.
pub(crate) fn long_list<T>(capacity: usize) -> Result<KVVec<T>, AllocError> {
    may_fail()?;
    KVVec::with_capacity(capacity, GFP_KERNEL)
}

/// A copy of `bytes`.
pub(crate) fn copied(bytes: &[u8]) -> Result<KVec<u8>, AllocError> {
    let mut copy = list(bytes.len())?;
    copy.extend_from_slice(bytes, GFP_KERNEL)?;
    Ok(copy)
}

/// Puts `value` at the end of `list`, which grows if need be.
pub(crate) fn push<T>(list: &mut KVec<T>, value: T) -> Result<(), AllocError> {
    may_fail()?;
    list.push(value, GFP_KERNEL)
}

/// Puts `value` at `index` of a table, which is nobody's there.
pub(crate) fn store<T: ForeignOwnable>(
    table: &mut xarray::Guard<'_, T>,
    index: usize,
    value: T,
) -> Result {
    if inject::fails(Point::Entry) {
        return Err(ENOMEM);
    }
    match table.store(index, value, GFP_KERNEL) {
        Ok(_) => Ok(()),
        Err(failed) => Err(failed.error),
    }
}
