// SPDX-License-Identifier: GPL-2.0

//! The module's knobs: one table for checks, help texts and what is shown.

use crate::sysfs::Error;
use crate::units::{self, UnitError};
use thiserror::Error as ThisError;

/// Whom a knob steers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The whole host: a file of `/sys/fs/thinram`.
    Host,
    /// One VM: a file of `/sys/fs/thinram/vms/NAME`.
    Vm,
}

/// What a knob's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A size in KiB.
    Size,
    /// A percentage.
    Percent,
    /// A number of something that the knob's name tells.
    Number,
    /// 0 or 1.
    Switch,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A name or a path; empty is allowed.
    Text,
}

/// One knob.
#[derive(Debug)]
pub struct Knob {
    /// Name of the file.
    pub name: &'static str,
    /// Whom it steers.
    pub scope: Scope,
    /// What it holds.
    pub kind: Kind,
    /// Least and largest number; meaningless for words and texts.
    pub range: (u64, u64),
    /// Value after the module was loaded or the VM created.
    pub default: &'static str,
    /// What 0, or empty, means where that is not a quantity.
    pub nothing: Option<&'static str>,
    /// One sentence.
    pub help: &'static str,
}

const SCOPES: Kind = Kind::Word(&["vm", "domain", "host"]);
const LARGE: Kind = Kind::Word(&["never", "always"]);

macro_rules! knob {
    ($scope:ident, $name:literal, $kind:expr, $range:expr, $default:literal, $nothing:expr, $help:literal) => {
        Knob {
            name: $name,
            scope: Scope::$scope,
            kind: $kind,
            range: $range,
            default: $default,
            nothing: $nothing,
            help: $help,
        }
    };
}

const ANY: (u64, u64) = (0, u64::MAX);
const SIZE: (u64, u64) = (0, units::MAX_KB);
const TEXT: (u64, u64) = (0, 0);

/// Every knob, in the order in which they are shown.
pub const KNOBS: &[Knob] = &[
    knob!(
        Host,
        "run",
        Kind::Number,
        (0, 2),
        "1",
        None,
        "0 stops the scanner, 1 lets it run, 2 breaks every share and stops."
    ),
    knob!(
        Host,
        "scan_pages_per_sec",
        Kind::Number,
        ANY,
        "0",
        Some("no ceiling"),
        "Pages that the scanner looks at in a second, at most."
    ),
    knob!(
        Host,
        "scan_period_secs",
        Kind::Number,
        ANY,
        "200",
        Some("no such pace"),
        "Seconds that a full scan shall take."
    ),
    knob!(
        Host,
        "scan_cpu_max_percent",
        Kind::Percent,
        (1, 100),
        "20",
        None,
        "Share of one CPU that the scanner may use."
    ),
    knob!(
        Host,
        "share_scope",
        SCOPES,
        TEXT,
        "domain",
        None,
        "Within which border pages are shared: one VM, its domain, or the host."
    ),
    knob!(
        Host,
        "zero_only",
        Kind::Switch,
        (0, 1),
        "0",
        None,
        "1 shares zero pages and no others."
    ),
    knob!(
        Host,
        "merge_across_nodes",
        Kind::Switch,
        (0, 1),
        "1",
        None,
        "0 keeps pages of different NUMA nodes apart."
    ),
    knob!(
        Host,
        "max_page_sharing",
        Kind::Number,
        (2, 1 << 20),
        "65536",
        None,
        "Sharers of one frame before a copy of it is chained."
    ),
    knob!(
        Host,
        "large_pages",
        LARGE,
        TEXT,
        "always",
        None,
        "Whether new memory may be 2 MiB pages."
    ),
    knob!(
        Host,
        "split_holes_percent",
        Kind::Percent,
        (1, 100),
        "50",
        None,
        "Holes in a 2 MiB page beyond which it is split."
    ),
    knob!(
        Host,
        "collapse_after_secs",
        Kind::Number,
        (0, 86_400),
        "60",
        None,
        "How long the host has to have memory before small pages become 2 MiB again."
    ),
    knob!(
        Host,
        "collapse_per_sec",
        Kind::Number,
        (0, 65_536),
        "16",
        None,
        "2 MiB pages that are made of small ones in a second at most; 0 = none."
    ),
    knob!(
        Host,
        "compress_max_percent",
        Kind::Percent,
        (0, 100),
        "10",
        None,
        "Size of a VM's pool of compressed pages, of the VM's size."
    ),
    knob!(
        Host,
        "compress_max_object_percent",
        Kind::Percent,
        (0, 100),
        "50",
        None,
        "Size up to which a compressed page is worth keeping, of a page."
    ),
    knob!(
        Host,
        "idle_tax_percent",
        Kind::Percent,
        (0, 99),
        "75",
        None,
        "How much more idle memory costs a VM than memory in use."
    ),
    knob!(
        Host,
        "active_sample_pages",
        Kind::Number,
        (0, 1 << 20),
        "100",
        Some("no sampling"),
        "Pages of each VM whose use is watched, for active_kb."
    ),
    knob!(
        Host,
        "active_sample_period_secs",
        Kind::Number,
        (1, 86400),
        "30",
        None,
        "Seconds for which they are watched."
    ),
    knob!(
        Host,
        "minfree_kb",
        Kind::Size,
        SIZE,
        "0",
        Some("computed"),
        "Available memory that the states of the host are measured by."
    ),
    knob!(
        Host,
        "swap_dir",
        Kind::Text,
        TEXT,
        "",
        Some("no swap"),
        "Directory for the VMs' swap files."
    ),
    knob!(
        Vm,
        "share",
        Kind::Switch,
        (0, 1),
        "1",
        None,
        "0 leaves the VM's pages alone."
    ),
    knob!(
        Vm,
        "domain",
        Kind::Text,
        TEXT,
        "",
        Some("its own"),
        "Domain that the VM shares pages with."
    ),
    knob!(
        Vm,
        "scan_pages_per_sec",
        Kind::Number,
        ANY,
        "0",
        Some("no ceiling"),
        "Pages of the VM that the scanner looks at in a second, at most."
    ),
    knob!(
        Vm,
        "shares",
        Kind::Number,
        (1, u32::MAX as u64),
        "1000",
        None,
        "Weight of the VM when memory is short."
    ),
    knob!(
        Vm,
        "reservation_kb",
        Kind::Size,
        SIZE,
        "0",
        Some("none"),
        "Resident memory that reclaim leaves to the VM."
    ),
    knob!(
        Vm,
        "limit_kb",
        Kind::Size,
        SIZE,
        "0",
        Some("none"),
        "Resident memory that the VM may have."
    ),
    knob!(
        Vm,
        "compress_max_percent",
        Kind::Percent,
        (0, 100),
        "0",
        Some("the host's"),
        "Size of the VM's pool of compressed pages, of its size."
    ),
    knob!(
        Vm,
        "large_pages",
        LARGE,
        TEXT,
        "",
        Some("the host's"),
        "Whether new memory of the VM may be 2 MiB pages."
    ),
];

/// Why a value does not fit a knob.
#[derive(Debug, ThisError, PartialEq, Eq)]
pub enum BadValue {
    /// Not of the knob's kind.
    #[error("{knob}: {cause}")]
    Form {
        /// Name of the knob.
        knob: &'static str,
        /// What was wrong.
        cause: UnitError,
    },
    /// A number outside of the range.
    #[error("{knob}: `{value}` is out of range: {range}")]
    Range {
        /// Name of the knob.
        knob: &'static str,
        /// As it was given.
        value: String,
        /// Least and largest.
        range: String,
    },
    /// Not one of the words.
    #[error("{knob}: `{value}` is none of {words}")]
    Word {
        /// Name of the knob.
        knob: &'static str,
        /// As it was given, escaped.
        value: String,
        /// Those it takes.
        words: String,
    },
    /// A text with characters that no file of the module holds.
    #[error("{knob}: `{value}` has a control character in it")]
    Control {
        /// Name of the knob.
        knob: &'static str,
        /// As it was given, escaped.
        value: String,
    },
}

impl Knob {
    /// The knob of that name and scope.
    pub fn find(scope: Scope, name: &str) -> Option<&'static Knob> {
        Self::all(scope).find(|knob| knob.name == name)
    }

    /// Whether its value is a number.
    pub fn is_number(&self) -> bool {
        !matches!(self.kind, Kind::Word(_) | Kind::Text)
    }

    /// Every knob of a scope.
    pub fn all(scope: Scope) -> impl Iterator<Item = &'static Knob> {
        KNOBS.iter().filter(move |knob| knob.scope == scope)
    }

    /// Turns what an operator wrote into what the module reads.
    ///
    /// # Errors
    ///
    /// [`BadValue`], which names the value and what would be right.
    pub fn parse(&self, text: &str) -> Result<String, BadValue> {
        let form = |cause| BadValue::Form {
            knob: self.name,
            cause,
        };
        let value = match self.kind {
            Kind::Size => units::parse_kb(text).map_err(form)?,
            Kind::Percent => units::parse_percent(text).map_err(form)?,
            Kind::Number => units::parse_number(text).map_err(form)?,
            Kind::Switch => match text {
                "0" | "off" | "no" | "false" => 0,
                "1" | "on" | "yes" | "true" => 1,
                _ => return Err(self.no_word(text, "0, off, 1, on")),
            },
            Kind::Word(words) => {
                let empty = text.is_empty() && self.nothing.is_some();
                if !empty && !words.contains(&text) {
                    return Err(self.no_word(text, &words.join(", ")));
                }
                return Ok(text.to_owned());
            }
            Kind::Text => {
                if text.chars().any(char::is_control) {
                    let value = crate::text::escape(text.as_bytes());
                    return Err(BadValue::Control {
                        knob: self.name,
                        value,
                    });
                }
                return Ok(text.to_owned());
            }
        };
        if value < self.range.0 || value > self.range.1 {
            return Err(BadValue::Range {
                knob: self.name,
                value: text.to_owned(),
                range: self.range_text(),
            });
        }
        Ok(value.to_string())
    }

    fn no_word(&self, text: &str, words: &str) -> BadValue {
        let value = crate::text::escape(text.as_bytes());
        BadValue::Word {
            knob: self.name,
            value,
            words: words.to_owned(),
        }
    }

    /// The values it takes, in words.
    pub fn range_text(&self) -> String {
        let (least, largest) = self.range;
        match self.kind {
            Kind::Word(words) => words.join(", "),
            Kind::Text if self.name.ends_with("_dir") => {
                "the absolute path of a directory, or nothing".to_owned()
            }
            Kind::Text => {
                "up to 255 bytes of text without /, neither . nor .., or nothing".to_owned()
            }
            Kind::Switch => "0 or 1".to_owned(),
            Kind::Size => format!("a size such as {}", units::SIZE_FORMS),
            Kind::Percent => format!("{least}% to {largest}%"),
            Kind::Number if largest == u64::MAX => format!("{least} or more"),
            Kind::Number => format!("{least} to {largest}"),
        }
    }

    /// A value of the module with its unit, and with what it means where it is no quantity.
    pub fn show(&self, value: &str) -> String {
        let number = units::parse_number(value).ok();
        if let Some(nothing) = self.nothing {
            if value.is_empty() || number == Some(0) {
                let zero = if value.is_empty() { "-" } else { "0" };
                return format!("{zero} ({nothing})");
            }
        }
        match (self.kind, number) {
            (Kind::Size, Some(kb)) => units::exact_kb(kb),
            (Kind::Percent, Some(percent)) => format!("{percent}%"),
            (Kind::Switch, Some(0)) => "0 (off)".to_owned(),
            (Kind::Switch, Some(1)) => "1 (on)".to_owned(),
            _ => crate::text::escape(value.as_bytes()),
        }
    }

    /// One paragraph for help texts.
    pub fn describe(&self) -> String {
        let default = if self.default.is_empty() {
            "empty"
        } else {
            self.default
        };
        let nothing = match self.nothing {
            Some(nothing) if self.range == TEXT => format!("; empty: {nothing}"),
            Some(nothing) => format!("; 0: {nothing}"),
            None => String::new(),
        };
        format!(
            "{} [{}; default {default}{nothing}]",
            self.help,
            self.range_text()
        )
    }

    /// What the system meant by refusing a value, in plain words.
    pub fn explain(&self, value: &str, error: &Error) -> String {
        use rustix::io::Errno;
        let value = crate::text::escape(value.as_bytes());
        let name = self.name;
        let errno = error.errno().map(Errno::from_raw_os_error);
        let why = match errno {
            Some(Errno::INVAL) => {
                format!(
                    "the module takes no `{value}` for {name}: {}",
                    self.describe()
                )
            }
            Some(Errno::RANGE) => {
                format!("`{value}` is out of range for {name}: {}", self.describe())
            }
            Some(Errno::NOMEM) => format!(
                "not enough memory to set {name} to `{value}`: the shares that this breaks need \
                 frames of their own"
            ),
            Some(Errno::PERM | Errno::ACCESS) => {
                format!("not allowed to set {name}: run as root")
            }
            Some(Errno::BUSY) => format!("{name} cannot be changed to `{value}` now: it is in use"),
            Some(Errno::NOENT) => {
                format!("`{value}` for {name} names something that does not exist")
            }
            Some(Errno::OPNOTSUPP) => {
                format!(
                    "`{value}` for {name} is memory, or lacks O_TMPFILE or O_DIRECT: choose a \
                     directory on ext4, XFS or btrfs"
                )
            }
            Some(Errno::INTR) => format!("interrupted while setting {name}"),
            _ => return error.to_string(),
        };
        format!("{why} ({error})")
    }
}

/// Names most like `name`, best first, at most three.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    const ALIKE: f64 = 0.75;
    let mut scored: Vec<(f64, &str)> = known
        .map(|known| (strsim::jaro_winkler(name, known), known))
        .filter(|(score, _)| *score >= ALIKE)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.dedup_by_key(|entry| entry.1);
    scored.into_iter().take(3).map(|(_, known)| known).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;
    use std::io;

    fn host(name: &str) -> &'static Knob {
        Knob::find(Scope::Host, name).unwrap()
    }

    fn vm(name: &str) -> &'static Knob {
        Knob::find(Scope::Vm, name).unwrap()
    }

    #[test]
    fn bounds_and_defaults_are_the_modules() {
        use thinram_logic::tunables::{LargePages, ShareScope, KNOBS, VM_KNOBS};
        for (scope, modules) in [(Scope::Host, KNOBS), (Scope::Vm, VM_KNOBS)] {
            let numbers = Knob::all(scope).filter(|knob| knob.is_number()).count();
            assert_eq!(modules.len(), numbers);
            for theirs in modules {
                let ours = Knob::find(scope, theirs.name).unwrap();
                assert_eq!(ours.range, (theirs.min, theirs.max), "{}", theirs.name);
                assert_eq!(ours.default, theirs.default.to_string(), "{}", theirs.name);
            }
        }
        let large = host("large_pages");
        assert_eq!(large.default, LargePages::default().as_str());
        assert_eq!(large.kind, Kind::Word(&LargePages::WORDS));
        let scope = host("share_scope");
        assert_eq!(scope.default, ShareScope::default().as_str());
        assert_eq!(scope.kind, Kind::Word(&ShareScope::WORDS));
    }

    #[test]
    fn table_is_sound() {
        let mut seen = HashSet::new();
        for knob in KNOBS {
            assert!(
                seen.insert((knob.scope == Scope::Vm, knob.name)),
                "{} twice",
                knob.name
            );
            assert_eq!(
                knob.parse(knob.default).as_deref(),
                Ok(knob.default),
                "{}",
                knob.name
            );
            assert_eq!(
                knob.kind == Kind::Size,
                knob.name.ends_with("_kb"),
                "{}",
                knob.name
            );
            assert_eq!(
                knob.kind == Kind::Percent,
                knob.name.ends_with("_percent"),
                "{}",
                knob.name
            );
            assert!(
                knob.help.ends_with('.') && knob.help.len() < 80,
                "{}",
                knob.name
            );
        }
    }

    #[test]
    fn values_take_units() {
        assert_eq!(vm("limit_kb").parse("2G"), Ok("2097152".to_owned()));
        assert_eq!(vm("limit_kb").parse("4096"), Ok("4096".to_owned()));
        assert_eq!(host("idle_tax_percent").parse("50%"), Ok("50".to_owned()));
        assert_eq!(host("zero_only").parse("on"), Ok("1".to_owned()));
        assert_eq!(vm("large_pages").parse(""), Ok(String::new()));
        assert_eq!(vm("domain").parse("lab"), Ok("lab".to_owned()));
    }

    #[test]
    fn bad_values_say_what_is_right() {
        let said = |knob: &Knob, text: &str| knob.parse(text).unwrap_err().to_string();
        assert_eq!(said(host("run"), "3"), "run: `3` is out of range: 0 to 2");
        assert_eq!(
            said(host("max_page_sharing"), "1"),
            "max_page_sharing: `1` is out of range: 2 to 1048576"
        );
        assert_eq!(
            said(host("share_scope"), "all"),
            "share_scope: `all` is none of vm, domain, host"
        );
        assert_eq!(
            said(host("idle_tax_percent"), "101%"),
            "idle_tax_percent: `101%` is out of range: 0% to 99%"
        );
        assert!(said(vm("limit_kb"), "2Q").contains("`2Q` is no size"));
        assert!(said(host("scan_period_secs"), "-1").contains("`-1` is no whole number"));
        assert_eq!(
            said(vm("domain"), "a\nb"),
            "domain: `a\\nb` has a control character in it"
        );
        assert!(host("large_pages").parse("").is_err());
        assert!(host("zero_only").parse("2").is_err());
    }

    #[test]
    fn shown_with_unit_and_meaning() {
        assert_eq!(vm("limit_kb").show("2097152"), "2G");
        assert_eq!(vm("limit_kb").show("0"), "0 (none)");
        assert_eq!(host("idle_tax_percent").show("75"), "75%");
        assert_eq!(vm("domain").show(""), "- (its own)");
        assert_eq!(vm("share").show("1"), "1 (on)");
        assert_eq!(host("run").show("garbage\x1b"), "garbage\\x1b");
    }

    #[test]
    fn errnos_in_plain_words() {
        let said = |errno: rustix::io::Errno| {
            let cause = io::Error::from_raw_os_error(errno.raw_os_error());
            let error = Error::Io {
                path: "/x".into(),
                doing: "write",
                cause,
            };
            host("max_page_sharing").explain("7", &error)
        };
        use rustix::io::Errno;
        assert!(said(Errno::INVAL).contains("takes no `7`"));
        assert!(said(Errno::INVAL).contains("2 to 1048576; default 65536"));
        assert!(said(Errno::RANGE).contains("out of range"));
        assert!(said(Errno::NOMEM).contains("not enough memory"));
        assert!(said(Errno::PERM).contains("run as root"));
        assert!(said(Errno::ACCESS).contains("run as root"));
        assert!(said(Errno::BUSY).contains("in use"));
        assert!(said(Errno::INTR).contains("interrupted"));
        assert!(said(Errno::OPNOTSUPP).contains("choose a directory on ext4"));
        assert!(said(Errno::IO).starts_with("cannot write /x"));
    }

    #[test]
    fn near_names_are_suggested() {
        let names = || Knob::all(Scope::Host).map(|knob| knob.name);
        assert_eq!(nearest("scan_period_sec", names())[0], "scan_period_secs");
        assert_eq!(nearest("shre_scope", names())[0], "share_scope");
        assert!(nearest("qqqqqqqq", names()).is_empty());
    }

    proptest! {
        #[test]
        fn no_value_panics(text in any::<String>()) {
            for knob in KNOBS {
                let _ = knob.parse(&text);
                let _ = knob.show(&text);
            }
        }

        #[test]
        fn what_is_written_is_bare(text in "[0-9]{1,6}[%kKmMgG]?") {
            for knob in KNOBS.iter().filter(|knob| knob.range != TEXT) {
                if let Ok(written) = knob.parse(&text) {
                    let number: u64 = written.parse().unwrap();
                    prop_assert!((knob.range.0..=knob.range.1).contains(&number));
                }
            }
        }
    }
}
