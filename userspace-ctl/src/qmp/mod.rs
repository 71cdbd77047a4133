// SPDX-License-Identifier: GPL-2.0

//! A typed client of QEMU's machine protocol, as much of it as balloons need.
//!
//! Every call ends by a deadline. After any error but [`QmpError::Refused`] the connection is in no
//! known state: drop the client and connect again.

mod balloon;

pub use balloon::{Balloon, Driver, GuestStats};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// More than any answer to these commands is long.
const MAX_LINE: usize = 4 << 20;
/// Events kept for a caller that does not fetch them; the oldest go first.
const MAX_EVENTS: usize = 256;
/// Pause before a socket that was too busy is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// What went wrong with a QMP socket.
#[derive(Debug, Error)]
pub enum QmpError {
    /// Nobody listens, or not for us.
    #[error("cannot connect to {path}: {cause}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The socket broke.
    #[error("{path}: {cause}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// No answer in time.
    #[error("{path}: no answer to {command} within {}.{:03} s", .limit.as_secs(), .limit.subsec_millis())]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        command: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// The other side hung up: QEMU ended, or serves another client.
    #[error("{path}: the connection was closed")]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// What speaks there is not QMP.
    #[error("{path} is no QMP socket: it says `{content}`")]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// The start of what it said, escaped.
        content: String,
    },
    /// QEMU refused the command; the connection goes on.
    #[error("{command}: {desc} ({class})")]
    Refused {
        /// What was asked.
        command: String,
        /// QEMU's class of error, such as `DeviceNotActive`.
        class: String,
        /// Its words.
        desc: String,
    },
}

impl QmpError {
    /// Whether the connection can be used further.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// Something that QEMU told without being asked.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Event {
    /// Its name, such as `BALLOON_CHANGE`.
    pub event: String,
    /// What it is about.
    #[serde(default)]
    pub data: Value,
}

/// A command and the type of its answer.
pub trait Command: Serialize {
    /// Name on the wire.
    const NAME: &'static str;
    /// What QEMU returns.
    type Answer: DeserializeOwned;
}

/// Declares a command with named arguments.
macro_rules! command {
    ($(#[$meta:meta])* $name:ident<$($life:lifetime)?> { $($field:ident: $type:ty),* } = $wire:literal -> $answer:ty) => {
        $(#[$meta])*
        #[derive(Debug, serde::Serialize)]
        pub(crate) struct $name<$($life)?> { $(pub(crate) $field: $type),* }

        impl<$($life)?> $crate::qmp::Command for $name<$($life)?> {
            const NAME: &'static str = $wire;
            type Answer = $answer;
        }
    };
}
pub(crate) use command;

/// The empty answer, `{}`.
#[derive(Debug, Deserialize)]
pub struct Nothing {}

command!(
    /// Ends the negotiation.
    Capabilities<> {} = "qmp_capabilities" -> Nothing
);

/// A connection that has finished its negotiation.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: UnixStream,
    limit: Duration,
    unread: Vec<u8>,
    events: VecDeque<Event>,
    last_id: u64,
}

impl Client {
    /// Connects and negotiates; every later call is given `limit` as well.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, QmpError> {
        let deadline = Instant::now() + limit;
        let stream = connect_by(path, deadline).map_err(|cause| QmpError::Connect {
            path: path.to_owned(),
            cause,
        })?;
        let mut client = Self {
            path: path.to_owned(),
            stream,
            limit,
            unread: Vec::new(),
            events: VecDeque::new(),
            last_id: 0,
        };
        let greeting = client.line("the greeting", deadline)?;
        let spoken: Option<Value> = serde_json::from_slice(&greeting).ok();
        if spoken
            .as_ref()
            .and_then(|greeting| greeting.get("QMP"))
            .is_none()
        {
            return Err(client.not_qmp(&greeting));
        }
        client.execute(&Capabilities {})?;
        Ok(client)
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sends a command and waits for its answer; events that come meanwhile are kept.
    pub fn execute<C: Command>(&mut self, command: &C) -> Result<C::Answer, QmpError> {
        #[derive(Serialize)]
        struct Request<'a, C> {
            execute: &'static str,
            arguments: &'a C,
            id: u64,
        }
        let deadline = Instant::now() + self.limit;
        self.last_id += 1;
        let id = self.last_id;
        let request = Request {
            execute: C::NAME,
            arguments: command,
            id,
        };
        let mut bytes = serde_json::to_vec(&request).map_err(|error| self.io(error.into()))?;
        bytes.push(b'\n');
        self.send(&bytes, C::NAME, deadline)?;
        loop {
            let line = self.line(C::NAME, deadline)?;
            if let Some(value) = self.answer(&line, C::NAME, id)? {
                return serde_json::from_value(value).map_err(|_| self.not_qmp(&line));
            }
        }
    }

    /// The events since the last call, waiting up to `wait` for a first one.
    pub fn events(&mut self, wait: Duration) -> Result<Vec<Event>, QmpError> {
        let deadline = Instant::now() + wait;
        while self.events.is_empty() {
            match self.line("an event", deadline) {
                Ok(line) => {
                    self.answer(&line, "an event", 0)?;
                }
                Err(QmpError::Timeout { .. }) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(self.events.drain(..).collect())
    }

    /// The answer to `id`, if the line is that; an event is put aside, and an answer to an earlier
    /// command, which was given up, is passed over.
    fn answer(&mut self, line: &[u8], command: &str, id: u64) -> Result<Option<Value>, QmpError> {
        #[derive(Deserialize)]
        struct Line {
            event: Option<String>,
            data: Option<Value>,
            #[serde(rename = "return")]
            answer: Option<Value>,
            error: Option<Refusal>,
            id: Option<Value>,
        }
        #[derive(Deserialize)]
        struct Refusal {
            class: String,
            desc: String,
        }
        let Ok(parsed) = serde_json::from_slice::<Line>(line) else {
            return Err(self.not_qmp(line));
        };
        if let Some(event) = parsed.event {
            if self.events.len() == MAX_EVENTS {
                self.events.pop_front();
            }
            self.events.push_back(Event {
                event,
                data: parsed.data.unwrap_or_default(),
            });
            return Ok(None);
        }
        if parsed.id.is_some_and(|got| got.as_u64() != Some(id)) {
            return Ok(None);
        }
        match (parsed.answer, parsed.error) {
            (Some(answer), None) => Ok(Some(answer)),
            (None, Some(Refusal { class, desc })) => Err(QmpError::Refused {
                command: command.to_owned(),
                class,
                desc,
            }),
            _ => Err(self.not_qmp(line)),
        }
    }

    fn send(
        &mut self,
        mut bytes: &[u8],
        command: &'static str,
        deadline: Instant,
    ) -> Result<(), QmpError> {
        while !bytes.is_empty() {
            self.wait(PollFlags::OUT, command, deadline)?;
            match self.stream.write(bytes) {
                Ok(0) => {
                    return Err(QmpError::Closed {
                        path: self.path.clone(),
                    })
                }
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(self.io(error)),
            }
        }
        Ok(())
    }

    /// One line without its end.
    fn line(&mut self, command: &'static str, deadline: Instant) -> Result<Vec<u8>, QmpError> {
        let mut seen = 0;
        loop {
            if let Some(at) = self.unread[seen..].iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.unread.drain(..=seen + at).collect();
                line.pop();
                if line.iter().all(u8::is_ascii_whitespace) {
                    seen = 0;
                    continue;
                }
                return Ok(line);
            }
            seen = self.unread.len();
            if seen > MAX_LINE {
                return Err(self.not_qmp(&self.unread));
            }
            self.wait(PollFlags::IN, command, deadline)?;
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    return Err(QmpError::Closed {
                        path: self.path.clone(),
                    })
                }
                Ok(len) => self.unread.extend_from_slice(&chunk[..len]),
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(self.io(error)),
            }
        }
    }

    fn wait(
        &self,
        flags: PollFlags,
        command: &'static str,
        deadline: Instant,
    ) -> Result<(), QmpError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(left) = Timespec::try_from(left) else {
                return Err(self.io(ErrorKind::InvalidInput.into()));
            };
            match poll(&mut [PollFd::new(&self.stream, flags)], Some(&left)) {
                Ok(0) => {
                    let path = self.path.clone();
                    return Err(QmpError::Timeout {
                        path,
                        command,
                        limit: self.limit,
                    });
                }
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(self.io(error.into())),
            }
        }
    }

    fn io(&self, cause: io::Error) -> QmpError {
        match cause.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => QmpError::Closed {
                path: self.path.clone(),
            },
            _ => QmpError::Io {
                path: self.path.clone(),
                cause,
            },
        }
    }

    fn not_qmp(&self, line: &[u8]) -> QmpError {
        let start = &line[..line.len().min(200)];
        let content = crate::text::shorten(&crate::text::escape(start), 60);
        QmpError::NotQmp {
            path: self.path.clone(),
            content,
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Connects without ever blocking: a listener that accepts nobody would hold us for ever.
fn connect_by(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match net::connect(&socket, &address) {
            Ok(()) => return Ok(UnixStream::from(socket)),
            Err(rustix::io::Errno::AGAIN) if Instant::now() + BUSY_PAUSE < deadline => {
                thread::sleep(BUSY_PAUSE);
            }
            Err(rustix::io::Errno::AGAIN) => return Err(ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests;
