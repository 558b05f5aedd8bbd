//! A tunnel after its handshake: HTTP/2 in TLS 1.3 records. Ciphertext in, ciphertext out; still no socket, clock or task.

use super::{
    conn::{Conn, ConnError, Event},
    frame::ErrorCode,
    limits::{Abuse, Limits},
    out::Out,
    record::{
        self, Open, Opened, PostHandshake, PostHandshakeEvent, RecordError, Seal,
        alert::{CLOSE_NOTIFY, USER_CANCELED},
    },
    state::{Fields, RestoreError, Snapshot, Writer},
};

/// Largest record on the wire: what has to be kept of one that is not complete.
pub const MAX_RECORD: usize = record::MAX_RECORD;

/// Why a tunnel is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TunnelError {
    #[error(transparent)]
    Connection(#[from] ConnError),
    #[error("a TLS record that cannot be accepted")]
    Record(#[from] RecordError),
    /// An alert other than close_notify (RFC 8446 §6.2).
    #[error("the peer gave up with TLS alert {0}")]
    Alert(u8),
}

/// What lies at the front of the input.
#[derive(Debug)]
pub enum Step {
    /// Ask again: the record in front goes on, or the next one begins.
    Event(Event),
    /// More bytes are needed; everything before `at` is done with.
    Starved,
    /// The peer has ended its direction with close_notify; what follows is not looked at.
    Closed,
}

/// See the module.
#[derive(Debug)]
pub struct Tunnel {
    seal: Seal,
    open: Open,
    post_handshake: PostHandshake,
    /// Records that cost us and bring nothing.
    limits: Limits,
    /// The peer asked for a new key of ours (RFC 8446 §4.6.3).
    update_owed: bool,
    peer_closed: bool,
    pub conn: Conn,
    pub out: Out,
    /// The start of a record whose end has not come: only between turns, and never longer than a record.
    pub carry: Vec<u8>,
}

/// The opened record that [`Tunnel::step`] is in the middle of: a range of the input, and how far it has been read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cursor {
    /// The first byte not looked at.
    pub at: usize,
    plaintext: (usize, usize),
}

impl Tunnel {
    pub fn new(seal: Seal, open: Open, post_handshake: PostHandshake, conn: Conn, out: Out) -> Self {
        Self {
            seal,
            open,
            post_handshake,
            limits: Limits::default(),
            update_owed: false,
            peer_closed: false,
            conn,
            out,
            carry: Vec::new(),
        }
    }

    /// The next thing in `input`, which is opened in place. Between two calls the input stays the same. When it is
    /// [starved](Step::Starved), the bytes from `cursor.at` on belong in front of the next input, with a new cursor.
    ///
    /// # Errors
    /// The tunnel is over; [`Self::fail`] tells the peer.
    pub fn step(&mut self, input: &mut [u8], cursor: &mut Cursor) -> Result<Step, TunnelError> {
        loop {
            let (start, end) = cursor.plaintext;
            let mut read = start;
            let event = self.conn.next(input.get(..end).unwrap_or_default(), &mut read, &mut self.out)?;
            cursor.plaintext.0 = read;
            if let Some(event) = event {
                return Ok(Step::Event(event));
            }
            if self.peer_closed {
                return Ok(Step::Closed);
            }
            let rest = input.get_mut(cursor.at..).unwrap_or_default();
            let Some(length) = record::header(rest)? else { return Ok(Step::Starved) };
            let Some(record) = rest.get_mut(..length) else { return Ok(Step::Starved) };
            let start = cursor.at + record::HEADER;
            cursor.at += length;
            cursor.plaintext = (start, start + self.open(record)?);
        }
    }

    /// How many bytes of HTTP/2 the record brings.
    fn open(&mut self, record: &mut [u8]) -> Result<usize, TunnelError> {
        let now = self.conn.now();
        match self.open.open(record)? {
            Opened::Data(data) => {
                self.post_handshake.check_interleaving()?;
                self.conn.begin_record();
                if data.is_empty() {
                    self.limits.spend(Abuse::Records, now).map_err(ConnError::from)?;
                }
                Ok(data.len())
            }
            Opened::Alert { description: CLOSE_NOTIFY, .. } => {
                self.peer_closed = true;
                Ok(0)
            }
            // Only announces a close_notify (RFC 8446 §6.1).
            Opened::Alert { description: USER_CANCELED, .. } => {
                self.limits.spend(Abuse::Records, now).map_err(ConnError::from)?;
                Ok(0)
            }
            Opened::Alert { description, .. } => Err(TunnelError::Alert(description)),
            Opened::Handshake(mut fragment) => {
                self.limits.spend(Abuse::Records, now).map_err(ConnError::from)?;
                while let Some(event) = self.post_handshake.read(&mut fragment)? {
                    if let PostHandshakeEvent::KeyUpdate { requested } = event {
                        self.open.update()?;
                        self.update_owed |= requested;
                    }
                }
                Ok(0)
            }
        }
    }

    /// Makes about `bytes` of ciphertext ready in [`Out::ready`].
    ///
    /// # Errors
    /// When no key can seal any more.
    pub fn seal(&mut self, bytes: usize) -> Result<(), TunnelError> {
        // Due before the next data (RFC 8446 §4.6.3): behind what waits to be written already, one answer is enough.
        let due = self.out.is_all_written() || self.out.will_seal(bytes);
        if due && std::mem::take(&mut self.update_owed) {
            self.out.update_key(&mut self.seal, false)?;
        }
        self.out.seal(bytes, &mut self.seal)?;
        Ok(())
    }

    /// Whether there is something to write, sealed or not.
    pub fn wants_write(&self) -> bool {
        self.update_owed || !self.out.is_empty()
    }

    /// A new key for our direction, and one for the peer's.
    ///
    /// # Errors
    /// When no key can seal any more.
    pub fn rotate(&mut self) -> Result<(), TunnelError> {
        Ok(self.out.update_key(&mut self.seal, true)?)
    }

    /// Says goodbye in order: GOAWAY, close_notify. Whatever else was queued goes first.
    pub fn close(&mut self) {
        self.conn.close(ErrorCode::NO_ERROR, &mut self.out);
        self.out.alert(1, CLOSE_NOTIFY);
    }

    /// Tells the peer why the tunnel is over, ahead of what has not been sealed.
    pub fn fail(&mut self, error: &TunnelError) {
        // But our SETTINGS come before anything else (RFC 9113 §3.4).
        if self.seal.sequence() > 0 {
            self.out.discard_unsealed();
        }
        match error {
            TunnelError::Connection(error) => {
                self.conn.close(error.code, &mut self.out);
                self.out.alert(1, CLOSE_NOTIFY);
            }
            TunnelError::Record(error) => self.out.alert(2, error.alert()),
            TunnelError::Alert(_) => {}
        }
    }

    pub fn is_peer_closed(&self) -> bool {
        self.peer_closed
    }
}

impl Snapshot for Tunnel {
    fn save(&self, to: &mut Writer) {
        to.snapshot(1, &self.seal);
        to.snapshot(2, &self.open);
        to.snapshot(3, &self.post_handshake);
        to.snapshot(4, &self.limits);
        to.flag(5, self.update_owed);
        to.flag(6, self.peer_closed);
        to.snapshot(7, &self.conn);
        to.snapshot(8, &self.out);
        to.bytes(9, &self.carry);
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[1, 2, 3, 4, 5, 6, 7, 8, 9])?;
        let carry = from.bytes(9)?;
        if carry.len() > MAX_RECORD {
            return Err(RestoreError::Invalid { tag: 9, why: "is longer than a record" });
        }
        Ok(Self {
            seal: from.snapshot(1)?,
            open: from.snapshot(2)?,
            post_handshake: from.snapshot(3)?,
            limits: from.snapshot(4)?,
            update_owed: from.flag(5)?,
            peer_closed: from.flag(6)?,
            conn: from.snapshot(7)?,
            out: from.snapshot(8)?,
            carry: carry.to_vec(),
        })
    }
}
