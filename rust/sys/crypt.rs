// SPDX-License-Identifier: GPL-2.0

//! What leaves memory is encrypted, and known to be what left: ChaCha20 and SipHash-2-4, which every
//! kernel has built in, with a key that is drawn when a swap file is made and is gone with it.

use super::{bindings, protect};

/// What makes a key stream: never the same twice under one key.
#[derive(Clone, Copy)]
pub(crate) struct Nonce {
    /// The number of a use of a cluster.
    pub(crate) number: u64,
    /// The object's place in it.
    pub(crate) offset: u32,
}

/// The key of one swap file.
pub(crate) struct Key {
    cipher: [u32; 8],
    seal: [u64; 2],
}

impl Key {
    /// A random key.
    pub(crate) fn new() -> Key {
        let mut key = Key {
            cipher: [0; 8],
            seal: [0; 2],
        };
        // SAFETY: Both arrays are as long as is said.
        unsafe {
            bindings::get_random_bytes(
                key.cipher.as_mut_ptr().cast(),
                core::mem::size_of_val(&key.cipher),
            );
            bindings::get_random_bytes(
                key.seal.as_mut_ptr().cast(),
                core::mem::size_of_val(&key.seal),
            );
        }
        key
    }

    /// A key that is known.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn for_test(cipher: [u32; 8], seal: [u64; 2]) -> Key {
        Key { cipher, seal }
    }

    /// Encrypts `bytes`, or decrypts them: the same both ways.
    pub(crate) fn apply(&self, nonce: Nonce, bytes: &mut [u8]) {
        if !protect::armed(protect::Protection::Encrypt) {
            return;
        }
        const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];
        let [c0, c1, c2, c3] = CONSTANTS;
        let [k0, k1, k2, k3, k4, k5, k6, k7] = self.cipher;
        let (low, high) = (nonce.number as u32, (nonce.number >> 32) as u32);
        let mut state = [
            c0,
            c1,
            c2,
            c3,
            k0,
            k1,
            k2,
            k3,
            k4,
            k5,
            k6,
            k7,
            0,
            nonce.offset,
            low,
            high,
        ];
        let mut stream = [0u8; 64];
        for block in bytes.chunks_mut(stream.len()) {
            // SAFETY: Sixteen words and 64 bytes, as the function asks for; it counts the block
            // number in word 12 up.
            unsafe { bindings::thinram_chacha20_block(state.as_mut_ptr(), stream.as_mut_ptr()) };
            for (byte, mask) in block.iter_mut().zip(stream) {
                *byte ^= mask;
            }
        }
    }

    /// The checksum of encrypted `bytes` in their place, which nobody without the key can make.
    pub(crate) fn seal(&self, nonce: Nonce, bytes: &[u8]) -> u64 {
        // SAFETY: The bytes are as long as is said; the key is two words.
        unsafe {
            let seal =
                bindings::thinram_siphash(bytes.as_ptr().cast(), bytes.len(), self.seal.as_ptr());
            let place = [seal, nonce.number, nonce.offset.into(), bytes.len() as u64];
            bindings::thinram_siphash(
                place.as_ptr().cast(),
                core::mem::size_of_val(&place),
                self.seal.as_ptr(),
            )
        }
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // SAFETY: Plain integers; volatile, so that it is not left out as useless.
        unsafe {
            core::ptr::write_volatile(&mut self.cipher, [0; 8]);
            core::ptr::write_volatile(&mut self.seal, [0; 2]);
        }
    }
}
