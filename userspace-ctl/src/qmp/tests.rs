// SPDX-License-Identifier: GPL-2.0

//! The client against servers that behave in every way.

use super::*;
use proptest::prelude::*;
use serde_json::json;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use tempfile::TempDir;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"major": 11}}, "capabilities": []}}"#;
const LIMIT: Duration = Duration::from_millis(300);
/// Long enough for a loaded machine to answer.
const PATIENT: Duration = Duration::from_secs(20);

/// A server for one connection, in a thread of its own.
struct Server {
    dir: TempDir,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    fn new(serve: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let dir = TempDir::new().unwrap();
        let listener = UnixListener::bind(dir.path().join("qmp")).unwrap();
        let thread = thread::spawn(move || serve(listener.accept().unwrap().0));
        Self {
            dir,
            thread: Some(thread),
        }
    }

    /// Greets, then answers each request by `reply`: lines, `ID` in them is the request's.
    fn scripted(reply: impl Fn(&str, &Value) -> Vec<String> + Send + 'static) -> Self {
        Self::new(move |stream| {
            let mut write = stream.try_clone().unwrap();
            writeln!(write, "{GREETING}\r").unwrap();
            for line in BufReader::new(stream).lines() {
                let Ok(line) = line else { return };
                let request: Value = serde_json::from_str(&line).unwrap();
                let name = request["execute"].as_str().unwrap();
                let lines = match name {
                    "qmp_capabilities" => vec![r#"{"return": {}, "id": ID}"#.to_owned()],
                    _ => reply(name, &request["arguments"]),
                };
                for line in lines {
                    let line = line.replace("ID", &request["id"].to_string());
                    if writeln!(write, "{line}\r").is_err() {
                        return;
                    }
                }
            }
        })
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    fn connect(&self, limit: Duration) -> Result<Client, QmpError> {
        Client::connect(&self.path(), limit)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || thread::panicking());
    }
}

fn answer(value: &Value) -> Vec<String> {
    vec![json!({"return": value, "id": "X"})
        .to_string()
        .replace("\"X\"", "ID")]
}

fn refusal(class: &str) -> Vec<String> {
    vec![format!(
        r#"{{"error": {{"class": "{class}", "desc": "not so"}}, "id": ID}}"#
    )]
}

/// A QEMU with a balloon whose driver tells these figures.
fn qemu(stats: Value) -> Server {
    Server::scripted(
        move |name, arguments| match (name, arguments["path"].as_str()) {
            ("qom-list", Some("/machine/peripheral")) => {
                answer(&json!([{"name": "type", "type": "string"}]))
            }
            ("qom-list", _) => answer(&json!([
                {"name": "device[0]", "type": "child<virtio-net-pci>"},
                {"name": "device[1]", "type": "child<virtio-balloon-pci>"}
            ])),
            ("qom-set", path) => {
                assert_eq!(path, Some("/machine/peripheral-anon/device[1]"));
                assert_eq!(arguments["value"], 2);
                answer(&json!({}))
            }
            ("qom-get", _) => answer(&stats),
            ("query-balloon", _) => {
                let mut lines = vec![
                    r#"{"event": "BALLOON_CHANGE", "data": {"actual": 1073741824},
                "timestamp": {"seconds": 1, "microseconds": 2}}"#
                        .replace('\n', ""),
                ];
                lines.extend(answer(&json!({"actual": 1_073_741_824u64})));
                lines
            }
            ("balloon", _) if arguments["value"] == 536_870_912u64 => answer(&json!({})),
            _ => refusal("CommandNotFound"),
        },
    )
}

#[test]
fn a_balloon_is_found_read_and_set() {
    let server = qemu(json!({"last-update": 77, "stats": {
        "stat-total-memory": 1_040_187_392u64, "stat-free-memory": 524_288_000u64,
        "stat-available-memory": 734_003_200u64, "stat-disk-caches": -1, "stat-swap-in": 0,
        "stat-swap-out": 1_048_576u64, "stat-major-faults": 12, "stat-htlb-pgalloc": 18_446_744_073_709_551_615u64,
        "stat-of-a-newer-qemu": {}
    }}));
    let mut balloon = Balloon::open(server.connect(PATIENT).unwrap(), 2).unwrap();
    assert!(balloon.has_device());
    assert_eq!(balloon.actual_kb().unwrap(), Some(1 << 20));
    let stats = balloon.stats().unwrap().unwrap();
    assert_eq!(stats.last_update_s, 77);
    assert_eq!(
        (stats.total_kb, stats.free_kb),
        (Some(1_015_808), Some(512_000))
    );
    assert_eq!((stats.available_kb, stats.caches_kb), (Some(716_800), None));
    assert_eq!(
        (stats.swapped_out_kb(), stats.major_faults),
        (Some(1024), Some(12))
    );
    balloon.set_kb(512 << 10).unwrap();
    let refused = balloon.set_kb(7).unwrap_err();
    assert!(refused.is_refusal());
    assert_eq!(refused.to_string(), "balloon: not so (CommandNotFound)");
    let events = balloon.client().events(Duration::ZERO).unwrap();
    assert_eq!(events.len(), 1);
    assert_eq!(
        (events[0].event.as_str(), &events[0].data),
        ("BALLOON_CHANGE", &json!({"actual": 1 << 30}))
    );
}

#[test]
fn drivers_that_never_told_anything() {
    let never = json!({"last-update": 0, "stats": {"stat-total-memory": u64::MAX}});
    for stats in [never, json!({"odd": true}), json!(3)] {
        let server = qemu(stats);
        let mut balloon = Balloon::open(server.connect(PATIENT).unwrap(), 2).unwrap();
        assert_eq!(balloon.stats().unwrap(), None);
    }
    let server = qemu(
        json!({"last-update": 5, "stats": {"stat-total-memory": u64::MAX, "stat-free-memory": -1}}),
    );
    let mut balloon = Balloon::open(server.connect(PATIENT).unwrap(), 2).unwrap();
    let stats = balloon.stats().unwrap().unwrap();
    assert_eq!(
        stats,
        GuestStats {
            last_update_s: 5,
            ..GuestStats::default()
        }
    );
}

#[test]
fn a_vm_without_a_balloon() {
    let server = Server::scripted(|name, _| match name {
        "qom-list" => answer(&json!([])),
        "balloon" => refusal("DeviceNotActive"),
        _ => refusal("GenericError"),
    });
    let mut balloon = Balloon::open(server.connect(PATIENT).unwrap(), 2).unwrap();
    assert!(!balloon.has_device());
    assert_eq!(
        (balloon.actual_kb().unwrap(), balloon.stats().unwrap()),
        (None, None)
    );
    assert!(balloon
        .set_kb(1)
        .unwrap_err()
        .to_string()
        .contains("DeviceNotActive"));
}

#[test]
fn nobody_listens() {
    let dir = TempDir::new().unwrap();
    let missing = Client::connect(&dir.path().join("none"), LIMIT).unwrap_err();
    assert!(
        missing.to_string().contains("cannot connect to"),
        "{missing}"
    );
    std::fs::write(dir.path().join("file"), "").unwrap();
    assert!(matches!(
        Client::connect(&dir.path().join("file"), LIMIT),
        Err(QmpError::Connect { .. })
    ));
    let long = dir.path().join("x".repeat(200));
    assert!(matches!(
        Client::connect(&long, LIMIT),
        Err(QmpError::Connect { .. })
    ));
}

#[test]
fn a_socket_that_is_not_qmp() {
    for said in [
        "SSH-2.0-OpenSSH_9\r\n",
        "{\"hello\": 1}\n",
        "[1]\n",
        "\x1b[2J\u{202e}\n",
        "{}\n",
    ] {
        let server = Server::new(move |mut stream| stream.write_all(said.as_bytes()).unwrap());
        let error = server.connect(PATIENT).unwrap_err();
        assert!(matches!(error, QmpError::NotQmp { .. }), "{error}");
        assert!(
            error.to_string().contains("is no QMP socket: it says `"),
            "{error}"
        );
        assert!(!error.to_string().contains('\x1b'));
    }
}

#[test]
fn endless_lines() {
    let server = Server::new(|mut stream| while stream.write_all(&[b'a'; 65536]).is_ok() {});
    assert!(matches!(
        server.connect(PATIENT),
        Err(QmpError::NotQmp { .. })
    ));
}

#[test]
fn silence_ends_by_the_deadline() {
    let wait = |mut stream: UnixStream| drop(stream.read_to_end(&mut Vec::new()));
    let server = Server::new(wait);
    let start = Instant::now();
    let error = server.connect(LIMIT).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("no answer to the greeting within 0.300 s"),
        "{error}"
    );
    assert!(start.elapsed() >= LIMIT && start.elapsed() < PATIENT);

    let server = Server::scripted(|_, _| Vec::new());
    let mut client = server.connect(PATIENT).unwrap();
    client.limit = LIMIT;
    let error = client.execute(&Capabilities2 {}).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("no answer to query-nothing within"),
        "{error}"
    );
}

command!(
    /// Answered by what a test likes.
    Capabilities2<> {} = "query-nothing" -> Value
);

#[test]
fn a_listener_that_accepts_nobody() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("qmp");
    let _listener = UnixListener::bind(&path).unwrap();
    let mut held = Vec::new();
    let error = loop {
        match connect_by(&path, Instant::now() + LIMIT) {
            Ok(stream) => held.push(stream),
            Err(error) => break error,
        }
        assert!(held.len() < 100_000);
    };
    assert_eq!(error.kind(), ErrorKind::TimedOut);
}

#[test]
fn a_slow_talker_is_understood() {
    let server = Server::new(|mut stream| {
        for byte in format!("{GREETING}\r\n").bytes() {
            stream.write_all(&[byte]).unwrap();
        }
        stream
            .write_all(b"\r\n{\"return\": {}, \"id\": 1}\n")
            .unwrap();
        drop(stream.read_to_end(&mut Vec::new()));
    });
    assert!(server.connect(PATIENT).is_ok());
}

#[test]
fn late_answers_belong_to_their_own_command() {
    let server = Server::scripted(|_, _| {
        let mut lines = vec![r#"{"return": "late", "id": 99}"#.to_owned()];
        lines.extend(answer(&json!("mine")));
        lines
    });
    let mut client = server.connect(PATIENT).unwrap();
    assert_eq!(client.execute(&Capabilities2 {}).unwrap(), json!("mine"));
}

#[test]
fn a_qemu_that_ends() {
    let server = Server::new(|mut stream| writeln!(stream, "{GREETING}").unwrap());
    assert!(matches!(
        server.connect(PATIENT),
        Err(QmpError::Closed { .. })
    ));

    let server = Server::scripted(|_, _| vec!["{\"return\": {}, \"error\": 3}".to_owned()]);
    let mut client = server.connect(PATIENT).unwrap();
    assert!(matches!(
        client.execute(&Capabilities2 {}),
        Err(QmpError::NotQmp { .. })
    ));
}

#[test]
fn events_are_waited_for_and_bounded() {
    let server = Server::scripted(|_, _| {
        let event = |n: usize| format!(r#"{{"event": "E{n}", "timestamp": {{}}}}"#);
        let mut lines: Vec<String> = (0..MAX_EVENTS + 10).map(event).collect();
        lines.extend(answer(&json!(0)));
        lines.push(event(7));
        lines
    });
    let mut client = server.connect(PATIENT).unwrap();
    client.execute(&Capabilities2 {}).unwrap();
    let events = client.events(Duration::ZERO).unwrap();
    assert_eq!(
        (events.len(), events[0].event.as_str()),
        (MAX_EVENTS, "E10")
    );
    assert_eq!(client.events(PATIENT).unwrap()[0].event, "E7");
    assert!(client.events(Duration::from_millis(20)).unwrap().is_empty());
}

/// A client whose other side said these bytes, some of which it has read, and hung up.
fn client_of(read: &[u8], unread: &[u8]) -> Client {
    let (stream, mut other) = UnixStream::pair().unwrap();
    stream.set_nonblocking(true).unwrap();
    other.write_all(unread).unwrap();
    // It reads what it is asked, and answers no more.
    other.shutdown(std::net::Shutdown::Write).unwrap();
    thread::spawn(move || other.read_to_end(&mut Vec::new()));
    Client {
        path: PathBuf::from("/run/qmp"),
        stream,
        limit: PATIENT,
        unread: read.to_vec(),
        events: VecDeque::new(),
        last_id: 0,
    }
}

/// What a peer may send in a line, good and bad.
fn line() -> impl Strategy<Value = Vec<u8>> {
    let word = "[a-z{}\\[\\]\",:0-9 \\\\]{0,30}";
    prop_oneof![
        2 => (0u64..4).prop_map(|id| format!(r#"{{"return": {{}}, "id": {id}}}"#).into_bytes()),
        1 => (0u64..4).prop_map(|id| {
            format!(r#"{{"error": {{"class": "C", "desc": "d"}}, "id": {id}}}"#).into_bytes()
        }),
        2 => Just(br#"{"event": "BALLOON_CHANGE", "data": {"actual": 1}}"#.to_vec()),
        1 => Just(br#"{"return": 1, "error": 2, "id": 1}"#.to_vec()),
        1 => Just(br#"{"event": 7}"#.to_vec()),
        1 => Just(b" \r".to_vec()),
        1 => word.prop_map(String::into_bytes),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_answer_is_made_up(lines in prop::collection::vec(line(), 0..8)) {
        let bytes = lines.join(&b'\n');
        let mut client = client_of(&[], &bytes);
        let outcome = client.execute(&Capabilities {});
        // The answer to the first command has its id, or none; all before it was no other end of it.
        let whole = bytes.split(|byte| *byte == b'\n').count().saturating_sub(1);
        let said = bytes.split(|byte| *byte == b'\n').take(whole);
        let values = || said.clone().filter_map(|line| serde_json::from_slice::<Value>(line).ok());
        let its_own = |value: &Value| value["id"].as_u64().is_none_or(|id| id == 1);
        match outcome {
            Ok(Nothing {}) => {
                prop_assert!(values().any(|v| v["return"].is_object() && its_own(&v)));
            }
            Err(QmpError::Refused { class, desc, .. }) => {
                prop_assert_eq!((class.as_str(), desc.as_str()), ("C", "d"));
                prop_assert!(values().any(|v| v["error"].is_object() && its_own(&v)));
            }
            Err(QmpError::NotQmp { content, .. }) => {
                prop_assert!(content.chars().count() <= 60 && !content.contains('\n'));
            }
            Err(QmpError::Closed { .. }) => {}
            Err(error) => prop_assert!(false, "{}", error),
        }
        let events = values().filter(|v| v["event"].is_string()).count();
        prop_assert!(client.events.len() <= events);
    }

    #[test]
    fn it_does_not_matter_how_bytes_come(events in 0usize..5, old in 0u64..3, cut in 0usize..400) {
        let mut text = String::new();
        for n in 0..events {
            text += &format!("{{\"event\": \"E{n}\", \"data\": {{\"n\": {n}}}}}\r\n");
        }
        // Answers to commands that were given up; the next one is number 1.
        for n in 0..old {
            text += &format!("{{\"return\": {{\"old\": {n}}}, \"id\": {}}}\n\r\n", n + 2);
        }
        text += "{\"return\": {}, \"id\": 1}\n";
        let (read, unread) = text.as_bytes().split_at(cut.min(text.len()));
        let mut client = client_of(read, unread);
        let answered = client.execute(&Capabilities {}).is_ok();
        prop_assert!(answered);
        let names: Vec<_> = client.events.iter().map(|event| event.event.clone()).collect();
        let expected: Vec<_> = (0..events).map(|n| format!("E{n}")).collect();
        prop_assert_eq!(names, expected);
    }
}
