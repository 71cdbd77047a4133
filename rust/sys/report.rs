// SPDX-License-Identifier: GPL-2.0

//! What the module says of itself when something is so that only a mistake in it can have brought about.

/// Tells the kernel's log, once for each place, after the words that each run is searched for: in it
/// they are `thinram: bug: `.
macro_rules! bug_once {
    ($($arg:tt)*) => {
        kernel::pr_err_once!("bug: {}\n", kernel::prelude::fmt!($($arg)*))
    };
}
pub(crate) use bug_once;
