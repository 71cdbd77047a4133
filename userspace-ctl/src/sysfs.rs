// SPDX-License-Identifier: GPL-2.0

//! The files below `/sys/fs/thinram`, under any root.

use crate::text::escape;
use crate::units::parse_number;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// More than any sysfs file holds; a longer one is not ours.
const MAX_BYTES: u64 = 64 * 1024;
/// How much of a bad content is shown.
const SHOWN_COLUMNS: usize = 60;

/// What went wrong with a file, and with which one.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no such directory: no module.
    #[error("{0} is missing: is the module loaded? sudo modprobe thinram")]
    NotLoaded(String),
    /// The object that the file belongs to ended while it was read.
    #[error("{0} is gone: the VM ended")]
    Gone(String),
    /// The system refused.
    #[error("cannot {doing} {path}: {cause}")]
    Io {
        /// Which file, escaped.
        path: String,
        /// `read`, `list` or `write`.
        doing: &'static str,
        /// Its error.
        cause: io::Error,
    },
    /// Longer than any file of the module.
    #[error("{0} is longer than {MAX_BYTES} bytes: not a file of thinram")]
    TooLong(String),
    /// Bytes that are no text.
    #[error("{path} holds no text: `{content}`")]
    NotText {
        /// Which file, escaped.
        path: String,
        /// What it holds, escaped.
        content: String,
    },
    /// No number where one belongs.
    #[error("{path}{}: `{content}` is no whole number", line_suffix(*.line))]
    Number {
        /// Which file, escaped.
        path: String,
        /// Line, where the file has several.
        line: Option<usize>,
        /// What stands there, escaped.
        content: String,
    },
    /// A line of `stat` that is not `name value`.
    #[error("{path} line {line}: `{content}` is not of the form `name value`")]
    Line {
        /// Which file, escaped.
        path: String,
        /// Line, counted from 1.
        line: usize,
        /// What stands there, escaped.
        content: String,
    },
}

fn line_suffix(line: Option<usize>) -> String {
    line.map(|line| format!(" line {line}")).unwrap_or_default()
}

fn shown_path(path: &Path) -> String {
    escape(path.as_os_str().as_bytes())
}

fn shown_content(bytes: &[u8]) -> String {
    crate::text::shorten(&escape(bytes), SHOWN_COLUMNS)
}

impl Error {
    /// The error number, where the system gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Io { cause, .. } => cause.raw_os_error(),
            _ => None,
        }
    }
}

/// Numbers of errors that a removed sysfs file answers with.
const ENODEV: i32 = rustix::io::Errno::NODEV.raw_os_error();

/// One directory of files.
#[derive(Debug, Clone)]
pub struct Dir {
    path: PathBuf,
}

impl Dir {
    /// `/sys/fs/thinram` below a root.
    ///
    /// # Errors
    ///
    /// [`Error::NotLoaded`] where it does not exist.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let path = root.join("sys/fs/thinram");
        match fs::metadata(&path) {
            Ok(meta) if meta.is_dir() => Ok(Self { path }),
            Ok(_) => Err(Error::NotLoaded(shown_path(&path))),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(Error::NotLoaded(shown_path(&path)))
            }
            Err(cause) => Err(io_error(&path, "read", cause)),
        }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it still exists.
    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    /// A directory in it.
    pub fn child(&self, name: impl AsRef<Path>) -> Self {
        Self {
            path: self.path.join(name),
        }
    }

    /// Names of the directories in it, sorted; none where it does not exist.
    pub fn dirs(&self) -> Result<Vec<OsString>, Error> {
        self.list(true)
    }

    /// Names of the files in it, sorted.
    pub fn files(&self) -> Result<Vec<OsString>, Error> {
        self.list(false)
    }

    fn list(&self, dirs: bool) -> Result<Vec<OsString>, Error> {
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(cause) => return Err(io_error(&self.path, "list", cause)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|cause| io_error(&self.path, "list", cause))?;
            // An entry whose type cannot be told has just gone.
            if fs::metadata(entry.path()).is_ok_and(|meta| meta.is_dir() == dirs) {
                names.push(entry.file_name());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Content of a file without its last newline; `None` where it does not exist.
    ///
    /// # Errors
    ///
    /// [`Error::Gone`] where the kernel removed the file while it was open, [`Error::NotText`] for
    /// what is not UTF-8.
    pub fn read(&self, name: impl AsRef<OsStr>) -> Result<Option<String>, Error> {
        let path = self.path.join(name.as_ref());
        let mut bytes = Vec::new();
        let read =
            File::open(&path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes));
        match read {
            Ok(len) if len as u64 > MAX_BYTES => return Err(Error::TooLong(shown_path(&path))),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(ENODEV) => {
                return Err(Error::Gone(shown_path(&path)))
            }
            Err(cause) => return Err(io_error(&path, "read", cause)),
        }
        match String::from_utf8(bytes) {
            Ok(mut text) => {
                if text.ends_with('\n') {
                    text.pop();
                }
                Ok(Some(text))
            }
            Err(error) => Err(Error::NotText {
                path: shown_path(&path),
                content: shown_content(error.as_bytes()),
            }),
        }
    }

    /// A whole number; `None` where the file does not exist.
    pub fn number(&self, name: &str) -> Result<Option<u64>, Error> {
        self.parsed(name, |text| parse_number(text).ok())
    }

    /// A whole number that may be negative; `None` where the file does not exist.
    pub fn signed(&self, name: &str) -> Result<Option<i64>, Error> {
        self.parsed(name, |text| {
            let (sign, digits) = match text.strip_prefix('-') {
                Some(digits) => (-1, digits),
                None => (1, text),
            };
            let value = i128::from(parse_number(digits).ok()?);
            i64::try_from(sign * value).ok()
        })
    }

    fn parsed<T>(&self, name: &str, parse: impl Fn(&str) -> Option<T>) -> Result<Option<T>, Error> {
        let Some(text) = self.read(name)? else {
            return Ok(None);
        };
        parse(&text).map(Some).ok_or_else(|| Error::Number {
            path: shown_path(&self.path.join(name)),
            line: None,
            content: shown_content(text.as_bytes()),
        })
    }

    /// Lines of `name value`, for names that `known` takes; other names are passed over with
    /// whatever they hold. `false` where the file does not exist.
    pub fn stat(
        &self,
        name: &str,
        mut known: impl FnMut(&str, Option<u64>) -> bool,
    ) -> Result<bool, Error> {
        let Some(text) = self.read(name)? else {
            return Ok(false);
        };
        let path = || shown_path(&self.path.join(name));
        for (at, line) in text.lines().enumerate() {
            let content = || shown_content(line.as_bytes());
            let Some((key, value)) = line.split_once(' ') else {
                if line.is_empty() {
                    continue;
                }
                return Err(Error::Line {
                    path: path(),
                    line: at + 1,
                    content: content(),
                });
            };
            let value = parse_number(value.trim()).ok();
            if known(key, value) && value.is_none() {
                return Err(Error::Number {
                    path: path(),
                    line: Some(at + 1),
                    content: content(),
                });
            }
        }
        Ok(true)
    }

    /// Whether the file may be written at all, whoever asks; `None` where it does not exist.
    pub fn writable(&self, name: &str) -> Option<bool> {
        let meta = fs::metadata(self.path.join(name))
            .ok()
            .filter(fs::Metadata::is_file)?;
        Some(meta.permissions().mode() & 0o222 != 0)
    }

    /// Writes a value and a newline in one call; the file must exist.
    pub fn write(&self, name: &str, value: &str) -> Result<(), Error> {
        let path = self.path.join(name);
        let written = OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(&path)
            .and_then(|mut file| file.write_all(format!("{value}\n").as_bytes()));
        match written {
            Ok(()) => Ok(()),
            Err(error) if error.raw_os_error() == Some(ENODEV) => {
                Err(Error::Gone(shown_path(&path)))
            }
            Err(cause) => Err(io_error(&path, "write", cause)),
        }
    }
}

fn io_error(path: &Path, doing: &'static str, cause: io::Error) -> Error {
    Error::Io {
        path: shown_path(path),
        doing,
        cause,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tempfile::TempDir;

    fn holding(bytes: &[u8]) -> (TempDir, Dir) {
        let root = TempDir::new().unwrap();
        fs::write(root.path().join("file"), bytes).unwrap();
        let path = root.path().to_owned();
        (root, Dir { path })
    }

    proptest! {
        #[test]
        fn numbers_are_what_they_say(text in "-?[0-9]{0,22}\n?|\\PC{0,5}") {
            let (_root, dir) = holding(text.as_bytes());
            let bare = text.strip_suffix('\n').unwrap_or(&text);
            let digits = bare.bytes().all(|byte| byte.is_ascii_digit());
            match dir.number("file") {
                Ok(number) => {
                    prop_assert!(digits);
                    prop_assert_eq!(number, bare.parse().ok());
                }
                Err(error) => {
                    prop_assert!(!digits || bare.parse::<u64>().is_err(), "{}", error);
                    prop_assert!(error.to_string().contains("/file"), "{}", error);
                }
            }
            match dir.signed("file") {
                Ok(number) => prop_assert_eq!(number, bare.parse().ok()),
                Err(_) => prop_assert!(!digits || bare.parse::<i64>().is_err()),
            }
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let (_root, dir) = holding(&bytes);
            if let Ok(text) = dir.read("file") {
                let text = text.unwrap();
                prop_assert!(bytes.starts_with(text.as_bytes()));
            }
            let _ = dir.stat("file", |_, _| true);
        }

        #[test]
        fn a_snapshot_gives_every_figure(
            figures in prop::collection::btree_map("[a-z_]{1,9}", any::<u64>(), 0..9),
            odd in prop::option::of("[a-z]{1,4}( [a-z]{1,4})?"),
            at in any::<usize>(),
        ) {
            let mut lines: Vec<String> = figures.iter().map(|(name, n)| format!("{name} {n}")).collect();
            let at = at % (lines.len() + 1);
            if let Some(odd) = &odd {
                lines.insert(at, odd.clone());
            }
            let (_root, dir) = holding((lines.join("\n") + "\n").as_bytes());
            let mut seen = Vec::new();
            let outcome = dir.stat("file", |name, value| {
                seen.extend(value.map(|value| (name.to_owned(), value)));
                true
            });
            match odd {
                None => {
                    prop_assert!(outcome.unwrap());
                    prop_assert_eq!(seen, figures.into_iter().collect::<Vec<_>>());
                }
                Some(_) => {
                    let said = outcome.unwrap_err().to_string();
                    prop_assert!(said.contains(&format!("{}", at + 1)), "{}", said);
                }
            }
        }
    }
}
