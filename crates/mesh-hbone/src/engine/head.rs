//! What a header list says: a request or an answer, or neither (RFC 9113 §8.2, §8.3, §8.5).

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::hpack::HeaderList;

/// A header list that breaks HTTP/2's own rules: the stream ends with PROTOCOL_ERROR (RFC 9113 §8.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

/// A request as it came: well-formed, which does not mean that it is a CONNECT, or for us.
#[derive(Clone, Debug)]
pub struct RequestHead {
    pub method: String,
    pub authority: Option<String>,
    pub headers: HeaderMap,
}

/// An answer; 1xx ones are kept apart by their status.
#[derive(Clone, Debug)]
pub struct ResponseHead {
    pub status: StatusCode,
    pub headers: HeaderMap,
}

/// Fields that mean something to one HTTP/1 connection and nothing here (RFC 9113 §8.2.2).
const CONNECTION_SPECIFIC: [&str; 5] = ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"];

impl RequestHead {
    pub(crate) fn parse(list: &HeaderList) -> Result<Self, Malformed> {
        let mut pseudo = [None; 4];
        let names: [&[u8]; 4] = [b":method", b":scheme", b":authority", b":path"];
        let headers = split(list, &names, &mut pseudo)?;
        let [method, scheme, authority, path] = pseudo;
        let method = method.ok_or(Malformed("no :method"))?;
        if method == b"CONNECT" {
            if scheme.is_some() || path.is_some() {
                return Err(Malformed("CONNECT with :scheme or :path"));
            }
        } else if scheme.is_none() || path.is_none_or(<[u8]>::is_empty) {
            return Err(Malformed("no :scheme or :path"));
        }
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Self { method: text(method), authority: authority.map(text), headers })
    }
}

impl ResponseHead {
    pub(crate) fn parse(list: &HeaderList) -> Result<Self, Malformed> {
        let mut pseudo = [None];
        let headers = split(list, &[b":status"], &mut pseudo)?;
        let status = pseudo[0].ok_or(Malformed("no :status"))?;
        let status = StatusCode::from_bytes(status).map_err(|_| Malformed(":status is no status"))?;
        Ok(Self { status, headers })
    }
}

/// Trailers carry nothing that a tunnel could use, but must be well-formed.
pub(crate) fn check_trailers(list: &HeaderList) -> Result<(), Malformed> {
    split(list, &[], &mut []).map(drop)
}

/// The pseudo-fields among `names`, each at most once and before all others; the rest as a map.
fn split<'a>(list: &'a HeaderList, names: &[&[u8]], values: &mut [Option<&'a [u8]>]) -> Result<HeaderMap, Malformed> {
    let mut headers = HeaderMap::new();
    for (name, value) in list.iter() {
        if name.first() == Some(&b':') {
            let slot = names.iter().position(|known| *known == name).ok_or(Malformed("an unknown pseudo-field"))?;
            if !headers.is_empty() {
                return Err(Malformed("a pseudo-field after others"));
            }
            if values[slot].replace(value).is_some() {
                return Err(Malformed("a pseudo-field occurs twice"));
            }
            continue;
        }
        if name.iter().any(u8::is_ascii_uppercase) {
            return Err(Malformed("a field name with capitals"));
        }
        let name = HeaderName::from_bytes(name).map_err(|_| Malformed("a field name that is none"))?;
        if CONNECTION_SPECIFIC.contains(&name.as_str()) || (name == http::header::TE && value != b"trailers") {
            return Err(Malformed("a field for one connection only"));
        }
        let value = HeaderValue::from_bytes(value).map_err(|_| Malformed("a field value that is none"))?;
        // Bounded by the header list's limit; the map itself takes 32,768 and says so.
        headers.try_append(name, value).map_err(|_| Malformed("too many fields"))?;
    }
    Ok(headers)
}
