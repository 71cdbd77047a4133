// SPDX-License-Identifier: GPL-2.0

#[kernel::macros::kunit_tests(thinram_crypt)]
mod tests {
    use crate::sys::crypt::{Key, Nonce};
    use kernel::prelude::*;

    /// The key stream of RFC 8439, 2.3.2: the second block of this key and nonce.
    #[test]
    fn the_key_stream_is_chacha20() -> Result {
        const BLOCK_1: [u8; 64] = [
            0x10, 0xf1, 0xe7, 0xe4, 0xd1, 0x3b, 0x59, 0x15, 0x50, 0x0f, 0xdd, 0x1f, 0xa3, 0x20,
            0x71, 0xc4, 0xc7, 0xd1, 0xf4, 0xc7, 0x33, 0xc0, 0x68, 0x03, 0x04, 0x22, 0xaa, 0x9a,
            0xc3, 0xd4, 0x6c, 0x4e, 0xd2, 0x82, 0x64, 0x46, 0x07, 0x9f, 0xaa, 0x09, 0x14, 0xc2,
            0xd7, 0x05, 0xd9, 0x8b, 0x02, 0xa2, 0xb5, 0x12, 0x9c, 0xd1, 0xde, 0x16, 0x4e, 0xb9,
            0xcb, 0xd0, 0x83, 0xe8, 0xa2, 0x50, 0x3c, 0x4e,
        ];
        let words = [
            0x0302_0100,
            0x0706_0504,
            0x0b0a_0908,
            0x0f0e_0d0c,
            0x1312_1110,
            0x1716_1514,
            0x1b1a_1918,
            0x1f1e_1d1c,
        ];
        let key = Key::for_test(words, [1, 2]);
        let nonce = Nonce {
            number: 0x4a00_0000,
            offset: 0x0900_0000,
        };
        let mut bytes = [0; 128];
        key.apply(nonce, &mut bytes);
        assert_eq!(bytes.get(64..), Some(&BLOCK_1[..]));
        Ok(())
    }

    #[test]
    fn what_is_encrypted_twice_is_what_it_was() -> Result {
        let key = Key::new();
        let nonce = Nonce {
            number: 7,
            offset: 4080,
        };
        let mut bytes = [0x5a; 1000];
        key.apply(nonce, &mut bytes);
        assert!(bytes != [0x5a; 1000]);
        key.apply(nonce, &mut bytes);
        assert!(bytes == [0x5a; 1000]);
        Ok(())
    }

    #[test]
    fn a_checksum_tells_bytes_and_places_apart() -> Result {
        let key = Key::new();
        let nonce = |number, offset| Nonce { number, offset };
        let mut bytes = [3; 500];
        let seal = key.seal(nonce(1, 16), &bytes);
        assert_eq!(key.seal(nonce(1, 16), &bytes), seal);
        assert!(key.seal(nonce(2, 16), &bytes) != seal);
        assert!(key.seal(nonce(1, 32), &bytes) != seal);
        assert!(key.seal(nonce(1, 16), bytes.get(..499).unwrap_or(&[])) != seal);
        assert!(Key::new().seal(nonce(1, 16), &bytes) != seal);
        for at in [0, 250, 499] {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1;
            }
            assert!(key.seal(nonce(1, 16), &bytes) != seal);
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1;
            }
        }
        Ok(())
    }
}
