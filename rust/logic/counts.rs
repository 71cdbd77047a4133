// SPDX-License-Identifier: GPL-2.0

//! How many of a VM's pages are in which state.

/// Kinds of state. A busy page counts as what it was.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Class {
    /// Never written, or given back.
    Empty,
    /// All zero, without memory.
    Zero,
    /// A frame of its own.
    Private,
    /// A sharer of a shared record, in any form.
    Shared,
    /// Part of a 2 MiB page.
    Huge,
    /// In the VM's pool.
    Compressed,
    /// In the VM's swap file.
    Swapped,
}

/// Number of classes.
pub const CLASSES: usize = 7;

impl Class {
    /// Every class, in the order of [`Counts::pages`].
    pub const ALL: [Class; CLASSES] = [
        Class::Empty,
        Class::Zero,
        Class::Private,
        Class::Shared,
        Class::Huge,
        Class::Compressed,
        Class::Swapped,
    ];

    const fn index(self) -> usize {
        self as usize
    }
}

/// A move that the counts do not allow; nothing was changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BadMove {
    /// The class that has too few pages, or too many.
    pub class: Class,
    /// Pages in it.
    pub has: u64,
    /// Pages that were to leave it, or to come.
    pub asked: u64,
}

/// Pages of a VM by class. Their sum is its size, always.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// Pages by class, in the order of [`Class::ALL`].
    pub pages: [u64; CLASSES],
}

impl Counts {
    /// No pages.
    pub const fn new() -> Self {
        Counts {
            pages: [0; CLASSES],
        }
    }

    /// Pages of one class.
    #[inline]
    pub fn get(&self, class: Class) -> u64 {
        self.pages.get(class.index()).copied().unwrap_or(0)
    }

    fn set(&mut self, class: Class, n: u64) {
        if let Some(pages) = self.pages.get_mut(class.index()) {
            *pages = n;
        }
    }

    fn more(&self, class: Class, n: u64) -> Result<u64, BadMove> {
        let has = self.get(class);
        has.checked_add(n).ok_or(BadMove {
            class,
            has,
            asked: n,
        })
    }

    fn less(&self, class: Class, n: u64) -> Result<u64, BadMove> {
        let has = self.get(class);
        has.checked_sub(n).ok_or(BadMove {
            class,
            has,
            asked: n,
        })
    }

    /// The VM grew by `n` pages.
    ///
    /// # Errors
    ///
    /// [`BadMove`] when that is more than can be counted.
    pub fn add_empty(&mut self, n: u64) -> Result<(), BadMove> {
        let pages = self.more(Class::Empty, n)?;
        self.set(Class::Empty, pages);
        Ok(())
    }

    /// The VM shrank by `n` pages, which were emptied before.
    ///
    /// # Errors
    ///
    /// [`BadMove`] when fewer are empty.
    pub fn remove_empty(&mut self, n: u64) -> Result<(), BadMove> {
        let pages = self.less(Class::Empty, n)?;
        self.set(Class::Empty, pages);
        Ok(())
    }

    /// `n` pages went from one state to another.
    ///
    /// # Errors
    ///
    /// [`BadMove`] when fewer are in `from`.
    pub fn transition(&mut self, from: Class, to: Class, n: u64) -> Result<(), BadMove> {
        let left = self.less(from, n)?;
        if from == to {
            return Ok(());
        }
        let come = self.more(to, n)?;
        self.set(from, left);
        self.set(to, come);
        Ok(())
    }

    /// The counts of another VM on top of these, for sums over VMs.
    pub fn add(&mut self, other: &Counts) {
        for (pages, more) in self.pages.iter_mut().zip(other.pages) {
            *pages = pages.saturating_add(more);
        }
    }

    /// All pages.
    pub fn total(&self) -> u64 {
        self.pages.iter().fold(0, |sum, &n| sum.saturating_add(n))
    }

    /// Pages of one class in KiB.
    pub fn kb(&self, class: Class) -> u64 {
        pages_to_kb(self.get(class))
    }

    /// Size of the VM in KiB.
    pub fn size_kb(&self) -> u64 {
        pages_to_kb(self.total())
    }

    /// Memory that the VM itself holds, in KiB: its own frames and its pool of compressed pages.
    pub fn resident_kb(&self, pool_kb: u64) -> u64 {
        self.private_kb()
            .saturating_add(self.huge_kb())
            .saturating_add(pool_kb)
    }

    /// KiB never written or given back.
    pub fn empty_kb(&self) -> u64 {
        self.kb(Class::Empty)
    }

    /// KiB of zeroes.
    pub fn zero_kb(&self) -> u64 {
        self.kb(Class::Zero)
    }

    /// KiB in frames of the VM's own.
    pub fn private_kb(&self) -> u64 {
        self.kb(Class::Private)
    }

    /// KiB that are shared, in any form.
    pub fn shared_kb(&self) -> u64 {
        self.kb(Class::Shared)
    }

    /// KiB in 2 MiB pages.
    pub fn huge_kb(&self) -> u64 {
        self.kb(Class::Huge)
    }

    /// KiB that were compressed, before compression.
    pub fn compressed_kb(&self) -> u64 {
        self.kb(Class::Compressed)
    }

    /// KiB in the swap file, before compression.
    pub fn swapped_kb(&self) -> u64 {
        self.kb(Class::Swapped)
    }
}

/// KiB of so many 4 KiB pages.
pub const fn pages_to_kb(pages: u64) -> u64 {
    pages.saturating_mul(4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn class() -> impl Strategy<Value = Class> {
        prop::sample::select(&Class::ALL[..])
    }

    #[test]
    fn figures_are_in_kib() {
        let counts = Counts {
            pages: [1, 2, 3, 4, 5, 6, 7],
        };
        assert_eq!(
            (counts.empty_kb(), counts.zero_kb(), counts.private_kb()),
            (4, 8, 12)
        );
        assert_eq!((counts.shared_kb(), counts.huge_kb()), (16, 20));
        assert_eq!((counts.compressed_kb(), counts.swapped_kb()), (24, 28));
        assert_eq!(
            (counts.size_kb(), counts.resident_kb(9)),
            (112, 12 + 20 + 9)
        );
        let huge = Counts {
            pages: [u64::MAX; CLASSES],
        };
        assert_eq!(
            (huge.total(), huge.size_kb(), huge.resident_kb(1)),
            (u64::MAX, u64::MAX, u64::MAX)
        );
    }

    #[test]
    fn a_move_that_is_not_possible_says_why() {
        let mut counts = Counts::new();
        counts.add_empty(3).unwrap();
        let refused = BadMove {
            class: Class::Empty,
            has: 3,
            asked: 4,
        };
        assert_eq!(
            counts.transition(Class::Empty, Class::Zero, 4),
            Err(refused)
        );
        assert_eq!(counts.remove_empty(4), Err(refused));
        counts.pages[Class::Zero as usize] = u64::MAX;
        let refused = BadMove {
            class: Class::Zero,
            has: u64::MAX,
            asked: 1,
        };
        assert_eq!(
            counts.transition(Class::Empty, Class::Zero, 1),
            Err(refused)
        );
        assert_eq!(counts.get(Class::Empty), 3);
    }

    proptest! {
        #[test]
        fn pages_are_neither_lost_nor_made(
            size in 0u64..1000,
            moves in prop::collection::vec((class(), class(), 0u64..300), 0..200),
        ) {
            let mut counts = Counts::new();
            counts.add_empty(size).unwrap();
            for (from, to, n) in moves {
                let before = counts;
                let moved = counts.transition(from, to, n);
                prop_assert_eq!(moved.is_ok(), before.get(from) >= n);
                for class in Class::ALL {
                    let mut expected = before.get(class);
                    if moved.is_ok() && class == from {
                        expected -= n;
                    }
                    if moved.is_ok() && class == to {
                        expected += n;
                    }
                    prop_assert_eq!(counts.get(class), expected);
                }
                prop_assert_eq!(counts.total(), size);
                let parts = Class::ALL.iter().map(|&class| counts.kb(class)).sum::<u64>();
                prop_assert_eq!(parts, counts.size_kb());
            }
            let mut twice = counts;
            twice.add(&counts);
            prop_assert_eq!(twice.total(), 2 * size);
            let empty = counts.get(Class::Empty);
            prop_assert!(counts.remove_empty(empty).is_ok());
            prop_assert_eq!(counts.total(), size - empty);
        }
    }
}
