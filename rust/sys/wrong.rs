// SPDX-License-Identifier: GPL-2.0

//! Debug builds only: what a module must never do, done when a test says so, to see that whatever
//! watches the kernel notices. Locks: those of [`sleep`] are its own.

use super::{
    page::{Frame, Purpose},
    report::bug_once,
};
use kernel::{
    alloc::KBox,
    new_mutex, new_spinlock,
    prelude::*,
    sync::{Mutex, SpinLock},
};

/// A mistake: its word, and what makes it.
pub(crate) type Mistake = (&'static str, fn() -> Result);

/// All of them.
pub(crate) const MISTAKES: [Mistake; 5] = [
    ("report", report),
    ("use_after_free", use_after_free),
    ("sleep", sleep),
    ("leak", leak),
    ("leak_frame", leak_frame),
];

/// Bytes of an object that is freed too early, or never.
const SIZE: usize = 192;

/// Says that something is so which cannot be.
fn report() -> Result {
    bug_once!("a test asked for this line");
    Ok(())
}

/// Reads what was freed.
fn use_after_free() -> Result {
    let freed = KBox::new([0u8; SIZE], GFP_KERNEL)?;
    let bytes: *const u8 = freed.as_ptr();
    drop(freed);
    // SAFETY: it is not safe, which KASAN must say; the byte lies in the direct map whoever owns it now,
    // and nothing depends on what it holds.
    unsafe { bytes.read_volatile() };
    Ok(())
}

/// Takes a lock that may sleep under one under which nobody may.
fn sleep() -> Result {
    let spinning: Pin<KBox<SpinLock<()>>> = KBox::pin_init(new_spinlock!(()), GFP_KERNEL)?;
    let sleeping: Pin<KBox<Mutex<()>>> = KBox::pin_init(new_mutex!(()), GFP_KERNEL)?;
    let _outer = spinning.lock();
    let _inner = sleeping.lock();
    Ok(())
}

/// Objects that are forgotten at once: a pointer that is left somewhere by chance hides one of them.
const FORGOTTEN: usize = 16;

/// Forgets objects.
fn leak() -> Result {
    for _ in 0..FORGOTTEN {
        KBox::leak(KBox::new([0u8; SIZE], GFP_KERNEL)?);
    }
    Ok(())
}

/// Forgets a page.
fn leak_frame() -> Result {
    core::mem::forget(Frame::alloc(Purpose::Shared, -1).ok_or(ENOMEM)?);
    Ok(())
}
