// SPDX-License-Identifier: GPL-2.0

#[kernel::macros::kunit_tests(thinram_frames)]
mod tests {
    use crate::sys::{
        hash::{self, Seed},
        page::{Frame, Label, Purpose},
    };
    use kernel::prelude::*;

    fn frame(zeroed: bool) -> Result<Frame> {
        let purpose = if zeroed {
            Purpose::GuestZeroed
        } else {
            Purpose::Shared
        };
        let mut frame = Frame::alloc(purpose, -1).ok_or(ENOMEM)?;
        if zeroed {
            frame.clear();
        }
        Ok(frame)
    }

    #[test]
    fn a_frame_that_only_we_hold_freezes() -> Result {
        let frame = frame(true)?;
        assert!(frame.as_ref().freeze().is_some());
        // The thaw gives the reference back, so it works again.
        assert!(frame.as_ref().freeze().is_some());
        Ok(())
    }

    #[test]
    fn a_frame_that_a_reader_holds_does_not_freeze() -> Result {
        let frame = frame(true)?;
        let reader = frame.as_ref().get();
        assert!(frame.as_ref().freeze().is_none());
        drop(reader);
        assert!(frame.as_ref().freeze().is_some());
        Ok(())
    }

    #[test]
    fn a_pin_shows_in_the_count() -> Result {
        let frame = frame(true)?;
        assert!(frame.as_ref().is_unpinned());
        let pin = frame.as_ref().get();
        assert!(!frame.as_ref().is_unpinned());
        drop(pin);
        Ok(())
    }

    #[test]
    fn zero_pages_are_told_from_others() -> Result {
        let zero = frame(true)?;
        let mut other = frame(true)?;
        let frozen = zero.as_ref().freeze().ok_or(EBUSY)?;
        assert!(frozen.is_zero());
        assert!(frozen.equals(other.as_ref()));
        drop(frozen);
        // The hash changes the last word of a page that is not zero any more.
        other.fill_for_test(4095, 1);
        let frozen = other.as_ref().freeze().ok_or(EBUSY)?;
        assert!(!frozen.is_zero());
        assert!(!frozen.equals(zero.as_ref()));
        Ok(())
    }

    #[test]
    fn hashes_depend_on_content_and_scope() -> Result {
        let mut one = frame(true)?;
        let two = frame(true)?;
        let seed = Seed::new(1, 2);
        assert_eq!(
            hash::of_page(one.as_ref(), seed),
            hash::of_page(two.as_ref(), seed)
        );
        assert!(hash::of_page(one.as_ref(), seed) != hash::of_page(one.as_ref(), Seed::new(1, 3)));
        one.fill_for_test(0, 7);
        assert!(hash::of_page(one.as_ref(), seed) != hash::of_page(two.as_ref(), seed));
        Ok(())
    }

    #[test]
    fn a_copy_has_the_same_bytes() -> Result {
        let mut from = frame(true)?;
        from.fill_for_test(17, 0xa5);
        let mut to = frame(true)?;
        assert!(to.copy_from(from.as_ref()).is_ok());
        assert!(to.as_ref().same_content(from.as_ref()));
        Ok(())
    }

    #[test]
    fn zeroing_keeps_to_its_range() -> Result {
        let mut page = frame(true)?;
        page.fill_for_test(9, 1);
        page.fill_for_test(10, 1);
        page.as_ref().zero_range(10, 4096);
        page.as_ref().zero_range(5000, 6000);
        assert!(!page.as_ref().is_zero());
        page.as_ref().zero_range(9, 10);
        assert!(page.as_ref().is_zero());
        Ok(())
    }

    #[test]
    fn a_label_stays_with_its_frame() -> Result {
        let mut page = frame(true)?;
        let label = Label {
            hash: u64::MAX - 5,
            scope: 77,
        };
        page.set_label(label);
        assert!(page.as_ref().label() == label);
        Ok(())
    }
}
