// SPDX-License-Identifier: GPL-2.0

//! What bindgen made of `bindings.h` at build time, together with the kernel crate's own bindings.
//! A type that both have is the one of this build.

#![allow(clippy::all, missing_docs, unused_imports, dead_code, unreachable_pub)]
#![allow(
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    improper_ctypes
)]
#![allow(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub(crate) use generated::*;
pub(crate) use kernel::bindings::*;

mod generated {
    use kernel::bindings::*;
    use kernel::ffi;
    include!(env!("THINRAM_BINDINGS"));
}
