// SPDX-License-Identifier: GPL-2.0

//! Sizes and percentages, as people write them and as they are shown.
//!
//! Everything inside the program is whole KiB; units are 1024-based.

use thiserror::Error;

/// Largest size accepted, in KiB: its bytes still fit in 64 bits.
pub const MAX_KB: u64 = u64::MAX / 1024;

/// The forms of a size, for messages and help texts.
pub const SIZE_FORMS: &str = "4096 (KiB), 512K, 512M, 1.5G, 2GiB, 1T";

const SUFFIXES: [char; 5] = ['K', 'M', 'G', 'T', 'P'];
const MAX_FRACTION_DIGITS: usize = 9;

/// Why a text is no size or percentage.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum UnitError {
    /// Not of any accepted form.
    #[error("`{0}` is no size: write it like {SIZE_FORMS}")]
    Size(String),
    /// More than [`MAX_KB`].
    #[error("`{0}` is too large: at most {MAX_KB} KiB; write it like {SIZE_FORMS}")]
    Overflow(String),
    /// Neither `50` nor `50%`.
    #[error("`{0}` is no percentage: write it like 50 or 50%")]
    Percent(String),
    /// Not a plain whole number.
    #[error("`{0}` is no whole number: write it like 0, 200 or 65536")]
    Number(String),
}

/// Parses digits only: no sign, no separators, no spaces.
pub fn parse_number(text: &str) -> Result<u64, UnitError> {
    let bad = || UnitError::Number(text.to_owned());
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    text.parse().map_err(|_| bad())
}

/// Parses `50` or `50%` to 50. The range is the knob's matter.
pub fn parse_percent(text: &str) -> Result<u64, UnitError> {
    let digits = text.strip_suffix('%').map_or(text, str::trim_end);
    parse_number(digits).map_err(|_| UnitError::Percent(text.to_owned()))
}

/// Parses a size to KiB.
///
/// A plain number is KiB. `K`, `M`, `G`, `T` and `P`, also as `KB` or `KiB`, in either case, are
/// powers of 1024. A fraction needs a unit of MiB or more and is rounded down to whole KiB.
pub fn parse_kb(text: &str) -> Result<u64, UnitError> {
    let bad = || UnitError::Size(text.to_owned());
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let power = unit_power(unit.trim_start()).ok_or_else(bad)?;
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (number, None),
    };
    if whole.is_empty() || !whole.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let overflow = || UnitError::Overflow(text.to_owned());
    let scale = 1u128 << (10 * power);
    let whole: u128 = whole.parse().map_err(|_| overflow())?;
    let mut kb = whole.checked_mul(scale).ok_or_else(overflow)?;
    if let Some(fraction) = fraction {
        let digits = fraction.len();
        if power == 0 || digits == 0 || digits > MAX_FRACTION_DIGITS {
            return Err(bad());
        }
        let part: u128 = fraction.parse().map_err(|_| bad())?;
        let tens = 10u128.pow(u32::try_from(digits).map_err(|_| bad())?);
        kb = kb.checked_add(part * scale / tens).ok_or_else(overflow)?;
    }
    u64::try_from(kb)
        .ok()
        .filter(|kb| *kb <= MAX_KB)
        .ok_or_else(overflow)
}

/// Power of 1024 above KiB that a suffix stands for.
fn unit_power(unit: &str) -> Option<u32> {
    let mut chars = unit.chars();
    let Some(first) = chars.next() else {
        return Some(0);
    };
    let rest = chars.as_str();
    if !(rest.is_empty() || rest.eq_ignore_ascii_case("b") || rest.eq_ignore_ascii_case("ib")) {
        return None;
    }
    let at = SUFFIXES
        .iter()
        .position(|s| *s == first.to_ascii_uppercase())?;
    u32::try_from(at).ok()
}

/// A size for tables, at most six characters and rounded to the nearest: `512K`, `1.5M`, `37.2G`.
pub fn short_kb(kb: u64) -> String {
    let (text, suffix) = rounded(kb);
    format!("{text}{suffix}")
}

/// A size for sentences, rounded like [`short_kb`]: `1.5 MiB`.
pub fn long_kb(kb: u64) -> String {
    let (text, suffix) = rounded(kb);
    format!("{text} {suffix}iB")
}

/// A signed number of bytes for sentences: `-1.5 MiB`, `300 B`.
pub fn long_bytes(bytes: i64) -> String {
    let sign = if bytes < 0 { "-" } else { "" };
    let size = bytes.unsigned_abs();
    if size < 1024 {
        format!("{sign}{size} B")
    } else {
        format!("{sign}{}", long_kb(size / 1024))
    }
}

/// A size that [`parse_kb`] reads back to the same number: `512M`, `2G`, `4100K`.
pub fn exact_kb(kb: u64) -> String {
    let mut value = kb;
    let mut at = 0;
    while value != 0 && value % 1024 == 0 && at + 1 < SUFFIXES.len() {
        value /= 1024;
        at += 1;
    }
    format!("{value}{}", SUFFIXES[at])
}

fn rounded(kb: u64) -> (String, char) {
    let mut divisor = 1u128;
    for (at, suffix) in SUFFIXES.into_iter().enumerate() {
        let last = at + 1 == SUFFIXES.len();
        let kb = u128::from(kb);
        let whole = (kb + divisor / 2) / divisor;
        if at == 0 && whole < 1024 {
            return (whole.to_string(), suffix);
        }
        let tenths = (kb * 10 + divisor / 2) / divisor;
        if at > 0 && tenths < 1000 {
            return (format!("{}.{}", tenths / 10, tenths % 10), suffix);
        }
        if whole < 1024 || last {
            return (whole.to_string(), suffix);
        }
        divisor *= 1024;
    }
    unreachable!("the last suffix takes every size")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_people_write() {
        for (text, kb) in [
            ("0", 0),
            ("4096", 4096),
            ("2G", 2 << 20),
            ("2g", 2 << 20),
            ("512M", 512 << 10),
            ("1.5G", 3 << 19),
            ("1.5 gib", 3 << 19),
            ("512 MiB", 512 << 10),
            ("512mb", 512 << 10),
            ("7KiB", 7),
            ("1T", 1 << 30),
            ("1p", 1 << 40),
            ("0.1M", 102),
        ] {
            assert_eq!(parse_kb(text), Ok(kb), "{text}");
        }
    }

    #[test]
    fn junk_is_refused_by_name() {
        for text in [
            "",
            " ",
            "G",
            "-1",
            "+1",
            "1.5",
            "1.5K",
            "1.G",
            ".5G",
            "1..5G",
            "1.5.2G",
            "1,5G",
            "2Q",
            "2GG",
            "2Gi",
            "0x10",
            "1e3",
            "2G ",
            " 2G",
            "\u{0661}G",
            "nan",
            "1.0000000001G",
        ] {
            assert_eq!(
                parse_kb(text),
                Err(UnitError::Size(text.to_owned())),
                "{text}"
            );
        }
        let said = UnitError::Size("2Q".into()).to_string();
        assert!(said.contains("`2Q`") && said.contains("1.5G"), "{said}");
    }

    #[test]
    fn overflow_is_refused() {
        for text in [
            "18014398509481984",
            "16384P",
            "99999999999999999999999999999999999999999G",
        ] {
            assert_eq!(
                parse_kb(text),
                Err(UnitError::Overflow(text.to_owned())),
                "{text}"
            );
        }
        assert_eq!(parse_kb("18014398509481983"), Ok(MAX_KB));
    }

    #[test]
    fn percentages() {
        assert_eq!(parse_percent("50%"), Ok(50));
        assert_eq!(parse_percent("50 %"), Ok(50));
        assert_eq!(parse_percent("7"), Ok(7));
        for text in ["", "%", "5%%", "-5", "5.5%", "half"] {
            assert_eq!(
                parse_percent(text),
                Err(UnitError::Percent(text.to_owned())),
                "{text}"
            );
        }
    }

    #[test]
    fn shown_sizes() {
        for (kb, short) in [
            (0, "0K"),
            (1023, "1023K"),
            (1024, "1.0M"),
            (1536, "1.5M"),
            (102_348, "99.9M"),
            (102_349, "100M"),
            (1_048_063, "1023M"),
            (1_048_064, "1.0G"),
            (2 << 20, "2.0G"),
            (u64::MAX, "16777216P"),
        ] {
            assert_eq!(short_kb(kb), short, "{kb}");
        }
        assert_eq!(long_kb(1536), "1.5 MiB");
        assert_eq!(long_bytes(-2048), "-2 KiB");
        assert_eq!(long_bytes(300), "300 B");
        assert_eq!(long_bytes(i64::MIN), "-8192 PiB");
    }

    proptest! {
        #[test]
        fn exact_sizes_round_trip(kb in prop_oneof![0..=MAX_KB, 0..1u64 << 24]) {
            prop_assert_eq!(parse_kb(&exact_kb(kb)), Ok(kb));
            prop_assert_eq!(parse_kb(&kb.to_string()), Ok(kb));
        }

        #[test]
        fn suffix_is_a_multiplication(n in any::<u64>(), at in 0usize..5) {
            let want = u128::from(n) << (10 * at);
            let got = parse_kb(&format!("{n}{}", SUFFIXES[at]));
            match got {
                Ok(kb) => prop_assert_eq!(u128::from(kb), want),
                Err(error) => {
                    prop_assert!(matches!(error, UnitError::Overflow(_)));
                    prop_assert!(want > u128::from(MAX_KB));
                }
            }
        }

        #[test]
        fn short_sizes_are_near(kb in 0..=MAX_KB / 2) {
            let short = short_kb(kb);
            prop_assert!(short.len() <= 6, "{}", short);
            let back = parse_kb(&short).unwrap();
            prop_assert!(back.abs_diff(kb) <= kb / 20 + 1, "{} {} {}", kb, short, back);
        }

        #[test]
        fn no_text_panics(text in any::<String>()) {
            let _ = parse_kb(&text);
            let _ = parse_percent(&text);
            let _ = parse_number(&text);
        }
    }
}
