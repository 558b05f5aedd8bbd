//! The Huffman code for strings (RFC 7541 §5.2, Appendix B).

use super::HpackError;

/// Bits of each octet's code, and last those of EOS: all that Appendix B says. The code is canonical, so the codes of one length are
/// consecutive numbers in the order of their octets, and those of the next length follow on.
#[rustfmt::skip]
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
     6, 10, 10, 12, 13,  6,  8, 11, 10, 10,  8, 11,  8,  6,  6,  6,
     5,  5,  5,  6,  6,  6,  6,  6,  6,  6,  7,  8, 15,  6, 12, 10,
    13,  6,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,
     7,  7,  7,  7,  7,  7,  7,  7,  8,  7,  8, 13, 19, 13, 14,  6,
    15,  5,  6,  5,  6,  5,  6,  6,  6,  5,  7,  7,  6,  6,  6,  5,
     6,  7,  6,  5,  5,  6,  7,  7,  7,  7,  7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];

const EOS: u16 = 256;
const SYMBOLS: u16 = EOS + 1;
const LONGEST: usize = 30;
const SHORTEST: usize = 5;

/// Codes up to this length are looked up in one step; every letter and digit is among them.
const QUICK: usize = 8;

static CODE: Code = Code::new();

struct Code {
    /// By the next `QUICK` bits: symbol and length, or length 0 where the code is longer.
    quick: [(u16, u8); 1 << QUICK],
    /// By rank: shorter codes first, then smaller symbols.
    symbols: [u16; SYMBOLS as usize],
    /// By length.
    lengths: [Length; LONGEST + 1],
}

#[derive(Clone, Copy)]
struct Length {
    /// The first code that is longer, moved to the top of 32 bits.
    end: u64,
    /// The first code of this length, and its rank.
    first: usize,
    rank: usize,
}

impl Code {
    const fn new() -> Self {
        let mut code = Self {
            quick: [(0, 0); 1 << QUICK],
            symbols: [0; SYMBOLS as usize],
            lengths: [Length { end: 0, first: 0, rank: 0 }; LONGEST + 1],
        };
        let (mut next, mut rank) = (0_usize, 0);
        let mut length = 1_u8;
        while length as usize <= LONGEST {
            next <<= 1;
            code.lengths[length as usize].first = next;
            code.lengths[length as usize].rank = rank;
            let mut symbol = 0;
            while symbol < SYMBOLS {
                if LENGTHS[symbol as usize] == length {
                    code.symbols[rank] = symbol;
                    if length as usize <= QUICK {
                        let spare = QUICK - length as usize;
                        let mut tail = 0;
                        while tail < 1 << spare {
                            code.quick[(next << spare) + tail] = (symbol, length);
                            tail += 1;
                        }
                    }
                    next += 1;
                    rank += 1;
                }
                symbol += 1;
            }
            code.lengths[length as usize].end = (next as u64) << (32 - length);
            length += 1;
        }
        code
    }

    /// The symbol that `bits` begins with, at the top, and its length. There always is one: the code is complete.
    fn first_of(&self, bits: u64) -> (u16, u32) {
        let [a, b, c, d, ..] = bits.to_be_bytes();
        let (symbol, length) = self.quick[usize::from(a)];
        if length > 0 { (symbol, u32::from(length)) } else { self.first_long(u32::from_be_bytes([a, b, c, d])) }
    }

    #[cold]
    fn first_long(&self, bits: u32) -> (u16, u32) {
        for (length, of) in (0..).zip(&self.lengths).skip(QUICK + 1) {
            if u64::from(bits) < of.end {
                let among = (bits >> (32 - length)) as usize - of.first;
                return (self.symbols[of.rank + among], length);
            }
        }
        // Not reached, as thirty ones are below the last end.
        (EOS, 30)
    }
}

/// Appends what `coded` stands for to `out`: at most 8/5 of its length.
///
/// # Errors
/// §5.2: EOS within the string; padding that is longer than 7 bits or is not how EOS begins, that is, all ones.
pub(super) fn decode(coded: &[u8], out: &mut Vec<u8>) -> Result<(), HpackError> {
    out.reserve(coded.len() * 8 / SHORTEST);
    let (words, rest) = coded.as_chunks();
    let mut bits = Bits { top: 0, count: 0 };
    for word in words {
        bits.top |= u64::from(u32::from_be_bytes(*word)) << (32 - bits.count);
        bits.count += 32;
        // A code has at most 30 bits, so that it can be taken while there are more than 32, and the next word fits afterwards.
        while bits.count > 32 {
            let (symbol, length) = CODE.first_of(bits.top);
            bits.skip(length);
            out.push(octet(symbol)?);
        }
    }
    for byte in rest {
        bits.top |= u64::from(*byte) << (56 - bits.count);
        bits.count += 8;
    }
    while bits.count > 0 {
        let (symbol, length) = CODE.first_of(bits.top);
        if length > bits.count {
            let padding = bits.top.leading_ones() == bits.count && bits.count < 8;
            return if padding { Ok(()) } else { Err(HpackError::Padding) };
        }
        bits.skip(length);
        out.push(octet(symbol)?);
    }
    Ok(())
}

/// The next `count` bits at the top, and zeros.
struct Bits {
    top: u64,
    count: u32,
}

impl Bits {
    fn skip(&mut self, length: u32) {
        self.top <<= length;
        self.count -= length;
    }
}

/// EOS is the only symbol that is none.
fn octet(symbol: u16) -> Result<u8, HpackError> {
    u8::try_from(symbol).map_err(|_| HpackError::EndOfString)
}

/// For tests: we send no Huffman code.
#[cfg(test)]
pub(super) fn encode(plain: &[u8]) -> Vec<u8> {
    let mut bits: Vec<bool> = plain.iter().flat_map(|octet| tests::code_of(usize::from(*octet))).collect();
    bits.resize(bits.len().next_multiple_of(8), true);
    bits.chunks(8).map(|byte| byte.iter().fold(0, |byte, bit| byte << 1 | u8::from(*bit))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// From the lengths alone, without the tables under test.
    pub(super) fn code_of(symbol: usize) -> Vec<bool> {
        let length = LENGTHS[symbol];
        let before = (0..257).filter(|other| (LENGTHS[*other], *other) < (length, symbol));
        let code: u64 = before.map(|other| 1 << (32 - LENGTHS[other])).sum();
        (0..length).map(|bit| code & (1 << (31 - bit)) != 0).collect()
    }

    fn decoded(coded: &[u8]) -> Result<Vec<u8>, HpackError> {
        let mut out = Vec::new();
        decode(coded, &mut out).map(|()| out)
    }

    fn bytes(bits: &[bool]) -> Vec<u8> {
        bits.chunks(8).map(|byte| byte.iter().fold(0, |byte, bit| byte << 1 | u8::from(*bit))).collect()
    }

    #[test]
    fn the_code_is_complete() {
        let kraft: u64 = LENGTHS.iter().map(|length| 1 << (LONGEST - usize::from(*length))).sum();
        assert_eq!(kraft, 1 << LONGEST);
        assert_eq!(usize::from(*LENGTHS.iter().min().unwrap()), SHORTEST);
    }

    #[test]
    fn codes_are_those_of_the_appendix() {
        for (symbol, code, length) in [
            (0, 0x1ff8, 13),
            (1, 0x007f_ffd8, 23),
            (10, 0x3fff_fffc, 30),
            (usize::from(b'0'), 0x0, 5),
            (usize::from(b't'), 0x9, 5),
            (usize::from(b' '), 0x14, 6),
            (usize::from(b'u'), 0x2d, 6),
            (usize::from(b':'), 0x5c, 7),
            (usize::from(b'z'), 0x7b, 7),
            (usize::from(b'&'), 0xf8, 8),
            (usize::from(b'Z'), 0xfd, 8),
            (usize::from(b'!'), 0x3f8, 10),
            (usize::from(b'|'), 0x7fc, 11),
            (usize::from(b'#'), 0xffa, 12),
            (usize::from(b'~'), 0x1ffd, 13),
            (usize::from(b'}'), 0x3ffd, 14),
            (usize::from(b'{'), 0x7ffe, 15),
            (usize::from(b'\\'), 0x0007_fff0, 19),
            (128, 0x000f_ffe6, 20),
            (199, 0x01ff_ffec, 25),
            (249, 0x0fff_fffe, 28),
            (255, 0x03ff_ffee, 26),
            (256, 0x3fff_ffff, 30),
        ] {
            let bits: Vec<bool> = (0..length).rev().map(|bit| code & (1 << bit) != 0).collect();
            assert_eq!(code_of(symbol), bits, "{symbol}");
        }
    }

    #[test]
    fn every_octet_is_decoded_after_every_number_of_bits() {
        for octet in 0..=u8::MAX {
            for before in 0..8 {
                let plain = [&vec![b'0'; before][..], &[octet], b"%z"].concat();
                assert_eq!(decoded(&encode(&plain)), Ok(plain));
            }
        }
    }

    #[test]
    fn up_to_seven_ones_pad() {
        assert_eq!(decoded(&[]), Ok(vec![]));
        // Codes of 5 to 8 bits pad with 3 to 0; of 10, 11, 12, 13 and 15 with up to 6; eight letters of 7 with none.
        for plain in ["0", "%", ":", "&", "!", "|", "#", "~", "{", ":::::::", "::::::::", "0:::::::"] {
            assert_eq!(decoded(&encode(plain.as_bytes())), Ok(plain.into()));
        }
    }

    #[test]
    fn other_padding_is_an_error() {
        for coded in [
            // A whole octet of ones, alone and after a string that fills its own.
            &[0xff][..],
            &[0xff, 0xff],
            &[0xff, 0xff, 0xff],
            &[0xf8, 0xff],
            &[0x07, 0xff],
            // '0', and then three bits that are not ones.
            &[0x00],
            &[0x06],
            &[0x03],
            // Begins like a code of 10 bits.
            &[0xfe],
        ] {
            assert_eq!(decoded(coded), Err(HpackError::Padding), "{coded:02x?}");
        }
    }

    #[test]
    fn eos_is_an_error_wherever_it_is() {
        for before in 0..16 {
            for after in 0..8 {
                let mut bits: Vec<bool> = (0..before).flat_map(|_| code_of(usize::from(b'0'))).collect();
                bits.extend(code_of(256));
                bits.extend((0..after).flat_map(|_| code_of(usize::from(b'0'))));
                bits.resize(bits.len().next_multiple_of(8), true);
                assert_eq!(decoded(&bytes(&bits)), Err(HpackError::EndOfString), "{before} {after}");
            }
        }
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(plain: Vec<u8>) {
            prop_assert_eq!(decoded(&encode(&plain)), Ok(plain));
        }

        #[test]
        fn any_bytes_make_at_most_eight_fifths_and_are_the_only_code_for_them(coded: Vec<u8>) {
            if let Ok(plain) = decoded(&coded) {
                prop_assert!(plain.len() <= coded.len() * 8 / 5);
                prop_assert_eq!(encode(&plain), coded);
            }
        }

        #[test]
        fn text_is_followed_by_nothing_but_its_padding(plain in "[ -~]{0,40}", more in 1..4_usize) {
            let mut coded = encode(plain.as_bytes());
            coded.extend(vec![0xff; more]);
            prop_assert!(decoded(&coded).is_err());
        }
    }
}
