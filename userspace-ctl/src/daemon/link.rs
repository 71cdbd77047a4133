// SPDX-License-Identifier: GPL-2.0

//! A thread that talks to one QEMU.

use super::{say, Level};
use crate::qmp::{Balloon, Client, Driver, GuestStats, QmpError};
use crate::virsh::{Domain, VirshError};
use std::fmt;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long QEMU may take to answer.
const LIMIT: Duration = Duration::from_secs(3);
/// Pause between two questions.
const PAUSE: Duration = Duration::from_secs(1);
/// The same for libvirt, where each is a process: while an order is carried out, and otherwise.
const VIRSH_PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(6));
/// How long after an order libvirt is asked more often. A balloon that does not move meanwhile is
/// told again only after a while.
const VIRSH_BUSY: Duration = Duration::from_secs(30);
/// How long orders and the balloon's own news wait for each other.
const SLICE: Duration = Duration::from_millis(200);
/// Seconds between two reports of the guest's driver.
const REPORT_S: u64 = 2;
/// Figures that did not change for so long are those of a guest that stopped telling.
const STALE: Duration = Duration::from_secs(30);
/// Longest pause before a socket is tried again.
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// What is known about the other end.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    pub(super) driver: Option<Driver>,
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

/// How a VM's balloon is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// A QMP socket of ours.
    Qmp(PathBuf),
    /// libvirt, which has the socket.
    Libvirt(Domain),
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Qmp(path) => write!(f, "{}", path.display()),
            Self::Libvirt(Domain(name)) => write!(f, "libvirt:{name}"),
        }
    }
}

/// The thread; it ends when this is dropped.
pub(super) struct Link {
    way: Way,
    seen: Arc<Mutex<Seen>>,
    orders: Sender<u64>,
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    // Each writer leaves it whole at any time.
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    pub(super) fn start(way: Way) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (orders, inbox) = mpsc::channel();
        let (thread_way, thread_seen) = (way.clone(), Arc::clone(&seen));
        thread::spawn(move || serve(&thread_way, &thread_seen, &inbox));
        Self { way, seen, orders }
    }

    pub(super) fn way(&self) -> &Way {
        &self.way
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

/// Something that went wrong at the other end.
struct Failure {
    said: String,
    /// Whether the connection can be used further.
    goes_on: bool,
}

impl From<QmpError> for Failure {
    fn from(error: QmpError) -> Self {
        Self {
            goes_on: error.is_refusal(),
            said: error.to_string(),
        }
    }
}

impl From<VirshError> for Failure {
    fn from(error: VirshError) -> Self {
        Self {
            goes_on: false,
            said: error.to_string(),
        }
    }
}

/// What the balloon leaves the guest, `None` without a balloon, and the guest's figures.
type Look = (Option<u64>, Option<GuestStats>);

/// The other end, connected.
enum Remote {
    Qmp(Balloon),
    Libvirt(Domain),
}

impl Remote {
    fn connect(way: &Way) -> Result<Self, Failure> {
        Ok(match way {
            Way::Qmp(path) => {
                let client = Client::connect(path, LIMIT)?;
                Self::Qmp(Balloon::open(client, REPORT_S)?)
            }
            Way::Libvirt(domain) => {
                domain.poll_stats(REPORT_S)?;
                Self::Libvirt(domain.clone())
            }
        })
    }

    fn look(&mut self) -> Result<Look, Failure> {
        Ok(match self {
            Self::Qmp(balloon) => (balloon.actual_kb()?, balloon.stats()?),
            Self::Libvirt(domain) => {
                let told = domain.memory_stats()?;
                (told.actual_kb, told.stats)
            }
        })
    }

    fn set_kb(&mut self, kb: u64) -> Result<(), Failure> {
        match self {
            Self::Qmp(balloon) => Ok(balloon.set_kb(kb)?),
            Self::Libvirt(domain) => match domain.set_kb(kb) {
                Err(error @ VirshError::Refused { .. }) => Err(Failure {
                    said: error.to_string(),
                    goes_on: true,
                }),
                outcome => Ok(outcome?),
            },
        }
    }

    /// Waits a moment; what the balloon leaves the guest, where it tells that it changed.
    fn listen(&mut self) -> Result<Option<u64>, Failure> {
        match self {
            Self::Qmp(balloon) => {
                let events = balloon.client().events(SLICE)?;
                let last = events
                    .iter()
                    .rev()
                    .find(|event| event.event == "BALLOON_CHANGE");
                let bytes = last.and_then(|event| event.data["actual"].as_u64());
                Ok(bytes.map(|bytes| bytes / 1024))
            }
            Self::Libvirt(_) => {
                thread::sleep(SLICE);
                Ok(None)
            }
        }
    }

    /// Pause between two looks: a command of virsh costs more than a line to QEMU.
    fn pause(&self, ordered: Option<Instant>) -> Duration {
        match self {
            Self::Qmp(_) => PAUSE,
            Self::Libvirt(_) if ordered.is_some_and(|at| at.elapsed() < VIRSH_BUSY) => {
                VIRSH_PAUSE.0
            }
            Self::Libvirt(_) => VIRSH_PAUSE.1,
        }
    }
}

/// Connects again and again until nobody wants orders carried out any more.
fn serve(way: &Way, seen: &Mutex<Seen>, inbox: &Receiver<u64>) {
    let mut retry = PAUSE;
    let mut last_error = String::new();
    loop {
        let error = match Remote::connect(way) {
            Ok(remote) => {
                let told = talk(remote, way, seen, inbox);
                match told {
                    Talk::Over => return,
                    Talk::Broke { error, worked } => {
                        if worked {
                            retry = PAUSE;
                            last_error.clear();
                        }
                        error
                    }
                }
            }
            Err(failure) => failure.said,
        };
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

/// How a connection ended.
enum Talk {
    /// Nobody wants more.
    Over,
    /// It broke; whether it worked before.
    Broke { error: String, worked: bool },
}

/// Asks and orders until the connection breaks.
fn talk(mut remote: Remote, way: &Way, seen: &Mutex<Seen>, inbox: &Receiver<u64>) -> Talk {
    let mut worked = false;
    let mut ordered = None;
    let broke = |failure: Failure, worked| Talk::Broke {
        error: failure.said,
        worked,
    };
    loop {
        match remote.look() {
            Ok((actual_kb, stats)) => {
                worked = true;
                note(seen, actual_kb.is_some(), actual_kb, stats);
            }
            Err(failure) if failure.goes_on => lock(seen).error = Some(failure.said),
            Err(failure) => return broke(failure, worked),
        }
        let looked = Instant::now();
        while looked.elapsed() < remote.pause(ordered) {
            match inbox.try_recv() {
                Ok(kb) => match remote.set_kb(kb) {
                    Ok(()) => ordered = Some(Instant::now()),
                    Err(failure) if failure.goes_on => {
                        say(Level::Warning, &format!("{way}: {}", failure.said));
                        lock(seen).error = Some(failure.said);
                    }
                    Err(failure) => return broke(failure, worked),
                },
                Err(TryRecvError::Disconnected) => return Talk::Over,
                Err(TryRecvError::Empty) => match remote.listen() {
                    Ok(Some(kb)) => lock(seen).actual_kb = Some(kb),
                    Ok(None) => {}
                    Err(failure) => return broke(failure, worked),
                },
            }
        }
    }
}

fn note(seen: &Mutex<Seen>, device: bool, actual_kb: Option<u64>, stats: Option<GuestStats>) {
    let mut seen = lock(seen);
    if stats.map(|new| new.last_update_s) != seen.stats.map(|old| old.last_update_s) {
        seen.renewed = stats.map(|_| Instant::now());
    }
    seen.driver = Some(match (device, stats) {
        (false, _) => Driver::None,
        (true, None) => Driver::Any,
        (true, Some(_)) => Driver::Driver,
    });
    seen.actual_kb = actual_kb;
    seen.stats = stats;
    seen.error = match device {
        true => None,
        false => Some("it has no balloon: start QEMU with -device virtio-balloon".to_owned()),
    };
}
