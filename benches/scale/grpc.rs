//! Discovery's messages, read as they come in: a node keeps names and versions, and a whole mesh is never held twice.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// In front of each message.
const PREFIX: usize = 5;

/// A field of a response, as far as a node here cares.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Part<'a> {
    Resource {
        name: &'a [u8],
        version: &'a [u8],
    },
    Removed(&'a [u8]),
    Type(&'a [u8]),
    Nonce(&'a [u8]),
    /// The response is whole.
    End,
}

/// Bytes in, parts of responses out.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    buffer: BytesMut,
    /// Of the response under way, what is still to come; `None` between responses.
    left: Option<usize>,
}

impl Reader {
    /// # Errors
    /// When the bytes are no responses.
    pub(crate) fn read(&mut self, bytes: &[u8], mut each: impl FnMut(Part<'_>)) -> anyhow::Result<()> {
        self.buffer.extend_from_slice(bytes);
        loop {
            let Some(left) = self.left else {
                if self.buffer.len() < PREFIX {
                    return Ok(());
                }
                anyhow::ensure!(self.buffer[0] == 0, "a compressed message");
                self.buffer.advance(1);
                self.left = Some(usize::try_from(self.buffer.get_u32())?);
                continue;
            };
            if left == 0 {
                each(Part::End);
                self.left = None;
                continue;
            }
            let Some((field, range)) = field(&self.buffer)? else { return Ok(()) };
            let (end, value) = (range.end, &self.buffer[range]);
            match field {
                2 => {
                    let (mut name, mut version) = (&[][..], &[][..]);
                    fields(value, |field, value| match field {
                        3 => name = value,
                        1 => version = value,
                        _ => {}
                    })?;
                    each(Part::Resource { name, version });
                }
                4 => each(Part::Type(value)),
                5 => each(Part::Nonce(value)),
                6 => each(Part::Removed(value)),
                _ => {}
            }
            self.buffer.advance(end);
            self.left = Some(left.checked_sub(end).ok_or_else(|| anyhow::anyhow!("a field beyond its message"))?);
        }
    }
}

fn fields<'a>(mut message: &'a [u8], mut each: impl FnMut(u64, &'a [u8])) -> anyhow::Result<()> {
    while !message.is_empty() {
        let (number, range) = field(message)?.ok_or_else(|| anyhow::anyhow!("a message is cut short"))?;
        each(number, &message[range.clone()]);
        message = &message[range.end..];
    }
    Ok(())
}

/// The first field's number and where its content is; `None` while it is not whole. All of discovery's have a length.
fn field(bytes: &[u8]) -> anyhow::Result<Option<(u64, std::ops::Range<usize>)>> {
    let Some((tag, after_tag)) = varint(bytes)? else { return Ok(None) };
    anyhow::ensure!(tag & 7 == 2, "field {} has no length", tag >> 3);
    let Some((length, after_length)) = varint(&bytes[after_tag..])? else { return Ok(None) };
    let start = after_tag + after_length;
    let end = start.saturating_add(usize::try_from(length)?);
    Ok((bytes.len() >= end).then_some((tag >> 3, start..end)))
}

fn varint(bytes: &[u8]) -> anyhow::Result<Option<(u64, usize)>> {
    let mut value = 0;
    for (at, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Ok(Some((value, at + 1)));
        }
    }
    anyhow::ensure!(bytes.len() < 10, "no varint");
    Ok(None)
}

/// A request as it is sent.
pub(crate) fn framed(message: &impl prost::Message) -> anyhow::Result<Bytes> {
    let mut bytes = BytesMut::new();
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(message.encoded_len())?);
    message.encode(&mut bytes)?;
    Ok(bytes.freeze())
}
