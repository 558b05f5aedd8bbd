use proptest::prelude::*;

use super::{aead::Sealer, alert, *};
use crate::engine::state::{self, RestoreError, Snapshot};

const SUITES: [Suite; 2] = [Suite::Aes128GcmSha256, Suite::Aes256GcmSha384];

fn secret(suite: Suite) -> TrafficSecret {
    TrafficSecret::new(suite, &[0x5c; 48][..suite.hash_len()]).unwrap()
}

fn pair(suite: Suite) -> (Seal, Open) {
    (Seal::new(secret(suite), 0).unwrap(), Open::new(secret(suite), 0).unwrap())
}

fn sealed(seal: &mut Seal, content: ContentType, plaintext: &[u8]) -> Vec<u8> {
    let mut record = vec![0; plaintext.len() + OVERHEAD];
    record[HEADER..HEADER + plaintext.len()].copy_from_slice(plaintext);
    assert_eq!(seal.seal(&mut record, content, plaintext.len()), Ok(record.len()));
    record
}

/// A record with anything inside: content, type and padding are the test's.
fn protect(sequence: u64, inner: &[u8]) -> Vec<u8> {
    let keys = secret(SUITES[0]).keys();
    let length = u16::try_from(inner.len() + TAG).unwrap();
    let header = [&[23, 3, 3][..], &length.to_be_bytes()].concat();
    let mut body = inner.to_vec();
    let mut sealer = Sealer::new(keys.algorithm(), keys.key()).unwrap();
    let tag = sealer.seal(keys::nonce(&keys.iv(), sequence), &header, &mut body).unwrap();
    [header, body, tag.to_vec()].concat()
}

fn open_one(record: &mut [u8]) -> Result<Opened<'_>, RecordError> {
    Open::new(secret(SUITES[0]), 0).unwrap().open(record)
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

/// RFC 8448 §3, from the application traffic secrets on.
mod rfc_8448 {
    use super::*;

    const CLIENT: &str = "9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5";
    const SERVER: &str = "a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643";

    fn traffic(secret: &str) -> TrafficSecret {
        TrafficSecret::new(Suite::Aes128GcmSha256, &hex(secret)).unwrap()
    }

    #[test]
    fn keys_are_derived() {
        let (client, server) = (traffic(CLIENT).keys(), traffic(SERVER).keys());
        assert_eq!(client.key(), hex("17422dda596ed5d9acd890e3c63f5051"));
        assert_eq!(client.iv()[..], hex("5b78923dee08579033e523d9"));
        assert_eq!(server.key(), hex("9f02283b6c9c07efc26bb9f2ac92e356"));
        assert_eq!(server.iv()[..], hex("cf782b88dd83549aadf1e984"));
    }

    #[test]
    fn records_are_sealed() {
        let mut seal = Seal::new(traffic(CLIENT), 0).unwrap();
        let data: Vec<u8> = (0..50).collect();
        assert_eq!(
            sealed(&mut seal, ContentType::ApplicationData, &data),
            hex(
                "17 03 03 00 43 a2 3f 70 54 b6 2c 94 d0 af fa fe 82 28 ba 55 cb ef ac ea 42 f9 14 aa 66 bc ab 3f 2b 98 19 \
                 a8 a5 b4 6b 39 5b d5 4a 9a 20 44 1e 2b 62 97 4e 1f 5a 62 92 a2 97 70 14 bd 1e 3d ea e6 3a ee bb 21 69 49 \
                 15 e4"
            )
        );
        let mut record = [0; ALERT_RECORD];
        assert_eq!(seal.close_notify(&mut record), Ok(ALERT_RECORD));
        assert_eq!(record[..], hex("17 03 03 00 13 c9 87 27 60 65 56 66 b7 4d 7f f1 15 3e fd 6d b6 d0 b0 e3"));
    }

    #[test]
    fn records_are_opened() {
        let mut open = Open::new(traffic(SERVER), 1).unwrap();
        let mut record = hex(
            "17 03 03 00 43 2e 93 7e 11 ef 4a c7 40 e5 38 ad 36 00 5f c4 a4 69 32 fc 32 25 d0 5f 82 aa 1b 36 e3 0e fa f9 \
             7d 90 e6 df fc 60 2d cb 50 1a 59 a8 fc c4 9c 4b f2 e5 f0 a2 1c 00 47 c2 ab f3 32 54 0d d0 32 e1 67 c2 95 5d",
        );
        assert_eq!(open.open(&mut record), Ok(Opened::Data(&mut (0..50).collect::<Vec<u8>>())));
        let mut record = hex("17 03 03 00 13 b5 8f d6 71 66 eb f5 99 d2 47 20 cf be 7e fa 7a 88 64 a9");
        assert_eq!(open.open(&mut record), Ok(Opened::Alert { level: 1, description: alert::CLOSE_NOTIFY }));
    }
}

#[test]
fn every_kind_of_content_arrives() {
    for suite in SUITES {
        let (mut seal, mut open) = pair(suite);
        for length in [0, 1, 64, 1000, MAX_PLAINTEXT] {
            let mut data = vec![7; length];
            let mut record = sealed(&mut seal, ContentType::ApplicationData, &data);
            assert_eq!(header(&record), Ok(Some(record.len())));
            assert_eq!(open.open(&mut record), Ok(Opened::Data(&mut data)));
        }
        let mut record = [0; ALERT_RECORD];
        seal.alert(&mut record, AlertLevel::Fatal, alert::BAD_RECORD_MAC).unwrap();
        assert_eq!(open.open(&mut record), Ok(Opened::Alert { level: 2, description: 20 }));
        let mut record = [0; KEY_UPDATE_RECORD];
        assert_eq!(seal.key_update(&mut record, true), Ok(KEY_UPDATE_RECORD));
        assert_eq!(open.open(&mut record), Ok(Opened::Handshake(&[24, 0, 0, 1, 1])));
        open.update().unwrap();
        assert_eq!((seal.sequence(), open.sequence()), (0, 0));
        let mut record = sealed(&mut seal, ContentType::ApplicationData, b"new keys");
        assert_eq!(open.open(&mut record), Ok(Opened::Data(&mut b"new keys".to_vec())));
    }
}

#[test]
fn sealing_leaves_what_is_behind_the_record() {
    let (mut seal, _) = pair(SUITES[0]);
    let mut buffer = vec![0xee; 100];
    assert_eq!(seal.seal(&mut buffer, ContentType::ApplicationData, 10), Ok(32));
    assert_eq!(buffer[32..], [0xee; 68]);
}

#[test]
fn one_changed_bit_anywhere_is_noticed() {
    let (mut seal, _) = pair(SUITES[0]);
    let good = sealed(&mut seal, ContentType::ApplicationData, &[7; 40]);
    for position in 0..good.len() {
        for bit in 0..8 {
            let mut record = good.clone();
            record[position] ^= 1 << bit;
            let found = open_one(&mut record).map(|_| ()).unwrap_err();
            match position {
                0 => assert_eq!(found, RecordError::OuterType(23 ^ 1 << bit)),
                1..3 => assert!(matches!(found, RecordError::Version(_))),
                3..5 => assert!(matches!(found, RecordError::Length | RecordError::TooLong(_))),
                _ => assert_eq!((&found, found.alert()), (&RecordError::Mac, alert::BAD_RECORD_MAC)),
            }
        }
    }
    // Cut to what its header now says, it fails authentication.
    for length in 0..good.len() - HEADER {
        let mut record = good[..HEADER + length].to_vec();
        record[4] = u8::try_from(length).unwrap();
        assert_eq!(open_one(&mut record), Err(RecordError::Mac));
    }
}

#[test]
fn records_out_of_order_fail() {
    let (mut seal, mut open) = pair(SUITES[0]);
    let mut first = sealed(&mut seal, ContentType::ApplicationData, b"1");
    let mut second = sealed(&mut seal, ContentType::ApplicationData, b"2");
    assert_eq!(open.open(&mut second), Err(RecordError::Mac));
    assert!(open.open(&mut first).is_ok());
    assert_eq!(open.open(&mut first), Err(RecordError::Mac));
}

#[test]
fn headers_are_judged_before_anything_is_buffered() {
    assert_eq!(header(&[23, 3, 3, 0x41]), Ok(None));
    assert_eq!(header(&[23, 3, 3, 0x41, 0, 9, 9]), Ok(Some(MAX_RECORD)));
    for (bytes, error, alert) in [
        ([23, 3, 3, 0x41, 1], RecordError::TooLong(MAX_CIPHERTEXT + 1), 22),
        ([23, 3, 3, 0xff, 0xff], RecordError::TooLong(0xffff), 22),
        ([20, 3, 3, 0, 1], RecordError::OuterType(20), 10),
        ([21, 3, 3, 0, 2], RecordError::OuterType(21), 10),
        (*b"GET /", RecordError::OuterType(b'G'), 10),
        ([23, 3, 1, 0, 20], RecordError::Version(0x0301), 70),
    ] {
        assert_eq!(header(&bytes), Err(error.clone()));
        assert_eq!(error.alert(), alert);
    }
}

#[test]
fn what_is_inside_a_record_is_judged() {
    const TYPE: u8 = ContentType::ApplicationData as u8;
    let padded = |content: &[u8], kind: u8, zeros: usize| [content, &[kind], &vec![0; zeros]].concat();
    for (name, inner, expected) in [
        ("padding is removed", padded(b"data\0", TYPE, 300), Ok(Opened::Data(&mut b"data\0".to_vec()))),
        ("nothing but padding around nothing", padded(b"", TYPE, 16_384), Ok(Opened::Data(&mut []))),
        ("only zeros", vec![0; 50], Err(RecordError::NoType)),
        ("nothing at all", vec![], Err(RecordError::NoType)),
        ("one byte too many", padded(b"", TYPE, 16_385), Err(RecordError::TooLong(16_386))),
        ("too much content", padded(&[1; 16_385], TYPE, 0), Err(RecordError::TooLong(16_386))),
        ("empty alert", padded(b"", 21, 3), Err(RecordError::Empty)),
        ("empty handshake", padded(b"", 22, 3), Err(RecordError::Empty)),
        ("half an alert", padded(&[2], 21, 0), Err(RecordError::Alert(1))),
        ("two alerts", padded(&[1, 0, 1, 0], 21, 0), Err(RecordError::Alert(4))),
        ("protected ChangeCipherSpec", padded(&[1], 20, 0), Err(RecordError::InnerType(20))),
        ("unknown type", padded(b"x", 99, 0), Err(RecordError::InnerType(99))),
    ] {
        assert_eq!(open_one(&mut protect(0, &inner)), expected, "{name}");
    }
}

#[test]
fn a_key_is_given_up_in_time() {
    let mut record = [0; OVERHEAD];
    if !aead::RESUMES {
        assert_eq!(Seal::new(secret(SUITES[0]), 1).unwrap_err(), RecordError::Cipher);
        return;
    }
    let mut seal = Seal::new(secret(SUITES[0]), (1 << 23) - 1).unwrap();
    assert!(!seal.needs_update());
    assert!(seal.seal(&mut record, ContentType::ApplicationData, 0).is_ok());
    assert!(seal.needs_update());
    seal.update().unwrap();
    assert!(!seal.needs_update());

    let mut seal = Seal::new(secret(SUITES[0]), 1 << 24).unwrap();
    assert_eq!(seal.seal(&mut record, ContentType::ApplicationData, 0), Err(RecordError::Exhausted));
    let mut open = Open::new(secret(SUITES[0]), u64::MAX).unwrap();
    assert_eq!(open.open(&mut protect(u64::MAX, &[23])), Err(RecordError::Exhausted));
}

mod post_handshake {
    use super::*;

    fn ticket(length: usize) -> Vec<u8> {
        let header = u32::try_from(length).unwrap() | 4 << 24;
        [&header.to_be_bytes()[..], &vec![0xaa; length]].concat()
    }

    fn read(role: Role, records: &[&[u8]]) -> Result<Vec<PostHandshakeEvent>, RecordError> {
        let (mut post, mut events) = (PostHandshake::new(role), vec![]);
        for mut record in records.iter().copied() {
            while let Some(event) = post.read(&mut record)? {
                events.push(event);
            }
            assert!(record.is_empty());
        }
        Ok(events)
    }

    const TICKET: PostHandshakeEvent = PostHandshakeEvent::NewSessionTicket;
    const UPDATE: PostHandshakeEvent = PostHandshakeEvent::KeyUpdate { requested: true };

    #[test]
    fn messages_may_be_joined_and_split() {
        let joined = [ticket(200), ticket(0), key_update_message(true).to_vec()].concat();
        let expected = Ok(vec![TICKET, TICKET, UPDATE]);
        assert_eq!(read(Role::Client, &[&joined]), expected);
        for cut in 1..joined.len() {
            assert_eq!(read(Role::Client, &[&joined[..cut], &joined[cut..]]), expected, "{cut}");
        }
        let bytes: Vec<_> = joined.chunks(1).collect();
        assert_eq!(read(Role::Client, &bytes), expected);
    }

    #[test]
    fn a_key_update_ends_its_record() {
        let more = [&key_update_message(false)[..], &ticket(1)].concat();
        assert_eq!(read(Role::Client, &[&more]), Err(RecordError::NotAligned));
        assert_eq!(
            read(Role::Client, &[&key_update_message(false), &ticket(1)]),
            Ok(vec![PostHandshakeEvent::KeyUpdate { requested: false }, TICKET])
        );
    }

    #[test]
    fn what_may_not_come_is_refused() {
        for (name, role, message, error, alert) in [
            ("ticket from a client", Role::Server, ticket(9), RecordError::Message(4), 10),
            ("ClientHello", Role::Server, vec![1, 0, 0, 5], RecordError::Message(1), 10),
            ("CertificateRequest", Role::Client, vec![13, 0, 0, 0], RecordError::Message(13), 10),
            (
                "unbounded ticket",
                Role::Client,
                vec![4, 1, 0, 1],
                RecordError::MessageLength { kind: 4, length: 65_537 },
                50,
            ),
            (
                "empty KeyUpdate",
                Role::Client,
                vec![24, 0, 0, 0],
                RecordError::MessageLength { kind: 24, length: 0 },
                50,
            ),
            ("long KeyUpdate", Role::Client, vec![24, 0, 0, 2], RecordError::MessageLength { kind: 24, length: 2 }, 50),
            ("KeyUpdate with 2", Role::Server, vec![24, 0, 0, 1, 2], RecordError::KeyUpdate(2), 47),
        ] {
            assert_eq!(read(role, &[&message]), Err(error.clone()), "{name}");
            assert_eq!(error.alert(), alert, "{name}");
        }
    }

    #[test]
    fn other_records_may_only_come_between_messages() {
        let mut post = PostHandshake::new(Role::Client);
        assert_eq!(post.check_interleaving(), Ok(()));
        for byte in ticket(3) {
            assert_eq!(post.read(&mut &[byte][..]).unwrap(), (post.check_interleaving().is_ok()).then_some(TICKET));
        }
        assert_eq!(post.check_interleaving(), Ok(()));
        assert_eq!(post.read(&mut &[24][..]), Ok(None));
        assert_eq!(post.check_interleaving(), Err(RecordError::Interleaved));
    }

    #[test]
    fn only_states_it_can_be_in_are_restored() {
        let with = |fill: fn(&mut state::Writer)| {
            struct Raw(fn(&mut state::Writer));
            impl Snapshot for Raw {
                fn save(&self, to: &mut state::Writer) {
                    to.flag(1, false);
                    self.0(to);
                }
                fn restore(_: &state::Fields<'_>) -> Result<Self, RestoreError> {
                    unreachable!()
                }
            }
            state::decode::<PostHandshake>(&state::encode(&Raw(fill)))
        };
        assert!(with(|to| to.bytes(2, &[24, 0, 0])).is_ok());
        assert!(with(|to| to.bytes(2, &[24, 0, 0, 1])).is_err());
        assert!(with(|to| to.u32(3, 1)).is_err(), "tickets come from servers");
        assert_eq!(with(|_| ()), Err(RestoreError::Missing(2)));
    }
}

fn reborn<T: Snapshot>(value: &T) -> T {
    state::decode(&state::encode(value)).unwrap()
}

#[test]
fn a_damaged_snapshot_is_refused() {
    let (seal, open) = pair(SUITES[1]);
    let good = state::encode(&seal).to_vec();
    assert_eq!(good, state::encode(&open).to_vec());
    for cut in 0..good.len() {
        assert!(state::decode::<Seal>(&good[..cut]).is_err(), "{cut}");
    }
    let mut unknown_suite = good.clone();
    unknown_suite[13] = 3;
    assert!(matches!(state::decode::<Seal>(&unknown_suite), Err(RestoreError::Invalid { tag: 1, .. })));
    let mut other_suite = good;
    other_suite[13] = 1;
    assert!(matches!(state::decode::<Open>(&other_suite), Err(RestoreError::Invalid { tag: 2, .. })));
}

#[test]
fn secrets_are_not_printed() {
    let (seal, open) = pair(SUITES[0]);
    for text in [format!("{seal:?}"), format!("{open:?}"), format!("{:?}", secret(SUITES[0]).keys())] {
        assert!(!text.contains("92"), "{text}");
    }
}

/// What can happen on a connection.
#[derive(Clone, Debug)]
enum Step {
    Data(usize),
    KeyUpdate(bool),
    /// Tickets of these lengths in one record, the last one cut here.
    Tickets(Vec<usize>, usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..3000_usize).prop_map(Step::Data),
        1 => any::<bool>().prop_map(Step::KeyUpdate),
        2 => (prop::collection::vec(0..300_usize, 1..4), 1..400_usize).prop_map(|(t, cut)| Step::Tickets(t, cut)),
    ]
}

/// All records, and all that came out of them, when everything is saved and restored wherever `swap` says so.
fn transcript(suite: Suite, steps: &[Step], mut swap: impl FnMut() -> bool) -> (Vec<Vec<u8>>, Vec<String>) {
    let (mut seal, mut open) = pair(suite);
    let mut post = PostHandshake::new(Role::Client);
    let (mut records, mut seen) = (vec![], vec![]);
    let mut pass = |content, plaintext: &[u8], seal: &mut Seal| {
        if swap() && seal.can_be_saved() {
            *seal = reborn(seal);
        }
        if swap() {
            (open, post) = (reborn(&open), reborn(&post));
        }
        let mut record = sealed(seal, content, plaintext);
        records.push(record.clone());
        match open.open(&mut record).unwrap() {
            Opened::Handshake(mut fragment) => {
                while let Some(event) = post.read(&mut fragment).unwrap() {
                    seen.push(format!("{event:?}"));
                    if let PostHandshakeEvent::KeyUpdate { .. } = event {
                        open.update().unwrap();
                    }
                }
            }
            other => {
                post.check_interleaving().unwrap();
                seen.push(format!("{other:?}"));
            }
        }
    };
    for (number, step) in steps.iter().enumerate() {
        match step {
            Step::Data(length) => {
                pass(ContentType::ApplicationData, &vec![u8::try_from(number).unwrap(); *length], &mut seal);
            }
            Step::KeyUpdate(request) => {
                pass(ContentType::Handshake, &key_update_message(*request), &mut seal);
                seal.update().unwrap();
            }
            Step::Tickets(lengths, cut) => {
                let tickets: Vec<u8> = lengths
                    .iter()
                    .flat_map(|length| {
                        [&[4, 0][..], &u16::try_from(*length).unwrap().to_be_bytes(), &vec![1; *length]].concat()
                    })
                    .collect();
                let (first, second) = tickets.split_at((*cut).min(tickets.len() - 1).max(1));
                pass(ContentType::Handshake, first, &mut seal);
                pass(ContentType::Handshake, second, &mut seal);
            }
        }
    }
    (records, seen)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_swap_at_any_record_changes_nothing(
        suite in prop::sample::select(&SUITES[..]),
        steps in prop::collection::vec(step(), 1..30),
        swaps in any::<u64>(),
    ) {
        let mut coins = swaps;
        let swapped = transcript(suite, &steps, || {
            coins = coins.rotate_left(1);
            coins & 1 == 1
        });
        prop_assert!(swapped == transcript(suite, &steps, || false), "another transcript");
        prop_assert!(swapped == transcript(suite, &steps, || true), "another transcript");
    }

    #[test]
    fn any_bytes_are_a_record_or_an_error(mut bytes in prop::collection::vec(any::<u8>(), 0..600), plausible in any::<bool>()) {
        if plausible && let Some(length) = bytes.len().checked_sub(HEADER) {
            bytes[..HEADER].copy_from_slice(&[23, 3, 3, 0, 0]);
            bytes[3..HEADER].copy_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
        }
        prop_assert!(open_one(&mut bytes).is_err());
    }

    #[test]
    fn any_content_is_opened_or_an_error(inner in prop::collection::vec(prop_oneof![Just(0_u8), 20..25_u8, any::<u8>()], 0..60)) {
        if let Ok(Opened::Data(data)) = open_one(&mut protect(0, &inner)) {
            prop_assert_eq!(&*data, &inner[..data.len()]);
            prop_assert_eq!(inner[data.len()], 23);
        }
    }

    #[test]
    fn any_handshake_bytes_are_read_alike_however_they_are_cut(
        bytes in prop::collection::vec(prop_oneof![Just(0_u8), Just(1_u8), Just(4_u8), Just(24_u8), any::<u8>()], 0..200),
        cuts in prop::collection::vec(1..20_usize, 0..40),
    ) {
        let mut post = PostHandshake::new(Role::Client);
        let mut rest = &bytes[..];
        for cut in cuts {
            let (mut fragment, after) = rest.split_at(cut.min(rest.len()));
            rest = after;
            let length = fragment.len();
            let mut events = 0;
            loop {
                let twin = reborn(&post);
                prop_assert_eq!(&twin, &post);
                match post.read(&mut fragment) {
                    Ok(Some(_)) => events += 1,
                    Ok(None) => break,
                    Err(_) => return Ok(()),
                }
            }
            prop_assert!(fragment.is_empty() && events <= length + 1);
        }
    }

    #[test]
    fn any_bytes_are_a_snapshot_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        let blob = [&b"FWTN\0\x01"[..], &bytes].concat();
        let _ignored = (state::decode::<Seal>(&blob).is_ok(), state::decode::<PostHandshake>(&blob).is_ok());
    }
}
