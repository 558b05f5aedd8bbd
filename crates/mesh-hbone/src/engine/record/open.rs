//! The receiving direction, and the handshake messages that may come after the handshake.

use super::{
    ContentType, HEADER, LEGACY_VERSION, MAX_CIPHERTEXT, MAX_PLAINTEXT, RecordError, Suite, TrafficSecret,
    aead::{NONCE, Opener},
    keys, seal, tag,
};
use crate::engine::state::{Fields, RestoreError, Snapshot, Writer};

/// How long the record starting here is, header included; `None` when there is less than a header. Ask before buffering the rest: no
/// answer is longer than [`super::MAX_RECORD`].
///
/// # Errors
/// What the header alone shows: [`RecordError::OuterType`], [`RecordError::Version`], [`RecordError::TooLong`].
pub fn header(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    let Some(&[kind, major, minor, high, low]) = bytes.first_chunk::<HEADER>() else {
        return Ok(None);
    };
    // An unprotected ChangeCipherSpec too is only tolerated during the handshake (RFC 8446 §5).
    if kind != ContentType::ApplicationData as u8 {
        return Err(RecordError::OuterType(kind));
    }
    // No version but this can have been sent after TLS 1.3 was agreed on, and it is authenticated.
    match u16::from_be_bytes([major, minor]) {
        LEGACY_VERSION => {}
        other => return Err(RecordError::Version(other)),
    }
    match usize::from(u16::from_be_bytes([high, low])) {
        length @ ..=MAX_CIPHERTEXT => Ok(Some(HEADER + length)),
        length => Err(RecordError::TooLong(length)),
    }
}

/// Opens what the peer sends. After an error the connection is over.
#[derive(Debug)]
pub struct Open {
    secret: TrafficSecret,
    iv: [u8; NONCE],
    /// Of the next record.
    sequence: u64,
    opener: Opener,
}

/// What was in a record, within the buffer it came in.
#[derive(Debug, PartialEq, Eq)]
pub enum Opened<'a> {
    /// Application data. May be empty, as often as the peer likes (RFC 8446 §5.1): count those.
    Data(&'a mut [u8]),
    /// The peer closes its direction (`close_notify`) or the connection (anything else but `user_canceled`, whatever the level
    /// says: RFC 8446 §6).
    Alert { level: u8, description: u8 },
    /// A piece of handshake messages, never empty: for [`PostHandshake::read`].
    Handshake(&'a [u8]),
}

impl Open {
    /// # Errors
    /// [`RecordError::Cipher`] when the back end cannot load the key.
    pub fn new(secret: TrafficSecret, sequence: u64) -> Result<Self, RecordError> {
        let keys = secret.keys();
        let opener = Opener::new(keys.algorithm(), keys.key()).map_err(|_| RecordError::Cipher)?;
        Ok(Self { iv: keys.iv(), secret, sequence, opener })
    }

    /// Opens exactly one record, header included, in place.
    ///
    /// # Errors
    /// Those of [`header`], and those of RFC 8446 §5.1, §5.2 and §5.4 about what is inside. [`RecordError::Length`] when `record` is
    /// not as long as its header says.
    pub fn open<'a>(&mut self, record: &'a mut [u8]) -> Result<Opened<'a>, RecordError> {
        if header(record)? != Some(record.len()) {
            return Err(RecordError::Length);
        }
        let next = self.sequence.checked_add(1).ok_or(RecordError::Exhausted)?;
        let (header, body) = record.split_at_mut(HEADER);
        let length =
            self.opener.open(keys::nonce(&self.iv, self.sequence), header, body).map_err(|_| RecordError::Mac)?;
        self.sequence = next;
        if length > MAX_PLAINTEXT + 1 {
            return Err(RecordError::TooLong(length));
        }
        // Content, its type, then any number of zeros (§5.4).
        let end = body[..length].iter().rposition(|byte| *byte != 0).ok_or(RecordError::NoType)?;
        let (content, rest) = body.split_at_mut(end);
        match rest[0] {
            kind if kind == ContentType::ApplicationData as u8 => Ok(Opened::Data(content)),
            kind if kind == ContentType::Handshake as u8 => match &*content {
                [] => Err(RecordError::Empty),
                content => Ok(Opened::Handshake(content)),
            },
            kind if kind == ContentType::Alert as u8 => match *content {
                [] => Err(RecordError::Empty),
                [level, description] => Ok(Opened::Alert { level, description }),
                // Alerts are neither split nor joined (§5.1).
                _ => Err(RecordError::Alert(content.len())),
            },
            kind => Err(RecordError::InnerType(kind)),
        }
    }

    /// Takes the next generation of keys: the record just opened ended with a KeyUpdate.
    ///
    /// # Errors
    /// [`RecordError::Cipher`] when the back end cannot load a key.
    pub fn update(&mut self) -> Result<(), RecordError> {
        *self = Self::new(self.secret.next(), 0)?;
        Ok(())
    }

    /// The number of the next record under this key.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    pub fn suite(&self) -> Suite {
        self.secret.suite()
    }
}

impl Snapshot for Open {
    fn save(&self, to: &mut Writer) {
        seal::save(&self.secret, self.sequence, to);
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        let (secret, sequence) = seal::restore(from)?;
        Self::new(secret, sequence)
            .map_err(|_| RestoreError::Invalid { tag: tag::SECRET, why: "is not accepted by the cipher" })
    }
}

pub use crate::engine::Role;

/// What the peer said after the handshake. How many of each are too many is the caller's matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PostHandshakeEvent {
    /// A ticket (RFC 8446 §4.6.1) was skipped: we do not resume.
    NewSessionTicket,
    /// The peer seals with new keys from the next record on: [`Open::update`] at once. When `requested`, answer with a KeyUpdate of
    /// our own before the next data (§4.6.3).
    KeyUpdate { requested: bool },
}

/// Takes handshake messages apart that come after the handshake, however they are cut into records. Keeps a header at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostHandshake {
    role: Role,
    state: Reading,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Reading {
    /// Of `type u8 | length u24`, the first so many bytes.
    Header { bytes: [u8; MESSAGE_HEADER], have: u8 },
    /// This much of a ticket is still to come.
    Ticket { left: u32 },
    /// The one byte of a KeyUpdate is still to come.
    KeyUpdate,
}

const MESSAGE_HEADER: usize = 4;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
/// Largest ticket we are willing to skip: no real one is near it.
const MAX_TICKET: u32 = 1 << 16;

impl PostHandshake {
    /// `role` is ours: only a client may be sent tickets.
    pub fn new(role: Role) -> Self {
        Self { role, state: Reading::START }
    }

    /// Reads on, up to and including the next event, and removes what was read from `fragment`. To be called until it says `None`,
    /// which means that `fragment` is used up.
    ///
    /// # Errors
    /// [`RecordError::Message`] for a message that may not come (we never offer `post_handshake_auth`), [`RecordError::NotAligned`]
    /// for a KeyUpdate that is not the last of its record (RFC 8446 §5.1), [`RecordError::MessageLength`], [`RecordError::KeyUpdate`].
    pub fn read(&mut self, fragment: &mut &[u8]) -> Result<Option<PostHandshakeEvent>, RecordError> {
        loop {
            match &mut self.state {
                Reading::Ticket { left: 0 } => {
                    self.state = Reading::START;
                    return Ok(Some(PostHandshakeEvent::NewSessionTicket));
                }
                Reading::Ticket { left } => {
                    // As much as there is of what is left, which is not nothing.
                    let skip = u32::try_from(fragment.len()).unwrap_or(u32::MAX).min(*left);
                    let Some((_, rest)) = usize::try_from(skip).ok().and_then(|skip| fragment.split_at_checked(skip))
                    else {
                        return Ok(None);
                    };
                    *fragment = rest;
                    *left -= skip;
                    if *left > 0 {
                        return Ok(None);
                    }
                }
                Reading::KeyUpdate => {
                    let Some((request, rest)) = fragment.split_first() else {
                        return Ok(None);
                    };
                    let requested = match request {
                        0 => false,
                        1 => true,
                        other => return Err(RecordError::KeyUpdate(*other)),
                    };
                    if !rest.is_empty() {
                        return Err(RecordError::NotAligned);
                    }
                    *fragment = rest;
                    self.state = Reading::START;
                    return Ok(Some(PostHandshakeEvent::KeyUpdate { requested }));
                }
                Reading::Header { bytes, have } => {
                    let Some((byte, rest)) = fragment.split_first() else {
                        return Ok(None);
                    };
                    *fragment = rest;
                    bytes[usize::from(*have)] = *byte;
                    *have += 1;
                    if usize::from(*have) == MESSAGE_HEADER {
                        self.state = Reading::body(self.role, *bytes)?;
                    }
                }
            }
        }
    }

    /// To be asked for every record that is not a handshake record: none may come between the pieces of a message (RFC 8446 §5.1).
    ///
    /// # Errors
    /// [`RecordError::Interleaved`].
    pub fn check_interleaving(&self) -> Result<(), RecordError> {
        if self.state == Reading::START { Ok(()) } else { Err(RecordError::Interleaved) }
    }
}

impl Reading {
    const START: Self = Self::Header { bytes: [0; MESSAGE_HEADER], have: 0 };

    fn body(role: Role, header: [u8; MESSAGE_HEADER]) -> Result<Self, RecordError> {
        let [kind, length @ ..] = header;
        let length = u32::from_be_bytes([0, length[0], length[1], length[2]]);
        match (kind, role) {
            (NEW_SESSION_TICKET, Role::Client) if length <= MAX_TICKET => Ok(Self::Ticket { left: length }),
            (KEY_UPDATE, _) if length == 1 => Ok(Self::KeyUpdate),
            (NEW_SESSION_TICKET, Role::Client) | (KEY_UPDATE, _) => Err(RecordError::MessageLength { kind, length }),
            _ => Err(RecordError::Message(kind)),
        }
    }
}

/// Fields of a snapshot of [`PostHandshake`]: at most one of the last three.
mod field {
    pub(super) const CLIENT: u16 = 1;
    pub(super) const HEADER: u16 = 2;
    pub(super) const TICKET: u16 = 3;
    pub(super) const KEY_UPDATE: u16 = 4;
}

impl Snapshot for PostHandshake {
    fn save(&self, to: &mut Writer) {
        to.flag(field::CLIENT, self.role == Role::Client);
        match &self.state {
            Reading::Header { bytes, have } => to.bytes(field::HEADER, &bytes[..usize::from(*have)]),
            Reading::Ticket { left } => to.u32(field::TICKET, *left),
            Reading::KeyUpdate => to.flag(field::KEY_UPDATE, true),
        }
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[field::CLIENT, field::HEADER, field::TICKET, field::KEY_UPDATE])?;
        let role = if from.flag(field::CLIENT)? { Role::Client } else { Role::Server };
        let invalid = |tag| RestoreError::Invalid { tag, why: "is no state of this reader" };
        let mut resumed = Self::new(role);
        if from.optional(field::KEY_UPDATE)?.is_some() {
            resumed.state = Reading::KeyUpdate;
        } else if from.optional(field::TICKET)?.is_some() {
            let left = from.u32(field::TICKET)?;
            if role == Role::Server || left > MAX_TICKET {
                return Err(invalid(field::TICKET));
            }
            resumed.state = Reading::Ticket { left };
        } else {
            let mut read = from.bytes(field::HEADER)?;
            if read.len() >= MESSAGE_HEADER || resumed.read(&mut read) != Ok(None) {
                return Err(invalid(field::HEADER));
            }
        }
        Ok(resumed)
    }
}
