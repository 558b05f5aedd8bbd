//! Header compression (RFC 7541): everything a peer may send is understood, and what we send needs no memory at either end.

mod decode;
pub mod encode;
mod huffman;
mod table;

pub use self::{
    decode::{Decoder, HeaderList, HpackError},
    encode::Encoder,
};

/// Of a dynamic table that nothing was said about (RFC 9113 §6.5.2, SETTINGS_HEADER_TABLE_SIZE).
pub const DEFAULT_TABLE_SIZE: usize = 4096;

/// What a field counts for beside its name and value, in the table (RFC 7541 §4.1) and in a list (RFC 9113 §6.5.2).
pub const FIELD_OVERHEAD: usize = 32;

fn size(name: &[u8], value: &[u8]) -> usize {
    name.len() + value.len() + FIELD_OVERHEAD
}

#[cfg(test)]
fn hex(digits: &str) -> Vec<u8> {
    let digits: Vec<u8> = digits.bytes().filter(|digit| !digit.is_ascii_whitespace()).collect();
    let value = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(value).collect()
}

#[cfg(test)]
fn text((name, value): (&[u8], &[u8])) -> String {
    format!("{}: {}", name.escape_ascii(), value.escape_ascii())
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::{table::STATIC, *};
    use crate::engine::state;

    type Field = (Vec<u8>, Vec<u8>);

    /// Something that a peer can say within a block.
    #[derive(Clone, Debug)]
    enum Said {
        Indexed(Index),
        Literal { first: u8, bits: u32, name: Result<Index, Text>, value: Text },
    }

    #[derive(Clone, Debug)]
    struct Text(Vec<u8>, bool);

    /// What happens before a block, and the block.
    #[derive(Clone, Debug)]
    struct Round {
        limits: Vec<usize>,
        updates: Vec<Index>,
        said: Vec<Said>,
    }

    /// A peer that uses all there is, with a table as plain as can be.
    struct Peer {
        entries: Vec<Field>,
        max: usize,
        limit: usize,
        lowest: usize,
    }

    impl Peer {
        fn new() -> Self {
            Self { entries: vec![], max: 4096, limit: 4096, lowest: 4096 }
        }

        fn acknowledge(&mut self, limit: usize) {
            self.limit = limit;
            self.lowest = self.lowest.min(limit);
        }

        /// The block, and the fields in it.
        fn block(&mut self, round: &Round) -> (Vec<u8>, Vec<Field>) {
            let mut out = vec![];
            let mut updates: Vec<usize> = round.updates.iter().map(|index| index.index(self.limit + 1)).collect();
            if self.lowest < self.max {
                updates.insert(0, self.lowest);
            }
            for update in updates {
                encode::integer(update, 5, 0x20, &mut out);
                self.max = update;
                self.evict();
            }
            self.lowest = self.limit;
            let fields = round.said.iter().map(|said| self.say(said, &mut out)).collect();
            (out, fields)
        }

        fn say(&mut self, said: &Said, out: &mut Vec<u8>) -> Field {
            match said {
                Said::Indexed(index) => {
                    let index = index.index(STATIC.len() + self.entries.len());
                    encode::integer(index + 1, 7, 0x80, out);
                    self.field(index)
                }
                Said::Literal { first, bits, name, value } => {
                    let name = match name {
                        Ok(index) => {
                            let index = index.index(STATIC.len() + self.entries.len());
                            encode::integer(index + 1, *bits, *first, out);
                            self.field(index).0
                        }
                        Err(name) => {
                            out.push(*first);
                            name.write(out);
                            name.0.clone()
                        }
                    };
                    value.write(out);
                    if *first == 0x40 {
                        self.entries.insert(0, (name.clone(), value.0.clone()));
                        self.evict();
                    }
                    (name, value.0.clone())
                }
            }
        }

        fn field(&self, at: usize) -> Field {
            match STATIC.get(at) {
                Some((name, value)) => (name.as_bytes().into(), value.as_bytes().into()),
                None => self.entries[at - STATIC.len()].clone(),
            }
        }

        fn evict(&mut self) {
            while self.entries.iter().map(|(name, value)| name.len() + value.len() + 32).sum::<usize>() > self.max {
                self.entries.pop();
            }
        }
    }

    impl Text {
        fn write(&self, out: &mut Vec<u8>) {
            let coded = if self.1 { &huffman::encode(&self.0) } else { &self.0 };
            encode::integer(coded.len(), 7, if self.1 { 0x80 } else { 0 }, out);
            out.extend_from_slice(coded);
        }
    }

    fn a_text() -> impl Strategy<Value = Text> {
        let bytes = prop_oneof![
            8 => "[a-z0-9 :/=-]{0,20}".prop_map(String::into_bytes),
            2 => vec(any::<u8>(), 0..50),
            1 => vec(any::<u8>(), 100..1500),
        ];
        (bytes, any::<bool>()).prop_map(|(bytes, huffman)| Text(bytes, huffman))
    }

    fn a_said() -> impl Strategy<Value = Said> {
        let how = prop_oneof![2 => Just((0x40, 6)), 1 => Just((0x00, 4)), 1 => Just((0x10, 4))];
        let name = prop_oneof![any::<Index>().prop_map(Ok), a_text().prop_map(Err)];
        prop_oneof![
            any::<Index>().prop_map(Said::Indexed),
            (how, name, a_text()).prop_map(|((first, bits), name, value)| Said::Literal { first, bits, name, value }),
        ]
    }

    fn rounds() -> impl Strategy<Value = Vec<Round>> {
        let limit = prop_oneof![Just(0), 0..200_usize, 0..10_000_usize, Just(4096)];
        let limits = prop_oneof![3 => Just(vec![]), 1 => vec(limit, 1..3)];
        let updates = prop_oneof![3 => Just(vec![]), 1 => vec(any::<Index>(), 1..3)];
        let round =
            (limits, updates, vec(a_said(), 0..12)).prop_map(|(limits, updates, said)| Round { limits, updates, said });
        vec(round, 1..10)
    }

    fn owned(list: &HeaderList) -> Vec<Field> {
        list.iter().map(|(name, value)| (name.into(), value.into())).collect()
    }

    fn moved<T: state::Snapshot>(value: &T) -> T {
        state::decode(&state::encode(value)).unwrap()
    }

    proptest! {
        #[test]
        fn what_a_peer_says_is_what_is_heard(rounds in rounds()) {
            let (mut peer, mut decoder) = (Peer::new(), Decoder::new());
            for round in rounds {
                for limit in &round.limits {
                    peer.acknowledge(*limit);
                    decoder.set_limit(*limit);
                }
                let (block, fields) = peer.block(&round);
                let list = decoder.decode(&block, usize::MAX).unwrap();
                prop_assert!(!list.too_large);
                prop_assert_eq!(owned(&list), fields);
                let mut entries: Vec<Field> = decoder.entries().map(|(name, value)| (name.into(), value.into())).collect();
                entries.reverse();
                prop_assert_eq!(entries, &peer.entries[..]);
            }
        }

        #[test]
        fn a_snapshot_between_any_two_blocks_changes_nothing(rounds in rounds(), wild: Vec<Vec<u8>>) {
            let (mut peer, mut stays, mut moves) = (Peer::new(), Decoder::new(), Decoder::new());
            for round in rounds {
                for limit in &round.limits {
                    peer.acknowledge(*limit);
                    stays.set_limit(*limit);
                    moves.set_limit(*limit);
                    moves = moved(&moves);
                    prop_assert_eq!(&moves, &stays);
                }
                let (block, _) = peer.block(&round);
                prop_assert_eq!(moves.decode(&block, 1000), stays.decode(&block, 1000));
                moves = moved(&moves);
                prop_assert_eq!(&moves, &stays);
            }
            for block in wild {
                prop_assert_eq!(moves.decode(&block, 1000), stays.decode(&block, 1000));
                moves = moved(&moves);
                prop_assert_eq!(&moves, &stays);
            }
        }

        #[test]
        fn a_limited_list_is_how_the_whole_begins_and_the_table_is_the_same(rounds in rounds(), limit in 0..2000_usize) {
            let (mut peer, mut all, mut some) = (Peer::new(), Decoder::new(), Decoder::new());
            for round in rounds {
                let (block, fields) = peer.block(&round);
                let whole = all.decode(&block, usize::MAX).unwrap();
                let part = some.decode(&block, limit).unwrap();
                let sums = fields.iter().scan(0, |sum, (name, value)| {
                    *sum += name.len() + value.len() + 32;
                    Some(*sum)
                });
                let fit = sums.take_while(|sum| *sum <= limit).count();
                prop_assert_eq!(owned(&part), &fields[..fit]);
                prop_assert_eq!(part.too_large, fit < whole.len());
                prop_assert_eq!(&some, &all);
            }
        }

        #[test]
        fn what_we_encode_is_decoded_and_needs_no_table(
            blocks in vec(vec((a_text(), a_text()), 1..8), 1..5),
            known in vec(any::<Index>(), 1..8),
            limit in prop_oneof![Just(None), (0..5000_usize).prop_map(Some)],
        ) {
            let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new());
            if let Some(limit) = limit {
                decoder.set_limit(limit);
            }
            for block in blocks {
                let mut fields: Vec<Field> = block.into_iter().map(|(name, value)| (name.0, value.0)).collect();
                for index in &known {
                    let (name, value) = index.get(&STATIC);
                    fields.push((name.as_bytes().into(), value.as_bytes().into()));
                }
                let mut out = vec![];
                for (name, value) in &fields {
                    encoder.field(name, value, &mut out);
                }
                encoder = moved(&encoder);
                prop_assert_eq!(owned(&decoder.decode(&out, usize::MAX).unwrap()), fields);
                prop_assert_eq!(decoder.entries().count(), 0);
                // Whatever the peer allows later, it needs no answer.
                decoder.set_limit(0);
                decoder.set_limit(limit.unwrap_or(4096));
            }
        }
    }
}
