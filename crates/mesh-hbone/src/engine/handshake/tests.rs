use std::io::{Read as _, Write as _};

use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    RootCertStore,
    crypto::{CryptoProvider, aws_lc_rs},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::engine::record::{
    ALERT_RECORD, ContentType, KEY_UPDATE_RECORD, MAX_PLAINTEXT, OVERHEAD, Opened, PostHandshakeEvent, aead::RESUMES,
    alert, header,
};

const SUITES: [Suite; 2] = [Suite::Aes128GcmSha256, Suite::Aes256GcmSha384];
const NAME: &str = "peer.test";

fn configs(suite: Suite, tickets: usize) -> (ClientConfig, ServerConfig) {
    let provider = Arc::new(CryptoProvider {
        cipher_suites: vec![match suite {
            Suite::Aes128GcmSha256 => cipher_suite::TLS13_AES_128_GCM_SHA256,
            Suite::Aes256GcmSha384 => cipher_suite::TLS13_AES_256_GCM_SHA384,
        }],
        ..aws_lc_rs::default_provider()
    });
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![NAME.to_owned()]).unwrap().self_signed(&key).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let roots = Arc::new(roots);
    let chain = vec![certificate.der().clone()];
    let key = || PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));

    let mut client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(chain.clone(), key())
        .unwrap();
    client.alpn_protocols = vec![b"h2".to_vec()];
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build().unwrap();
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key())
        .unwrap();
    server.alpn_protocols = vec![b"h2".to_vec()];
    server.send_tls13_tickets = tickets;
    if tickets == 0 {
        server.session_storage = Arc::new(NoServerSessionStorage {});
    }
    (client, server)
}

fn name() -> ServerName<'static> {
    ServerName::try_from(NAME).unwrap()
}

/// Our handshake and a rustls of the other kind.
fn start(role: Role, suite: Suite, tickets: usize) -> (Handshake, Connection) {
    let (client, server) = configs(suite, tickets);
    match role {
        Role::Client => {
            (Handshake::client(&client, name()).unwrap(), ServerConnection::new(Arc::new(server)).unwrap().into())
        }
        Role::Server => {
            (Handshake::server(&server).unwrap(), ClientConnection::new(Arc::new(client), name()).unwrap().into())
        }
    }
}

fn feed(peer: &mut Connection, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        peer.read_tls(&mut bytes).unwrap();
        peer.process_new_packets().unwrap();
    }
}

fn drain(peer: &mut Connection) -> Vec<u8> {
    let mut out = vec![];
    while peer.wants_write() {
        peer.write_tls(&mut out).unwrap();
    }
    out
}

/// Goes through the handshake, what we receive arriving `chunk` bytes at a time. Returns what came behind it as well.
fn shake(mut ours: Handshake, mut peer: Connection, chunk: usize) -> (Established, Connection, Vec<u8>) {
    let (mut inbox, mut to_peer) = (vec![], vec![]);
    while !ours.is_done() || peer.is_handshaking() {
        ours.write(&mut to_peer);
        feed(&mut peer, &std::mem::take(&mut to_peer));
        let arriving = drain(&mut peer);
        for bytes in arriving.chunks(chunk) {
            inbox.extend_from_slice(bytes);
            let used = ours.read(&inbox).unwrap();
            inbox.drain(..used);
        }
        if !ours.connection.is_handshaking() {
            assert_eq!(ours.read(&inbox).unwrap(), 0, "nothing more is taken");
        }
    }
    (ours.finish().unwrap(), peer, inbox)
}

/// A connection after the handshake, with what its driver would do.
struct Side {
    established: Established,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    received: Vec<u8>,
    events: Vec<PostHandshakeEvent>,
    alerts: Vec<u8>,
}

impl Side {
    fn new(established: Established, inbox: Vec<u8>) -> Self {
        let mut side = Self { established, inbox, outbox: vec![], received: vec![], events: vec![], alerts: vec![] };
        side.take(&[]);
        side
    }

    fn send(&mut self, data: &[u8], record_len: usize) {
        for chunk in data.chunks(record_len) {
            let mut record = vec![0; chunk.len() + OVERHEAD];
            record[HEADER..HEADER + chunk.len()].copy_from_slice(chunk);
            self.established.seal.seal(&mut record, ContentType::ApplicationData, chunk.len()).unwrap();
            self.outbox.extend(record);
        }
    }

    fn key_update(&mut self, request: bool) {
        let mut record = [0; KEY_UPDATE_RECORD];
        self.established.seal.key_update(&mut record, request).unwrap();
        self.outbox.extend(record);
    }

    fn take(&mut self, bytes: &[u8]) {
        self.inbox.extend_from_slice(bytes);
        while let Some(length) = header(&self.inbox).unwrap().filter(|length| *length <= self.inbox.len()) {
            let mut record: Vec<u8> = self.inbox.drain(..length).collect();
            match self.established.open.open(&mut record).unwrap() {
                Opened::Data(data) => self.received.extend_from_slice(data),
                Opened::Alert { description, .. } => self.alerts.push(description),
                Opened::Handshake(mut fragment) => {
                    let mut answer = false;
                    while let Some(event) = self.established.post_handshake.read(&mut fragment).unwrap() {
                        self.events.push(event);
                        if let PostHandshakeEvent::KeyUpdate { requested } = event {
                            self.established.open.update().unwrap();
                            answer = requested;
                        }
                    }
                    if answer {
                        self.key_update(false);
                    }
                }
            }
        }
    }

    /// Delivers what is under way, both ways.
    fn exchange(&mut self, peer: &mut Connection) -> Vec<u8> {
        let mut received = vec![];
        loop {
            let (out, arriving) = (std::mem::take(&mut self.outbox), drain(peer));
            if out.is_empty() && arriving.is_empty() {
                return received;
            }
            for bytes in out.chunks(5000) {
                feed(peer, bytes);
                let mut buffer = vec![0; 1 << 17];
                while let Ok(length @ 1..) = peer.reader().read(&mut buffer) {
                    received.extend_from_slice(&buffer[..length]);
                }
            }
            self.take(&arriving);
        }
    }
}

fn connected(role: Role, suite: Suite, tickets: usize) -> (Side, Connection) {
    let (ours, peer) = start(role, suite, tickets);
    let (established, peer, rest) = shake(ours, peer, usize::MAX);
    (Side::new(established, rest), peer)
}

fn everywhere(test: impl Fn(Role, Suite)) {
    for role in [Role::Client, Role::Server] {
        for suite in SUITES {
            test(role, suite);
        }
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}

fn send_through(peer: &mut Connection, data: &[u8]) {
    peer.set_buffer_limit(None);
    peer.writer().write_all(data).unwrap();
}

#[test]
fn takes_over_from_rustls_as_client_and_server() {
    everywhere(|role, suite| {
        let (mut side, mut peer) = connected(role, suite, 0);
        assert_eq!(side.established.seal.suite(), suite);
        assert_eq!(side.established.alpn.as_deref(), Some(&b"h2"[..]));
        assert_eq!(side.established.peer_certificates.len(), 1);
        assert_eq!((side.established.seal.sequence(), side.established.open.sequence()), (0, 0));
        let sizes = [0, 1, 2, 63, 1000, 16_383, 16_384, 16_385, 40_000];
        for size in sizes {
            let data = pattern(size);
            send_through(&mut peer, &data);
            side.send(&data, MAX_PLAINTEXT);
            assert_eq!(side.exchange(&mut peer), data, "{size} sent");
            assert_eq!(std::mem::take(&mut side.received), data, "{size} received");
        }
        side.send(&pattern(3000), 7);
        assert_eq!(side.exchange(&mut peer), pattern(3000), "many small records");
    });
}

#[test]
fn bytes_may_arrive_one_by_one() {
    everywhere(|role, suite| {
        let (ours, peer) = start(role, suite, 2);
        if role == Role::Server && !RESUMES {
            return;
        }
        let (established, mut peer, rest) = shake(ours, peer, 1);
        let mut side = Side::new(established, rest);
        send_through(&mut peer, &pattern(500));
        for byte in drain(&mut peer) {
            side.take(&[byte]);
        }
        assert_eq!(side.received, pattern(500));
    });
}

#[test]
fn tickets_of_a_server_are_skipped() {
    for suite in SUITES {
        let (mut side, mut peer) = connected(Role::Client, suite, 4);
        send_through(&mut peer, b"after the tickets");
        side.exchange(&mut peer);
        assert_eq!(side.events, [PostHandshakeEvent::NewSessionTicket; 4]);
        assert_eq!(side.received, b"after the tickets");
        assert!(side.established.open.sequence() >= 2);
    }
}

/// rustls sealed tickets under the application keys before it is asked for them: we go on behind them.
#[test]
fn sequence_numbers_continue_where_rustls_was() {
    let (ours, peer) = start(Role::Server, SUITES[0], 2);
    let (mut ours, mut peer) = (ours, peer);
    let mut bytes = vec![];
    while !ours.is_done() {
        assert_eq!(ours.read(&drain(&mut peer)).map(|_| ()).map_err(|e| e.to_string()), Ok(()));
        ours.write(&mut bytes);
        feed(&mut peer, &std::mem::take(&mut bytes));
    }
    match ours.finish() {
        Ok(established) => {
            assert!(established.seal.sequence() > 0);
            let mut side = Side::new(established, vec![]);
            side.send(b"hello", 16);
            assert_eq!(side.exchange(&mut peer), b"hello");
        }
        // Such keys cannot start behind the tickets.
        Err(error) if !RESUMES => assert!(matches!(error, HandshakeError::Record(RecordError::Cipher))),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn key_updates_of_rustls_are_followed_and_answered() {
    everywhere(|role, suite| {
        let (mut side, mut peer) = connected(role, suite, 0);
        for round in 1..=3 {
            send_through(&mut peer, b"old");
            peer.refresh_traffic_keys().unwrap();
            send_through(&mut peer, b"new");
            side.exchange(&mut peer);
            assert_eq!(side.events, vec![PostHandshakeEvent::KeyUpdate { requested: true }; round]);
            side.send(b"ours", 100);
            assert_eq!(side.exchange(&mut peer), b"ours");
        }
        assert_eq!(side.received, b"oldnew".repeat(3));
    });
}

#[test]
fn our_key_updates_are_understood_by_rustls() {
    everywhere(|role, suite| {
        let (mut side, mut peer) = connected(role, suite, 0);
        for request in [true, false, true] {
            side.send(b"old", 100);
            side.key_update(request);
            side.send(b"new", 100);
            assert_eq!(side.exchange(&mut peer), b"oldnew");
            side.events.clear();
            // The answer goes out with the peer's next data at the latest.
            send_through(&mut peer, b"theirs");
            side.exchange(&mut peer);
            assert_eq!(std::mem::take(&mut side.received), b"theirs");
        }
    });
}

#[test]
fn closing_is_understood_both_ways() {
    everywhere(|role, suite| {
        let (mut side, mut peer) = connected(role, suite, 0);
        let mut record = [0; ALERT_RECORD];
        side.established.seal.close_notify(&mut record).unwrap();
        peer.read_tls(&mut &record[..]).unwrap();
        assert!(peer.process_new_packets().unwrap().peer_has_closed());
        peer.send_close_notify();
        side.take(&drain(&mut peer));
        assert_eq!(side.alerts, [alert::CLOSE_NOTIFY]);
    });
}

#[test]
fn a_saved_and_restored_connection_goes_on_with_rustls() {
    use crate::engine::state::{decode, encode};

    everywhere(|role, suite| {
        let (mut side, mut peer) = connected(role, suite, 0);
        for round in 0..4 {
            send_through(&mut peer, &pattern(20_000));
            side.send(&pattern(20_000), MAX_PLAINTEXT);
            if round == 2 {
                peer.refresh_traffic_keys().unwrap();
            }
            assert_eq!(side.exchange(&mut peer), pattern(20_000));
            assert_eq!(std::mem::take(&mut side.received), pattern(20_000));
            if !side.established.seal.can_be_saved() {
                assert!(decode::<Seal>(&encode(&side.established.seal)).is_err());
                side.key_update(false);
            }
            side.established.seal = decode(&encode(&side.established.seal)).unwrap();
            side.established.open = decode(&encode(&side.established.open)).unwrap();
            side.established.post_handshake = decode(&encode(&side.established.post_handshake)).unwrap();
        }
    });
}

#[test]
fn not_before_the_end() {
    for role in [Role::Client, Role::Server] {
        let (ours, _) = start(role, SUITES[0], 0);
        assert!(matches!(ours.finish(), Err(HandshakeError::Unfinished)));
    }
    // The client has everything, but its own Finished is not written yet.
    let (mut ours, mut peer) = start(Role::Client, SUITES[0], 0);
    let mut hello = vec![];
    ours.write(&mut hello);
    feed(&mut peer, &hello);
    let flight = drain(&mut peer);
    assert_eq!(ours.read(&flight).unwrap(), flight.len());
    assert!(!ours.is_done());
    let mut finished = vec![];
    ours.write(&mut finished);
    assert!(!finished.is_empty() && ours.is_done());
}

#[test]
fn a_refused_peer_is_told() {
    let (_, server) = configs(SUITES[0], 0);
    let (client, _) = configs(SUITES[0], 0);
    let mut ours = Handshake::client(&client, name()).unwrap();
    let mut peer: Connection = ServerConnection::new(Arc::new(server)).unwrap().into();
    let mut bytes = vec![];
    ours.write(&mut bytes);
    feed(&mut peer, &bytes);
    assert!(matches!(ours.read(&drain(&mut peer)), Err(HandshakeError::Tls(rustls::Error::InvalidCertificate(_)))));
    bytes.clear();
    ours.write(&mut bytes);
    let mut rest = &bytes[..];
    let mut told = Ok(());
    while !rest.is_empty() {
        peer.read_tls(&mut rest).unwrap();
        told = told.and_then(|()| peer.process_new_packets().map(|_| ()));
    }
    assert!(matches!(told, Err(rustls::Error::AlertReceived(_))), "{told:?}");
    assert!(matches!(ours.finish(), Err(HandshakeError::Unfinished)));
}

#[test]
fn what_is_no_tls_is_refused_at_once() {
    let (mut ours, _) = start(Role::Server, SUITES[0], 0);
    assert_eq!(ours.read(b"GET").unwrap(), 0);
    assert!(matches!(ours.read(b"GET / HTTP/1.1\r\n"), Err(HandshakeError::Tls(_))));
    let mut alert = vec![];
    ours.write(&mut alert);
    assert_eq!(alert, [21, 3, 3, 0, 2, 2, alert::DECODE_ERROR]);

    for length in [0x4101_u16, 0xffff] {
        let (mut ours, _) = start(Role::Server, SUITES[0], 0);
        let [high, low] = length.to_be_bytes();
        assert!(ours.read(&[22, 3, 1, high, low]).is_err());
    }
}

#[test]
fn a_peer_cannot_keep_us_busy_for_ever() {
    let (mut ours, _) = start(Role::Server, SUITES[0], 0);
    // A ClientHello of 16 MiB in the making.
    let mut record = vec![0; 5 + 16_384];
    record[..9].copy_from_slice(&[22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff]);
    let refused = (0..100).find_map(|_| ours.read(&record).err());
    assert!(refused.is_some());
}

/// Unprotected alerts are believed only when they do harm to nobody but their sender; the others are limited in number.
#[test]
fn alerts_end_the_handshake() {
    let alert = |level, description| [21, 3, 3, 0, 2, level, description];
    let (mut ours, _) = start(Role::Server, SUITES[0], 0);
    assert!(matches!(ours.read(&alert(2, 40)), Err(HandshakeError::Tls(rustls::Error::AlertReceived(_)))));
    let (mut ours, _) = start(Role::Server, SUITES[0], 0);
    assert!(ours.read(&alert(1, alert::CLOSE_NOTIFY).repeat(10)).is_err());
}

#[test]
fn whoever_wanted_a_key_log_still_gets_it() {
    #[derive(Debug, Default)]
    struct Labels(Mutex<Vec<String>>);
    impl KeyLog for Labels {
        fn log(&self, label: &str, _: &[u8], _: &[u8]) {
            self.0.lock().unwrap().push(label.to_owned());
        }
    }
    let (mut client, server) = configs(SUITES[0], 0);
    let labels = Arc::new(Labels::default());
    client.key_log = labels.clone();
    let ours = Handshake::client(&client, name()).unwrap();
    assert!(format!("{ours:?}{:?}", ours.secrets).len() < 200);
    shake(ours, ServerConnection::new(Arc::new(server)).unwrap().into(), 100);
    let labels = labels.0.lock().unwrap();
    for wanted in ["CLIENT_HANDSHAKE_TRAFFIC_SECRET", "CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0"] {
        assert_eq!(labels.iter().filter(|label| *label == wanted).count(), 1, "{wanted}");
    }
}

#[test]
fn a_secret_that_does_not_lead_to_the_keys_is_noticed() {
    for suite in SUITES {
        let keys = || ConnectionTrafficSecrets::Aes128Gcm { key: [7; 32].into(), iv: [7; 12].into() };
        assert!(matches!(check(suite, &vec![7; suite.hash_len()], &keys()), Err(HandshakeError::Keys)));
        assert!(matches!(check(suite, &[], &keys()), Err(HandshakeError::Keys)));
    }
}

/// The same over an asynchronous stream, with the usual adapter on the other side.
#[tokio::test]
async fn talks_to_tokio_rustls() {
    for role in [Role::Client, Role::Server] {
        let (client, server) = configs(SUITES[1], 2);
        let (mut near, far) = tokio::io::duplex(3000);
        let (mut ours, other) = match role {
            Role::Client => {
                let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
                let accepting = async move { tokio_rustls::TlsStream::from(acceptor.accept(far).await.unwrap()) };
                (Handshake::client(&client, name()).unwrap(), tokio::spawn(accepting))
            }
            Role::Server => {
                let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
                let mut server = server;
                server.send_tls13_tickets = 0;
                let dialling =
                    async move { tokio_rustls::TlsStream::from(connector.connect(name(), far).await.unwrap()) };
                (Handshake::server(&server).unwrap(), tokio::spawn(dialling))
            }
        };
        let echo = tokio::spawn(async move {
            let mut stream = other.await.unwrap();
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                stream.write_all(&buffer[..length]).await.unwrap();
                stream.flush().await.unwrap();
            }
            stream.shutdown().await.unwrap();
        });
        let (mut inbox, mut out, mut buffer) = (vec![], vec![], [0; 2000]);
        loop {
            out.clear();
            ours.write(&mut out);
            near.write_all(&out).await.unwrap();
            if ours.is_done() {
                break;
            }
            let length = near.read(&mut buffer).await.unwrap();
            inbox.extend_from_slice(&buffer[..length]);
            let used = ours.read(&inbox).unwrap();
            inbox.drain(..used);
        }
        let mut side = Side::new(ours.finish().unwrap(), inbox);
        let data = pattern(40_000);
        for chunk in data.chunks(1000) {
            side.send(chunk, MAX_PLAINTEXT);
            near.write_all(&std::mem::take(&mut side.outbox)).await.unwrap();
            let wanted = side.received.len() + chunk.len();
            while side.received.len() < wanted {
                let length = near.read(&mut buffer).await.unwrap();
                side.take(&buffer[..length]);
            }
        }
        assert_eq!(side.received, data);
        let mut record = [0; ALERT_RECORD];
        side.established.seal.close_notify(&mut record).unwrap();
        near.write_all(&record).await.unwrap();
        while side.alerts.is_empty() {
            let length = near.read(&mut buffer).await.unwrap();
            side.take(&buffer[..length]);
        }
        assert_eq!(side.alerts, [alert::CLOSE_NOTIFY]);
        echo.await.unwrap();
    }
}

/// The outer type of protected records.
const APPLICATION_DATA: u8 = 23;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_bytes_are_consumed_or_an_error(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        kind in 19..24_u8,
        server in any::<bool>(),
    ) {
        let (mut ours, _) = start(if server { Role::Server } else { Role::Client }, SUITES[0], 0);
        let [high, low] = u16::try_from(bytes.len()).unwrap().to_be_bytes();
        let record = [&[kind, 3, 3, high, low], &bytes[..]].concat();
        if let Ok(used) = ours.read(&record) {
            prop_assert!(used <= record.len());
        }
        let mut out = vec![];
        ours.write(&mut out);
        prop_assert!(!ours.is_done());
    }

    #[test]
    fn a_damaged_flight_never_finishes(position in 0..3000_usize, bit in 0..8_u8) {
        let (mut ours, mut peer) = start(Role::Client, SUITES[0], 0);
        let mut out = vec![];
        ours.write(&mut out);
        feed(&mut peer, &out);
        let mut flight = drain(&mut peer);
        let mut meaningless = vec![];
        let mut start = 0;
        while let Some(&[kind, _, _, high, low]) = flight.get(start..).and_then(<[u8]>::first_chunk) {
            meaningless.extend([start + 1, start + 2]);
            meaningless.extend((kind == APPLICATION_DATA).then_some(start));
            start += HEADER + usize::from(u16::from_be_bytes([high, low]));
        }
        let position = position % flight.len();
        flight[position] ^= 1 << bit;
        let read = ours.read(&flight);
        ours.write(&mut out);
        // The version of a record means nothing (RFC 8446 §5.1), nor to rustls the outer type of a protected one, whose true type is
        // inside. A record that claims to be longer is waited for.
        prop_assert!(!ours.is_done() || meaningless.contains(&position), "{position}: {read:?}");
    }
}
