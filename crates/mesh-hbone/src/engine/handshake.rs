//! The TLS 1.3 handshake (RFC 8446 §4), done by rustls, without a socket: bytes in, bytes out, and at the end the two directions of
//! the record layer. The only module that names rustls; everything else knows [`Established`].
//!
//! rustls is fed whole records and not one more than it needs, so that nothing of what follows the handshake, be it session tickets
//! or data, ends up in its buffers. It does not give away traffic secrets, only keys, with which a KeyUpdate could not be followed: the
//! secrets come through its key log, and are checked against the keys.

use std::{
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
};

use rustls::{
    ClientConfig, ClientConnection, Connection, ConnectionTrafficSecrets, KeyLog, ServerConfig, ServerConnection,
    SupportedCipherSuite,
    crypto::{aws_lc_rs::cipher_suite, tls13::OkmBlock},
};
use rustls_pki_types::{CertificateDer, ServerName};
use zeroize::Zeroizing;

use super::record::{
    HEADER, Keys, MAX_RECORD, Open, PostHandshake, RecordError, Role, Seal, Suite, TrafficSecret, aead::Algorithm,
};

/// Most bytes a peer may send us for one handshake. Certificate chains make the most of it; rustls stops at 64 KiB for one message.
const MAX_HANDSHAKE: usize = 256 * 1024;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    #[error("TLS handshake failed")]
    Tls(#[source] rustls::Error),
    #[error("TLS handshake failed: no room for what the peer sends")]
    Buffer(#[source] io::Error),
    #[error("the peer closed the connection during the TLS handshake")]
    Closed,
    #[error("the peer sent a TLS record of {0} bytes")]
    RecordTooLong(usize),
    #[error("the peer sent more than {MAX_HANDSHAKE} bytes for a TLS handshake")]
    TooLong,
    #[error("the TLS handshake is not finished")]
    Unfinished,
    #[error("cipher suite {0:#06x} was negotiated, which tunnels do not use")]
    Suite(u16),
    #[error("the derived traffic keys are not those of the TLS handshake")]
    Keys,
    #[error("the record layer cannot take over")]
    Record(#[source] RecordError),
}

/// A handshake under way.
///
/// To be driven as: [`Self::read`] what came in, send what [`Self::write`] gives, until [`Self::is_done`]; then [`Self::finish`]. What
/// `read` did not consume is to be kept, and after the handshake belongs to [`Open`]. A client starts with `write`.
pub struct Handshake {
    connection: Connection,
    secrets: Arc<SecretLog>,
    role: Role,
    received: usize,
}

/// What a handshake leads to.
#[derive(Debug)]
pub struct Established {
    pub seal: Seal,
    pub open: Open,
    pub post_handshake: PostHandshake,
    pub alpn: Option<Vec<u8>>,
    /// As the peer sent them, its own first; verified as the configuration demands.
    pub peer_certificates: Vec<CertificateDer<'static>>,
}

impl Handshake {
    /// Neither side may send data early: it would be lost.
    ///
    /// # Errors
    /// [`HandshakeError::Tls`] when the configuration cannot be used.
    pub fn client(config: &ClientConfig, name: ServerName<'static>) -> Result<Self, HandshakeError> {
        let mut config = config.clone();
        let secrets = Arc::new(SecretLog::new(config.key_log));
        config.key_log = secrets.clone();
        config.enable_secret_extraction = true;
        config.enable_early_data = false;
        let connection = ClientConnection::new(Arc::new(config), name).map_err(HandshakeError::Tls)?;
        Ok(Self { connection: connection.into(), secrets, role: Role::Client, received: 0 })
    }

    /// As [`Self::client`].
    ///
    /// # Errors
    /// [`HandshakeError::Tls`] when the configuration cannot be used.
    pub fn server(config: &ServerConfig) -> Result<Self, HandshakeError> {
        let mut config = config.clone();
        let secrets = Arc::new(SecretLog::new(config.key_log));
        config.key_log = secrets.clone();
        config.enable_secret_extraction = true;
        config.max_early_data_size = 0;
        let connection = ServerConnection::new(Arc::new(config)).map_err(HandshakeError::Tls)?;
        Ok(Self { connection: connection.into(), secrets, role: Role::Server, received: 0 })
    }

    /// Takes whole records from the start of `input`, as many as the handshake needs, and says how many bytes that were. An incomplete
    /// record is left alone; none is longer than [`MAX_RECORD`].
    ///
    /// # Errors
    /// All are final. [`Self::write`] may have an alert to send even so.
    pub fn read(&mut self, input: &[u8]) -> Result<usize, HandshakeError> {
        let mut consumed = 0;
        while self.connection.is_handshaking() {
            let rest = &input[consumed..];
            let Some(length) = self.next_record(rest)? else { break };
            self.feed(&rest[..length])?;
            consumed += length;
        }
        Ok(consumed)
    }

    /// Appends what is to be sent.
    pub fn write(&mut self, out: &mut Vec<u8>) {
        while self.connection.wants_write() {
            self.connection.write_tls(out).expect("memory takes everything");
        }
    }

    /// Both sides have finished and everything was written.
    pub fn is_done(&self) -> bool {
        !self.connection.is_handshaking() && !self.connection.wants_write()
    }

    /// Takes the connection over.
    ///
    /// # Errors
    /// [`HandshakeError::Unfinished`] before [`Self::is_done`], and those of the change from rustls to our own record layer.
    pub fn finish(self) -> Result<Established, HandshakeError> {
        if !self.is_done() {
            return Err(HandshakeError::Unfinished);
        }
        let negotiated = self.connection.negotiated_cipher_suite().ok_or(HandshakeError::Unfinished)?;
        let number = u16::from(negotiated.suite());
        let suite = Suite::from_u16(number).ok_or(HandshakeError::Suite(number))?;
        let alpn = self.connection.alpn_protocol().map(<[u8]>::to_vec);
        let peer_certificates = self.connection.peer_certificates().unwrap_or_default().to_vec();

        let rustls_keys = self.connection.dangerous_extract_secrets().map_err(HandshakeError::Tls)?;
        let [client, server] = self.secrets.take();
        let (ours, theirs) = match self.role {
            Role::Client => (client, server),
            Role::Server => (server, client),
        };
        let (sequence, keys) = rustls_keys.tx;
        let seal = Seal::new(check(suite, &ours, &keys)?, sequence).map_err(HandshakeError::Record)?;
        let (sequence, keys) = rustls_keys.rx;
        let open = Open::new(check(suite, &theirs, &keys)?, sequence).map_err(HandshakeError::Record)?;
        Ok(Established { seal, open, post_handshake: PostHandshake::new(self.role), alpn, peer_certificates })
    }

    /// The length of the record at the start of `bytes` once it is complete.
    fn next_record(&mut self, bytes: &[u8]) -> Result<Option<usize>, HandshakeError> {
        let Some(&[kind, _, _, high, low]) = bytes.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = HEADER + usize::from(u16::from_be_bytes([high, low]));
        // Waiting for the rest of something that is no TLS would be in vain. rustls has the right alert for it.
        let content_types = 20..=23;
        if length > MAX_RECORD || !content_types.contains(&kind) {
            self.feed(&bytes[..HEADER])?;
            return Err(HandshakeError::RecordTooLong(length));
        }
        Ok(Some(length).filter(|length| *length <= bytes.len()))
    }

    fn feed(&mut self, mut record: &[u8]) -> Result<(), HandshakeError> {
        self.received = self.received.saturating_add(record.len());
        if self.received > MAX_HANDSHAKE {
            return Err(HandshakeError::TooLong);
        }
        while !record.is_empty() {
            if self.connection.read_tls(&mut record).map_err(HandshakeError::Buffer)? == 0 {
                return Err(HandshakeError::Closed);
            }
        }
        let state = self.connection.process_new_packets().map_err(HandshakeError::Tls)?;
        if state.peer_has_closed() {
            return Err(HandshakeError::Closed);
        }
        Ok(())
    }
}

impl fmt::Debug for Handshake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handshake").field("role", &self.role).field("received", &self.received).finish_non_exhaustive()
    }
}

/// HKDF-Expand (RFC 5869 §2.3), `secret` being as long as the suite's hash.
///
/// Always AWS-LC's, whichever provider does the handshakes: a restored tunnel goes on deriving keys without any configuration to take
/// a provider from, and each handshake compares the outcome with what its provider derived.
///
/// # Panics
/// When `out` is longer than 255 hashes.
pub fn expand(suite: Suite, secret: &[u8], info: &[&[u8]], out: &mut [u8]) {
    let suite: &SupportedCipherSuite = match suite {
        Suite::Aes128GcmSha256 => &cipher_suite::TLS13_AES_128_GCM_SHA256,
        Suite::Aes256GcmSha384 => &cipher_suite::TLS13_AES_256_GCM_SHA384,
    };
    let hkdf = suite.tls13().expect("a suite of TLS 1.3").hkdf_provider;
    hkdf.expander_for_okm(&OkmBlock::new(secret)).expand_slice(info, out).expect("keys are short");
}

/// The secret, if it leads to the keys that rustls uses.
fn check(suite: Suite, secret: &[u8], theirs: &ConnectionTrafficSecrets) -> Result<TrafficSecret, HandshakeError> {
    let secret = TrafficSecret::new(suite, secret).ok_or(HandshakeError::Keys)?;
    let ours: Keys = secret.keys();
    let same = match (ours.algorithm(), theirs) {
        (Algorithm::Aes128Gcm, ConnectionTrafficSecrets::Aes128Gcm { key, iv })
        | (Algorithm::Aes256Gcm, ConnectionTrafficSecrets::Aes256Gcm { key, iv }) => {
            ours.key() == key.as_ref() && ours.iv() == iv.as_ref()
        }
        _ => false,
    };
    if same { Ok(secret) } else { Err(HandshakeError::Keys) }
}

/// Catches the first application traffic secrets of one connection. Whoever asked for a key log still gets it.
struct SecretLog {
    next: Arc<dyn KeyLog>,
    /// The client's and the server's.
    secrets: Mutex<[Zeroizing<Vec<u8>>; 2]>,
}

impl SecretLog {
    fn new(next: Arc<dyn KeyLog>) -> Self {
        Self { next, secrets: Mutex::default() }
    }

    fn take(&self) -> [Zeroizing<Vec<u8>>; 2] {
        std::mem::take(&mut *self.secrets.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn position(label: &str) -> Option<usize> {
        ["CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0"].iter().position(|known| *known == label)
    }
}

impl KeyLog for SecretLog {
    fn log(&self, label: &str, client_random: &[u8], secret: &[u8]) {
        if let Some(position) = Self::position(label) {
            self.secrets.lock().unwrap_or_else(PoisonError::into_inner)[position] = Zeroizing::new(secret.to_vec());
        }
        if self.next.will_log(label) {
            self.next.log(label, client_random, secret);
        }
    }

    fn will_log(&self, label: &str) -> bool {
        Self::position(label).is_some() || self.next.will_log(label)
    }
}

impl fmt::Debug for SecretLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretLog").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
