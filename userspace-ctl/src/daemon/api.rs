// SPDX-License-Identifier: GPL-2.0

//! How the command line talks to the daemon: one line of JSON each way, over a socket that only root
//! may use.

use crate::config::VmConfig;
use crate::control::{Conduct, Decision, HostState, Tally};
use crate::policy::PolicyKind;
use crate::qmp::Driver;
use crate::rates::PerSecond;
use crate::snapshot::Snapshot;
use crate::units::exact_kb;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;

/// How long either side waits for the other.
const LIMIT: Duration = Duration::from_secs(5);
/// How long the daemon waits for a client's question.
const QUESTION: Duration = Duration::from_millis(500);
/// More than any question is long.
const MAX_QUESTION: u64 = 64 << 10;

/// Where the daemon listens.
pub fn socket_path(root: &Path) -> PathBuf {
    root.join("run/thinramctl.sock")
}

/// What the daemon can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// All guests.
    Status {},
    /// The last decisions about a VM.
    Explain {
        /// Which one.
        vm: String,
    },
    /// A size by hand, kept until it is released.
    Balloon {
        /// Which VM.
        vm: String,
        /// Its size.
        kb: u64,
    },
    /// Leaves a VM to its policy again.
    Release {
        /// Which one.
        vm: String,
    },
    /// What the policies decide from, now.
    Snapshot {},
    /// Adds a VM.
    Add {
        /// Its name.
        vm: String,
        /// Its settings, as an operator writes them.
        settings: BTreeMap<String, String>,
    },
    /// Changes a setting of a VM.
    Set {
        /// Which VM.
        vm: String,
        /// Which setting.
        key: String,
        /// Its value, as an operator writes it.
        value: String,
    },
    /// Sizes a VM no more.
    Remove {
        /// Which one.
        vm: String,
    },
    /// Whether a VM may start; if so, its minimum is kept for it.
    Admit {
        /// Its name.
        vm: String,
        /// Least that it can run with.
        min_kb: u64,
        /// Most that it may get.
        max_kb: u64,
        /// Part of all sharing breaking that need not be backed; the configuration's where not given.
        unshare_risk_percent: Option<u64>,
        /// How long it is kept.
        hold_s: u64,
        /// It will be asked again: the guests make room meanwhile.
        wait: bool,
    },
    /// Keeps nothing for a VM any more.
    Cancel {
        /// Which one.
        vm: String,
    },
}

/// What it answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Reply {
    /// All guests.
    Status(Box<Report>),
    /// What the policies decide from.
    Snapshot(Snapshot),
    /// Whether a VM may start.
    Admission {
        /// It may.
        admitted: bool,
        /// What of its maximum it could have now.
        room_kb: Option<u64>,
        /// Why not, or what is kept.
        reason: String,
    },
    /// The last decisions about a VM.
    Explain {
        /// The daemon's clock.
        now_s: f64,
        /// Oldest first.
        decisions: Vec<Decision>,
    },
    /// Done.
    Done {},
}

/// The loop's view of the host.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The host's policy.
    pub policy: PolicyKind,
    /// Whether all dynamic minima fit.
    pub admission_ok: bool,
    /// What is wrong with the host, if anything is.
    pub trouble: Option<String>,
    /// The host's memory.
    pub host: Option<HostReport>,
    /// What is kept for VMs that start.
    pub reservations: Vec<ReservationReport>,
    /// The configured guests.
    pub guests: Vec<GuestReport>,
    /// VMs of the module that are in no configuration: they are left alone.
    pub found: Vec<FoundReport>,
}

/// The host's memory, as the loop sees it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HostReport {
    /// The module's state.
    pub state: Option<HostState>,
    /// All memory.
    pub total_kb: u64,
    /// What can be had without swapping.
    pub available_kb: u64,
    /// Kept back from all guests.
    pub slush_kb: u64,
    /// Kept for VMs that start.
    pub reserved_kb: u64,
    /// What it would cost if all sharing broke.
    pub unshare_kb: u64,
    /// Part of that which need not be backed by memory.
    pub unshare_risk_percent: u64,
    /// Whether the rest is.
    pub unshare_ok: bool,
}

/// What is kept for a VM that starts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReservationReport {
    /// The VM.
    pub name: String,
    /// Its minimum.
    pub min_kb: u64,
    /// For how long yet.
    pub left_s: f64,
    /// It was admitted, else it waits for the memory.
    pub admitted: bool,
}

/// A VM that nobody configured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FoundReport {
    /// Its name in the module.
    pub name: String,
    /// What it holds.
    pub resident_kb: Option<u64>,
    /// Process that maps its memory.
    pub owner_pid: Option<u64>,
    /// How its balloon could be reached, by that process's command line.
    pub link: Option<String>,
}

/// The loop's view of a guest; what is not known is `null`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GuestReport {
    /// Its name.
    pub name: String,
    /// Its name in the module; `null` where it is not there.
    pub module_name: Option<String>,
    /// How it is reached: the path of its QMP socket, or `libvirt:` and its domain.
    pub link: Option<String>,
    /// Its policy.
    pub policy: PolicyKind,
    /// Whether it was sized by hand, and keeps that.
    pub by_hand: bool,
    /// Whether the guest's own root may ask for a size.
    pub guest_control: bool,
    /// Whether its own root sizes it now.
    pub by_guest: bool,
    /// What its own root asks for, within the bounds or not.
    pub guest_asks_kb: Option<u64>,
    /// How far it can be ballooned; `null` where it is not reached.
    pub driver: Option<Driver>,
    /// How it behaves.
    pub conduct: Option<Conduct>,
    /// Least that it may be given.
    pub min_kb: u64,
    /// What it has a right to.
    pub entitlement_kb: Option<u64>,
    /// Most that it may be given.
    pub max_kb: u64,
    /// Step of `entitlement`.
    pub chunk_kb: u64,
    /// Whether `entitlement` moves its memory.
    pub amr: bool,
    /// What it could live with now.
    pub comfortable_kb: Option<u64>,
    /// What its policy wants it to have.
    pub target_kb: Option<u64>,
    /// What its balloon was told.
    pub ordered_kb: Option<u64>,
    /// What its balloon leaves it.
    pub current_kb: Option<u64>,
    /// What its balloon took of the memory that it was started with.
    pub ballooned_kb: Option<u64>,
    /// All memory that it sees.
    pub guest_total_kb: Option<u64>,
    /// Its free memory.
    pub guest_free_kb: Option<u64>,
    /// What its programs could still get.
    pub guest_available_kb: Option<u64>,
    /// Its page cache.
    pub guest_caches_kb: Option<u64>,
    /// Read from its swap since it started.
    pub guest_swap_in_kb: Option<u64>,
    /// Written to its swap since it started.
    pub guest_swap_out_kb: Option<u64>,
    /// Faults that had to read since it started.
    pub guest_major_faults: Option<u64>,
    /// What its programs use, an estimate.
    pub committed_kb: Option<u64>,
    /// That in percent of what it sees.
    pub pressure_percent: Option<u64>,
    /// What it lately used, by the module's samples.
    pub active_kb: Option<u64>,
    /// Host memory that it holds.
    pub resident_kb: Option<u64>,
    /// How old its figures are.
    pub stats_age_s: Option<f64>,
    /// What happens to it in a second.
    pub rates: PerSecond,
    /// Why it is sized as it is.
    pub reason: Option<String>,
    /// What is wrong with its socket or balloon.
    pub error: Option<String>,
    /// What was moved.
    pub tally: Option<Tally>,
}

/// Why the daemon gave no answer.
#[derive(Debug, Error)]
pub enum ApiError {
    /// It does not run.
    #[error("the daemon does not run: nobody answers on {0}")]
    NotRunning(PathBuf),
    /// Only root may ask.
    #[error("not allowed to ask the daemon: run as root")]
    NotAllowed,
    /// The connection broke.
    #[error("{path}: {cause}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// It refused.
    #[error("{0}")]
    Refused(String),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Envelope<T> {
    Ok(T),
    Error(String),
}

/// Asks the daemon.
pub fn ask(root: &Path, request: &Request) -> Result<Value, ApiError> {
    let path = socket_path(root);
    let failed = |cause: io::Error| ApiError::Io {
        path: path.clone(),
        cause,
    };
    let stream = UnixStream::connect(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => ApiError::NotRunning(path.clone()),
        ErrorKind::PermissionDenied => ApiError::NotAllowed,
        _ => failed(error),
    })?;
    stream.set_read_timeout(Some(LIMIT)).map_err(failed)?;
    stream.set_write_timeout(Some(LIMIT)).map_err(failed)?;
    let mut question = serde_json::to_vec(request).map_err(|error| failed(error.into()))?;
    question.push(b'\n');
    (&stream).write_all(&question).map_err(failed)?;
    let mut line = String::new();
    BufReader::new(&stream)
        .read_line(&mut line)
        .map_err(failed)?;
    match serde_json::from_str(&line).map_err(|error| failed(error.into()))? {
        Envelope::Ok(value) => Ok(value),
        Envelope::Error(error) => Err(ApiError::Refused(error)),
    }
}

/// Answers one client. What goes wrong is the client's matter: it sees its connection end.
pub(super) fn answer(stream: UnixStream, reply: impl FnOnce(Request) -> Result<Reply, String>) {
    let _ = try_answer(&stream, reply);
}

fn try_answer(
    stream: &UnixStream,
    reply: impl FnOnce(Request) -> Result<Reply, String>,
) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(QUESTION))?;
    stream.set_write_timeout(Some(QUESTION))?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_QUESTION)).read_line(&mut line)?;
    let answer = match serde_json::from_str(&line) {
        Ok(request) => reply(request),
        Err(error) => Err(format!("not a question that the daemon knows: {error}")),
    };
    let envelope = match answer {
        Ok(reply) => Envelope::Ok(reply),
        Err(error) => Envelope::Error(error),
    };
    let mut line = serde_json::to_vec(&envelope)?;
    line.push(b'\n');
    let mut stream = stream;
    stream.write_all(&line)
}

/// Refuses a size by hand outside of a VM's bounds.
pub fn within_bounds(config: &VmConfig, kb: u64) -> Result<(), String> {
    let (min, max) = (config.dynamic_min_kb, config.ceiling_kb());
    if (min..=max).contains(&kb) {
        return Ok(());
    }
    let (kb, min, max) = (exact_kb(kb), exact_kb(min), exact_kb(max));
    Err(format!(
        "{kb} is not within {min} and {max}, the bounds of VM {}",
        config.name
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::RefCell;
    use std::net::Shutdown;

    /// What a client hears that says `question` and no more, and what the daemon took it for.
    fn asked(question: &[u8]) -> (Vec<u8>, Option<Request>) {
        let (mut client, daemon) = UnixStream::pair().unwrap();
        client.write_all(question).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let taken = RefCell::new(None);
        answer(daemon, |request| {
            *taken.borrow_mut() = Some(request);
            Ok(Reply::Done {})
        });
        let mut heard = Vec::new();
        // What the daemon left unread may reset the connection.
        let _ = client.read_to_end(&mut heard);
        (heard, taken.into_inner())
    }

    fn request() -> impl Strategy<Value = Request> {
        let name = || "[a-z0-9-]{1,9}|\\PC{0,6}";
        let settings = prop::collection::btree_map(name(), "\\PC{0,8}", 0..4);
        let admit = (
            name(),
            any::<[u64; 3]>(),
            prop::option::of(any::<u64>()),
            any::<bool>(),
        );
        prop_oneof![
            Just(Request::Status {}),
            Just(Request::Snapshot {}),
            name().prop_map(|vm| Request::Explain { vm }),
            name().prop_map(|vm| Request::Release { vm }),
            name().prop_map(|vm| Request::Remove { vm }),
            name().prop_map(|vm| Request::Cancel { vm }),
            (name(), any::<u64>()).prop_map(|(vm, kb)| Request::Balloon { vm, kb }),
            (name(), settings).prop_map(|(vm, settings)| Request::Add { vm, settings }),
            (name(), name(), "\\PC{0,8}").prop_map(|(vm, key, value)| Request::Set {
                vm,
                key,
                value
            }),
            admit.prop_map(
                |(vm, [min_kb, max_kb, hold_s], risk, wait)| Request::Admit {
                    vm,
                    min_kb,
                    max_kb,
                    unshare_risk_percent: risk,
                    hold_s,
                    wait,
                }
            ),
        ]
    }

    /// What a request says, read as nothing but JSON; what is not given is not there.
    fn plain(mut value: Value) -> Value {
        if let Some(map) = value.as_object_mut() {
            map.retain(|_, value| !value.is_null());
        }
        value
    }

    #[test]
    fn no_question_is_longer_than_it_may_be() {
        let long = format!(
            "{{\"op\":\"explain\",\"vm\":\"{}\"}}\n",
            "x".repeat(64 << 10)
        );
        let (heard, taken) = asked(long.as_bytes());
        assert_eq!(taken, None);
        let heard = String::from_utf8(heard).unwrap();
        assert!(
            heard.is_empty() || heard.contains("not a question"),
            "{heard}"
        );
    }

    proptest! {
        #[test]
        fn a_request_comes_as_it_was_sent(request in request(), more in "\\PC{0,20}") {
            let mut line = serde_json::to_vec(&request).unwrap();
            prop_assert!(!line.contains(&b'\n'));
            line.push(b'\n');
            // One question has one answer; what follows it is passed over.
            line.extend(more.bytes());
            let (heard, taken) = asked(&line);
            prop_assert_eq!(taken, Some(request));
            prop_assert_eq!(heard, b"{\"ok\":{}}\n");
        }

        #[test]
        fn what_is_taken_is_what_was_said(
            text in "\\{(\"op\":\"(status|explain|balloon|cancel|Status|admit)\",?|\"(vm|kb|min_kb|wait|x)\":(\"[a-z]{0,3}\"|-?[0-9]{1,22}|1e3|true|null),?|\\PC){0,6}\\}",
            bytes in prop::collection::vec(any::<u8>(), 0..60),
        ) {
            for question in [text.as_bytes(), &bytes] {
                let (heard, taken) = asked(question);
                let line = question.split(|byte| *byte == b'\n').next().unwrap();
                match taken {
                    Some(request) => {
                        let said: Value = serde_json::from_slice(line).unwrap();
                        prop_assert_eq!(plain(serde_json::to_value(&request).unwrap()), plain(said));
                        prop_assert_eq!(&heard, b"{\"ok\":{}}\n");
                    }
                    None if std::str::from_utf8(question).is_err() => {}
                    None => {
                        let said: Value = serde_json::from_slice(&heard).unwrap();
                        let error = said["error"].as_str().unwrap();
                        prop_assert!(error.starts_with("not a question that the daemon knows: "));
                        prop_assert_eq!(heard.iter().filter(|byte| **byte == b'\n').count(), 1);
                    }
                }
            }
        }
    }
}
