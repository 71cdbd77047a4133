// SPDX-License-Identifier: GPL-2.0

//! What users write into sysfs and mount options, and the bounds of the host's numbers.

use core::fmt::{self, Write};

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

/// A text that somebody gave, on one line of a log: what is no printable UTF-8 escaped, and no more
/// than its beginning.
pub struct Shown<'a>(pub &'a [u8]);

impl Shown<'_> {
    /// As much as is shown, in characters.
    const LENGTH: usize = 64;
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = Self::LENGTH;
        for chunk in without_newline(self.0).utf8_chunks() {
            for letter in chunk.valid().chars() {
                left = match left.checked_sub(1) {
                    Some(left) => left,
                    None => return out.write_str("..."),
                };
                if letter.is_control() {
                    write!(out, "{}", letter.escape_default())?;
                } else {
                    out.write_char(letter)?;
                }
            }
            for byte in chunk.invalid() {
                write!(out, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// What a file in sysfs or a mount option takes, in words for whoever gave it something else.
pub struct Takes<'a>(pub &'a str);

impl fmt::Display for Takes<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            "share_scope" => Self::words(out, &ShareScope::WORDS),
            "large_pages" => Self::words(out, &LargePages::WORDS),
            "size" => out.write_str("bytes, or a number with k, m, g or t; 0 = no limit"),
            "mode" => out.write_str("an octal number up to 0777"),
            "domain" => out.write_str(
                "1 to 255 bytes of UTF-8 without control characters and /, neither . nor ..",
            ),
            name => match Knob::find(name).or_else(|| Knob::find_vm(name)) {
                Some(knob) => write!(out, "a number from {} to {}", knob.min, knob.max),
                None => out.write_str("something else"),
            },
        }
    }
}

impl Takes<'_> {
    fn words(out: &mut fmt::Formatter<'_>, words: &[&str]) -> fmt::Result {
        for (i, word) in words.iter().enumerate() {
            write!(out, "{}{word}", if i == 0 { "" } else { " or " })?;
        }
        Ok(())
    }
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

words! {
    /// Within which border pages are shared, the narrowest first.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub enum ShareScope {
        /// A VM shares with itself only.
        Vm = "vm",
        /// The VMs of a domain share with each other.
        #[default]
        Domain = "domain",
        /// All VMs of the host share with each other.
        Host = "host",
    }
}

words! {
    /// When empty regions become 2 MiB pages.
    #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
    pub enum LargePages {
        /// Never; those that are there stay.
        Never = "never",
        /// Where a whole region is empty and the mapping fits.
        #[default]
        Always = "always",
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
}

/// A number of the host's or of a VM's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Knob {
    /// Name of the file.
    pub name: &'static str,
    /// Least value.
    pub min: u64,
    /// Largest value.
    pub max: u64,
    /// Value after the module was loaded, or the VM made.
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

    /// The VM's knob of that name.
    pub fn find_vm(name: &str) -> Option<&'static Knob> {
        VM_KNOBS.iter().find(|knob| knob.name == name)
    }
}

/// The most KiB that a size in bytes can be.
pub const KB_MAX: u64 = u64::MAX >> 10;

/// The largest weight of a VM.
pub const SHARES_MAX: u64 = u32::MAX as u64;

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
    Knob::new("split_holes_percent", 1, 100, 50),
    Knob::new("collapse_after_secs", 0, 86_400, 60),
    Knob::new("collapse_per_sec", 0, 65_536, 16),
    Knob::new("compress_max_percent", 0, 100, 10),
    Knob::new("compress_max_object_percent", 0, 100, 50),
    Knob::new("idle_tax_percent", 0, 99, 75),
    Knob::new("minfree_kb", 0, KB_MAX, 0),
    Knob::new("active_sample_pages", 0, 1 << 20, 100),
    Knob::new("active_sample_period_secs", 1, 86_400, 30),
];

/// A VM's numbers; 0 means "none", and of `compress_max_percent` the host's.
pub const VM_KNOBS: &[Knob] = &[
    Knob::new("share", 0, 1, 1),
    Knob::new("scan_pages_per_sec", 0, u64::MAX, 0),
    Knob::new("shares", 1, SHARES_MAX, 1000),
    Knob::new("reservation_kb", 0, KB_MAX, 0),
    Knob::new("limit_kb", 0, KB_MAX, 0),
    Knob::new("compress_max_percent", 0, 100, 0),
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn numbers() {
        let parse = |bytes: &[u8]| parse_u64(bytes, 2, 1 << 20);
        assert_eq!(parse(b"2"), Ok(2));
        assert_eq!(parse(b"1048576\n"), Ok(1 << 20));
        assert_eq!(parse(b"0007"), Ok(7));
        for bad in [
            "", "\n", "7\n\n", "+7", "-7", " 7", "7 ", "0x7", "7k", "7.0", "seven", "7\0",
        ] {
            assert_eq!(parse(bad.as_bytes()), Err(BadValue::Invalid), "{bad:?}");
        }
        for bad in [
            "1",
            "1048577",
            "18446744073709551616",
            "99999999999999999999999999",
        ] {
            assert_eq!(parse(bad.as_bytes()), Err(BadValue::Range), "{bad:?}");
        }
        assert_eq!(parse(b"\xff"), Err(BadValue::Invalid));
        assert_eq!(
            parse_u64(b"18446744073709551615", 0, u64::MAX),
            Ok(u64::MAX)
        );
    }

    #[test]
    fn words() {
        for (i, word) in ShareScope::WORDS.iter().enumerate() {
            assert_eq!(parse_word(word.as_bytes(), &ShareScope::WORDS), Ok(i));
            let scope = ShareScope::from_index(i).unwrap();
            assert_eq!((scope.index(), scope.as_str()), (i, *word));
            assert_eq!(
                ShareScope::parse(std::format!("{word}\n").as_bytes()),
                Ok(scope)
            );
        }
        for bad in ["", "Vm", "vm ", "host\n\n", "[vm]", "domai", "domains"] {
            assert_eq!(
                ShareScope::parse(bad.as_bytes()),
                Err(BadValue::Invalid),
                "{bad:?}"
            );
        }
        assert_eq!(ShareScope::from_index(3), None);
        assert_eq!(ShareScope::default(), ShareScope::Domain);
    }

    #[test]
    fn run_modes() {
        for mode in RunMode::ALL {
            assert_eq!(
                RunMode::parse(mode.index().to_string().as_bytes()),
                Ok(mode)
            );
            assert_eq!(RunMode::from_index(mode.index()), Some(mode));
        }
        assert_eq!(RunMode::parse(b"3\n"), Err(BadValue::Range));
        assert_eq!(RunMode::parse(b"run"), Err(BadValue::Invalid));
        assert_eq!(RunMode::default(), RunMode::Run);
    }

    #[test]
    fn names() {
        let longest = "n".repeat(NAME_MAX);
        for good in [
            "web1",
            "1-web1",
            "...",
            "a b",
            "-",
            "größe",
            longest.as_str(),
        ] {
            assert_eq!(parse_name(good.as_bytes()), Ok(good));
        }
        for bad in ["", ".", "..", "a/b", "a\n", "\u{7f}", "a\u{85}b", "a\0"] {
            assert_eq!(
                parse_name(bad.as_bytes()),
                Err(BadValue::Invalid),
                "{bad:?}"
            );
        }
        assert_eq!(parse_name(b"\xc3"), Err(BadValue::Invalid));
        assert_eq!(parse_name(&[b'n'; NAME_MAX + 1]), Err(BadValue::Range));
        assert_eq!(without_newline(b"lab\n"), b"lab");
        assert_eq!(without_newline(b"lab\n\n"), b"lab\n");
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size(b"4096"), Ok(4096));
        assert_eq!(
            (parse_size(b"1k"), parse_size(b"1K")),
            (Ok(1 << 10), Ok(1 << 10))
        );
        assert_eq!(
            (parse_size(b"512M"), parse_size(b"2g")),
            (Ok(512 << 20), Ok(2 << 30))
        );
        assert_eq!(parse_size(b"16777215T"), Ok(((1 << 24) - 1) << 40));
        assert_eq!(parse_size(b"16777216t"), Err(BadValue::Range));
        for bad in [
            "", "M", "50%", "1.5G", "1 G", "1GB", "1G\n", "-1", "0x10", "1P",
        ] {
            assert_eq!(
                parse_size(bad.as_bytes()),
                Err(BadValue::Invalid),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn knobs_take_their_bounds_and_defaults() {
        let mut seen = HashSet::new();
        let host = KNOBS.iter().map(|knob| (knob, Knob::find(knob.name)));
        let vm = VM_KNOBS.iter().map(|knob| (knob, Knob::find_vm(knob.name)));
        for (i, (knob, found)) in host.chain(vm).enumerate() {
            let of_vm = i >= KNOBS.len();
            assert!(seen.insert((of_vm, knob.name)), "{} twice", knob.name);
            for value in [knob.min, knob.default, knob.max] {
                assert_eq!(knob.parse(std::format!("{value}\n").as_bytes()), Ok(value));
            }
            if let Some(below) = knob.min.checked_sub(1) {
                assert_eq!(
                    knob.parse(below.to_string().as_bytes()),
                    Err(BadValue::Range)
                );
            }
            if let Some(above) = knob.max.checked_add(1) {
                assert_eq!(
                    knob.parse(above.to_string().as_bytes()),
                    Err(BadValue::Range)
                );
            }
            assert_eq!(found, Some(knob));
        }
        assert_eq!(Knob::find("swap_dir"), None);
        assert_eq!(Knob::find_vm("run"), None);
    }

    #[test]
    fn refusals_in_words() {
        let shown = |bytes: &[u8]| Shown(bytes).to_string();
        assert_eq!(shown(b"1.5G\n"), "1.5G");
        assert_eq!(shown("größe".as_bytes()), "größe");
        assert_eq!(shown(b"a\nb\x1b[31m\n\n"), "a\\nb\\u{1b}[31m\\n");
        assert_eq!(shown(b"\xffa\xc3"), "\\xffa\\xc3");
        assert_eq!(shown(&[b'n'; 64]), "n".repeat(64));
        assert_eq!(shown(&[b'n'; 4000]), "n".repeat(64) + "...");
        let takes = |name: &str| Takes(name).to_string();
        assert_eq!(takes("run"), "a number from 0 to 2");
        assert_eq!(takes("shares"), "a number from 1 to 4294967295");
        assert_eq!(takes("share_scope"), "vm or domain or host");
        assert_eq!(takes("large_pages"), "never or always");
        for knob in KNOBS.iter().chain(VM_KNOBS) {
            assert!(takes(knob.name).starts_with("a number"), "{}", knob.name);
        }
    }

    proptest! {
        #[test]
        fn a_refusal_is_one_short_line(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let line = Shown(&bytes).to_string();
            prop_assert!(!line.contains(char::is_control), "{line:?}");
            prop_assert!(line.chars().count() <= 4 * bytes.len() + 16);
        }

        #[test]
        fn no_bytes_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..300), min: u64, max: u64) {
            if let Ok(value) = parse_u64(&bytes, min, max) {
                prop_assert!(min <= value && value <= max);
                let text = std::str::from_utf8(&bytes).unwrap();
                prop_assert_eq!(text.trim_end_matches('\n').parse(), Ok(value));
            }
            let _ = parse_size(&bytes);
            let _ = parse_word(&bytes, &ShareScope::WORDS);
            if let Ok(name) = parse_name(&bytes) {
                prop_assert_eq!(name.as_bytes(), &bytes[..]);
            }
        }

        #[test]
        fn numbers_read_as_std_does(text in "[0-9+ -]{0,22}") {
            let plain = !text.contains(['+', ' ', '-']);
            let parsed = parse_u64(text.as_bytes(), 0, u64::MAX);
            prop_assert_eq!(parsed.ok(), text.parse().ok().filter(|_| plain));
        }

        #[test]
        fn sizes_are_what_they_say(number in 0u64..1 << 24, suffix in prop::sample::select(&["", "k", "M", "g", "T"][..])) {
            let shift = match suffix { "" => 0, "k" => 10, "M" => 20, "g" => 30, _ => 40 };
            prop_assert_eq!(parse_size(std::format!("{number}{suffix}").as_bytes()), Ok(number << shift));
        }
    }
}
