// SPDX-License-Identifier: GPL-2.0

//! The options of a mount: what each takes, and what a remount may say.

use super::tunables::{parse_name, parse_size, BadValue, Knob, LargePages};
use core::ops::Deref;

/// The largest mode of a root.
const MODE_MAX: u32 = 0o777;

/// An option whose value is a text.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Text {
    /// `size=`
    Size,
    /// `domain=`
    Domain,
    /// `scan_pages_per_sec=`
    ScanPagesPerSec,
    /// `large_pages=`
    LargePages,
}

impl Text {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Text::Size => "size",
            Text::Domain => "domain",
            Text::ScanPagesPerSec => "scan_pages_per_sec",
            Text::LargePages => "large_pages",
        }
    }
}

/// What was asked for; `None` is not mentioned. `D` holds the bytes of a domain's name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Options<D> {
    /// Pages that all files may have together; 0 is no limit.
    pub size_pages: Option<u64>,
    /// Mode of the root.
    pub mode: Option<u16>,
    /// Its owner.
    pub uid: Option<u32>,
    /// Its group.
    pub gid: Option<u32>,
    /// The domain of all VMs.
    pub domain: Option<D>,
    /// Whether new VMs share.
    pub share: Option<bool>,
    /// Pace for new VMs.
    pub scan_pages_per_sec: Option<u64>,
    /// Whether new VMs get pages of 2 MiB.
    pub large_pages: Option<LargePages>,
}

impl<D> Default for Options<D> {
    fn default() -> Self {
        Options {
            size_pages: None,
            mode: None,
            uid: None,
            gid: None,
            domain: None,
            share: None,
            scan_pages_per_sec: None,
            large_pages: None,
        }
    }
}

impl<D: Deref<Target = [u8]>> Options<D> {
    /// Takes the text of an option; `own` makes a domain's name that stays.
    ///
    /// # Errors
    ///
    /// `Err(Some(why))` for a value that is not taken, `Err(None)` when `own` has no memory. Nothing
    /// has changed then.
    pub fn take(
        &mut self,
        option: Text,
        text: &[u8],
        page: u64,
        own: impl FnOnce(&str) -> Option<D>,
    ) -> Result<(), Option<BadValue>> {
        match option {
            Text::Size => self.size_pages = Some(parse_size(text)?.div_ceil(page)),
            Text::Domain => self.domain = Some(own(parse_name(text)?).ok_or(None)?),
            Text::ScanPagesPerSec => {
                let knob = Knob::find_vm(option.name()).ok_or(BadValue::Invalid)?;
                self.scan_pages_per_sec = Some(knob.parse(text)?);
            }
            Text::LargePages => self.large_pages = Some(LargePages::parse(text)?),
        }
        Ok(())
    }

    /// Takes a mode.
    ///
    /// # Errors
    ///
    /// `Range` for more than permissions. Nothing has changed then.
    pub fn take_mode(&mut self, mode: u32) -> Result<(), BadValue> {
        match u16::try_from(mode) {
            Ok(bits) if mode <= MODE_MAX => self.mode = Some(bits),
            _ => return Err(BadValue::Range),
        }
        Ok(())
    }

    /// What of it a remount cannot have, of a mount that stands like `now`: it may repeat what holds,
    /// and give another size.
    pub fn fixed<E: Deref<Target = [u8]>>(&self, now: &Options<E>) -> Option<Fixed> {
        fn other<T: PartialEq>(new: &Option<T>, now: &Option<T>) -> bool {
            new.is_some() && new != now
        }
        if other(&self.domain.as_deref(), &now.domain.as_deref()) {
            return Some(Fixed::Domain);
        }
        if other(&self.uid, &now.uid) || other(&self.gid, &now.gid) {
            return Some(Fixed::Owner);
        }
        if other(&self.mode, &now.mode) {
            return Some(Fixed::Mode);
        }
        let defaults = other(&self.share, &now.share)
            || other(&self.scan_pages_per_sec, &now.scan_pages_per_sec)
            || other(&self.large_pages, &now.large_pages);
        defaults.then_some(Fixed::Defaults)
    }
}

/// What a remount does not change.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fixed {
    /// The domain.
    Domain,
    /// Owner and group of the root.
    Owner,
    /// Its mode.
    Mode,
    /// What new VMs begin with.
    Defaults,
}

impl Fixed {
    /// Why not, in words.
    pub const fn why(self) -> &'static str {
        match self {
            Fixed::Domain => "domain= cannot change on remount: write vms/NAME/domain instead",
            Fixed::Owner => "uid= and gid= cannot change on remount: use chown",
            Fixed::Mode => "mode= cannot change on remount: use chmod",
            Fixed::Defaults => "defaults for VMs cannot change on remount: write vms/NAME/...",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunables::NAME_MAX;
    use proptest::prelude::*;

    const TEXTS: [Text; 4] = [
        Text::Size,
        Text::Domain,
        Text::ScanPagesPerSec,
        Text::LargePages,
    ];

    fn own(name: &str) -> Option<Vec<u8>> {
        Some(name.as_bytes().to_vec())
    }

    /// A value as a user may write it, nearly right most of the time.
    fn value() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            6 => "[0-9]{0,21}[kKmMgGtTpP%]?".prop_map(String::into_bytes),
            3 => "(never|always|Never|alway)[ \n]?".prop_map(String::into_bytes),
            3 => "\\PC{0,20}[./\n\u{0}]?".prop_map(String::into_bytes),
            1 => (250usize..260).prop_map(|len| vec![b'n'; len]),
            2 => prop::collection::vec(any::<u8>(), 0..40),
        ]
    }

    /// Bytes that a size says, read by other means.
    fn bytes_of(text: &str) -> Option<u64> {
        let end = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let power = match text[end..].to_ascii_lowercase().as_str() {
            "" => 0,
            "k" => 1,
            "m" => 2,
            "g" => 3,
            "t" => 4,
            _ => return None,
        };
        u64::try_from(
            text[..end]
                .parse::<u128>()
                .ok()?
                .checked_mul(1024u128.pow(power))?,
        )
        .ok()
    }

    fn standing() -> impl Strategy<Value = Options<Vec<u8>>> {
        fn few<T: Clone + std::fmt::Debug + 'static>(of: &[T]) -> impl Strategy<Value = Option<T>> {
            prop::option::of(prop::sample::select(of.to_vec()))
        }
        let root = (
            few(&[0o700u16, 0o755]),
            few(&[0u32, 64055]),
            few(&[0u32, 107]),
        );
        let vms = (few(&[true, false]), few(&[0u64, 900]));
        let large = few(&[LargePages::Never, LargePages::Always]);
        let domain = few(&[b"lab".to_vec(), b"la".to_vec()]);
        (root, vms, large, domain, few(&[0u64, 7])).prop_map(|(root, vms, large, domain, size)| {
            Options {
                size_pages: size,
                mode: root.0,
                uid: root.1,
                gid: root.2,
                domain,
                share: vms.0,
                scan_pages_per_sec: vms.1,
                large_pages: large,
            }
        })
    }

    #[test]
    fn a_size_is_rounded_up_to_pages() {
        let mut options = Options::<Vec<u8>>::default();
        for (text, pages) in [("0", 0), ("1", 1), ("4096", 1), ("4097", 2), ("2M", 512)] {
            assert_eq!(options.take(Text::Size, text.as_bytes(), 4096, own), Ok(()));
            assert_eq!(options.size_pages, Some(pages));
        }
        // The longest size is no overflow.
        let most = u64::MAX.to_string();
        assert_eq!(options.take(Text::Size, most.as_bytes(), 4096, own), Ok(()));
        assert_eq!(options.size_pages, Some(1 << 52));
    }

    #[test]
    fn without_memory_nothing_changes() {
        let mut options = Options::<Vec<u8>>::default();
        let taken = options.take(Text::Domain, b"lab", 4096, |_| None);
        assert_eq!((taken, options), (Err(None), Options::default()));
    }

    #[test]
    fn what_does_is_said() {
        for fixed in [Fixed::Domain, Fixed::Owner, Fixed::Mode, Fixed::Defaults] {
            let said = fixed.why();
            assert!(said.contains("cannot change on remount: "), "{said}");
        }
    }

    proptest! {
        /// What is taken is what another reader makes of it, and nothing else changes.
        #[test]
        fn each_option_is_refused_or_means_what_it_says(
            option in prop::sample::select(&TEXTS[..]),
            text in value(),
            mut before in standing(),
        ) {
            let mut options = before.clone();
            let taken = options.take(option, &text, 4096, own);
            let word = std::str::from_utf8(&text).ok();
            let known = match option {
                Text::Size => {
                    let pages = word.and_then(bytes_of).map(|bytes| bytes.div_ceil(4096));
                    before.size_pages = pages.or(before.size_pages);
                    pages.is_some()
                }
                Text::Domain => {
                    let name = word.filter(|name| {
                        let odd = |c: char| c.is_control() || c == '/';
                        let dots = *name == "." || *name == "..";
                        !name.is_empty() && name.len() <= NAME_MAX && !dots && !name.contains(odd)
                    });
                    before.domain = name.and_then(own).or(before.domain);
                    name.is_some()
                }
                Text::ScanPagesPerSec => {
                    let digits = word.map(|word| word.strip_suffix('\n').unwrap_or(word));
                    let digits = digits.filter(|word| word.bytes().all(|b| b.is_ascii_digit()));
                    let pages = digits.and_then(|word| word.parse().ok());
                    before.scan_pages_per_sec = pages.or(before.scan_pages_per_sec);
                    pages.is_some()
                }
                Text::LargePages => {
                    let large = match word {
                        Some("never" | "never\n") => Some(LargePages::Never),
                        Some("always" | "always\n") => Some(LargePages::Always),
                        _ => None,
                    };
                    before.large_pages = large.or(before.large_pages);
                    large.is_some()
                }
            };
            prop_assert_eq!(taken.is_ok(), known, "{:?} {:?}", option, String::from_utf8_lossy(&text));
            prop_assert_eq!(options, before);
        }

        #[test]
        fn a_mode_is_permissions_alone(mode in prop_oneof![0u32..0o2000, any::<u32>()]) {
            let mut options = Options::<Vec<u8>>::default();
            prop_assert_eq!(options.take_mode(mode).is_ok(), mode & !0o777 == 0);
            let kept = (mode & !0o777 == 0).then_some(mode);
            prop_assert_eq!(options.mode.map(u32::from), kept);
        }

        /// A remount may repeat what holds, all or a part of it, and give any size; each other value
        /// is refused, and by the name of what is other.
        #[test]
        fn a_remount_changes_the_size_alone(now in standing(), asked in standing(), keep in any::<u8>()) {
            let mut part = now.clone();
            let bit = |n: u32| keep & (1 << n) != 0;
            part.size_pages = asked.size_pages;
            part.domain = part.domain.filter(|_| bit(0));
            part.uid = part.uid.filter(|_| bit(1));
            part.gid = part.gid.filter(|_| bit(2));
            part.mode = part.mode.filter(|_| bit(3));
            part.share = part.share.filter(|_| bit(4));
            part.scan_pages_per_sec = part.scan_pages_per_sec.filter(|_| bit(5));
            part.large_pages = part.large_pages.filter(|_| bit(6));
            prop_assert_eq!(part.fixed(&now), None);

            let differs = [
                (asked.domain.is_some() && asked.domain != now.domain, Fixed::Domain),
                (asked.uid.is_some() && asked.uid != now.uid, Fixed::Owner),
                (asked.gid.is_some() && asked.gid != now.gid, Fixed::Owner),
                (asked.mode.is_some() && asked.mode != now.mode, Fixed::Mode),
                (asked.share.is_some() && asked.share != now.share, Fixed::Defaults),
                (
                    asked.scan_pages_per_sec.is_some()
                        && asked.scan_pages_per_sec != now.scan_pages_per_sec,
                    Fixed::Defaults,
                ),
                (asked.large_pages.is_some() && asked.large_pages != now.large_pages, Fixed::Defaults),
            ];
            let first = differs.iter().find(|(is_other, _)| *is_other).map(|(_, fixed)| *fixed);
            prop_assert_eq!(asked.fixed(&now), first);
        }
    }
}
