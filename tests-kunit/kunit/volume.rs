// SPDX-License-Identifier: GPL-2.0

#[kernel::macros::kunit_tests(thinram_volume)]
mod tests {
    use crate::{
        engine::volume::{open, put, Filling, Table},
        logic::clusters::{Clusters, Place},
        sys::{crypt::Key, swapio::Buffer, zs::Scratch},
    };
    use kernel::{page::PAGE_SIZE, prelude::*};

    fn two_clusters() -> Result<Clusters<Table>> {
        let mut table = Table::with_capacity(2)?;
        table.fill_up(2);
        let mut clusters = Clusters::new(table);
        if clusters.add(2) != 2 {
            return Err(ENOSPC);
        }
        Ok(clusters)
    }

    fn filling(clusters: &mut Clusters<Table>) -> Result<Filling> {
        let fill = clusters.take().ok_or(ENOSPC)?;
        let buffer = Buffer::new()?;
        Ok(Filling { fill, buffer })
    }

    /// Bytes of the object that was put as number `nth` in a round.
    fn object(round: u8, nth: usize) -> Result<KVec<u8>> {
        let len = 1 + (nth * 977 + usize::from(round) * 331) % PAGE_SIZE;
        let mut bytes = KVec::with_capacity(len, GFP_KERNEL)?;
        for at in 0..len {
            let byte = (at as u8).wrapping_mul(31) ^ round ^ nth as u8;
            bytes.push(byte, GFP_KERNEL)?;
        }
        Ok(bytes)
    }

    /// Fills a cluster to the end.
    fn fill_up(
        key: &Key,
        clusters: &mut Clusters<Table>,
        filling: &mut Filling,
        round: u8,
    ) -> Result<KVec<Place>> {
        let mut places = KVec::new();
        while let Some(place) = put(key, clusters, filling, &object(round, places.len())?) {
            places.push(place, GFP_KERNEL)?;
        }
        Ok(places)
    }

    /// Whether object `nth` opens, as what was put there; `None` when it is refused.
    fn opens(
        key: &Key,
        filling: &Filling,
        number: u64,
        place: Place,
        (round, nth): (u8, usize),
        scratch: &mut Scratch,
    ) -> Result<Option<bool>> {
        let Some(len) = open(key, &filling.buffer, number, place, scratch) else {
            return Ok(None);
        };
        Ok(Some(
            scratch.bytes().get(..len) == Some(&object(round, nth)?[..]),
        ))
    }

    #[test]
    fn what_is_put_comes_back_in_each_use_of_a_cluster() -> Result {
        let key = Key::new();
        let mut clusters = two_clusters()?;
        let mut scratch = Scratch::new().ok_or(ENOMEM)?;
        let mut before = 0;
        for round in 0..20 {
            let mut filling = filling(&mut clusters)?;
            let number = filling.fill.number();
            // No number is used twice, or a key stream would be.
            assert!(number > before);
            before = number;
            let places = fill_up(&key, &mut clusters, &mut filling, round)?;
            assert!(places.len() > 8);
            assert_eq!(clusters.live(), places.len() as u64);
            for (nth, place) in places.iter().enumerate() {
                let found = opens(&key, &filling, number, *place, (round, nth), &mut scratch)?;
                assert_eq!(found, Some(true));
            }
            let Filling { fill, .. } = filling;
            let cluster = fill.cluster();
            assert!(clusters.seal(fill));
            // Gone before it is written, or after.
            let (early, late) = places.split_at(places.len() / 2);
            assert!(early.iter().all(|place| clusters.release(*place)));
            assert_eq!(clusters.written(cluster), places.len() as u64);
            assert_eq!(clusters.free(), 1);
            assert!(late.iter().all(|place| clusters.release(*place)));
            assert_eq!((clusters.free(), clusters.live()), (2, 0));
            assert!(!clusters.release(places[0]));
        }
        Ok(())
    }

    #[test]
    fn what_a_disk_changed_is_refused_and_nothing_else() -> Result {
        let key = Key::new();
        let mut clusters = two_clusters()?;
        let mut scratch = Scratch::new().ok_or(ENOMEM)?;
        let mut filling = filling(&mut clusters)?;
        let number = filling.fill.number();
        let places = fill_up(&key, &mut clusters, &mut filling, 1)?;
        for (hit, place) in places.iter().enumerate() {
            // Checksum, length (from a small one to one out of the cluster), and bytes.
            for at in [0, 7, 8, 9, 10, 15, 16] {
                for bit in [1, 0x80] {
                    filling.buffer.0[place.offset() + at] ^= bit;
                    for (nth, other) in places.iter().enumerate() {
                        let found = opens(&key, &filling, number, *other, (1, nth), &mut scratch)?;
                        assert_eq!(found, (nth != hit).then_some(true));
                    }
                    filling.buffer.0[place.offset() + at] ^= bit;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn what_lay_there_before_is_refused() -> Result {
        let key = Key::new();
        let mut clusters = two_clusters()?;
        let mut scratch = Scratch::new().ok_or(ENOMEM)?;
        let mut old = filling(&mut clusters)?;
        let number = old.fill.number();
        let places = fill_up(&key, &mut clusters, &mut old, 3)?;
        for (nth, place) in places.iter().enumerate() {
            // A later use of the cluster, another object's place, another file's key.
            let next = places[(nth + 1) % places.len()];
            let id = (3, nth);
            assert_eq!(
                opens(&key, &old, number + 1, *place, id, &mut scratch)?,
                None
            );
            assert_eq!(
                opens(&Key::new(), &old, number, *place, id, &mut scratch)?,
                None
            );
            assert_eq!(
                opens(&key, &old, number, *place, id, &mut scratch)?,
                Some(true)
            );
            assert_eq!(
                opens(&key, &old, number, next, id, &mut scratch)?,
                Some(false)
            );
        }
        Ok(())
    }

    #[test]
    fn no_object_is_empty_or_longer_than_a_page() -> Result {
        let key = Key::new();
        let mut clusters = two_clusters()?;
        let mut filling = filling(&mut clusters)?;
        let long = KBox::new([0u8; PAGE_SIZE + 1], GFP_KERNEL)?;
        for bytes in [&[0u8; 0][..], &long[..]] {
            assert!(put(&key, &mut clusters, &mut filling, bytes).is_none());
        }
        assert_eq!(clusters.live(), 0);
        assert!(put(&key, &mut clusters, &mut filling, &long[1..]).is_some());
        Ok(())
    }
}
