// SPDX-License-Identifier: GPL-2.0

//! A thread that hears what one guest's own root asks for.

use super::{say, Level};
use crate::agent::{asked_kb, Way};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Pause between two questions.
const PAUSE: Duration = Duration::from_secs(5);

/// What was heard last.
#[derive(Debug, Clone, Default)]
pub(super) struct Heard {
    pub(super) asked_kb: Option<u64>,
    pub(super) error: Option<String>,
}

/// The thread; it ends when this is dropped.
pub(super) struct Wishes {
    way: Way,
    heard: Arc<Mutex<Heard>>,
    /// Nothing is sent: the thread sees when it is dropped.
    _end: Sender<()>,
}

impl Wishes {
    pub(super) fn start(way: Way) -> Self {
        let heard = Arc::new(Mutex::new(Heard::default()));
        let (end, ended) = mpsc::channel();
        let (thread_way, thread_heard) = (way.clone(), Arc::clone(&heard));
        thread::spawn(move || loop {
            let new = match asked_kb(&thread_way) {
                Ok(asked_kb) => Heard {
                    asked_kb,
                    error: None,
                },
                // A guest that does not answer, or asks for nonsense, asks for nothing.
                Err(error) => Heard {
                    asked_kb: None,
                    error: Some(error.to_string()),
                },
            };
            let mut heard = thread_heard.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(error) = new.error.as_ref().filter(|_| new.error != heard.error) {
                say(Level::Warning, error);
            }
            *heard = new;
            drop(heard);
            if ended.recv_timeout(PAUSE) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        });
        Self {
            way,
            heard,
            _end: end,
        }
    }

    pub(super) fn way(&self) -> &Way {
        &self.way
    }

    pub(super) fn look(&self) -> Heard {
        let heard = self.heard.lock();
        heard.unwrap_or_else(PoisonError::into_inner).clone()
    }
}
