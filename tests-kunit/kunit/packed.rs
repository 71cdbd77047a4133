// SPDX-License-Identifier: GPL-2.0

#[kernel::macros::kunit_tests(thinram_packed)]
mod tests {
    use crate::sys::{
        packed::Packed,
        page::{Frame, Label, Purpose},
        zs::{Compressor, NoRoom, Scratch, Store},
    };
    use kernel::{page::PAGE_SIZE, prelude::*};

    const LABEL: Label = Label { hash: 5, scope: 6 };

    /// A page of which `words` words of four bytes differ from the others and from each other.
    fn frame(words: usize) -> Result<Frame> {
        let mut frame = Frame::alloc(Purpose::Shared, -1).ok_or(ENOMEM)?;
        frame.clear();
        for word in 0..words {
            let noise = (word as u32 + 1).wrapping_mul(0x9e37_79b9);
            for (place, byte) in noise.to_le_bytes().into_iter().enumerate() {
                frame.fill_for_test(word * 4 + place, byte);
            }
        }
        Ok(frame)
    }

    #[test]
    fn a_page_comes_back_as_it_was() -> Result {
        let mut compressor = Compressor::new()?;
        let mut scratch = Scratch::new().ok_or(ENOMEM)?;
        let store = Store::new()?;
        store.open()?;
        let mut kept = KVec::new();
        // Objects of many sizes, so that some lie in two pages of the pool.
        for words in (1..500).step_by(3) {
            let page = frame(words)?;
            let bytes = compressor
                .compress(page.as_ref(), PAGE_SIZE)
                .ok_or(EINVAL)?;
            assert!(bytes.len() < PAGE_SIZE);
            let packed = Packed::compressed(LABEL, 0, &store, bytes, u64::MAX);
            kept.push((page, packed.map_err(|_| ENOMEM)?), GFP_KERNEL)?;
        }
        assert_eq!(store.objects(), kept.len() as u64);
        assert!(store.pages() > 0);
        for (page, packed) in kept.iter() {
            let mut to = frame(3)?;
            assert!(packed.copy_to(&mut to, &mut scratch).is_ok());
            assert!(to.as_ref().same_content(page.as_ref()));
            assert!(packed.label() == LABEL);
        }
        drop(kept);
        assert_eq!(store.objects(), 0);
        Ok(())
    }

    #[test]
    fn what_does_not_get_small_is_refused() -> Result {
        let mut compressor = Compressor::new()?;
        let page = frame(PAGE_SIZE / 4)?;
        assert!(compressor.compress(page.as_ref(), PAGE_SIZE / 2).is_none());
        // It works on others afterwards.
        let page = frame(1)?;
        assert!(compressor.compress(page.as_ref(), PAGE_SIZE / 2).is_some());
        Ok(())
    }

    #[test]
    fn a_full_store_takes_nothing() -> Result {
        let store = Store::new()?;
        // Without a pool there is no room; with one, as much as is asked for.
        let put = |max| Packed::compressed(LABEL, 0, &store, &[7; 100], max);
        assert!(matches!(put(9), Err(NoRoom::Memory)));
        store.open()?;
        assert!(matches!(put(0), Err(NoRoom::Full)));
        assert_eq!((store.objects(), store.pages()), (0, 0));
        assert!(put(9).is_ok());
        assert_eq!((store.objects(), store.pages()), (0, 0));
        Ok(())
    }

    #[test]
    fn what_is_not_lz4_is_told() -> Result {
        let store = Store::new()?;
        store.open()?;
        let mut scratch = Scratch::new().ok_or(ENOMEM)?;
        let mut to = frame(0)?;
        // Both end long before a page is full.
        for bytes in [&[0u8; 40][..], &[0xff; 300][..]] {
            let packed = Packed::compressed(LABEL, 0, &store, bytes, 9).map_err(|_| ENOMEM)?;
            assert!(packed.copy_to(&mut to, &mut scratch).is_err());
        }
        Ok(())
    }

    #[test]
    fn a_pattern_takes_no_object() -> Result {
        let store = Store::new()?;
        let mut scratch = Scratch::new().ok_or(ENOMEM)?;
        let packed = Packed::filled(LABEL, 1, &store, 0x0102_0304).map_err(|_| ENOMEM)?;
        assert_eq!((store.objects(), packed.node()), (0, 1));
        let mut to = frame(9)?;
        assert!(packed.copy_to(&mut to, &mut scratch).is_ok());
        assert_eq!(to.as_ref().filled_with(), Some(0x0102_0304));
        Ok(())
    }
}
