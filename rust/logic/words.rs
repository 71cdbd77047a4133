// SPDX-License-Identifier: GPL-2.0

//! Enums that users read and write as words.

/// An enum whose values are written as words. Each has an index, its place in `ALL` and `WORDS`.
macro_rules! words {
    (
        $(#[$of_type:meta])*
        pub enum $name:ident { $($(#[$of_value:meta])* $value:ident = $word:literal,)* }
    ) => {
        $(#[$of_type])*
        pub enum $name { $($(#[$of_value])* $value,)* }

        impl $name {
            /// All values.
            pub const ALL: [$name; [$($word),*].len()] = [$($name::$value),*];
            /// Their words, in the same order.
            pub const WORDS: [&'static str; Self::ALL.len()] = [$($word),*];

            /// The value of an index.
            pub fn from_index(index: usize) -> Option<Self> {
                Self::ALL.get(index).copied()
            }

            /// Its index.
            pub const fn index(self) -> usize {
                self as usize
            }

            /// Its word.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $($name::$value => $word,)*
                }
            }

            /// The value of a word, with at most one newline after it.
            ///
            /// # Errors
            ///
            /// `Invalid` when it is none of the words.
            pub fn parse(
                bytes: &[u8],
            ) -> Result<Self, $crate::logic::tunables::BadValue> {
                let index = $crate::logic::tunables::parse_word(bytes, &Self::WORDS)?;
                Self::from_index(index).ok_or($crate::logic::tunables::BadValue::Invalid)
            }
        }
    };
}
