pub const CASES: &[crate::harness::Case] = &[];
