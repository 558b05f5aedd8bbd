//! What a peer sends, in any of the ways that it may choose.

use std::fmt;

use super::{DEFAULT_TABLE_SIZE, huffman, size, table::Table};
use crate::engine::state::{Fields, RestoreError, Snapshot, Writer};

/// A block that is not HPACK. The two tables may differ from here on, so the connection ends with COMPRESSION_ERROR (RFC 9113 §4.3),
/// and the decoder must not be used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HpackError {
    #[error("the header block ends within a field")]
    Truncated,
    /// RFC 7541 §5.1: what passes our limits, 2^32-1 and five octets beyond the first, must be an error.
    #[error("an integer in the header block is too long")]
    Integer,
    /// RFC 7541 §2.3.3, §6.1.
    #[error("index {0} of the header tables is empty")]
    Index(usize),
    /// RFC 7541 §5.2.
    #[error("a Huffman-coded string contains the end-of-string symbol")]
    EndOfString,
    /// RFC 7541 §5.2.
    #[error("a Huffman-coded string is not padded with at most seven ones")]
    Padding,
    /// RFC 7541 §4.2.
    #[error("the table's size is updated after the first field of a header block")]
    UpdateLate,
    /// RFC 7541 §4.2, §6.3.
    #[error("the table's size is updated to {size}, more than the {allowed} allowed")]
    UpdateTooLarge { size: usize, allowed: usize },
    /// RFC 9113 §4.3.1.
    #[error("the table's size was not updated after it had been limited")]
    UpdateMissing,
}

/// The fields of one block, in the order in which they came.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct HeaderList {
    /// Names and values, one after the other.
    bytes: Vec<u8>,
    /// The lengths of each name and value.
    fields: Vec<(u32, u32)>,
    /// There were more fields than the limit allowed. What is here came before.
    pub too_large: bool,
}

impl HeaderList {
    /// Names and values. They are any bytes: whether they are names and values of HTTP is for others to say.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&[u8], &[u8])> {
        let mut rest = &self.bytes[..];
        let mut take = move |length: u32| {
            let (taken, after) = rest.split_at(length as usize);
            rest = after;
            taken
        };
        self.fields.iter().map(move |(name, value)| (take(*name), take(*value)))
    }

    pub fn len(&self) -> usize {
        self.fields.len()
    }

    pub fn is_empty(&self) -> bool {
        self.fields.is_empty()
    }
}

impl fmt::Debug for HeaderList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fields = self.iter().map(|(name, value)| format!("{}: {}", name.escape_ascii(), value.escape_ascii()));
        f.debug_list().entries(fields).finish()?;
        if self.too_large { f.write_str(" and more") } else { Ok(()) }
    }
}

/// The decoder of one connection (RFC 7541 §3).
///
/// It holds no more than its table, whose entries' sizes sum up to at most the limit. Empty, it has nothing on the heap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoder {
    /// Its `max` is what the peer chose, or was made to choose: at most `limit`.
    table: Table,
    /// What the peer may choose.
    limit: usize,
    /// The limit went below the table's `max`. The next block must begin with an update that says so, and not say more.
    update_due: bool,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { table: Table::new(DEFAULT_TABLE_SIZE), limit: DEFAULT_TABLE_SIZE, update_due: false }
    }
}

impl Decoder {
    /// For a peer that was told nothing yet: it may use [`DEFAULT_TABLE_SIZE`].
    pub fn new() -> Self {
        Self::default()
    }

    /// The peer has acknowledged our SETTINGS_HEADER_TABLE_SIZE; every block after its acknowledgement obeys (RFC 7541 §4.2).
    ///
    /// If that is less than the table's maximum, entries beyond it go now, and the next block must begin with a size update (RFC 9113
    /// §4.3.1). If the limit changed more than once in between, the first update must stay below the lowest.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
        if limit < self.table.max() {
            self.table.set_max(limit);
            self.update_due = true;
        }
    }

    /// Decodes a whole block: the fragments of HEADERS and its CONTINUATIONs together.
    ///
    /// Fields are kept until name, value and 32 octets for each pass `list_limit` (RFC 9113 §6.5.2). From then on the block is decoded
    /// only for what it does to the table, and to see that it is one: the connection can go on, whatever becomes of the stream.
    ///
    /// Allocates at most in proportion to the block, `list_limit` and the table.
    ///
    /// # Errors
    /// See [`HpackError`].
    pub fn decode(&mut self, block: &[u8], list_limit: usize) -> Result<HeaderList, HpackError> {
        let mut input = Input(block);
        self.update_size(&mut input)?;
        let mut fields = Building::new(input.0.len(), list_limit);
        while let Some(first) = input.next() {
            match first {
                0x80.. => {
                    let index = input.integer(first, 7)?;
                    let (name, value) = self.field(index)?;
                    fields.add(name, value);
                }
                0x40.. => self.literal(input.integer(first, 6)?, true, &mut input, &mut fields)?,
                0x20.. => return Err(HpackError::UpdateLate),
                // Without indexing and never indexed: the difference is for those who encode a field again, and we never index.
                _ => self.literal(input.integer(first, 4)?, false, &mut input, &mut fields)?,
            }
        }
        Ok(fields.list)
    }

    /// §4.2 and §6.3. Whoever has shrunk and grown its table in between says both; nothing is lost if one says more.
    fn update_size(&mut self, input: &mut Input<'_>) -> Result<(), HpackError> {
        while let Some(first @ 0x20..=0x3f) = input.peek() {
            input.next();
            let size = input.integer(first, 5)?;
            let allowed = if self.update_due { self.table.max() } else { self.limit };
            if size > allowed {
                return Err(HpackError::UpdateTooLarge { size, allowed });
            }
            self.table.set_max(size);
            self.update_due = false;
        }
        if self.update_due { Err(HpackError::UpdateMissing) } else { Ok(()) }
    }

    /// §6.2: a name from the tables, or as a string when the index is 0, and a value.
    fn literal(
        &mut self,
        name: usize,
        insert: bool,
        input: &mut Input<'_>,
        fields: &mut Building,
    ) -> Result<(), HpackError> {
        let start = fields.list.bytes.len();
        if name == 0 {
            input.string(&mut fields.list.bytes)?;
        } else {
            let (name, _) = self.field(name)?;
            // An index is short and may stand for a long name: not to be copied once more for nothing.
            if insert || !fields.list.too_large {
                fields.list.bytes.extend_from_slice(name);
            }
        }
        let value = fields.list.bytes.len();
        input.string(&mut fields.list.bytes)?;
        if insert {
            self.table.insert(&fields.list.bytes[start..value], &fields.list.bytes[value..]);
        }
        fields.keep(start, value);
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn entries(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.table.oldest_first()
    }

    fn field(&self, index: usize) -> Result<(&[u8], &[u8]), HpackError> {
        self.table.get(index).ok_or(HpackError::Index(index))
    }
}

/// A list that becomes longer until it is too large.
struct Building {
    list: HeaderList,
    room: usize,
}

impl Building {
    fn new(block: usize, room: usize) -> Self {
        let mut list = HeaderList::default();
        if block > 0 {
            // Right for most blocks: literals with an indexed name, which grow a little.
            list.bytes.reserve(room.min(2 * block));
            list.fields.reserve(8);
        }
        Self { list, room }
    }

    fn add(&mut self, name: &[u8], value: &[u8]) {
        // First asked, then copied: an index of one octet can stand for the whole table.
        if self.list.too_large || size(name, value) > self.room {
            self.list.too_large = true;
            return;
        }
        let start = self.list.bytes.len();
        self.list.bytes.extend_from_slice(name);
        self.list.bytes.extend_from_slice(value);
        self.keep(start, start + name.len());
    }

    /// Makes a field of what follows `start`, its value from `value` on, or drops that.
    fn keep(&mut self, start: usize, value: usize) {
        let (name, value) = (value - start, self.list.bytes.len() - value);
        let lengths = u32::try_from(name).ok().zip(u32::try_from(value).ok());
        let room = self.room.checked_sub(name + value + super::FIELD_OVERHEAD);
        match lengths.zip(room) {
            Some((lengths, room)) if !self.list.too_large => {
                self.list.fields.push(lengths);
                self.room = room;
            }
            _ => {
                self.list.bytes.truncate(start);
                self.list.too_large = true;
            }
        }
    }
}

/// What is left of a block.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn peek(&self) -> Option<u8> {
        self.0.first().copied()
    }

    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// §5.1, with `bits` from 1 to 8 left in the first octet.
    fn integer(&mut self, first: u8, bits: u32) -> Result<usize, HpackError> {
        let max = u8::MAX >> (8 - bits);
        if first & max < max {
            return Ok(usize::from(first & max));
        }
        let mut value = u64::from(max);
        for shift in (0..35).step_by(7) {
            let octet = self.next().ok_or(HpackError::Truncated)?;
            value += u64::from(octet & 0x7f) << shift;
            if octet & 0x80 == 0 {
                return u32::try_from(value).map(|value| value as usize).map_err(|_| HpackError::Integer);
            }
        }
        Err(HpackError::Integer)
    }

    /// §5.2, appended to `out`.
    fn string(&mut self, out: &mut Vec<u8>) -> Result<(), HpackError> {
        let first = self.next().ok_or(HpackError::Truncated)?;
        let length = self.integer(first, 7)?;
        let (string, rest) = self.0.split_at_checked(length).ok_or(HpackError::Truncated)?;
        self.0 = rest;
        if first & 0x80 == 0 {
            out.extend_from_slice(string);
            Ok(())
        } else {
            huffman::decode(string, out)
        }
    }
}

/// Append only.
const LIMIT: u16 = 1;
const MAX: u16 = 2;
const UPDATE_DUE: u16 = 3;
/// Repeats, oldest first: the name's length in four octets, name, value.
const ENTRY: u16 = 4;

impl Snapshot for Decoder {
    fn save(&self, to: &mut Writer) {
        to.u64(LIMIT, self.limit as u64);
        to.u64(MAX, self.table.max() as u64);
        to.flag(UPDATE_DUE, self.update_due);
        for (name, value) in self.table.oldest_first() {
            let length = u32::try_from(name.len()).expect("a string's length was at most 2^32-1");
            to.bytes(ENTRY, &[&length.to_be_bytes(), name, value].concat());
        }
    }

    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
        from.only(&[LIMIT, MAX, UPDATE_DUE, ENTRY])?;
        let invalid = |tag, why| RestoreError::Invalid { tag, why };
        let number = |tag| usize::try_from(from.u64(tag)?).map_err(|_| invalid(tag, "is too large for this machine"));
        let limit = number(LIMIT)?;
        let max = number(MAX)?;
        if max > limit {
            return Err(invalid(MAX, "is above the limit"));
        }
        let mut table = Table::new(max);
        for entry in from.all(ENTRY) {
            let (length, field) = entry.split_first_chunk().ok_or_else(|| invalid(ENTRY, "has no length"))?;
            let split = usize::try_from(u32::from_be_bytes(*length)).ok().and_then(|at| field.split_at_checked(at));
            let (name, value) = split.ok_or_else(|| invalid(ENTRY, "is shorter than its name"))?;
            if !table.has_room_for(name, value) {
                return Err(invalid(ENTRY, "does not fit into the table"));
            }
            table.insert(name, value);
        }
        Ok(Self { table, limit, update_due: from.flag(UPDATE_DUE)? })
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::{
        super::{FIELD_OVERHEAD, hex, table::STATIC, text},
        *,
    };
    use crate::engine::state;

    const NO_LIMIT: usize = usize::MAX;

    /// As if all had begun with a table of another size, which the examples presume.
    fn with_table(size: usize) -> Decoder {
        Decoder { table: Table::new(size), limit: size, update_due: false }
    }

    /// With two entries, "b: 2" at index 62 and "a: 1" at 63.
    fn with_entries() -> Decoder {
        let mut decoder = Decoder::new();
        decoder.decode(b"\x40\x01a\x011\x40\x01b\x012", NO_LIMIT).unwrap();
        decoder
    }

    /// A decoder's snapshot with any limit, maximum and entries.
    #[derive(Clone, Debug)]
    struct Made(u64, u64, Vec<Vec<u8>>);

    impl Snapshot for Made {
        fn save(&self, to: &mut Writer) {
            to.u64(LIMIT, self.0);
            to.u64(MAX, self.1);
            to.flag(UPDATE_DUE, false);
            self.2.iter().for_each(|entry| to.bytes(ENTRY, entry));
        }

        fn restore(_: &Fields<'_>) -> Result<Self, RestoreError> {
            unreachable!("it is only written")
        }
    }

    fn listed(list: &HeaderList) -> Vec<String> {
        list.iter().map(text).collect()
    }

    fn newest_first(decoder: &Decoder) -> Vec<String> {
        let mut entries: Vec<String> = decoder.entries().map(text).collect();
        entries.reverse();
        entries
    }

    /// One block of the appendix: its octets, its list, and the table it leaves, with its size.
    type Example = (&'static str, &'static [&'static str], &'static [&'static str], usize);

    fn check(name: &str, table: usize, examples: &[Example]) {
        let mut decoder = with_table(table);
        for (at, (block, list, entries, used)) in (1..).zip(examples) {
            let decoded = decoder.decode(&hex(block), NO_LIMIT).unwrap();
            assert_eq!(listed(&decoded), *list, "{name}.{at}");
            assert!(!decoded.too_large);
            assert_eq!(newest_first(&decoder), *entries, "{name}.{at}");
            assert_eq!(decoder.table.used(), *used, "{name}.{at}");
        }
    }

    /// RFC 7541 C.1, and where our limits are.
    #[test]
    fn integers_end_where_they_end_or_are_errors() {
        use HpackError::{Integer, Truncated};
        let cases: &[(&[u8], u32, Result<usize, HpackError>)] = &[
            (&[0b1110_1010], 5, Ok(10)),
            (&[0b1111_1111, 0b1001_1010, 0b0000_1010], 5, Ok(1337)),
            (&[0b0010_1010], 8, Ok(42)),
            (&[0x1e], 5, Ok(30)),
            (&[0x1f, 0x00], 5, Ok(31)),
            // Longer than need be is allowed, within bounds.
            (&[0x1f, 0x80, 0x80, 0x80, 0x80, 0x00], 5, Ok(31)),
            (&[0x1f, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00], 5, Err(Integer)),
            (&[0xff, 0x80, 0xfe, 0xff, 0xff, 0x0f], 8, Ok(u32::MAX as usize)),
            (&[0xff, 0x81, 0xfe, 0xff, 0xff, 0x0f], 8, Err(Integer)),
            (&[0xff, 0xff, 0xff, 0xff, 0xff, 0x7f], 8, Err(Integer)),
            (&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01], 8, Err(Integer)),
            (&[0x1f], 5, Err(Truncated)),
            (&[0x1f, 0x80], 5, Err(Truncated)),
            (&[0x1f, 0x80, 0x80, 0x80, 0x80], 5, Err(Truncated)),
        ];
        for (octets, bits, want) in cases {
            assert_eq!(Input(&octets[1..]).integer(octets[0], *bits), *want, "{octets:02x?}");
        }
    }

    #[test]
    fn each_representation_of_appendix_c_2() {
        const HEADER: &str = "custom-key: custom-header";
        let literal = "400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572";
        check("C.2.1", 4096, &[(literal, &[HEADER], &[HEADER], 55)]);
        check("C.2.2", 4096, &[("040c 2f73 616d 706c 652f 7061 7468", &[":path: /sample/path"], &[], 0)]);
        check("C.2.3", 4096, &[("1008 7061 7373 776f 7264 0673 6563 7265 74", &["password: secret"], &[], 0)]);
        check("C.2.4", 4096, &[("82", &[":method: GET"], &[], 0)]);
    }

    #[test]
    fn requests_of_appendices_c_3_and_c_4() {
        let plain = [
            "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "8286 84be 5808 6e6f 2d63 6163 6865",
            "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
        ];
        let huffman = [
            "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
            "8286 84be 5886 a8eb 1064 9cbf",
            "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
        ];
        for (name, [first, second, third]) in [("C.3", plain), ("C.4", huffman)] {
            let examples: &[Example] = &[
                (
                    first,
                    &[":method: GET", ":scheme: http", ":path: /", ":authority: www.example.com"],
                    &[":authority: www.example.com"],
                    57,
                ),
                (
                    second,
                    &[
                        ":method: GET",
                        ":scheme: http",
                        ":path: /",
                        ":authority: www.example.com",
                        "cache-control: no-cache",
                    ],
                    &["cache-control: no-cache", ":authority: www.example.com"],
                    110,
                ),
                (
                    third,
                    &[
                        ":method: GET",
                        ":scheme: https",
                        ":path: /index.html",
                        ":authority: www.example.com",
                        "custom-key: custom-value",
                    ],
                    &["custom-key: custom-value", "cache-control: no-cache", ":authority: www.example.com"],
                    164,
                ),
            ];
            check(name, 4096, examples);
        }
    }

    #[test]
    fn responses_of_appendices_c_5_and_c_6_which_evict() {
        let plain = [
            "4803 3330 3258 0770 7269 7661 7465 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32
             3120 474d 546e 1768 7474 7073 3a2f 2f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "4803 3330 37c1 c0bf",
            "88c1 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3220 474d 54c0 5a04 677a 6970
             7738 666f 6f3d 4153 444a 4b48 514b 425a 584f 5157 454f 5049 5541 5851 5745 4f49 553b 206d 6178 2d61
             6765 3d33 3630 303b 2076 6572 7369 6f6e 3d31",
        ];
        let huffman = [
            "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad
             1718 63c7 8f0b 97c8 e9ae 82ae 43d3",
            "4883 640e ffc1 c0bf",
            "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2
             e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07",
        ];
        const PRIVATE: &str = "cache-control: private";
        const AT_21: &str = "date: Mon, 21 Oct 2013 20:13:21 GMT";
        const AT_22: &str = "date: Mon, 21 Oct 2013 20:13:22 GMT";
        const LOCATION: &str = "location: https://www.example.com";
        const GZIP: &str = "content-encoding: gzip";
        const COOKIE: &str = "set-cookie: foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1";
        for (name, [first, second, third]) in [("C.5", plain), ("C.6", huffman)] {
            let examples: &[Example] = &[
                (first, &[":status: 302", PRIVATE, AT_21, LOCATION], &[LOCATION, AT_21, PRIVATE, ":status: 302"], 222),
                (second, &[":status: 307", PRIVATE, AT_21, LOCATION], &[":status: 307", LOCATION, AT_21, PRIVATE], 222),
                (third, &[":status: 200", PRIVATE, AT_22, LOCATION, GZIP, COOKIE], &[COOKIE, GZIP, AT_22], 215),
            ];
            check(name, 256, examples);
        }
    }

    #[test]
    fn every_field_of_the_static_table_can_be_indexed() {
        for (index, (name, value)) in (1..).zip(STATIC) {
            let list = Decoder::new().decode(&[0x80 | index], NO_LIMIT).unwrap();
            assert_eq!(list.iter().collect::<Vec<_>>(), [(name.as_bytes(), value.as_bytes())]);
        }
    }

    #[test]
    fn a_new_entry_may_take_its_name_from_the_one_that_it_evicts() {
        let mut decoder = with_table(40);
        decoder.decode(b"\x40\x04name\x011", NO_LIMIT).unwrap();
        let list = decoder.decode(b"\x7e\x012", NO_LIMIT).unwrap();
        assert_eq!(listed(&list), ["name: 2"]);
        assert_eq!(newest_first(&decoder), ["name: 2"]);
    }

    #[test]
    fn an_index_beyond_the_tables_and_index_zero_are_errors() {
        let cases: &[(&[u8], usize)] = &[
            (b"\x80", 0),
            (b"\xc0", 64),
            (b"\xff\x80\xff\xff\xff\x0f", u32::MAX as usize),
            // As names.
            (b"\x7f\x01\x011", 64),
            (b"\x0f\x31\x011", 64),
            (b"\x1f\x31\x011", 64),
        ];
        for (block, index) in cases {
            assert_eq!(with_entries().decode(block, NO_LIMIT), Err(HpackError::Index(*index)), "{block:02x?}");
        }
        for block in [b"\xbf", b"\xbe"] {
            assert_eq!(with_entries().decode(block, NO_LIMIT).unwrap().len(), 1);
        }
    }

    #[test]
    fn a_block_that_ends_early_is_an_error() {
        let whole = hex("20 3fe11f 40826402 04 61626364 5f85aec3771a4b 10016100 0f0000");
        let mut ends = vec![];
        for end in 0..whole.len() {
            match Decoder::new().decode(&whole[..end], NO_LIMIT) {
                Ok(_) => ends.push(end),
                Err(error) => assert_eq!(error, HpackError::Truncated, "at {end}"),
            }
        }
        assert_eq!(ends, [0, 1, 4, 13, 20, 24]);
    }

    #[test]
    fn errors_of_huffman_strings_are_errors_of_the_block() {
        for (block, error) in [
            (&b"\x00\x81\x00\x011"[..], HpackError::Padding),
            (b"\x01\x82\x07\xff", HpackError::Padding),
            (b"\x41\x84\xff\xff\xff\xff", HpackError::EndOfString),
        ] {
            assert_eq!(Decoder::new().decode(block, NO_LIMIT), Err(error), "{block:02x?}");
            // Also when nothing is kept any more.
            assert_eq!(Decoder::new().decode(block, 0), Err(error), "{block:02x?}");
        }
    }

    #[test]
    fn the_peer_may_choose_any_table_up_to_the_limit() {
        for (update, max) in [(&b"\x20"[..], 0), (b"\x21", 1), (b"\x3f\xe1\x1f", 4096), (b"\x20\x3e\x21", 1)] {
            let mut decoder = with_entries();
            assert!(decoder.decode(update, NO_LIMIT).unwrap().is_empty());
            assert_eq!(decoder.table.max(), max);
            assert!(decoder.table.used() <= max);
        }
        let too_large = HpackError::UpdateTooLarge { size: 4097, allowed: 4096 };
        assert_eq!(with_entries().decode(b"\x3f\xe2\x1f", NO_LIMIT), Err(too_large));
    }

    #[test]
    fn entries_that_an_update_evicted_stay_away() {
        let mut decoder = with_entries();
        // Down to one entry, and up again.
        decoder.decode(b"\x3f\x03\x3f\xe1\x1f\xbe", NO_LIMIT).unwrap();
        assert_eq!(newest_first(&decoder), ["b: 2"]);
        assert_eq!(decoder.decode(b"\xbf", NO_LIMIT), Err(HpackError::Index(63)));
    }

    #[test]
    fn an_update_after_a_field_is_an_error() {
        for block in [b"\x82\x20", b"\xbe\x3e"] {
            assert_eq!(with_entries().decode(block, NO_LIMIT), Err(HpackError::UpdateLate));
        }
    }

    #[test]
    fn a_lower_limit_evicts_and_must_be_confirmed_at_the_beginning_of_the_next_block() {
        let mut decoder = with_entries();
        decoder.set_limit(34);
        assert_eq!(newest_first(&decoder), ["b: 2"]);
        for block in [&b""[..], b"\x82", b"\x40\x01a\x011", b"\x82\x20"] {
            assert_eq!(decoder.clone().decode(block, NO_LIMIT), Err(HpackError::UpdateMissing), "{block:02x?}");
        }
        let too_large = HpackError::UpdateTooLarge { size: 35, allowed: 34 };
        assert_eq!(decoder.clone().decode(b"\x3f\x04\xbe", NO_LIMIT), Err(too_large));
        assert_eq!(decoder.decode(b"\x3f\x03\xbe", NO_LIMIT).unwrap().len(), 1);
        // Once.
        assert_eq!(decoder.decode(b"\xbe", NO_LIMIT).unwrap().len(), 1);
        assert_eq!(decoder.decode(b"\x3f\x04", NO_LIMIT), Err(too_large));
    }

    #[test]
    fn a_limit_at_or_above_what_the_peer_uses_needs_no_confirmation() {
        for limit in [4096, 4097, 65536] {
            let mut decoder = with_entries();
            decoder.set_limit(limit);
            assert_eq!(decoder.table.max(), 4096);
            assert_eq!(decoder.decode(b"\xbe", NO_LIMIT).unwrap().len(), 1);
        }
        let mut decoder = with_entries();
        decoder.decode(b"\x20", NO_LIMIT).unwrap();
        decoder.set_limit(0);
        assert_eq!(decoder.decode(b"\x82", NO_LIMIT).unwrap().len(), 1);
    }

    #[test]
    fn of_several_limits_between_two_blocks_the_lowest_must_be_confirmed_and_the_last_holds() {
        let mut decoder = with_entries();
        decoder.set_limit(0);
        decoder.set_limit(100);
        let too_large = |allowed| HpackError::UpdateTooLarge { size: 101, allowed };
        assert_eq!(decoder.clone().decode(b"\x3f\x46", NO_LIMIT), Err(too_large(0)));
        assert_eq!(decoder.clone().decode(b"\x20\x3f\x46", NO_LIMIT), Err(too_large(100)));
        // Up to 100, and an entry of 34.
        assert_eq!(decoder.decode(b"\x20\x3f\x45\x40\x01a\x011", NO_LIMIT).unwrap().len(), 1);
        assert_eq!(newest_first(&decoder), ["a: 1"]);
    }

    #[test]
    fn what_no_table_holds_is_a_field_all_the_same() {
        let mut decoder = Decoder::new();
        decoder.set_limit(0);
        assert_eq!(listed(&decoder.decode(b"\x20\x40\x01a\x011", NO_LIMIT).unwrap()), ["a: 1"]);
        assert_eq!(decoder.decode(b"\xbe", NO_LIMIT), Err(HpackError::Index(62)));
    }

    #[test]
    fn a_list_is_too_large_when_names_values_and_32_each_pass_the_limit() {
        // "a: 1", "b: 2" newly indexed, and "a: 1" from the table.
        let block = b"\x40\x01a\x011\x40\x01b\x012\xbf";
        for (limit, kept) in [(0, 0), (33, 0), (34, 1), (67, 1), (68, 2), (101, 2), (102, 3), (NO_LIMIT, 3)] {
            let mut decoder = Decoder::new();
            let list = decoder.decode(block, limit).unwrap();
            assert_eq!((list.len(), list.too_large), (kept, kept < 3), "{limit}");
            assert_eq!(listed(&list), ["a: 1", "b: 2", "a: 1"][..kept]);
            assert_eq!(decoder, with_entries(), "the table is the same, whatever the limit");
        }
    }

    #[test]
    fn nothing_is_kept_after_the_first_field_that_was_too_large_even_if_it_would_fit() {
        let alone = b"\x82";
        assert_eq!(Decoder::new().decode(alone, 42).unwrap().len(), 1);
        let list = Decoder::new().decode(b"\x00\x01a\x0a0123456789\x82", 42).unwrap();
        assert_eq!((list.len(), list.too_large), (0, true));
    }

    #[test]
    fn one_octet_for_a_whole_table_does_not_fill_memory() {
        let mut decoder = Decoder::new();
        let value = vec![b'x'; 4000];
        let insert = [b"\x40\x01a\x7f\xa1\x1e", &value[..]].concat();
        assert_eq!(decoder.decode(&insert, NO_LIMIT).unwrap().len(), 1);
        let list = decoder.decode(&vec![0xbe; 16384], 65536).unwrap();
        assert_eq!((list.len(), list.too_large), (65536 / (4001 + FIELD_OVERHEAD), true));
        assert!(list.bytes.capacity() <= 65536);
    }

    #[test]
    fn an_idle_decoder_and_an_empty_list_hold_no_memory() {
        let mut decoder = with_entries();
        decoder.set_limit(0);
        let list = decoder.decode(b"\x20", NO_LIMIT).unwrap();
        assert_eq!((list.bytes.capacity(), list.fields.capacity()), (0, 0));
        assert!(size_of::<Decoder>() <= 72);
    }

    #[test]
    fn a_list_is_readable_in_logs() {
        let list = Decoder::new().decode(b"\x82\x00\x01a\x01\n", 60).unwrap();
        assert_eq!(format!("{list:?}"), r#"[":method: GET"] and more"#);
    }

    #[test]
    fn a_restored_decoder_knows_its_table_and_what_is_due() {
        let mut decoder = with_entries();
        for decoder in [Decoder::new(), decoder.clone(), {
            decoder.set_limit(40);
            decoder
        }] {
            assert_eq!(state::decode(&state::encode(&decoder)), Ok(decoder));
        }
    }

    #[test]
    fn a_snapshot_that_cannot_be_is_refused() {
        let restored = |limit, max, entries: &[&[u8]]| {
            let entries = entries.iter().map(|entry| entry.to_vec()).collect();
            state::decode::<Decoder>(&state::encode(&Made(limit, max, entries)))
        };
        let entry = &b"\0\0\0\x01a1"[..];
        assert!(restored(68, 68, &[entry, entry]).is_ok());
        assert!(restored(u64::MAX, u64::MAX, &[entry]).is_ok());
        let cases: [(_, _, &[&[u8]], _, _); 6] = [
            (67, 67, &[entry, entry], ENTRY, "does not fit into the table"),
            (0, 0, &[b"\0\0\0\0"], ENTRY, "does not fit into the table"),
            (68, 69, &[], MAX, "is above the limit"),
            (68, 68, &[b"\0\0\0"], ENTRY, "has no length"),
            (68, 68, &[b"\0\0\0\x02a"], ENTRY, "is shorter than its name"),
            (68, 68, &[b"\xff\xff\xff\xffa"], ENTRY, "is shorter than its name"),
        ];
        for (limit, max, entries, tag, why) in cases {
            assert_eq!(restored(limit, max, entries), Err(RestoreError::Invalid { tag, why }));
        }
    }

    fn is_sound(decoder: &Decoder) -> bool {
        let sum: usize = decoder.entries().map(|(name, value)| size(name, value)).sum();
        sum == decoder.table.used() && sum <= decoder.table.max() && decoder.table.max() <= decoder.limit
    }

    proptest! {
        #[test]
        fn any_snapshot_makes_a_sound_decoder_or_is_refused(
            limit in 0..300_u64,
            max in 0..300_u64,
            fields in vec(vec(any::<u8>(), 0..40), 0..6),
            flip: (Index, u8),
            block: Vec<u8>,
        ) {
            let entry = |field: Vec<u8>| [&[0, 0, 0, field.first().map_or(0, |name| name % 32)], &field[..]].concat();
            let blob = state::encode(&Made(limit, max, fields.into_iter().map(entry).collect())).to_vec();
            let mut flipped = blob.clone();
            flipped[flip.0.index(blob.len())] ^= flip.1;
            for blob in [blob, flipped] {
                if let Ok(mut decoder) = state::decode::<Decoder>(&blob) {
                    prop_assert!(is_sound(&decoder));
                    prop_assert_eq!(&state::decode::<Decoder>(&state::encode(&decoder)).unwrap(), &decoder);
                    drop(decoder.decode(&block, 500));
                    prop_assert!(is_sound(&decoder));
                }
            }
        }

        #[test]
        fn any_blocks_make_a_bounded_list_or_an_error(blocks: Vec<Vec<u8>>, limits: Vec<u16>, list in 0..5000_usize) {
            let mut decoder = Decoder::new();
            let mut limits = limits.into_iter();
            for block in blocks {
                if let Some(limit) = limits.next() {
                    decoder.set_limit(limit.into());
                }
                if let Ok(found) = decoder.decode(&block, list) {
                    prop_assert!(found.iter().map(|(name, value)| size(name, value)).sum::<usize>() <= list);
                }
                prop_assert!(is_sound(&decoder));
            }
        }
    }
}
