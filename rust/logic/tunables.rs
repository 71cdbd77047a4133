// SPDX-License-Identifier: GPL-2.0

//! What users write into sysfs and mount options, and the bounds of the host's numbers.

/// Why a value is not taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BadValue {
    /// Not of the form that is asked for (EINVAL).
    Invalid,
    /// Of that form, but outside of the bounds (ERANGE).
    Range,
}

/// Without the one newline that `echo` adds.
pub fn without_newline(bytes: &[u8]) -> &[u8] {
    bytes.strip_suffix(b"\n").unwrap_or(bytes)
}

/// Digits only; more than a u64 holds is out of range.
fn digits(bytes: &[u8]) -> Result<u64, BadValue> {
    if bytes.is_empty() || !bytes.iter().all(u8::is_ascii_digit) {
        return Err(BadValue::Invalid);
    }
    bytes
        .iter()
        .try_fold(0u64, |value, &digit| {
            let digit = u64::from(digit.wrapping_sub(b'0'));
            value.checked_mul(10)?.checked_add(digit)
        })
        .ok_or(BadValue::Range)
}

/// A decimal number between `min` and `max`, with at most one newline after it.
///
/// # Errors
///
/// `Invalid` for anything but digits (signs, spaces, nothing at all), `Range` outside of the bounds.
pub fn parse_u64(bytes: &[u8], min: u64, max: u64) -> Result<u64, BadValue> {
    let value = digits(without_newline(bytes))?;
    if value < min || value > max {
        return Err(BadValue::Range);
    }
    Ok(value)
}

/// The place of a word among `words`, with at most one newline after it.
///
/// # Errors
///
/// `Invalid` when it is none of them.
pub fn parse_word(bytes: &[u8], words: &[&str]) -> Result<usize, BadValue> {
    let word = without_newline(bytes);
    words
        .iter()
        .position(|known| known.as_bytes() == word)
        .ok_or(BadValue::Invalid)
}

/// Longest name of a VM or a domain, in bytes.
pub const NAME_MAX: usize = 255;

/// A name of a VM or domain: UTF-8 of 1 to 255 bytes without control characters and `/`, and
/// neither `.` nor `..`. No newline is taken off: a directory's name may end in one, and is refused
/// then. What comes from sysfs goes through [`without_newline`] first.
///
/// # Errors
///
/// `Range` when it is too long, else `Invalid`.
pub fn parse_name(bytes: &[u8]) -> Result<&str, BadValue> {
    if bytes.len() > NAME_MAX {
        return Err(BadValue::Range);
    }
    let name = core::str::from_utf8(bytes).map_err(|_| BadValue::Invalid)?;
    if matches!(name, "" | "." | "..") || name.contains('/') || name.contains(char::is_control) {
        return Err(BadValue::Invalid);
    }
    Ok(name)
}

/// A size in bytes: digits, and `k`, `m`, `g` or `t` (either case, powers of 1024) where wanted.
///
/// # Errors
///
/// `Invalid` for any other form (percentages, fractions, spaces), `Range` beyond a u64.
pub fn parse_size(bytes: &[u8]) -> Result<u64, BadValue> {
    let (number, shift) = match bytes.split_last() {
        Some((b'k' | b'K', number)) => (number, 10),
        Some((b'm' | b'M', number)) => (number, 20),
        Some((b'g' | b'G', number)) => (number, 30),
        Some((b't' | b'T', number)) => (number, 40),
        _ => (bytes, 0),
    };
    digits(number)?
        .checked_mul(1u64 << shift)
        .ok_or(BadValue::Range)
}

/// Within which border pages are shared.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum ShareScope {
    /// A VM shares with itself only.
    Vm,
    /// The VMs of a domain share with each other.
    #[default]
    Domain,
    /// All VMs of the host share with each other.
    Host,
}

impl ShareScope {
    /// The words, in the order of [`ShareScope::ALL`].
    pub const WORDS: [&'static str; 3] = ["vm", "domain", "host"];
    /// All scopes, the narrowest first.
    pub const ALL: [ShareScope; 3] = [ShareScope::Vm, ShareScope::Domain, ShareScope::Host];

    /// The scope of an index into [`ShareScope::ALL`].
    pub fn from_index(index: usize) -> Option<Self> {
        Self::ALL.get(index).copied()
    }

    /// Its index in [`ShareScope::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }

    /// What was written to sysfs.
    ///
    /// # Errors
    ///
    /// `Invalid` when it is no scope's word.
    pub fn parse(bytes: &[u8]) -> Result<Self, BadValue> {
        parse_word(bytes, &Self::WORDS).and_then(|i| Self::from_index(i).ok_or(BadValue::Invalid))
    }

    /// Its word.
    pub const fn as_str(self) -> &'static str {
        match self {
            ShareScope::Vm => "vm",
            ShareScope::Domain => "domain",
            ShareScope::Host => "host",
        }
    }
}

/// What the scanner does.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum RunMode {
    /// Nothing; what is shared stays so.
    Stop,
    /// It scans.
    #[default]
    Run,
    /// Nothing, and every share was broken.
    Unshare,
}

impl RunMode {
    /// All modes, by number.
    pub const ALL: [RunMode; 3] = [RunMode::Stop, RunMode::Run, RunMode::Unshare];

    /// The mode of a number.
    pub fn from_index(index: usize) -> Option<Self> {
        Self::ALL.get(index).copied()
    }

    /// Its number.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// What was written to sysfs.
    ///
    /// # Errors
    ///
    /// As [`parse_u64`].
    pub fn parse(bytes: &[u8]) -> Result<Self, BadValue> {
        let index = parse_u64(bytes, 0, 2)? as usize;
        Self::from_index(index).ok_or(BadValue::Range)
    }

    /// Its number as text.
    pub const fn as_str(self) -> &'static str {
        match self {
            RunMode::Stop => "0",
            RunMode::Run => "1",
            RunMode::Unshare => "2",
        }
    }
}

/// One of the host's numbers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Knob {
    /// Name of the file.
    pub name: &'static str,
    /// Least value.
    pub min: u64,
    /// Largest value.
    pub max: u64,
    /// Value after the module was loaded.
    pub default: u64,
}

impl Knob {
    const fn new(name: &'static str, min: u64, max: u64, default: u64) -> Self {
        Knob {
            name,
            min,
            max,
            default,
        }
    }

    /// What was written to the file.
    ///
    /// # Errors
    ///
    /// As [`parse_u64`].
    pub fn parse(&self, bytes: &[u8]) -> Result<u64, BadValue> {
        parse_u64(bytes, self.min, self.max)
    }

    /// The knob of that name.
    pub fn find(name: &str) -> Option<&'static Knob> {
        KNOBS.iter().find(|knob| knob.name == name)
    }
}

/// The most KiB that a size in bytes can be.
pub const KB_MAX: u64 = u64::MAX >> 10;

/// The host's numbers; 0 means "none" for paces and "computed" for `minfree_kb`. The idle tax stays
/// below 100 because memory's price is its inverse.
pub const KNOBS: &[Knob] = &[
    Knob::new("run", 0, 2, 1),
    Knob::new("scan_pages_per_sec", 0, u64::MAX, 0),
    Knob::new("scan_period_secs", 0, u64::MAX, 200),
    Knob::new("scan_cpu_max_percent", 1, 100, 20),
    Knob::new("zero_only", 0, 1, 0),
    Knob::new("merge_across_nodes", 0, 1, 1),
    Knob::new("max_page_sharing", 2, 1 << 20, 65536),
    Knob::new("compress_max_percent", 0, 100, 10),
    Knob::new("compress_max_object_percent", 0, 100, 50),
    Knob::new("idle_tax_percent", 0, 99, 75),
    Knob::new("minfree_kb", 0, KB_MAX, 0),
];
