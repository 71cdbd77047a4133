// SPDX-License-Identifier: GPL-2.0

//! How an object lies in a cluster of a swap file: its checksum, its length, its bytes.
//!
//! A disk may give back anything. So nothing that is read here is trusted: a length that leads out of
//! the cluster or is longer than a page is no object. Whether the bytes are those that were written is
//! for the checksum to say, which whoever has the key computes.

/// What comes before the bytes: the checksum, and the length.
pub const HEAD: usize = 16;
/// Bytes of an object at most: a page.
pub const OBJECT_MAX: usize = 4096;

const SEAL: usize = 8;

/// Bytes that an object of `len` takes; `None` for a length that no object has.
pub fn size(len: usize) -> Option<usize> {
    if len == 0 || len > OBJECT_MAX {
        return None;
    }
    HEAD.checked_add(len)
}

/// Room for an object, in which its bytes are put before it is closed.
pub struct Room<'a> {
    head: &'a mut [u8],
    /// The bytes.
    pub body: &'a mut [u8],
}

impl<'a> Room<'a> {
    /// Room for `len` bytes from `offset` on; `None` where the cluster ends before.
    pub fn of(cluster: &'a mut [u8], offset: usize, len: usize) -> Option<Room<'a>> {
        let end = offset.checked_add(size(len)?)?;
        let (head, body) = cluster.get_mut(offset..end)?.split_at_mut_checked(HEAD)?;
        Some(Room { head, body })
    }

    /// Writes the head: the bytes are what they shall be, and `seal` is their checksum.
    pub fn close(self, seal: u64) {
        let len = self.body.len() as u64;
        let words = Iterator::chain(seal.to_le_bytes().into_iter(), len.to_le_bytes());
        for (to, from) in self.head.iter_mut().zip(words) {
            *to = from;
        }
    }
}

/// What is said to be an object.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Object<'a> {
    /// The checksum that it was closed with.
    pub seal: u64,
    /// Its bytes.
    pub body: &'a [u8],
}

impl<'a> Object<'a> {
    /// What lies at `offset`; `None` when no object can lie there.
    pub fn at(cluster: &'a [u8], offset: usize) -> Option<Object<'a>> {
        let (head, rest) = cluster.get(offset..)?.split_at_checked(HEAD)?;
        let (seal, len) = head.split_at_checked(SEAL)?;
        let len = usize::try_from(u64::from_le_bytes(len.try_into().ok()?)).ok()?;
        size(len)?;
        Some(Object {
            seal: u64::from_le_bytes(seal.try_into().ok()?),
            body: rest.get(..len)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clusters::{Cluster, Clusters, CLUSTER_BYTES, UNIT};
    use proptest::prelude::*;

    /// As good as a checksum for which one needs a key: of the bytes, how many, and where.
    fn seal(offset: usize, body: &[u8]) -> u64 {
        let start = mix(offset as u64) ^ body.len() as u64;
        let next = |sum: u64, byte: &u8| mix(sum ^ u64::from(*byte));
        body.iter().fold(mix(start), next)
    }

    fn mix(n: u64) -> u64 {
        crate::catalog::tests::mix(n)
    }

    /// What the module takes an object for: the bytes, if their checksum is right.
    fn open(cluster: &[u8], offset: usize) -> Option<&[u8]> {
        let object = Object::at(cluster, offset)?;
        (seal(offset, object.body) == object.seal).then_some(object.body)
    }

    fn put(cluster: &mut [u8], offset: usize, body: &[u8]) -> bool {
        match Room::of(cluster, offset, body.len()) {
            Some(room) => {
                room.body.copy_from_slice(body);
                room.close(seal(offset, body));
                true
            }
            None => false,
        }
    }

    fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 1..most)
    }

    #[test]
    fn the_longest_object_and_none() {
        let mut cluster = vec![0; HEAD + OBJECT_MAX];
        assert!(put(&mut cluster, 0, &[7; OBJECT_MAX]));
        assert_eq!(open(&cluster, 0), Some(&[7; OBJECT_MAX][..]));
        assert!(!put(&mut cluster, 1, &[7; OBJECT_MAX]));
        assert!(Room::of(&mut cluster, 0, 0).is_none());
        assert!(Room::of(&mut [0; 2 * OBJECT_MAX], 0, OBJECT_MAX + 1).is_none());
        assert_eq!(Object::at(&cluster, usize::MAX), None);
        assert_eq!(Object::at(&[], 0), None);
        // One byte more than there can be, in a cluster that has room for it.
        let mut cluster = vec![0; 4 * OBJECT_MAX];
        cluster[SEAL..HEAD].copy_from_slice(&(OBJECT_MAX as u64 + 1).to_le_bytes());
        assert_eq!(Object::at(&cluster, 0), None);
    }

    proptest! {
        /// No bytes at all do harm: what is taken for an object lies in the cluster, behind its head,
        /// and is as long as that says.
        #[test]
        fn any_bytes_are_refused_or_within(
            mut cluster in prop::collection::vec(any::<u8>(), 0..600),
            offset in prop_oneof![8 => 0usize..620, 1 => any::<usize>()],
            len in prop_oneof![4 => 0u64..700, 1 => 4000u64..5000, 1 => any::<u64>()],
        ) {
            // A length by chance is never a possible one.
            if let Some(to) = cluster.get_mut(offset.saturating_add(SEAL)..offset.saturating_add(HEAD)) {
                to.copy_from_slice(&len.to_le_bytes());
            }
            let fits = offset as u128 + HEAD as u128 + u128::from(len) <= cluster.len() as u128;
            let possible = fits && (1..=OBJECT_MAX as u64).contains(&len);
            let object = Object::at(&cluster, offset);
            prop_assert_eq!(object.is_some(), possible);
            if let Some(object) = object {
                prop_assert_eq!(object.body, &cluster[offset + HEAD..offset + HEAD + len as usize]);
                prop_assert_eq!(object.seal.to_le_bytes(), &cluster[offset..offset + SEAL]);
            }
        }

        /// Side by side in one cluster, each comes back as it was put, until a byte is another one: then
        /// that object is refused, or is what it was, and the others are.
        #[test]
        fn what_was_put_comes_back_or_is_refused(
            objects in prop::collection::vec(bytes(300), 1..12),
            harm in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 0..4),
            torn in prop::option::weighted(0.2, any::<prop::sample::Index>()),
        ) {
            let mut clusters = Clusters::new(vec![Cluster::FREE]);
            prop_assert_eq!(clusters.add(1), 1);
            let mut fill = clusters.take().unwrap();
            let mut cluster = vec![0xa5; CLUSTER_BYTES];
            let mut at = Vec::new();
            for body in &objects {
                let place = clusters.place(&mut fill, size(body.len()).unwrap()).unwrap();
                prop_assert!(put(&mut cluster, place.offset(), body));
                at.push(place.offset());
            }
            for (offset, body) in at.iter().zip(&objects) {
                prop_assert_eq!(open(&cluster, *offset), Some(&body[..]));
            }
            // What a disk makes of it: bytes that changed, and one that wrote a part alone.
            let used = fill.bytes();
            let before = cluster.clone();
            for (index, change) in &harm {
                cluster[index.index(used)] ^= change;
            }
            if let Some(from) = torn {
                cluster[from.index(used)..].fill(0);
            }
            for (offset, body) in at.iter().zip(&objects) {
                let range = *offset..offset + size(body.len()).unwrap();
                let harmed = cluster[range.clone()] != before[range];
                match open(&cluster, *offset) {
                    Some(read) => prop_assert!(!harmed && read == &body[..]),
                    None => prop_assert!(harmed),
                }
            }
        }

        /// Anywhere, at the end of an object or within one, there is none but by its own place.
        #[test]
        fn an_object_is_one_in_its_place_alone(body in bytes(200), from in 0usize..20, to in 0usize..20) {
            let (from, to) = (from * UNIT, to * UNIT);
            let mut cluster = vec![0; 2048];
            prop_assert!(put(&mut cluster, from, &body));
            let copy = cluster[from..from + size(body.len()).unwrap()].to_vec();
            let mut other = vec![0; 2048];
            other[to..to + copy.len()].copy_from_slice(&copy);
            prop_assert_eq!(open(&other, to).is_some(), from == to);
        }
    }
}
