// SPDX-License-Identifier: GPL-2.0

/// Declares a struct of figures that may be absent, and its access by sysfs name.
macro_rules! figures {
    ($(#[$outer:meta])* pub struct $name:ident { $($(#[$inner:meta])* $field:ident),+ $(,)? }) => {
        $(#[$outer])*
        #[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
        pub struct $name {
            $($(#[$inner])* #[serde(skip_serializing_if = "Option::is_none")] pub $field: Option<u64>,)+
        }

        impl $name {
            /// The sysfs names, in the order in which they are shown.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($field)),+];

            /// The figure of that name, `None` for one that is absent or unknown.
            pub fn get(&self, name: &str) -> Option<u64> {
                match name {
                    $(stringify!($field) => self.$field,)+
                    _ => None,
                }
            }

            /// Sets the figure of that name; `false` says that the name is unknown.
            pub fn set(&mut self, name: &str, value: u64) -> bool {
                match name {
                    $(stringify!($field) => self.$field = Some(value),)+
                    _ => return false,
                }
                true
            }
        }
    };
}
pub(crate) use figures;
