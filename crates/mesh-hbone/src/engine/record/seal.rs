//! The sending direction.

use super::{
    ALERT_RECORD, ContentType, HEADER, KEY_UPDATE_RECORD, LEGACY_VERSION, MAX_PLAINTEXT, OVERHEAD, RecordError, Suite,
    TrafficSecret,
    aead::{self, NONCE, Sealer, TAG},
    alert, keys, tag,
};
use crate::engine::state::{Fields, RestoreError, Snapshot, Writer};

/// Records after which [`Seal::needs_update`] asks for new keys. RFC 8446 §5.5 allows 2^24.5 full records of AES-GCM under one key.
/// A record of any length counts alike: small ones then update sooner than they must, which costs nothing noticeable.
const UPDATE_AFTER: u64 = 1 << 23;
/// Records under one key that are never exceeded.
const REFUSE_AFTER: u64 = 1 << 24;

/// Seals what we send.
///
/// No two records are ever sealed with the same key and number: not by one of these, because the number only goes up, and not by two,
/// provided that of a saved and a restored one only the restored one is used any more.
#[derive(Debug)]
pub struct Seal {
    secret: TrafficSecret,
    iv: [u8; NONCE],
    /// Of the next record. As it restarts with every key, it also says how much this key has been used.
    sequence: u64,
    sealer: Sealer,
}

impl Seal {
    /// # Errors
    /// [`RecordError::Cipher`] when the sequence number is not 0 and the cipher insists on that: see [`Self::can_be_saved`].
    pub fn new(secret: TrafficSecret, sequence: u64) -> Result<Self, RecordError> {
        if sequence != 0 && !aead::RESUMES {
            return Err(RecordError::Cipher);
        }
        let keys = secret.keys();
        let sealer = Sealer::new(keys.algorithm(), keys.key()).map_err(|_| RecordError::Cipher)?;
        Ok(Self { iv: keys.iv(), secret, sequence, sealer })
    }

    /// Makes a record of the `plaintext_len` bytes at [`HEADER`] in `record` and returns its length, [`OVERHEAD`] more. Both
    /// ends of `record` are overwritten; what is behind the record stays.
    ///
    /// # Errors
    /// [`RecordError::Exhausted`] when [`Self::needs_update`] was ignored for as long again, [`RecordError::Cipher`] when the
    /// cipher refuses. `record` is then not to be sent.
    ///
    /// # Panics
    /// When `plaintext_len` is over [`super::MAX_PLAINTEXT`] or `record` is too short for the result: both are the caller's choice.
    pub fn seal(
        &mut self,
        record: &mut [u8],
        content: ContentType,
        plaintext_len: usize,
    ) -> Result<usize, RecordError> {
        assert!(plaintext_len <= MAX_PLAINTEXT, "a record holds at most 2^14 bytes");
        if self.sequence >= REFUSE_AFTER {
            return Err(RecordError::Exhausted);
        }
        let length = plaintext_len + OVERHEAD;
        let (header, body) = record[..length].split_at_mut(HEADER);
        let body_len = u16::try_from(body.len()).expect("at most 2^14 + 17");
        header[0] = ContentType::ApplicationData as u8;
        header[1..3].copy_from_slice(&LEGACY_VERSION.to_be_bytes());
        header[3..].copy_from_slice(&body_len.to_be_bytes());
        body[plaintext_len] = content as u8;
        let (text, tag) = body.split_at_mut(plaintext_len + 1);
        let nonce = keys::nonce(&self.iv, self.sequence);
        // Before the attempt: whatever comes of it, this number is used up.
        self.sequence += 1;
        let computed: [u8; TAG] = self.sealer.seal(nonce, header, text).map_err(|_| RecordError::Cipher)?;
        tag.copy_from_slice(&computed);
        Ok(length)
    }

    /// Writes an alert, [`ALERT_RECORD`] bytes, to the start of `record`.
    ///
    /// # Errors
    /// As [`Self::seal`].
    ///
    /// # Panics
    /// When `record` is too short.
    pub fn alert(&mut self, record: &mut [u8], level: AlertLevel, description: u8) -> Result<usize, RecordError> {
        const { assert!(ALERT_RECORD == OVERHEAD + 2) }
        record[HEADER..HEADER + 2].copy_from_slice(&[level as u8, description]);
        self.seal(record, ContentType::Alert, 2)
    }

    /// Writes the alert that ends our direction properly (RFC 8446 §6.1), [`ALERT_RECORD`] bytes. Nothing may be sealed afterwards.
    ///
    /// # Errors
    /// As [`Self::seal`].
    ///
    /// # Panics
    /// When `record` is too short.
    pub fn close_notify(&mut self, record: &mut [u8]) -> Result<usize, RecordError> {
        self.alert(record, AlertLevel::Warning, alert::CLOSE_NOTIFY)
    }

    /// Whether new keys are due: have [`Self::key_update`] send for them soon.
    pub fn needs_update(&self) -> bool {
        self.sequence >= UPDATE_AFTER
    }

    /// Announces new keys with the old ones, [`KEY_UPDATE_RECORD`] bytes at the start of `record`, and takes them (RFC 8446 §4.6.3).
    /// `request` asks the peer to do the same; an answer to its request must not.
    ///
    /// # Errors
    /// As [`Self::seal`].
    ///
    /// # Panics
    /// When `record` is too short.
    pub fn key_update(&mut self, record: &mut [u8], request: bool) -> Result<usize, RecordError> {
        let message = key_update_message(request);
        const { assert!(KEY_UPDATE_RECORD == OVERHEAD + 5) }
        record[HEADER..HEADER + message.len()].copy_from_slice(&message);
        let length = self.seal(record, ContentType::Handshake, message.len())?;
        self.update()?;
        Ok(length)
    }

    /// Takes the next generation of keys, the KeyUpdate having been sealed. [`Self::key_update`] does both.
    ///
    /// # Errors
    /// [`RecordError::Cipher`] when the back end cannot load a key.
    pub fn update(&mut self) -> Result<(), RecordError> {
        *self = Self::new(self.secret.next(), 0)?;
        Ok(())
    }

    /// Whether a snapshot of this can be restored by a program built like this one. Record keys that check their nonces themselves
    /// (`monotonic-nonces`, `fips`) start at sequence number 0 only; with them, do [`Self::key_update`] and save before the next
    /// record.
    pub fn can_be_saved(&self) -> bool {
        aead::RESUMES || self.sequence == 0
    }

    /// The number of the next record under this key.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    pub fn suite(&self) -> Suite {
        self.secret.suite()
    }
}

/// How bad an alert is (RFC 8446 §6): only `close_notify` and `user_canceled` are warnings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum AlertLevel {
    Warning = 1,
    Fatal = 2,
}

/// A KeyUpdate handshake message (RFC 8446 §4.6.3): `type u8 = 24 | length u24 = 1 | request_update u8`.
pub fn key_update_message(request: bool) -> [u8; 5] {
    [24, 0, 0, 1, u8::from(request)]
}

impl Snapshot for Seal {
    fn save(&self, to: &mut Writer) {
        save(&self.secret, self.sequence, to);
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        let (secret, sequence) = restore(from)?;
        Self::new(secret, sequence).map_err(|_| RestoreError::Invalid {
            tag: tag::SEQUENCE,
            why: "is not 0, where record keys of this program start",
        })
    }
}

pub(super) fn save(secret: &TrafficSecret, sequence: u64, to: &mut Writer) {
    to.bytes(tag::SUITE, &(secret.suite() as u16).to_be_bytes());
    to.bytes(tag::SECRET, secret.as_bytes());
    to.u64(tag::SEQUENCE, sequence);
}

pub(super) fn restore(from: &Fields<'_>) -> Result<(TrafficSecret, u64), RestoreError> {
    from.only(&[tag::SUITE, tag::SECRET, tag::SEQUENCE])?;
    let suite = from.array(tag::SUITE).map(u16::from_be_bytes)?;
    let suite = Suite::from_u16(suite).ok_or(RestoreError::Invalid { tag: tag::SUITE, why: "is no known suite" })?;
    let secret = TrafficSecret::new(suite, from.bytes(tag::SECRET)?)
        .ok_or(RestoreError::Invalid { tag: tag::SECRET, why: "has not the length of the suite's hash" })?;
    Ok((secret, from.u64(tag::SEQUENCE)?))
}
