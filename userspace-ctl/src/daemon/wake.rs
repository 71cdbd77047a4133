// SPDX-License-Identifier: GPL-2.0

//! What the daemon waits for: clients, signals, the module's state; and whom it tells that it lives.

use super::DaemonError;
use crate::sysfs::Dir;
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Instant;

/// Makes the socket; one that nobody answers on any more is replaced.
pub(super) fn listen(path: &PathBuf) -> Result<UnixListener, DaemonError> {
    let failed = |cause| DaemonError::Listen {
        path: path.clone(),
        cause,
    };
    if UnixStream::connect(path).is_ok() {
        return Err(DaemonError::Running(path.clone()));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// Signals as bytes that can be polled for.
pub(super) struct Signals {
    pub(super) hang_up: UnixStream,
    pub(super) end: UnixStream,
}

impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        let pipe = |signals: &[i32]| {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            for signal in signals {
                signal_hook::low_level::pipe::register(*signal, write.try_clone()?)?;
            }
            Ok::<_, io::Error>(read)
        };
        Ok(Self {
            hang_up: pipe(&[SIGHUP])?,
            end: pipe(&[SIGTERM, SIGINT])?,
        })
    }

    /// Whether one came since the last look.
    pub(super) fn came(mut stream: &UnixStream) -> bool {
        let mut bytes = [0; 64];
        let mut came = false;
        while matches!(stream.read(&mut bytes), Ok(1..)) {
            came = true;
        }
        came
    }
}

/// The module's `state`, which wakes us when it changes.
pub(super) struct StateFile(pub(super) Option<File>);

impl StateFile {
    /// Reads it, without which it would not wake us.
    pub(super) fn arm(&mut self, dir: Option<&Dir>) {
        let mut text = String::new();
        let read = |file: &mut File, text: &mut String| {
            file.seek(SeekFrom::Start(0))
                .and_then(|_| file.read_to_string(text))
        };
        let armed = self
            .0
            .as_mut()
            .is_some_and(|file| read(file, &mut text).is_ok());
        if !armed {
            self.0 = dir.and_then(|dir| File::open(dir.path().join("state")).ok());
            if let Some(file) = &mut self.0 {
                let _ = read(file, &mut text);
            }
        }
    }
}

/// The service manager that started us, if one did.
#[derive(Default)]
pub(super) struct Manager {
    last: String,
}

impl Manager {
    /// Says that we live, and how we are where that changed. The first time means "ready".
    pub(super) fn tell(&mut self, status: &str) {
        let mut said = Vec::new();
        if self.last.is_empty() {
            said.push(NotifyState::Ready);
        }
        if self.last != status {
            said.push(NotifyState::Status(status));
        }
        if sd_notify::watchdog_enabled().is_some() {
            said.push(NotifyState::Watchdog);
        }
        if !said.is_empty() {
            // Without a manager there is nobody to tell.
            let _ = sd_notify::notify(&said);
        }
        status.clone_into(&mut self.last);
    }
}

/// Waits for a client, a signal, a worse state (then the answer is `true`) or the time.
pub(super) fn wait(
    listener: &UnixListener,
    signals: &Signals,
    state: Option<&File>,
    until: Instant,
) -> io::Result<bool> {
    let left = until.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
    let mut fds = vec![
        PollFd::new(listener, PollFlags::IN),
        PollFd::new(&signals.hang_up, PollFlags::IN),
        PollFd::new(&signals.end, PollFlags::IN),
    ];
    if let Some(file) = state {
        fds.push(PollFd::new(file, PollFlags::PRI));
    }
    match poll(&mut fds, Some(&left)) {
        Ok(_) => Ok(fds
            .get(3)
            .is_some_and(|fd| fd.revents().contains(PollFlags::PRI))),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
