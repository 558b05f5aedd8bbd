//! The static and the dynamic table (RFC 7541 §2.3, Appendix A), which share one range of indices.

use std::collections::VecDeque;

use super::size;

/// Fields of the static table; the index of the first is 1.
pub(super) static STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

/// The dynamic table of one direction. Allocates for what is in it, and nothing while it is empty.
///
/// `used` is the sum of the entries' sizes and never above `max`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    /// Newest first, as indices are.
    entries: VecDeque<Entry>,
    used: usize,
    max: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    name_length: usize,
    /// Name, then value.
    bytes: Box<[u8]>,
}

impl Entry {
    fn parts(&self) -> (&[u8], &[u8]) {
        self.bytes.split_at(self.name_length)
    }
}

impl Table {
    pub(super) fn new(max: usize) -> Self {
        Self { entries: VecDeque::new(), used: 0, max }
    }

    pub(super) fn max(&self) -> usize {
        self.max
    }

    /// The field at an index of the shared range (§2.3.3), in which 0 is nothing.
    pub(super) fn get(&self, index: usize) -> Option<(&[u8], &[u8])> {
        let at = index.checked_sub(1)?;
        match STATIC.get(at) {
            Some((name, value)) => Some((name.as_bytes(), value.as_bytes())),
            None => self.entries.get(at - STATIC.len()).map(Entry::parts),
        }
    }

    /// Makes room by evicting the oldest. A field larger than the table leaves it empty, which is no error (§4.4).
    pub(super) fn insert(&mut self, name: &[u8], value: &[u8]) {
        let size = size(name, value);
        self.evict(self.max.saturating_sub(size));
        if size <= self.max {
            self.entries.push_front(Entry { name_length: name.len(), bytes: [name, value].concat().into() });
            self.used += size;
        }
    }

    /// §4.3.
    pub(super) fn set_max(&mut self, max: usize) {
        self.max = max;
        self.evict(max);
    }

    /// As a snapshot wants it.
    pub(super) fn oldest_first(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.entries.iter().rev().map(Entry::parts)
    }

    /// Whether a field can be inserted without evicting another.
    pub(super) fn has_room_for(&self, name: &[u8], value: &[u8]) -> bool {
        size(name, value) <= self.max - self.used
    }

    fn evict(&mut self, until: usize) {
        while self.used > until
            && let Some(oldest) = self.entries.pop_back()
        {
            let (name, value) = oldest.parts();
            self.used -= size(name, value);
        }
        if self.entries.is_empty() {
            // Most tables are emptied once, when the peer learns that it shall not use one, and then stay so.
            self.entries = VecDeque::new();
        }
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.used
    }
}

/// Where the static table has a field: all of it, or only its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Field(usize),
    Name(usize),
}

/// The first that fits.
pub(super) fn find(name: &[u8], value: &[u8]) -> Option<Found> {
    let range = BY_LENGTH.starts.get(name.len()..)?.first_chunk::<2>()?;
    let mut found = None;
    for at in &BY_LENGTH.order[range[0]..range[1]] {
        let (known_name, known_value) = STATIC[*at];
        if known_name.as_bytes() != name {
            continue;
        }
        // An empty value there means that no value is common, but it is a value too.
        if known_value.as_bytes() == value {
            return Some(Found::Field(at + 1));
        }
        found = found.or(Some(Found::Name(at + 1)));
    }
    found
}

/// The static table by the length of its names: few have the same.
struct ByLength {
    order: [usize; STATIC.len()],
    /// Where in `order` the names of each length begin, and thus where those of the length before end.
    starts: [usize; LONGEST_NAME + 2],
}

const LONGEST_NAME: usize = 27;

static BY_LENGTH: ByLength = {
    let mut by = ByLength { order: [0; STATIC.len()], starts: [0; LONGEST_NAME + 2] };
    let (mut length, mut next) = (0, 0);
    while length <= LONGEST_NAME {
        by.starts[length] = next;
        let mut at = 0;
        while at < STATIC.len() {
            if STATIC[at].0.len() == length {
                by.order[next] = at;
                next += 1;
            }
            at += 1;
        }
        length += 1;
    }
    by.starts[length] = next;
    assert!(next == STATIC.len());
    by
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_begin_at_one_and_go_on_into_the_dynamic_table_newest_first() {
        let mut table = Table::new(200);
        table.insert(b"old", b"1");
        table.insert(b"new", b"2");
        assert_eq!(table.get(0), None);
        assert_eq!(table.get(1), Some((&b":authority"[..], &b""[..])));
        assert_eq!(table.get(61), Some((&b"www-authenticate"[..], &b""[..])));
        assert_eq!(table.get(62), Some((&b"new"[..], &b"2"[..])));
        assert_eq!(table.get(63), Some((&b"old"[..], &b"1"[..])));
        assert_eq!(table.get(64), None);
        assert_eq!(table.get(usize::MAX), None);
    }

    #[test]
    fn static_indices_are_those_of_the_appendix() {
        for (index, name) in [(8, ":status"), (15, "accept-charset"), (31, "content-type"), (47, "max-forwards")] {
            assert_eq!(STATIC[index - 1].0, name);
        }
    }

    #[test]
    fn what_does_not_fit_evicts_the_oldest_and_what_never_fits_evicts_all() {
        let mut table = Table::new(3 * 36);
        for value in [b"1", b"2", b"3", b"4"] {
            table.insert(b"key", value);
        }
        assert_eq!(table.used(), 3 * 36);
        assert_eq!(table.get(64), Some((&b"key"[..], &b"2"[..])));
        table.insert(b"key", &[0; 73]);
        assert_eq!((table.used(), table.entries.len()), (108, 1));
        table.insert(b"key", &[0; 74]);
        assert_eq!((table.used(), table.entries.len()), (0, 0));
    }

    #[test]
    fn an_empty_table_holds_no_memory() {
        let mut table = Table::new(4096);
        assert_eq!(table.entries.capacity(), 0);
        table.insert(b"key", b"1");
        table.set_max(0);
        assert_eq!((table.used(), table.entries.capacity()), (0, 0));
        table.insert(b"key", b"1");
        assert_eq!((table.used(), table.entries.capacity()), (0, 0));
    }

    #[test]
    fn the_first_static_entry_that_fits_is_found() {
        for (at, (name, value)) in STATIC.iter().enumerate() {
            let first = STATIC.iter().position(|(other, _)| other == name).unwrap();
            assert_eq!(find(name.as_bytes(), value.as_bytes()), Some(Found::Field(at + 1)));
            assert_eq!(find(name.as_bytes(), b"?"), Some(Found::Name(first + 1)));
        }
        assert_eq!(find(b":method", b"CONNECT"), Some(Found::Name(2)));
        assert_eq!(find(b"cookie", b""), Some(Found::Field(32)));
        for unknown in [&b""[..], b":", b"Host", b"baggage", &[b'a'; 27], &[b'a'; 28], &[b'a'; 1000]] {
            assert_eq!(find(unknown, b""), None);
        }
    }
}
