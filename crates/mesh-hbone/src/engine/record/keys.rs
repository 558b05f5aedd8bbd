//! Traffic secrets and what is derived from them (RFC 8446 §7).

use std::fmt;

use zeroize::Zeroizing;

use super::aead::{Algorithm, NONCE};
use crate::engine::handshake::expand;

/// The cipher suites a tunnel may use (RFC 8446 §B.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Suite {
    Aes128GcmSha256 = 0x1301,
    Aes256GcmSha384 = 0x1302,
}

impl Suite {
    pub fn from_u16(value: u16) -> Option<Self> {
        [Self::Aes128GcmSha256, Self::Aes256GcmSha384].into_iter().find(|suite| *suite as u16 == value)
    }

    pub fn algorithm(self) -> Algorithm {
        match self {
            Self::Aes128GcmSha256 => Algorithm::Aes128Gcm,
            Self::Aes256GcmSha384 => Algorithm::Aes256Gcm,
        }
    }

    /// Length of the hash, and so of a secret.
    pub fn hash_len(self) -> usize {
        match self {
            Self::Aes128GcmSha256 => 32,
            Self::Aes256GcmSha384 => 48,
        }
    }
}

/// `application_traffic_secret_N` of one direction (RFC 8446 §7.1, §7.2). Wiped when dropped.
#[derive(Clone)]
pub struct TrafficSecret {
    suite: Suite,
    bytes: Zeroizing<[u8; MAX_SECRET]>,
}

const MAX_SECRET: usize = 48;

impl TrafficSecret {
    /// `None` when the length is not that of the suite's hash.
    pub fn new(suite: Suite, secret: &[u8]) -> Option<Self> {
        let mut bytes = Zeroizing::new([0; MAX_SECRET]);
        bytes.get_mut(..suite.hash_len()).filter(|to| to.len() == secret.len())?.copy_from_slice(secret);
        Some(Self { suite, bytes })
    }

    pub fn suite(&self) -> Suite {
        self.suite
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.suite.hash_len()]
    }

    /// The record keys of this generation (§7.3).
    pub fn keys(&self) -> Keys {
        let mut keys = Keys { algorithm: self.suite.algorithm(), key: Zeroizing::default(), iv: [0; NONCE] };
        let key_len = keys.algorithm.key_len();
        self.expand_label("key", &mut keys.key[..key_len]);
        self.expand_label("iv", &mut keys.iv);
        keys
    }

    /// The next generation's secret (§7.2).
    #[must_use]
    pub fn next(&self) -> Self {
        let mut bytes = Zeroizing::new([0; MAX_SECRET]);
        self.expand_label("traffic upd", &mut bytes[..self.suite.hash_len()]);
        Self { suite: self.suite, bytes }
    }

    /// HKDF-Expand-Label with an empty context (§7.1): the info is `length u16 | label length u8 | "tls13 " label | 0`.
    fn expand_label(&self, label: &str, out: &mut [u8]) {
        const PREFIX: &[u8] = b"tls13 ";
        let length = u16::try_from(out.len()).expect("a key, an IV or a secret").to_be_bytes();
        let label_len = u8::try_from(PREFIX.len() + label.len()).expect("one of three short labels");
        expand(self.suite, self.as_bytes(), &[&length, &[label_len], PREFIX, label.as_bytes(), &[0]], out);
    }
}

impl fmt::Debug for TrafficSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrafficSecret").field("suite", &self.suite).finish_non_exhaustive()
    }
}

/// What seals or opens the records of one generation.
pub struct Keys {
    algorithm: Algorithm,
    key: Zeroizing<[u8; 32]>,
    iv: [u8; NONCE],
}

impl Keys {
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    pub fn key(&self) -> &[u8] {
        &self.key[..self.algorithm.key_len()]
    }

    pub fn iv(&self) -> [u8; NONCE] {
        self.iv
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}

/// The nonce of a record (RFC 8446 §5.3): its sequence number, padded on the left, XORed with the IV.
pub(super) fn nonce(iv: &[u8; NONCE], sequence: u64) -> [u8; NONCE] {
    let mut nonce = *iv;
    for (byte, number) in nonce[NONCE - 8..].iter_mut().zip(sequence.to_be_bytes()) {
        *byte ^= number;
    }
    nonce
}
