// SPDX-License-Identifier: GPL-2.0

//! A thread that talks to one QEMU.

use super::{say, Level};
use crate::qmp::{Balloon, Client, Driver, GuestStats, QmpError};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long QEMU may take to answer.
const LIMIT: Duration = Duration::from_secs(3);
/// Pause between two questions.
const PAUSE: Duration = Duration::from_secs(1);
/// Seconds between two reports of the guest's driver.
const REPORT_S: u64 = 2;
/// Figures that did not change for so long are those of a guest that stopped telling.
const STALE: Duration = Duration::from_secs(30);
/// Longest pause before a socket is tried again.
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// What is known about the other end.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    pub(super) driver: Driver,
    pub(super) actual_kb: Option<u64>,
    pub(super) error: Option<String>,
    stats: Option<GuestStats>,
    /// When the driver's figures last were new ones.
    renewed: Option<Instant>,
}

impl Seen {
    /// How long ago the guest's figures were new ones.
    pub(super) fn stats_age(&self) -> Option<Duration> {
        self.renewed.map(|at| at.elapsed())
    }

    /// The guest's figures, unless they are old.
    pub(super) fn fresh_stats(&self) -> Option<GuestStats> {
        self.stats
            .filter(|_| self.renewed.is_some_and(|at| at.elapsed() < STALE))
    }
}

/// The thread; it ends when this is dropped.
pub(super) struct Link {
    path: PathBuf,
    seen: Arc<Mutex<Seen>>,
    orders: Sender<u64>,
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    // Each writer leaves it whole at any time.
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    pub(super) fn start(path: PathBuf) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (orders, inbox) = mpsc::channel();
        let (thread_path, thread_seen) = (path.clone(), Arc::clone(&seen));
        thread::spawn(move || serve(&thread_path, &thread_seen, &inbox));
        Self { path, seen, orders }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn look(&self) -> Seen {
        lock(&self.seen).clone()
    }

    /// Asks for a size; the loop sees by itself what becomes of it.
    pub(super) fn order(&self, kb: u64) {
        // The thread lives as long as this does.
        let _ = self.orders.send(kb);
    }
}

/// Connects again and again until nobody wants orders carried out any more.
fn serve(path: &Path, seen: &Mutex<Seen>, inbox: &Receiver<u64>) {
    let mut retry = PAUSE;
    let mut last_error = String::new();
    loop {
        let connected =
            Client::connect(path, LIMIT).and_then(|client| Balloon::open(client, REPORT_S));
        let error = match connected {
            Ok(balloon) => {
                retry = PAUSE;
                last_error.clear();
                match talk(balloon, seen, inbox) {
                    Some(error) => error,
                    None => return,
                }
            }
            Err(error) => error,
        };
        let error = error.to_string();
        if error != last_error {
            say(Level::Warning, &error);
            last_error.clone_from(&error);
        }
        *lock(seen) = Seen {
            error: Some(error),
            ..Seen::default()
        };
        // What was ordered before the connection broke was for what was seen then.
        let until = Instant::now() + retry;
        loop {
            match inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
        retry = (retry * 2).min(LONGEST_RETRY);
    }
}

/// Asks and orders until the connection breaks; `None` says that nobody wants more.
fn talk(mut balloon: Balloon, seen: &Mutex<Seen>, inbox: &Receiver<u64>) -> Option<QmpError> {
    loop {
        let asked = balloon
            .actual_kb()
            .and_then(|actual| Ok((actual, balloon.stats()?)));
        match asked {
            Ok((actual_kb, stats)) => note(seen, balloon.has_device(), actual_kb, stats),
            Err(error) if error.is_refusal() => lock(seen).error = Some(error.to_string()),
            Err(error) => return Some(error),
        }
        let until = Instant::now() + PAUSE;
        loop {
            match inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(kb) => match balloon.set_kb(kb) {
                    Ok(()) => {}
                    Err(error) if error.is_refusal() => {
                        say(
                            Level::Warning,
                            &format!("{}: {error}", balloon.client().path().display()),
                        );
                        lock(seen).error = Some(error.to_string());
                    }
                    Err(error) => return Some(error),
                },
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }
}

fn note(seen: &Mutex<Seen>, device: bool, actual_kb: Option<u64>, stats: Option<GuestStats>) {
    let mut seen = lock(seen);
    if stats.map(|new| new.last_update_s) != seen.stats.map(|old| old.last_update_s) {
        seen.renewed = stats.map(|_| Instant::now());
    }
    seen.driver = match (device, stats) {
        (false, _) => Driver::None,
        (true, None) => Driver::Any,
        (true, Some(_)) => Driver::Driver,
    };
    seen.actual_kb = actual_kb;
    seen.stats = stats;
    seen.error = match device {
        true => None,
        false => Some("it has no balloon: start QEMU with -device virtio-balloon".to_owned()),
    };
}
