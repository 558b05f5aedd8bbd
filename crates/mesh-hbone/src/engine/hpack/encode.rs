//! What we send. It uses the static table only: what a tunnel says is short and hardly repeats, so a dynamic table would cost both
//! ends memory, and a live hand-over its contents, for a few bytes of each stream. Strings are sent as they are, for the same reason.

use super::table::{Found, find};
use crate::engine::state::{Fields, RestoreError, Snapshot, Writer};

/// The encoder of one connection. All it knows is whether the peer was told that its table stays empty.
///
/// RFC 7541 §4.2 wants a size update at the beginning of the first block after SETTINGS_HEADER_TABLE_SIZE went below the maximum in
/// use, which is 4096 until something else was said; RFC 9113 §4.3.1 makes leaving it out a connection error, and peers check it. The
/// maximum may also be chosen lower than what the peer allows, at any time. So the very first block chooses 0, which no later setting
/// is below: one octet for each connection, and the peer's settings need no attention.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoder {
    closed: bool,
}

impl Encoder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a field to the block in `out`. Blocks must be sent in the order in which they were made, and the first one must be sent.
    ///
    /// `name` is lower-case. Any bytes can be encoded; whether they may be sent is the caller's concern (RFC 9113 §8.2.1).
    pub fn field(&mut self, name: &[u8], value: &[u8], out: &mut Vec<u8>) {
        if !self.closed {
            integer(0, 5, SIZE_UPDATE, out);
            self.closed = true;
        }
        match find(name, value) {
            Some(Found::Field(index)) => integer(index, 7, INDEXED, out),
            Some(Found::Name(index)) => {
                integer(index, 4, LITERAL, out);
                string(value, out);
            }
            None => {
                out.push(LITERAL);
                string(name, out);
                string(value, out);
            }
        }
    }
}

/// §6.1, §6.2.2, §6.3: how each representation begins. The index or size follows in what is left of the octet.
const INDEXED: u8 = 0x80;
const LITERAL: u8 = 0x00;
const SIZE_UPDATE: u8 = 0x20;

fn string(bytes: &[u8], out: &mut Vec<u8>) {
    integer(bytes.len(), 7, 0, out);
    out.extend_from_slice(bytes);
}

/// §5.1, with `bits` from 1 to 8 left in the first octet.
pub(super) fn integer(value: usize, bits: u32, first: u8, out: &mut Vec<u8>) {
    let max = u8::MAX >> (8 - bits);
    let mut rest = match u8::try_from(value) {
        Ok(value) if value < max => return out.push(first | value),
        _ => value - usize::from(max),
    };
    out.push(first | max);
    loop {
        let low = rest.to_le_bytes()[0] & 0x7f;
        rest >>= 7;
        if rest == 0 {
            return out.push(low);
        }
        out.push(low | 0x80);
    }
}

/// Append only.
const CLOSED: u16 = 1;

impl Snapshot for Encoder {
    fn save(&self, to: &mut Writer) {
        to.flag(CLOSED, self.closed);
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[CLOSED])?;
        Ok(Self { closed: from.flag(CLOSED)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::state;

    fn encoded(encoder: &mut Encoder, fields: &[(&str, &str)]) -> Vec<u8> {
        let mut out = Vec::new();
        for (name, value) in fields {
            encoder.field(name.as_bytes(), value.as_bytes(), &mut out);
        }
        out
    }

    /// RFC 7541 C.1, and the values around the ends of one octet, two, and all.
    #[test]
    fn integers_are_those_of_the_appendix() {
        for (value, bits, want) in [
            (10, 5, &[0x0a][..]),
            (1337, 5, &[0x1f, 0x9a, 0x0a]),
            (42, 8, &[0x2a]),
            (0, 1, &[0x00]),
            (1, 1, &[0x01, 0x00]),
            (30, 5, &[0x1e]),
            (31, 5, &[0x1f, 0x00]),
            (158, 5, &[0x1f, 0x7f]),
            (159, 5, &[0x1f, 0x80, 0x01]),
            (254, 8, &[0xfe]),
            (255, 8, &[0xff, 0x00]),
            (usize::MAX, 8, &[0xff, 0x80, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]),
        ] {
            let mut out = Vec::new();
            integer(value, bits, 0, &mut out);
            assert_eq!(out, want, "{value} in {bits} bits");
        }
    }

    #[test]
    fn the_first_field_of_all_closes_the_dynamic_table() {
        let mut encoder = Encoder::new();
        assert_eq!(encoded(&mut encoder, &[(":status", "200"), (":status", "204")]), [0x20, 0x88, 0x89]);
        assert_eq!(encoded(&mut encoder, &[(":status", "200")]), [0x88]);
    }

    #[test]
    fn what_the_static_table_has_is_indexed_and_the_rest_is_literal() {
        let mut encoder = Encoder { closed: true };
        for (name, value, want) in [
            (":status", "404", &b"\x8d"[..]),
            (":status", "503", b"\x08\x03503"),
            (":method", "CONNECT", b"\x02\x07CONNECT"),
            (":authority", "[::1]:80", b"\x01\x08[::1]:80"),
            ("accept", "", b"\x93"),
            ("accept-encoding", "", b"\x0f\x01\x00"),
            ("via", "a", b"\x0f\x2d\x01a"),
            ("baggage", "k=v", b"\x00\x07baggage\x03k=v"),
            ("", "", b"\x00\x00\x00"),
        ] {
            assert_eq!(encoded(&mut encoder, &[(name, value)]), want, "{name}: {value}");
        }
    }

    #[test]
    fn a_restored_encoder_does_not_repeat_itself() {
        let mut encoder = Encoder::new();
        for want in [&[0x20, 0x88][..], &[0x88], &[0x88]] {
            encoder = state::decode(&state::encode(&encoder)).unwrap();
            assert_eq!(encoded(&mut encoder, &[(":status", "200")]), want);
        }
    }
}
