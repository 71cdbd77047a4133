// SPDX-License-Identifier: GPL-2.0

#[kernel::macros::kunit_tests(thinram_slots)]
mod tests {
    use crate::{
        logic::slot::{Class, State},
        sys::{
            page::{Frame, Purpose},
            slots::{Content, SlotWords, SLOTS},
            zs::Store,
        },
    };
    use kernel::prelude::*;

    fn frame() -> Result<Frame> {
        Frame::alloc(Purpose::Shared, -1).ok_or(ENOMEM)
    }

    #[test]
    fn slots_begin_empty() -> Result {
        let (words, _key) = SlotWords::new(Store::new()?)?;
        for index in 0..SLOTS {
            assert!(words.peek(index).state() == State::Empty);
        }
        // Beyond the end nothing is owned either.
        assert!(words.peek(SLOTS).state() == State::Empty);
        Ok(())
    }

    #[test]
    fn a_slot_hands_back_the_frame_it_owned() -> Result {
        let (words, mut key) = SlotWords::new(Store::new()?)?;
        let frame = frame()?;
        let pfn = frame.as_ref().pfn();
        assert!(matches!(
            words.replace(&mut key, 3, Content::Private(frame), 0),
            Content::Empty
        ));
        assert_eq!(words.page(&key, 3).map(|page| page.pfn()), Some(pfn));
        match words.replace(&mut key, 3, Content::Zero, 0) {
            Content::Private(back) => {
                assert_eq!(back.as_ref().pfn(), pfn);
                // The one reference is ours again.
                assert!(back.as_ref().freeze().is_some());
            }
            _ => assert!(false),
        }
        Ok(())
    }

    #[test]
    fn dropped_slots_put_their_frames() -> Result {
        let (words, mut key) = SlotWords::new(Store::new()?)?;
        let frame = frame()?;
        let kept = frame.as_ref().get();
        drop(words.replace(&mut key, 511, Content::Private(frame), 0));
        assert!(kept.as_ref().freeze().is_none());
        drop(words);
        assert!(kept.as_ref().freeze().is_some());
        Ok(())
    }

    #[test]
    fn notes_change_no_owner() -> Result {
        let (words, mut key) = SlotWords::new(Store::new()?)?;
        drop(words.replace(&mut key, 0, Content::Private(frame()?), 1));
        let slot = words.peek(0);
        assert_eq!(slot.backoff(), 1);
        words.note(
            &mut key,
            0,
            slot.looked_at(Class::Unshared, 9).with_stable(true),
        );
        assert!(words.peek(0).is_stable());
        assert!(words.clear_stable(0));
        assert!(!words.clear_stable(0));
        assert_eq!(words.peek(0).tag(), 9);
        // A note of another owner's slot is refused.
        let foreign = crate::logic::slot::Slot::private(slot.payload() ^ 1);
        words.note(&mut key, 0, foreign);
        assert_eq!(words.peek(0).payload(), slot.payload());
        Ok(())
    }
}
