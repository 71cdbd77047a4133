// SPDX-License-Identifier: GPL-2.0

//! The running task, and kernel threads.

use super::{
    bindings,
    inject::{self, Point},
};
use core::ptr::NonNull;
use kernel::{
    error::from_err_ptr,
    ffi::{c_int, c_void},
    prelude::*,
    sync::Arc,
};

/// Whether the running task was killed, so that it should stop waiting.
pub(crate) fn fatal_signal_pending() -> bool {
    // SAFETY: Looks at the current task.
    unsafe { bindings::thinram_fatal_signal_pending() }
}

/// Lets others run when the scheduler wants it. May sleep.
pub(crate) fn cond_resched() {
    // SAFETY: Called with no spinlock held.
    unsafe { bindings::thinram_cond_resched() }
}

/// Sleeps for about `us` microseconds, or until killed.
pub(crate) fn sleep_killable(us: u64) {
    let ms = u32::try_from(us / 1000).unwrap_or(1000).max(1);
    let ticks = kernel::time::msecs_to_jiffies(ms);
    // SAFETY: Called with no spinlock held.
    unsafe { bindings::schedule_timeout_killable(isize::try_from(ticks).unwrap_or(1).max(1)) };
}

/// Whether the running task is a kernel thread, which no process pays for.
pub(crate) fn is_kernel_thread() -> bool {
    // SAFETY: Looks at the current task.
    unsafe { bindings::thinram_is_kernel_thread() }
}

/// Runs `f`, during which the task counts as stalled for want of memory (PSI).
pub(crate) fn stalled_for_memory(f: impl FnOnce()) {
    let mut flags = 0;
    // SAFETY: Both are called by the task itself, with the same flags.
    unsafe { bindings::thinram_memstall_enter(&mut flags) };
    f();
    // SAFETY: As above.
    unsafe { bindings::thinram_memstall_leave(&mut flags) };
}

/// Process id of the running task, in the initial namespace.
pub(crate) fn owner_pid() -> i32 {
    // SAFETY: Looks at the current task.
    unsafe { bindings::thinram_owner_pid() }
}

/// Whether one more line may be logged now (20 lines in 5 seconds).
pub(crate) fn may_log() -> bool {
    // SAFETY: No precondition.
    unsafe { bindings::thinram_ratelimit() }
}

/// What a kernel thread does.
pub(crate) trait Work: Send + Sync + 'static {
    /// Runs in the thread until [`should_stop`] says so.
    fn run(&self);
    /// Makes `run` look at [`should_stop`] soon.
    fn wake(&self);
}

/// A kernel thread; dropping it stops the thread and waits for its end.
pub(crate) struct Thread<W: Work> {
    task: NonNull<bindings::task_struct>,
    work: Arc<W>,
}

// SAFETY: kthread_stop() may be called from any task.
unsafe impl<W: Work> Send for Thread<W> {}
// SAFETY: `&Thread` offers nothing that touches the task.
unsafe impl<W: Work> Sync for Thread<W> {}

impl<W: Work> Thread<W> {
    /// Starts a thread called `name`.
    pub(crate) fn start(name: &CStr, work: Arc<W>) -> Result<Thread<W>> {
        if inject::fails(Point::Thread) {
            return Err(ENOMEM);
        }
        let data = work.clone().into_raw();
        // SAFETY: `entry` takes `data` over as the Arc it is; the name is copied.
        let task = from_err_ptr(unsafe {
            bindings::kthread_create_on_node(
                Some(entry::<W>),
                data.cast_mut().cast(),
                bindings::NUMA_NO_NODE,
                name.as_char_ptr(),
            )
        });
        let task = match task {
            Ok(task) => NonNull::new(task).ok_or(ENOMEM)?,
            Err(error) => {
                // SAFETY: The thread was not made, so the reference is still ours.
                drop(unsafe { Arc::from_raw(data) });
                return Err(error);
            }
        };
        // SAFETY: The task was just made; the extra reference keeps it valid for kthread_stop().
        unsafe {
            bindings::get_task_struct(task.as_ptr());
            bindings::wake_up_process(task.as_ptr());
        }
        Ok(Thread { task, work })
    }
}

/// Whether the current thread, one that [`Thread::start`] made, was asked to end.
pub(crate) fn should_stop() -> bool {
    // SAFETY: Only called from such threads.
    unsafe { bindings::kthread_should_stop() }
}

/// Gives the current thread a low priority.
pub(crate) fn be_nice(nice: isize) {
    // SAFETY: The current task is valid.
    unsafe { bindings::set_user_nice(bindings::get_current(), nice) }
}

extern "C" fn entry<W: Work>(data: *mut c_void) -> c_int {
    // SAFETY: `start` passed an Arc's raw pointer and gave the reference up.
    let work = unsafe { Arc::<W>::from_raw(data.cast()) };
    work.run();
    0
}

impl<W: Work> Drop for Thread<W> {
    fn drop(&mut self) {
        self.work.wake();
        // SAFETY: We hold a reference to the task, given back here. `run` returns once it is told
        // to stop; a thread that never ran yet never does, then its Arc reference is given back.
        unsafe {
            if bindings::kthread_stop(self.task.as_ptr()) == -(bindings::EINTR as c_int) {
                drop(Arc::from_raw(Arc::as_ptr(&self.work)));
            }
            bindings::put_task_struct(self.task.as_ptr());
        }
    }
}
