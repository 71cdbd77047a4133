// SPDX-License-Identifier: GPL-2.0

//! What the guest's own root asks for, through the guest agent: the content of one file in the guest.
//!
//! Whatever the guest says is only a size or it is refused; it is read with bounds and deadlines.

use crate::text::{escape, shorten};
use crate::units;
use crate::virsh::{Domain, VirshError};
use serde::Deserialize;
use serde_json::{json, Value};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;

/// The file in the guest. Nobody but its root can make one there.
pub const FILE: &str = "/run/thinram-size";
/// More than a size is long.
const MOST_BYTES: usize = 64;
/// How long the agent may take for one question.
const LIMIT: Duration = Duration::from_secs(3);
/// More than any answer is long.
const MAX_LINE: usize = 64 << 10;
/// Before the answer to `guest-sync-delimited`.
const DELIMITER: u8 = 0xff;

/// What went wrong with the agent.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The socket.
    #[error("guest agent at {path}: {cause}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Nobody answers in the guest.
    #[error("guest agent at {0}: no answer: does qemu-guest-agent run in the guest?")]
    Timeout(PathBuf),
    /// What answers is no guest agent.
    #[error("{0} is no guest agent")]
    NotAgent(PathBuf),
    /// It refused.
    #[error("guest agent: {0}")]
    Refused(String),
    /// virsh failed.
    #[error(transparent)]
    Virsh(#[from] VirshError),
    /// What the file holds is no size.
    #[error("{FILE} of the guest holds `{0}`, which is no size such as 1500M")]
    NoSize(String),
}

/// How the agent is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// Its socket.
    Socket(PathBuf),
    /// libvirt, which has the socket.
    Libvirt(Domain),
}

/// What the guest asks for, in KiB; `None` where it asks for nothing.
pub fn asked_kb(way: &Way) -> Result<Option<u64>, AgentError> {
    let text = match way {
        Way::Socket(path) => read_file(&mut Socket::connect(path)?)?,
        Way::Libvirt(domain) => read_file(&mut domain.clone())?,
    };
    let Some(text) = text else { return Ok(None) };
    let text = text.trim();
    if text.is_empty() {
        return Ok(None);
    }
    let unit = text.ends_with(|c: char| c.is_ascii_alphabetic());
    let size = units::parse_kb(text).ok().filter(|kb| unit && *kb > 0);
    let shown = || shorten(&escape(text.as_bytes()), 40);
    size.map(Some).ok_or_else(|| AgentError::NoSize(shown()))
}

/// Whoever takes a question to the agent.
trait Ask {
    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, AgentError>;
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<Complaint>,
}

#[derive(Deserialize)]
struct Complaint {
    desc: String,
}

impl Answer {
    fn value(self, command: &str) -> Result<Value, AgentError> {
        match (self.value, self.error) {
            (Some(value), None) => Ok(value),
            (_, error) => {
                let desc = error.map_or_else(|| "no answer".to_owned(), |error| error.desc);
                let desc = shorten(&escape(desc.as_bytes()), 120);
                Err(AgentError::Refused(format!("{command}: {desc}")))
            }
        }
    }
}

impl Ask for Domain {
    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, AgentError> {
        let question = json!({"execute": command, "arguments": arguments}).to_string();
        // libvirt tells an agent's error as its own.
        let line = self.agent(&question)?;
        let answer: Answer = serde_json::from_str(line.trim())
            .map_err(|error| AgentError::Refused(format!("{command}: {error}")))?;
        answer.value(command)
    }
}

/// The file's content; `None` where there is no such file.
fn read_file(agent: &mut impl Ask) -> Result<Option<String>, AgentError> {
    let opened = agent.ask("guest-file-open", json!({"path": FILE, "mode": "r"}));
    let handle = match opened {
        Ok(handle) => handle,
        Err(error) if error.to_string().contains("No such file") => return Ok(None),
        Err(error) => return Err(error),
    };
    let read = agent.ask(
        "guest-file-read",
        json!({"handle": handle, "count": MOST_BYTES}),
    );
    // Closed whatever came of it: the agent has few handles.
    let closed = agent.ask("guest-file-close", json!({"handle": handle}));
    let read = read?;
    closed?;
    let encoded = read["buf-b64"].as_str().unwrap_or("");
    let bytes = decode(encoded)
        .filter(|bytes| bytes.len() <= MOST_BYTES)
        .ok_or_else(|| AgentError::Refused("guest-file-read: an odd answer".to_owned()))?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Base64, as RFC 4648 has it, with padding.
fn decode(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let text = text.trim_end_matches('=');
    let (mut bits, mut count) = (0u32, 0);
    for byte in text.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push(((bits >> count) & 0xff) as u8);
        }
    }
    Some(out)
}

/// A connection that is in step with the agent.
struct Socket {
    path: PathBuf,
    stream: UnixStream,
    unread: Vec<u8>,
}

impl Socket {
    fn connect(path: &Path) -> Result<Self, AgentError> {
        let failed = |cause| AgentError::Io {
            path: path.to_owned(),
            cause,
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_write_timeout(Some(LIMIT)).map_err(failed)?;
        let mut socket = Self {
            path: path.to_owned(),
            stream,
            unread: Vec::new(),
        };
        // What an earlier client left unread ends at the delimiter.
        let id = u64::from(std::process::id());
        socket.send(&[DELIMITER])?;
        let question = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
        socket.send((question.to_string() + "\n").as_bytes())?;
        let end = Instant::now() + LIMIT;
        socket.read_to(DELIMITER, end)?;
        let line = socket.read_to(b'\n', end)?;
        let answer: Option<Answer> = serde_json::from_slice(&line).ok();
        if answer.and_then(|answer| answer.value?.as_u64()) != Some(id) {
            return Err(AgentError::NotAgent(path.to_owned()));
        }
        Ok(socket)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        self.stream
            .write_all(bytes)
            .map_err(|cause| AgentError::Io {
                path: self.path.clone(),
                cause,
            })
    }

    /// What comes before a byte, which is passed over.
    fn read_to(&mut self, stop: u8, end: Instant) -> Result<Vec<u8>, AgentError> {
        let failed = |cause| AgentError::Io {
            path: self.path.clone(),
            cause,
        };
        let mut bytes = [0; 4096];
        loop {
            if let Some(at) = self.unread.iter().position(|byte| *byte == stop) {
                let rest = self.unread.split_off(at + 1);
                let mut line = std::mem::replace(&mut self.unread, rest);
                line.pop();
                return Ok(line);
            }
            if self.unread.len() > MAX_LINE {
                return Err(AgentError::NotAgent(self.path.clone()));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(AgentError::Timeout(self.path.clone()));
            }
            self.stream.set_read_timeout(Some(left)).map_err(failed)?;
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(AgentError::NotAgent(self.path.clone())),
                Ok(got) => self.unread.extend(&bytes[..got]),
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut => {}
                    _ => return Err(failed(error)),
                },
            }
        }
    }
}

impl Ask for Socket {
    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, AgentError> {
        let question = json!({"execute": command, "arguments": arguments});
        self.send((question.to_string() + "\n").as_bytes())?;
        let line = self.read_to(b'\n', Instant::now() + LIMIT)?;
        let answer: Answer =
            serde_json::from_slice(&line).map_err(|_| AgentError::NotAgent(self.path.clone()))?;
        answer.value(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;
    use std::thread;

    /// An agent whose file holds this, base64.
    fn agent(path: &Path, file: Option<&'static str>) {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                // What nobody read before.
                stream.write_all(b"{\"return\": 3}\n").unwrap();
                let reader = BufReader::new(stream.try_clone().unwrap());
                for line in reader.split(b'\n') {
                    let Ok(line) = line else { break };
                    let line: Vec<u8> =
                        line.into_iter().filter(|byte| *byte != DELIMITER).collect();
                    let question: Value = serde_json::from_slice(&line).unwrap();
                    let error = json!({"error": {"class": "GenericError",
                        "desc": "failed to open file '/run/thinram-size' (mode: 'r'): No such file or directory"}});
                    let answer = match (question["execute"].as_str().unwrap(), file) {
                        ("guest-sync-delimited", _) => {
                            stream.write_all(&[DELIMITER]).unwrap();
                            json!({"return": question["arguments"]["id"]})
                        }
                        ("guest-file-open", None) => error,
                        ("guest-file-open", Some(_)) => json!({"return": 1000}),
                        ("guest-file-read", Some(text)) => {
                            json!({"return": {"count": 6, "buf-b64": text, "eof": true}})
                        }
                        _ => json!({"return": {}}),
                    };
                    if writeln!(stream, "{answer}").is_err() {
                        break;
                    }
                }
            }
        });
    }

    fn ask(file: Option<&'static str>) -> Result<Option<u64>, String> {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("agent");
        agent(&path, file);
        asked_kb(&Way::Socket(path)).map_err(|error| error.to_string())
    }

    #[test]
    fn what_the_guest_asks_for() {
        assert_eq!(ask(Some("MTUwME0K")), Ok(Some(1500 << 10)));
        assert_eq!(ask(Some("Cg==")), Ok(None));
        assert_eq!(ask(Some("")), Ok(None));
        assert_eq!(ask(None), Ok(None));
        for odd in ["MTUwMAo=", "bG90cw==", "ME0=", "/w=="] {
            let error = ask(Some(odd)).unwrap_err();
            assert!(error.contains("which is no size"), "{odd}: {error}");
        }
        assert!(ask(Some("%%")).unwrap_err().contains("odd answer"));
    }

    #[test]
    fn what_is_no_agent() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("agent");
        let way = Way::Socket(path.clone());
        let error = asked_kb(&way).unwrap_err().to_string();
        assert!(error.contains("No such file"), "{error}");
        let listener = UnixListener::bind(&path).unwrap();
        let silent = thread::spawn(move || {
            let one = listener.accept().unwrap();
            let (mut two, _) = listener.accept().unwrap();
            two.write_all(b"\xff220 smtp\n").unwrap();
            (one, two)
        });
        let error = asked_kb(&way).unwrap_err();
        assert!(matches!(error, AgentError::Timeout(_)), "{error}");
        let error = asked_kb(&way).unwrap_err();
        assert!(matches!(error, AgentError::NotAgent(_)), "{error}");
        drop(silent.join());
    }

    #[test]
    fn base64() {
        assert_eq!(decode("TWFu").as_deref(), Some(&b"Man"[..]));
        assert_eq!(decode("TWE=").as_deref(), Some(&b"Ma"[..]));
        assert_eq!(decode("+/8=").as_deref(), Some(&[0xfb, 0xff][..]));
        assert_eq!(decode("a b"), None);
    }

    fn encode(bytes: &[u8]) -> String {
        const DIGITS: &[u8; 64] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        bytes
            .chunks(3)
            .flat_map(|three| {
                let word = three
                    .iter()
                    .fold(0, |word, byte| (word << 8) | usize::from(*byte));
                let word = word << (8 * (3 - three.len()));
                (0..4).map(move |nth| match nth <= three.len() {
                    true => DIGITS[(word >> (18 - 6 * nth)) & 63] as char,
                    false => '=',
                })
            })
            .collect()
    }

    /// An agent that gives these answers, one after the other.
    struct Answers(Vec<Value>);

    impl Ask for Answers {
        fn ask(&mut self, command: &str, _: Value) -> Result<Value, AgentError> {
            let answer = self.0.pop().unwrap_or_default();
            match serde_json::from_value::<Answer>(answer) {
                Ok(answer) => answer.value(command),
                Err(error) => Err(AgentError::Refused(error.to_string())),
            }
        }
    }

    fn odd_answer() -> impl Strategy<Value = Value> {
        let text = prop_oneof!["\\PC{0,12}", "[A-Za-z0-9+/=]{0,12}"];
        prop_oneof![
            Just(json!({})),
            Just(json!(7)),
            any::<i64>().prop_map(|n| json!({ "return": n })),
            text.clone()
                .prop_map(|text| json!({"return": {"buf-b64": text}})),
            text.prop_map(|text| json!({"error": {"desc": text}})),
            Just(json!({"error": 3})),
        ]
    }

    proptest! {
        #[test]
        fn base64_round_trips(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            prop_assert_eq!(decode(&encode(&bytes)), Some(bytes));
        }

        #[test]
        fn no_answer_panics(answers in prop::collection::vec(odd_answer(), 0..4)) {
            let held = |text: &Value| text["return"]["buf-b64"].as_str().is_some();
            let any = answers.iter().any(held);
            if let Ok(Some(text)) = read_file(&mut Answers(answers)) {
                prop_assert!(any || text.is_empty());
                prop_assert!(text.len() <= 3 * MOST_BYTES);
            }
        }
    }
}
