// SPDX-License-Identifier: GPL-2.0

#[kernel::macros::kunit_tests(thinram_index)]
mod tests {
    use crate::{
        engine::{
            host::Host,
            region::Registry,
            shared::{Before, Candidate, Key, SharedIndex, CANDIDATES},
            vm::Scope,
        },
        sys::{
            frames::NotPacked,
            packed::Packed,
            page::{Frame, Purpose},
            zs::{Scratch, Store},
        },
    };
    use kernel::prelude::*;

    fn key(hash: u64) -> Key {
        Key {
            hash,
            scope: Scope::of_domain(4),
        }
    }

    fn published(
        index: &SharedIndex,
        registry: &Registry,
        hash: u64,
    ) -> Result<(crate::sys::slots::Sharer, crate::sys::slots::Sharer)> {
        let frame = Frame::alloc(Purpose::Shared, -1).ok_or(ENOMEM)?;
        index
            .publish(key(hash), frame, 0, registry)
            .map_err(|_| ENOSPC)
    }

    fn first(index: &SharedIndex, key: Key) -> Option<Candidate> {
        let mut found = [None; CANDIDATES];
        index.find(key, u32::MAX, &mut found);
        found[0]
    }

    #[test]
    fn without_memory_nothing_is_promised() -> Result {
        let registry = KBox::pin_init(Registry::new(), GFP_KERNEL)?;
        let index = KBox::pin_init(SharedIndex::new(), GFP_KERNEL)?;
        assert!(!index.has_room());
        assert!(!index.hint(1, 2, &registry));
        assert!(published(&index, &registry, 1).is_err());
        assert_eq!(index.figures().bytes, 0);
        Ok(())
    }

    #[test]
    fn a_published_frame_is_found_in_its_scope_only() -> Result {
        let registry = KBox::pin_init(Registry::new(), GFP_KERNEL)?;
        let index = KBox::pin_init(SharedIndex::new(), GFP_KERNEL)?;
        index.maintain(&registry, 100)?;
        let (one, two) = published(&index, &registry, 0x1234_5678)?;
        assert!(matches!(
            first(&index, key(0x1234_5678)),
            Some(Candidate::Record(_))
        ));
        let elsewhere = Key {
            hash: 0x1234_5678,
            scope: Scope::of_domain(5),
        };
        assert!(first(&index, elsewhere).is_none());
        assert_eq!(index.figures().pages_shared, 1);
        assert_eq!(index.figures().pages_sharing, 1);
        assert!(index.leave(one).is_none());
        assert!(index.leave(two).is_some());
        assert!(first(&index, key(0x1234_5678)).is_none());
        assert_eq!(index.figures().pages_shared, 0);
        Ok(())
    }

    #[test]
    fn a_full_record_takes_no_more_sharers() -> Result {
        let registry = KBox::pin_init(Registry::new(), GFP_KERNEL)?;
        let index = KBox::pin_init(SharedIndex::new(), GFP_KERNEL)?;
        index.maintain(&registry, 100)?;
        let (one, two) = published(&index, &registry, 99)?;
        let id = one.record();
        assert!(index.join(id, 2).is_none());
        match index.join(id, 3) {
            Some((three, frame)) => {
                assert_eq!(index.figures().pages_sharing, 2);
                drop(frame);
                drop(index.leave(three));
            }
            None => assert!(false),
        }
        drop(index.leave(one));
        // The last one to leave gets the frame.
        assert!(index.leave(two).is_some());
        Ok(())
    }

    #[test]
    fn a_packed_record_is_found_and_comes_back_for_all() -> Result {
        let registry = KBox::pin_init(Registry::new(), GFP_KERNEL)?;
        let index = KBox::pin_init(SharedIndex::new(), GFP_KERNEL)?;
        index.maintain(&registry, 100)?;
        let mut content = Frame::alloc(Purpose::Shared, -1).ok_or(ENOMEM)?;
        content.fill(0xabad_cafe);
        let mut copy = Frame::alloc(Purpose::Shared, -1).ok_or(ENOMEM)?;
        copy.fill(0xabad_cafe);
        let (one, two) = (index.publish(key(7), content, 0, &registry)).map_err(|_| ENOSPC)?;
        let id = one.record();
        // The first look takes a note, the second finds it idle still.
        let mut from = 0;
        assert!(index.next_idle(&mut from, 9).is_none());
        assert_eq!(from, u32::MAX);
        from = 0;
        let (found, frame, label) = index.next_idle(&mut from, 9).ok_or(ENOENT)?;
        assert_eq!(found, id);
        let store = Store::new()?;
        let packed = Packed::filled(label, 0, &store, 0xabad_cafe).map_err(|_| ENOMEM)?;
        let reader = frame.as_ref().get();
        assert!(index.pack(id, frame, packed) == Err(NotPacked::Held));
        let packed = Packed::filled(label, 0, &store, 0xabad_cafe).map_err(|_| ENOMEM)?;
        assert!(index.pack(id, reader, packed).is_ok());
        let figures = index.figures();
        assert_eq!((figures.pages_shared, figures.packed), (1, 1));
        assert!(matches!(
            first(&index, key(7)),
            Some(Candidate::Record(record)) if record == id
        ));
        let mut scratch = Scratch::new().ok_or(ENOMEM)?;
        let mut to = Frame::alloc(Purpose::Shared, -1).ok_or(ENOMEM)?;
        let host = Host::new()?;
        assert!(index.copy(id, &mut to, &mut scratch, host.away()).is_ok());
        assert!(to.as_ref().same_content(copy.as_ref()));
        to.clear();
        let back = index.bring_back(id, to, &mut scratch, host.away());
        let (back, before) = back.map_err(|_| EIO)?;
        assert!(before == Before::Packed);
        assert!(back.as_ref().same_content(copy.as_ref()));
        assert!(back.as_ref().label() == label);
        assert_eq!(index.figures().packed, 0);
        drop(back);
        drop(index.leave(one));
        assert!(index.leave(two).is_some());
        Ok(())
    }
}
