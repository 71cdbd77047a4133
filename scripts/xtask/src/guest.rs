// SPDX-License-Identifier: GPL-2.0

//! Real guests: QEMU processes inside the virtual KVM host, with their memory on a
//! folder or a file, their serial console on pipes, and QMP on a socket.

use crate::env::target;
use anyhow::{bail, Context, Result};
use serde_json::{json, Value};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Which kernel a guest runs, and so on which machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The small kernel on a microvm: seconds to boot.
    Small,
    /// The small kernel on a q35, which can have DIMMs plugged in.
    SmallPc,
    /// The stock Debian kernel on a q35.
    Stock,
}

/// What a guest is made of.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its name, also that of its load.
    pub name: String,
    /// Kernel and machine.
    pub kind: Kind,
    /// Its memory, in MiB.
    pub memory_mib: u64,
    /// The backends of its memory; their sizes add up to `memory_mib`.
    pub backends: Vec<String>,
    /// More of QEMU's arguments.
    pub args: Vec<String>,
    /// More of the kernel's command line: `MIB=` for the load, or `RUN="..."`.
    pub append: String,
    /// The initramfs; the kernel's own where there is none.
    pub initrd: Option<&'static str>,
}

impl Spec {
    /// A guest whose memory is one shared backend at `path`, a folder or a file.
    pub fn new(name: &str, kind: Kind, memory_mib: u64, path: &Path, load_mib: u64) -> Self {
        let backend = format!(
            "memory-backend-file,id=m0,mem-path={},size={memory_mib}M,share=on,align=2M",
            path.display()
        );
        Self {
            name: name.into(),
            kind,
            memory_mib,
            backends: vec![backend],
            args: Vec::new(),
            append: format!("MIB={load_mib}"),
            initrd: None,
        }
    }

    fn command(&self, qmp: &Path) -> Command {
        let guests = target("guests");
        let mut c = Command::new("setpriv");
        c.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
        c.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        c.args([
            "-accel", "kvm", "-cpu", "host", "-smp", "1", "-serial", "stdio",
        ]);
        c.arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", qmp.display()));
        let machine = match self.kind {
            Kind::Small => "microvm,acpi=on,isa-serial=on",
            _ => "q35",
        };
        let numa = self.backends.len() > 1;
        let memory = if numa { "" } else { ",memory-backend=m0" };
        c.args(["-machine", &format!("{machine}{memory}")]);
        let size = self.memory_mib;
        c.arg("-m").arg(match self.kind {
            // A microvm has no slots for DIMMs.
            Kind::Small => format!("{size}M"),
            _ => format!("{size}M,slots=4,maxmem={}M", size + 1024),
        });
        for (i, backend) in self.backends.iter().enumerate() {
            c.args(["-object", backend]);
            if numa {
                c.args(["-numa", &format!("node,nodeid={i},memdev=m{i}")]);
            }
        }
        let image = if self.kind == Kind::Stock {
            "stock"
        } else {
            "small"
        };
        c.arg("-kernel")
            .arg(guests.join(format!("{image}.vmlinuz")));
        let initrd = self.initrd.unwrap_or(image);
        c.arg("-initrd")
            .arg(guests.join(format!("{initrd}.initrd")));
        c.arg("-append").arg(format!(
            "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable no_timer_check NAME={} {}",
            self.name, self.append
        ));
        c.args(&self.args);
        c
    }
}

/// A guest that runs. It is killed when dropped.
pub struct Guest {
    /// Its name.
    pub name: String,
    /// The size of its memory, in KiB.
    pub size_kb: u64,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Arc<Mutex<Vec<String>>>,
    errors: Arc<Mutex<Vec<String>>>,
    qmp: PathBuf,
    control: Option<BufReader<UnixStream>>,
}

impl Guest {
    /// Starts it; it boots on its own.
    pub fn start(spec: &Spec) -> Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        // Two of a name run while one migrates to the other.
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let qmp = PathBuf::from(format!(
            "/run/qmp-{}-{}-{number}",
            spec.name,
            std::process::id()
        ));
        let _ = std::fs::remove_file(&qmp);
        let mut command = spec.command(&qmp);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("{command:?}"))?;
        let lines = collect(child.stdout.take());
        let errors = collect(child.stderr.take());
        Ok(Self {
            name: spec.name.clone(),
            size_kb: spec.memory_mib * 1024,
            stdin: child.stdin.take(),
            child,
            lines,
            errors,
            qmp,
            control: None,
        })
    }

    /// All lines of its console so far.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().map(|l| l.clone()).unwrap_or_default()
    }

    /// What QEMU itself said.
    pub fn errors(&self) -> String {
        self.errors.lock().map(|l| l.join("; ")).unwrap_or_default()
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// True once its first process runs.
    pub fn booted(&self) -> bool {
        self.lines().iter().any(|l| l.contains("guest: up "))
    }

    /// The passes of its load that are complete.
    pub fn passes(&self) -> u64 {
        let lines = self.lines();
        let last = lines
            .iter()
            .rev()
            .find_map(|l| value(l, "guest-load: pass="));
        last.unwrap_or(0)
    }

    /// The first pass that it told of after that many lines of its console.
    pub fn passes_since(&self, line: usize) -> Option<u64> {
        let lines = self.lines();
        let new = lines.get(line..)?;
        new.iter().find_map(|l| value(l, "guest-load: pass="))
    }

    /// What its load said at the end: all bytes were right in all passes. None before.
    pub fn verdict(&self) -> Option<bool> {
        let lines = self.lines();
        if lines.iter().any(|l| l.contains("CORRUPT")) {
            return Some(false);
        }
        let end = lines
            .iter()
            .rev()
            .find(|l| l.contains("guest-load: end "))?;
        Some(end.contains("verdict=intact"))
    }

    /// Types a line on its console.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        let stdin = self
            .stdin
            .as_mut()
            .context("the guest's console is closed")?;
        writeln!(stdin, "{line}").with_context(|| format!("console of {}", self.name))
    }

    /// Waits until `done`, or fails after `limit` or at QEMU's end.
    pub fn wait(
        &mut self,
        what: &str,
        limit: Duration,
        done: impl Fn(&Self) -> bool,
    ) -> Result<()> {
        let start = Instant::now();
        loop {
            if done(self) {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                std::thread::sleep(Duration::from_millis(200));
                if done(self) {
                    return Ok(());
                }
                bail!(
                    "{}: QEMU ended ({status}) before {what}: {}",
                    self.name,
                    self.last_words()
                );
            }
            if start.elapsed() > limit {
                bail!(
                    "{}: no {what} in {} s: {}",
                    self.name,
                    limit.as_secs(),
                    self.last_words()
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn last_words(&self) -> String {
        let lines = self.lines();
        let console = lines[lines.len().saturating_sub(4)..].join(" | ");
        let threads = threads(self.pid()).join(" | ");
        format!(
            "console: {console}; QEMU: {}; threads: {threads}",
            self.errors()
        )
    }

    /// Tells the load to stop and waits for its verdict; true is intact. Whether a guest that goes on
    /// lost the word, or hears none, is part of the error.
    pub fn finish(&mut self, limit: Duration) -> Result<bool> {
        const AGAIN: Duration = Duration::from_secs(60);
        self.type_line("stop")?;
        let end = self.wait("verdict", limit, |g| g.verdict().is_some());
        if let Err(why) = end {
            let tasks = self.blocked_tasks();
            self.type_line("stop")?;
            let again = self.wait("verdict", AGAIN, |g| g.verdict().is_some());
            let heard = if again.is_ok() { "heard" } else { "not heard" };
            return Err(why.context(format!(
                "a second \"stop\" was {heard}; its blocked tasks: {tasks}"
            )));
        }
        Ok(self.verdict() == Some(true))
    }

    /// What the guest's kernel says of tasks that wait, asked by SysRq on its console.
    fn blocked_tasks(&mut self) -> String {
        let before = self.lines().len();
        let asked = self
            .qmp("chardev-send-break", json!({"id": "serial0"}))
            .and_then(|_| self.type_line("w"));
        if let Err(why) = asked {
            return format!("{why:#}");
        }
        std::thread::sleep(Duration::from_secs(10));
        self.lines().get(before..).unwrap_or_default().join(" | ")
    }

    /// Waits for QEMU's end; its exit status.
    pub fn ended(&mut self, limit: Duration) -> Result<Option<i32>> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            if start.elapsed() > limit {
                bail!("{}: QEMU still runs after {} s", self.name, limit.as_secs());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Sends one QMP command; what it returns.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        if self.control.is_none() {
            self.wait("QMP socket", Duration::from_secs(300), |g| g.qmp.exists())?;
            let stream = UnixStream::connect(&self.qmp).context("QMP socket")?;
            stream.set_read_timeout(Some(Duration::from_secs(300)))?;
            let mut control = BufReader::new(stream);
            control.read_line(&mut String::new())?;
            self.control = Some(control);
            self.qmp("qmp_capabilities", json!({}))?;
        }
        let control = self.control.as_mut().context("QMP")?;
        writeln!(
            control.get_mut(),
            "{}",
            json!({"execute": command, "arguments": arguments})
        )?;
        loop {
            let mut line = String::new();
            if control.read_line(&mut line)? == 0 {
                bail!("QMP closed during {command}");
            }
            let answer: Value = serde_json::from_str(&line).context("QMP")?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.qmp);
    }
}

/// What the threads of a process do: name, state, and where they are in the kernel, innermost first.
fn threads(pid: u32) -> Vec<String> {
    /// Calls that are told of each.
    const CALLS: usize = 8;
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    tasks
        .map(|task| {
            let read = |file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
            // The name is in brackets, the state comes after it.
            let stat = read("stat");
            let (name, rest) = stat.rsplit_once(')').unwrap_or_default();
            let name = name.split_once('(').unwrap_or_default().1;
            let state = rest.trim_start().get(..1).unwrap_or("?");
            let stack = read("stack");
            let calls = stack
                .lines()
                .filter_map(|line| line.split_whitespace().nth(1));
            let calls = calls.take(CALLS).collect::<Vec<_>>().join(" < ");
            format!("{name} {state} {calls}")
        })
        .collect()
}

/// Gathers the lines of a stream in a thread of their own.
fn collect(stream: Option<impl Read + Send + 'static>) -> Arc<Mutex<Vec<String>>> {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let Some(stream) = stream else { return lines };
    let into = lines.clone();
    std::thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut raw = Vec::new();
        while stream.read_until(b'\n', &mut raw).is_ok_and(|n| n > 0) {
            let line = String::from_utf8_lossy(&raw).trim_end().to_string();
            raw.clear();
            if let Ok(mut lines) = into.lock() {
                lines.push(line);
            }
        }
    });
    lines
}

/// The number that follows `key` in `line`.
fn value(line: &str, key: &str) -> Option<u64> {
    let rest = &line[line.find(key)? + key.len()..];
    rest.chars()
        .take_while(char::is_ascii_digit)
        .collect::<String>()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_from_a_console() {
        assert_eq!(
            value("guest-load: pass=12 written=3 bad=0", "guest-load: pass="),
            Some(12)
        );
        assert_eq!(value("guest-load: end", "guest-load: pass="), None);
    }

    #[test]
    fn a_microvm_gets_no_slots() {
        let spec = Spec::new("a", Kind::Small, 64, Path::new("/run/t"), 8);
        let text = format!("{:?}", spec.command(Path::new("/run/q")));
        assert!(
            text.contains("\"64M\"") && !text.contains("slots="),
            "{text}"
        );
        let pc = Spec {
            kind: Kind::SmallPc,
            ..spec
        };
        assert!(format!("{:?}", pc.command(Path::new("/run/q"))).contains("slots=4"));
    }
}
