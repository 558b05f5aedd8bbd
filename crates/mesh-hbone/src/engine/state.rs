//! How snapshots are written down: tagged, length-prefixed fields, so that two versions of this program understand each other.
//!
//! Each field is `tag u16 | length u32 | bytes`, big-endian. Every type owns a numbering of its own tags; nothing is ever renumbered.
//! A reader refuses a tag it does not know, because leaving out what another version thought necessary would break a live
//! connection; the tags from [`OPTIONAL`] up are the exception. A blob for another process starts with [`MAGIC`] and a version.

use std::collections::BTreeMap;

use zeroize::Zeroizing;

/// Tags with this bit may be skipped by a reader that does not know them.
pub const OPTIONAL: u16 = 0x8000;

/// First bytes of every blob.
pub const MAGIC: [u8; 4] = *b"FWTN";

/// Of the format as a whole: changed only when old readers must not even try.
pub const VERSION: u16 = 1;

/// Why a snapshot cannot be restored. Nothing of it has taken effect then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    #[error("this is no tunnel snapshot")]
    Magic,
    #[error("snapshot format {found}; this program reads {VERSION}")]
    Version { found: u16 },
    #[error("the snapshot ends within a field")]
    Truncated,
    #[error("field {0:#06x} is unknown here and may not be left out")]
    Unknown(u16),
    #[error("field {0:#06x} is missing")]
    Missing(u16),
    #[error("field {0:#06x} occurs more than once")]
    Repeated(u16),
    #[error("field {tag:#06x}: {why}")]
    Invalid { tag: u16, why: &'static str },
}

/// What survives a change of process.
pub trait Snapshot: Sized {
    fn save(&self, to: &mut Writer);

    /// # Errors
    /// See [`RestoreError`]. Never panics, whatever the bytes.
    fn restore(from: &Fields<'_>) -> Result<Self, RestoreError>;
}

/// Collects fields. What it holds may include traffic keys: it is wiped when dropped.
#[derive(Debug, Default)]
pub struct Writer(Zeroizing<Vec<u8>>);

impl Writer {
    pub fn bytes(&mut self, tag: u16, value: &[u8]) {
        self.0.extend_from_slice(&tag.to_be_bytes());
        let length = u32::try_from(value.len()).expect("a field is far smaller than 4 GiB");
        self.0.extend_from_slice(&length.to_be_bytes());
        self.0.extend_from_slice(value);
    }

    pub fn u64(&mut self, tag: u16, value: u64) {
        self.bytes(tag, &value.to_be_bytes());
    }

    pub fn u32(&mut self, tag: u16, value: u32) {
        self.bytes(tag, &value.to_be_bytes());
    }

    pub fn flag(&mut self, tag: u16, value: bool) {
        self.bytes(tag, &[u8::from(value)]);
    }

    /// A field made of fields.
    pub fn group(&mut self, tag: u16, fill: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        fill(&mut inner);
        self.bytes(tag, &inner.0);
    }

    pub fn snapshot(&mut self, tag: u16, value: &impl Snapshot) {
        self.group(tag, |inner| value.save(inner));
    }
}

/// The blob of a whole snapshot.
pub fn encode(value: &impl Snapshot) -> Zeroizing<Vec<u8>> {
    let mut fields = Writer::default();
    value.save(&mut fields);
    let mut blob = Zeroizing::new(Vec::with_capacity(MAGIC.len() + 2 + fields.0.len()));
    blob.extend_from_slice(&MAGIC);
    blob.extend_from_slice(&VERSION.to_be_bytes());
    blob.extend_from_slice(&fields.0);
    blob
}

/// Reads what [`encode`] wrote, or another version of it.
///
/// # Errors
/// See [`RestoreError`].
pub fn decode<T: Snapshot>(blob: &[u8]) -> Result<T, RestoreError> {
    let rest = blob.strip_prefix(&MAGIC).ok_or(RestoreError::Magic)?;
    let (version, rest) = rest.split_first_chunk().ok_or(RestoreError::Truncated)?;
    match u16::from_be_bytes(*version) {
        VERSION => T::restore(&Fields::parse(rest)?),
        found => Err(RestoreError::Version { found }),
    }
}

/// The fields of one group: tag to values, in the order written.
#[derive(Debug)]
pub struct Fields<'a>(BTreeMap<u16, Vec<&'a [u8]>>);

impl<'a> Fields<'a> {
    /// # Errors
    /// [`RestoreError::Truncated`].
    pub fn parse(mut bytes: &'a [u8]) -> Result<Self, RestoreError> {
        let mut fields = BTreeMap::<u16, Vec<&[u8]>>::new();
        while !bytes.is_empty() {
            let (tag, rest) = bytes.split_first_chunk().ok_or(RestoreError::Truncated)?;
            let (length, rest) = rest.split_first_chunk().ok_or(RestoreError::Truncated)?;
            let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| RestoreError::Truncated)?;
            let (value, rest) = rest.split_at_checked(length).ok_or(RestoreError::Truncated)?;
            fields.entry(u16::from_be_bytes(*tag)).or_default().push(value);
            bytes = rest;
        }
        Ok(Self(fields))
    }

    /// Refuses fields that this version cannot give a meaning. Call it first, with every tag that will be asked for.
    ///
    /// # Errors
    /// [`RestoreError::Unknown`].
    pub fn only(&self, known: &[u16]) -> Result<&Self, RestoreError> {
        match self.0.keys().find(|tag| **tag & OPTIONAL == 0 && !known.contains(tag)) {
            Some(tag) => Err(RestoreError::Unknown(*tag)),
            None => Ok(self),
        }
    }

    /// Every value of a tag that may repeat.
    pub fn all(&self, tag: u16) -> impl Iterator<Item = &'a [u8]> + use<'a, '_> {
        self.0.get(&tag).into_iter().flatten().copied()
    }

    /// # Errors
    /// [`RestoreError::Repeated`].
    pub fn optional(&self, tag: u16) -> Result<Option<&'a [u8]>, RestoreError> {
        match self.0.get(&tag).map(Vec::as_slice) {
            None | Some([]) => Ok(None),
            Some([value]) => Ok(Some(value)),
            Some(_) => Err(RestoreError::Repeated(tag)),
        }
    }

    /// # Errors
    /// [`RestoreError::Missing`], [`RestoreError::Repeated`].
    pub fn bytes(&self, tag: u16) -> Result<&'a [u8], RestoreError> {
        self.optional(tag)?.ok_or(RestoreError::Missing(tag))
    }

    /// # Errors
    /// As [`Self::bytes`], and when the field has another length.
    pub fn array<const N: usize>(&self, tag: u16) -> Result<[u8; N], RestoreError> {
        self.bytes(tag)?.try_into().map_err(|_| RestoreError::Invalid { tag, why: "has an unexpected length" })
    }

    /// # Errors
    /// As [`Self::array`].
    pub fn u64(&self, tag: u16) -> Result<u64, RestoreError> {
        self.array(tag).map(u64::from_be_bytes)
    }

    /// # Errors
    /// As [`Self::array`].
    pub fn u32(&self, tag: u16) -> Result<u32, RestoreError> {
        self.array(tag).map(u32::from_be_bytes)
    }

    /// # Errors
    /// As [`Self::array`], and when it is neither 0 nor 1.
    pub fn flag(&self, tag: u16) -> Result<bool, RestoreError> {
        match self.array(tag)? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(RestoreError::Invalid { tag, why: "is neither 0 nor 1" }),
        }
    }

    /// # Errors
    /// As [`Self::bytes`], or what the inner type found.
    pub fn snapshot<T: Snapshot>(&self, tag: u16) -> Result<T, RestoreError> {
        T::restore(&Fields::parse(self.bytes(tag)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Pair(u64, Vec<u8>);

    impl Snapshot for Pair {
        fn save(&self, to: &mut Writer) {
            to.u64(1, self.0);
            to.bytes(2, &self.1);
        }

        fn restore(from: &Fields<'_>) -> Result<Self, RestoreError> {
            from.only(&[1, 2])?;
            Ok(Self(from.u64(1)?, from.bytes(2)?.to_vec()))
        }
    }

    fn with(tag: u16) -> Vec<u8> {
        let mut extra = Writer::default();
        extra.flag(tag, true);
        [&encode(&Pair(7, vec![1]))[..], &extra.0[..]].concat()
    }

    #[test]
    fn what_was_saved_is_restored() {
        let pair = Pair(7, vec![1, 2, 3]);
        assert_eq!(decode::<Pair>(&encode(&pair)), Ok(pair));
    }

    #[test]
    fn an_unknown_field_is_refused_unless_it_says_that_it_may_be_skipped() {
        assert_eq!(decode::<Pair>(&with(9)), Err(RestoreError::Unknown(9)));
        assert_eq!(decode::<Pair>(&with(OPTIONAL | 9)), Ok(Pair(7, vec![1])));
    }

    #[test]
    fn damage_is_named() {
        let blob = encode(&Pair(7, vec![1]));
        assert_eq!(decode::<Pair>(b"FW"), Err(RestoreError::Magic));
        assert_eq!(decode::<Pair>(&blob[..blob.len() - 1]), Err(RestoreError::Truncated));
        assert_eq!(decode::<Pair>(&blob[..6]), Err(RestoreError::Missing(1)));
        assert_eq!(decode::<Pair>(b"FWTN\0\x02"), Err(RestoreError::Version { found: 2 }));
        assert_eq!(decode::<Pair>(&with(1)), Err(RestoreError::Repeated(1)));
    }
}
