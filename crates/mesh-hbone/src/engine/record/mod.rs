//! TLS 1.3 records after the handshake (RFC 8446 §5, §4.6, §7.2, §7.3): [`Seal`] writes them, [`Open`] reads them, both in place and
//! without buffers of their own. Everything they know survives a change of process, down to the next record's bytes.
//!
//! On the wire, and in the buffers given to [`Seal::seal`] and [`Open::open`]:
//!
//! ```text
//! 0        1            3           5              5 + n         6 + n      22 + n
//! | 23 u8  | 0x0303 u16 | length u16 | content      | type u8     | tag       |
//!                                    '------ encrypted: n + 1 ----'
//! ```
//!
//! Not here: the handshake (`engine::handshake`), reading and writing sockets, and how often a peer may do what is allowed; what
//! is worth counting comes out as a value ([`Opened`], [`PostHandshakeEvent`]).

pub mod aead;
mod keys;
mod open;
mod seal;

pub use keys::{Keys, Suite, TrafficSecret};
pub use open::{Open, Opened, PostHandshake, PostHandshakeEvent, Role, header};
pub use seal::{AlertLevel, Seal, key_update_message};

use self::aead::TAG;

/// Length of a record's header.
pub const HEADER: usize = 5;
/// What a record adds to its content: header, content type, tag.
pub const OVERHEAD: usize = HEADER + 1 + TAG;
/// Most content of one record (RFC 8446 §5.1).
pub const MAX_PLAINTEXT: usize = 1 << 14;
/// Longest record there is, header included (RFC 8446 §5.2): a peer may pad.
pub const MAX_RECORD: usize = HEADER + MAX_CIPHERTEXT;
/// Length of a sealed alert.
pub const ALERT_RECORD: usize = OVERHEAD + 2;
/// Length of a sealed KeyUpdate.
pub const KEY_UPDATE_RECORD: usize = OVERHEAD + 5;

/// Longest body of a record (RFC 8446 §5.2).
const MAX_CIPHERTEXT: usize = MAX_PLAINTEXT + 256;
const LEGACY_VERSION: u16 = 0x0303;

/// What a record may contain once the handshake is over (RFC 8446 §5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ContentType {
    Alert = 21,
    Handshake = 22,
    ApplicationData = 23,
}

/// Why a connection cannot go on. [`RecordError::alert`] is what the peer is told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("record of type {0} where only protected ones are allowed")]
    OuterType(u8),
    #[error("record of version {0:#06x}")]
    Version(u16),
    #[error("record of {0} bytes")]
    TooLong(usize),
    #[error("record length and buffer differ")]
    Length,
    #[error("record fails authentication")]
    Mac,
    #[error("record without a content type")]
    NoType,
    #[error("record protects content of type {0}")]
    InnerType(u8),
    #[error("empty alert or handshake record")]
    Empty,
    #[error("alert of {0} bytes")]
    Alert(usize),
    #[error("post-handshake message of type {0}")]
    Message(u8),
    #[error("post-handshake message of type {kind} with {length} bytes")]
    MessageLength { kind: u8, length: u32 },
    #[error("KeyUpdate asks for {0}")]
    KeyUpdate(u8),
    #[error("more follows a KeyUpdate in its record")]
    NotAligned,
    #[error("another record within a handshake message")]
    Interleaved,
    #[error("too many records under one key")]
    Exhausted,
    #[error("the record cipher does not accept this key or sequence number")]
    Cipher,
}

impl RecordError {
    /// The AlertDescription to send (RFC 8446 §6.2).
    pub fn alert(&self) -> u8 {
        match self {
            Self::OuterType(_)
            | Self::NoType
            | Self::InnerType(_)
            | Self::Empty
            | Self::Message(_)
            | Self::NotAligned
            | Self::Interleaved => alert::UNEXPECTED_MESSAGE,
            Self::Mac => alert::BAD_RECORD_MAC,
            Self::TooLong(_) => alert::RECORD_OVERFLOW,
            Self::KeyUpdate(_) => alert::ILLEGAL_PARAMETER,
            Self::Alert(_) | Self::MessageLength { .. } => alert::DECODE_ERROR,
            Self::Version(_) => alert::PROTOCOL_VERSION,
            Self::Length | Self::Exhausted | Self::Cipher => alert::INTERNAL_ERROR,
        }
    }
}

/// AlertDescription values (RFC 8446 §6).
pub mod alert {
    pub const CLOSE_NOTIFY: u8 = 0;
    pub const UNEXPECTED_MESSAGE: u8 = 10;
    pub const BAD_RECORD_MAC: u8 = 20;
    pub const RECORD_OVERFLOW: u8 = 22;
    pub const ILLEGAL_PARAMETER: u8 = 47;
    pub const DECODE_ERROR: u8 = 50;
    pub const PROTOCOL_VERSION: u8 = 70;
    pub const INTERNAL_ERROR: u8 = 80;
    pub const USER_CANCELED: u8 = 90;
}

/// Fields of a snapshot of either direction.
mod tag {
    pub(super) const SUITE: u16 = 1;
    pub(super) const SECRET: u16 = 2;
    pub(super) const SEQUENCE: u16 = 3;
}

#[cfg(test)]
mod tests;
