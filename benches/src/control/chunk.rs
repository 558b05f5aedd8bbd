//! Payload on its way into a tunnel.

use bytes::{Buf, Bytes};
use mesh_net::copy::PooledBuffer;

/// Below this a copy is cheaper than keeping a whole pooled buffer until the bytes are written.
const COPY_BELOW: usize = 8 << 10;

/// Bytes of one DATA frame: a pooled buffer that goes home when written, or a small copy.
#[derive(Debug)]
pub enum Chunk {
    Copied(Bytes),
    Pooled { buffer: PooledBuffer, start: usize, end: usize },
}

impl Chunk {
    pub fn empty() -> Self {
        Self::Copied(Bytes::new())
    }

    /// The first `length` bytes of `buffer`.
    pub fn pooled(buffer: PooledBuffer, length: usize) -> Self {
        if length < COPY_BELOW {
            return Self::Copied(Bytes::copy_from_slice(&buffer[..length]));
        }
        Self::Pooled { buffer, start: 0, end: length }
    }
}

impl Buf for Chunk {
    fn remaining(&self) -> usize {
        self.chunk().len()
    }

    fn chunk(&self) -> &[u8] {
        match self {
            Self::Copied(bytes) => bytes,
            Self::Pooled { buffer, start, end } => &buffer[*start..*end],
        }
    }

    fn advance(&mut self, count: usize) {
        match self {
            Self::Copied(bytes) => bytes.advance(count),
            Self::Pooled { start, end, .. } => {
                assert!(count <= *end - *start, "advancing past the end");
                *start += count;
            }
        }
    }
}
