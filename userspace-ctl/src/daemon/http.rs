// SPDX-License-Identifier: GPL-2.0

//! Metrics over HTTP, on the loopback interface alone: a thread of its own, so that a client that
//! hangs holds up no balloon.

use super::{say, Level};
use crate::metrics::CONTENT_TYPE;
use rustix::event::{poll, PollFd, PollFlags};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long one client may take in all.
const LIMIT: Duration = Duration::from_secs(2);
/// More than any question is long.
const MAX_HEAD: usize = 8 << 10;

/// The server; it ends when this is dropped.
pub(super) struct Http {
    port: u16,
    text: Arc<Mutex<String>>,
    end: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Http {
    /// Listens on a port of 127.0.0.1.
    pub(super) fn start(port: u16) -> io::Result<Self> {
        let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
        listener.set_nonblocking(true)?;
        let (end, ended) = UnixStream::pair()?;
        let text = Arc::new(Mutex::new(String::from("# EOF\n")));
        let told = Arc::clone(&text);
        let thread = thread::spawn(move || serve(&listener, &ended, &told));
        Ok(Self {
            port,
            text,
            end: Some(end),
            thread: Some(thread),
        })
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// What is told from now on.
    pub(super) fn put(&self, text: String) {
        // Each writer leaves it whole at any time.
        *self.text.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }
}

impl Drop for Http {
    fn drop(&mut self) {
        // The thread sees its end closed.
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(listener: &TcpListener, ended: &UnixStream, text: &Mutex<String>) {
    loop {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(ended, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                say(Level::Error, &format!("metrics: {error}"));
                return;
            }
        }
        while let Ok((stream, _)) = listener.accept() {
            let text = text.lock().unwrap_or_else(PoisonError::into_inner).clone();
            // What goes wrong is the client's matter: it sees its connection end.
            let _ = answer(stream, &text);
        }
    }
}

fn answer(mut stream: TcpStream, text: &str) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    let end = Instant::now() + LIMIT;
    let mut head = Vec::new();
    let mut bytes = [0; 1024];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || head.len() > MAX_HEAD {
            return Ok(());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes)? {
            0 => return Ok(()),
            got => head.extend(&bytes[..got]),
        }
    }
    stream.set_write_timeout(Some(LIMIT))?;
    stream.write_all(response(&head, text).as_bytes())
}

/// What a client is answered, by the head of its request.
fn response(head: &[u8], text: &str) -> String {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.split(' ');
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let path = path.split('?').next().unwrap_or("");
    let (status, kind, body) = match (method, path) {
        ("GET" | "HEAD", "/metrics") => ("200 OK", CONTENT_TYPE, text),
        ("GET" | "HEAD", _) => (
            "404 Not Found",
            "text/plain",
            "there is /metrics, and nothing else\n",
        ),
        _ => ("405 Method Not Allowed", "text/plain", "only GET\n"),
    };
    let body = if method == "HEAD" { "" } else { body };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ask(port: u16, request: &str) -> String {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    }

    #[test]
    fn metrics_and_nothing_else() {
        // A port that is free now.
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let http = Http::start(port).unwrap();
        http.put("thinram_x 1\n# EOF\n".into());
        let got = ask(port, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(got.starts_with("HTTP/1.1 200 OK\r\n"), "{got}");
        assert!(
            got.contains(CONTENT_TYPE) && got.ends_with("\r\n\r\nthinram_x 1\n# EOF\n"),
            "{got}"
        );
        assert!(ask(port, "GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(ask(port, "POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
        assert!(ask(port, "HEAD /metrics HTTP/1.1\r\n\r\n").ends_with("\r\n\r\n"));
        assert_eq!(ask(port, &"x".repeat(MAX_HEAD + 2048)), "");
        // One that says nothing is given up, and the next one answered.
        let silent = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        assert!(ask(port, "GET /metrics HTTP/1.1\r\n\r\n").contains("thinram_x"));
        drop(silent);
        assert!(Http::start(port).is_err(), "the port is taken");
        drop(http);
        assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err());
    }

    fn head() -> impl Strategy<Value = Vec<u8>> {
        let line = "(GET|HEAD|POST|get|\\PC{0,4})[ \t]{0,2}(/|/metrics|/metrics/|/Metrics|\\PC{0,6})(\\?[a-z]{0,3})?( HTTP/1.[01])?";
        let fields = "((Host|GET /metrics): [a-z]{0,5}\r\n){0,3}";
        let likely = (line, fields).prop_map(|(line, fields)| format!("{line}\r\n{fields}\r\n"));
        prop_oneof![
            6 => likely.prop_map(String::into_bytes),
            1 => prop::collection::vec(any::<u8>(), 0..200),
        ]
    }

    proptest! {
        /// Any head has one answer, as long as it says, and metrics only for who asks for them.
        #[test]
        fn any_head_has_a_whole_answer(head in head(), text in "([a-z_]{1,9} [0-9]\n){0,3}# EOF\n") {
            let answer = response(&head, &text);
            let (first, body) = answer.split_once("\r\n\r\n").unwrap();
            let mut lines = first.split("\r\n");
            let status = lines.next().unwrap().strip_prefix("HTTP/1.1 ").unwrap();
            let fields: Vec<_> = lines.map(|line| line.split_once(": ").unwrap()).collect();
            let field = |name| fields.iter().find(|(key, _)| *key == name).map(|(_, value)| *value);
            prop_assert_eq!(field("Connection"), Some("close"));
            let length = body.len().to_string();
            prop_assert_eq!(field("Content-Length"), Some(length.as_str()));
            let asks = |what: &str| {
                let rest = head.strip_prefix(what.as_bytes());
                rest.is_some_and(|rest| matches!(rest.first(), None | Some(b' ' | b'?' | b'\r')))
            };
            let (got, looked) = (asks("GET /metrics"), asks("HEAD /metrics"));
            prop_assert_eq!(status == "200 OK", got || looked, "{}", String::from_utf8_lossy(&head));
            prop_assert_eq!(body == text, got);
            prop_assert!(!looked || body.is_empty());
        }
    }
}
