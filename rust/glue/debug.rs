// SPDX-License-Identifier: GPL-2.0

//! /sys/kernel/debug/thinram: how long faults waited for a region's lock, a state that is forced on
//! the host, and in debug builds the switches that take one protection out at a time. Not part of the ABI.

use crate::{
    engine::host::Host,
    logic::{state::HostState, tunables},
};
use kernel::{
    debugfs::{Dir, File},
    fmt,
    prelude::*,
    sync::Arc,
};

/// The host, as debugfs shows it.
struct Waits(Arc<Host>);

/// `force_state`: a state's word, or `none`.
struct ForcedState(Arc<Host>);

/// The directory's files; dropping them removes them.
#[pin_data]
pub(crate) struct DebugFiles {
    #[pin]
    lock_wait: File<Waits>,
    #[pin]
    force_state: File<ForcedState>,
    #[cfg(thinram_debug)]
    switches: switches::Switches,
    _dir: Dir,
}

impl DebugFiles {
    /// Makes the directory.
    pub(crate) fn new(host: Arc<Host>) -> Result<Pin<KBox<DebugFiles>>> {
        let dir = Dir::new(c"thinram");
        let files = dir.clone();
        KBox::try_pin_init(
            try_pin_init!(DebugFiles {
                lock_wait <- files.read_callback_file(
                    c"fault_lock_wait_us",
                    Waits(host.clone()),
                    &show_waits,
                ),
                force_state <- files.read_write_callback_file(
                    c"force_state",
                    ForcedState(host),
                    &show_forced,
                    &force,
                ),
                #[cfg(thinram_debug)]
                switches: switches::Switches::new(&dir)?,
                _dir: dir.clone(),
            }),
            GFP_KERNEL,
        )
    }
}

fn show_waits(waits: &Waits, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let hist = waits.0.lock_wait_us.snapshot();
    writeln!(
        f,
        "count {} p50 {} p99 {} max {}",
        hist.count(),
        hist.p50(),
        hist.p99(),
        hist.max
    )?;
    for (bucket, count) in hist.buckets.iter().enumerate() {
        if *count > 0 {
            let (from, to) = crate::logic::hist::bucket_bounds(bucket);
            writeln!(f, "{from} {to} {count}")?;
        }
    }
    Ok(())
}

fn show_forced(forced: &ForcedState, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let host = &forced.0;
    let word = if host.pressure.is_forced() {
        host.state().as_str()
    } else {
        "none"
    };
    writeln!(f, "{word}")
}

/// What was written, if there is room for it.
fn written<'a>(
    reader: &mut kernel::uaccess::UserSliceReader,
    bytes: &'a mut [u8],
) -> Result<&'a [u8]> {
    let len = reader.len();
    let text = bytes.get_mut(..len).ok_or(EINVAL)?;
    reader.read_slice(text)?;
    Ok(text)
}

fn force(forced: &ForcedState, reader: &mut kernel::uaccess::UserSliceReader) -> Result {
    let mut bytes = [0u8; 16];
    let word = written(reader, &mut bytes)?;
    let state = match HostState::parse(word) {
        Ok(state) => Some(state),
        Err(_) if tunables::without_newline(word) == b"none" => None,
        Err(_) => return Err(EINVAL),
    };
    forced.0.pressure.force(state);
    forced.0.reclaimer_bell.ring();
    forced.0.splitter_bell.ring();
    Ok(())
}

#[cfg(thinram_debug)]
mod switches {
    use super::written;
    use crate::{
        logic::tunables,
        sys::{
            inject::{self, Countdown, HeldAnswers},
            live::{Lent, LENT},
            protect, watching,
            wrong::{Mistake, MISTAKES},
        },
    };
    use core::sync::atomic::{AtomicBool, Ordering};
    use kernel::{
        debugfs::{Dir, File},
        fmt,
        prelude::*,
    };

    /// `1` is on.
    struct Switch(&'static AtomicBool);

    struct Wrong(&'static [Mistake]);

    /// One file for each protection, `1` takes it out; one for the means of sampling; and one for each
    /// kind of failure, and `fail_allocation` for all kinds: a number N lets the Nth from then on fail,
    /// `N-` all after it as well, and reads as how many it still is to that one. A number written to
    /// `hold_reads` holds that answer of a swap disk and all after it; it reads as how many came since
    /// it was 0. The files `live_*` read as how many of what the kernel lends are out. A word written to
    /// `do_wrong` makes that mistake; it reads as all words.
    pub(super) struct Switches {
        _switches: KVec<Pin<KBox<File<Switch>>>>,
        _countdowns: KVec<Pin<KBox<File<Countdown>>>>,
        _held: Pin<KBox<File<HeldAnswers>>>,
        _live: KVec<Pin<KBox<File<Lent>>>>,
        _wrong: Pin<KBox<File<Wrong>>>,
    }

    impl Switches {
        pub(super) fn new(dir: &Dir) -> Result<Switches> {
            let mut files = KVec::with_capacity(protect::ALL.len() + 1, GFP_KERNEL)?;
            let protections =
                protect::ALL.map(|(protection, name)| (protect::switch(protection), name));
            let means = [(watching::switch(), watching::NAME)];
            for (switch, name) in Iterator::chain(protections.into_iter(), means) {
                let file = KBox::pin_init(
                    dir.read_write_callback_file(name, Switch(switch), &show, &store),
                    GFP_KERNEL,
                )?;
                files.push(file, GFP_KERNEL)?;
            }
            let mut countdowns = KVec::with_capacity(inject::POINTS.len() + 1, GFP_KERNEL)?;
            let kinds = inject::POINTS.map(|(point, name)| (Some(point), name));
            for (point, name) in Iterator::chain(kinds.into_iter(), [(None, c"fail_allocation")]) {
                let countdown = Countdown::of(point);
                let file = dir.read_write_callback_file(
                    name,
                    countdown,
                    &show_countdown,
                    &store_countdown,
                );
                countdowns.push(KBox::pin_init(file, GFP_KERNEL)?, GFP_KERNEL)?;
            }
            let mut live = KVec::with_capacity(LENT.len(), GFP_KERNEL)?;
            for (kind, name) in LENT {
                let file = dir.read_callback_file(name, kind, &show_live);
                live.push(KBox::pin_init(file, GFP_KERNEL)?, GFP_KERNEL)?;
            }
            Ok(Switches {
                _switches: files,
                _live: live,
                _countdowns: countdowns,
                _held: KBox::pin_init(
                    dir.read_write_callback_file(
                        c"hold_reads",
                        HeldAnswers,
                        &show_held,
                        &store_held,
                    ),
                    GFP_KERNEL,
                )?,
                _wrong: KBox::pin_init(
                    dir.read_write_callback_file(
                        c"do_wrong",
                        Wrong(&MISTAKES),
                        &show_wrong,
                        &do_wrong,
                    ),
                    GFP_KERNEL,
                )?,
            })
        }
    }

    fn show(switch: &Switch, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", u8::from(switch.0.load(Ordering::Relaxed)))
    }

    fn store(switch: &Switch, reader: &mut kernel::uaccess::UserSliceReader) -> Result {
        let first: u8 = reader.read()?;
        let on = match first {
            b'0' => false,
            b'1' => true,
            _ => return Err(EINVAL),
        };
        switch.0.store(on, Ordering::Relaxed);
        Ok(())
    }

    fn show_live(kind: &Lent, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", kind.live())
    }

    fn show_wrong(wrong: &Wrong, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (word, _) in wrong.0 {
            writeln!(f, "{word}")?;
        }
        Ok(())
    }

    fn do_wrong(wrong: &Wrong, reader: &mut kernel::uaccess::UserSliceReader) -> Result {
        let mut bytes = [0u8; 20];
        let text = tunables::without_newline(written(reader, &mut bytes)?);
        let named = wrong.0.iter().find(|(word, _)| word.as_bytes() == text);
        let (_, mistake) = named.ok_or(EINVAL)?;
        mistake()
    }

    fn show_countdown(countdown: &Countdown, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", countdown.left())
    }

    fn store_countdown(
        countdown: &Countdown,
        reader: &mut kernel::uaccess::UserSliceReader,
    ) -> Result {
        let mut digits = [0u8; 20];
        let text = text_of(reader, &mut digits)?;
        let (nth, all_after) = match text.strip_suffix('-') {
            Some(nth) => (nth, true),
            None => (text, false),
        };
        countdown.fail_after(nth.parse::<u32>().map_err(|_| EINVAL)?.into(), all_after);
        Ok(())
    }

    fn show_held(held: &HeldAnswers, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", held.came())
    }

    fn store_held(held: &HeldAnswers, reader: &mut kernel::uaccess::UserSliceReader) -> Result {
        let mut digits = [0u8; 20];
        let first = text_of(reader, &mut digits)?.parse::<u32>();
        held.hold_from(first.map_err(|_| EINVAL)?.into());
        Ok(())
    }

    /// What was written, as text without its newline.
    fn text_of<'a>(
        reader: &mut kernel::uaccess::UserSliceReader,
        bytes: &'a mut [u8; 20],
    ) -> Result<&'a str> {
        let text = core::str::from_utf8(written(reader, bytes)?);
        Ok(text.map_err(|_| EINVAL)?.trim_end())
    }
}
