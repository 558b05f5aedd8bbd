//! What a CONNECT carries.

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use mesh_core::headers::Authority;

use crate::engine::head::RequestHead;

/// A tunnel asked for: `:authority` and further headers; the method is always CONNECT (RFC 9110 §9.3.6).
#[derive(Clone, Debug)]
pub struct ConnectRequest {
    pub authority: Authority,
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// The answer that opened it.
#[derive(Clone, Debug)]
pub struct ConnectResponse {
    pub headers: HeaderMap,
    /// Identifies the stream within its tunnel.
    pub stream_id: u32,
}

/// A CONNECT received and found well-formed.
#[derive(Clone, Debug)]
pub struct Request {
    pub authority: Authority,
    pub headers: HeaderMap,
}

/// Why a request never reached the handler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    pub status: StatusCode,
    pub detail: String,
}

impl Request {
    pub(crate) fn parse(head: RequestHead) -> Result<Self, Malformed> {
        let bad = |detail: String| Malformed { status: StatusCode::BAD_REQUEST, detail };
        if head.method != Method::CONNECT.as_str() {
            return Err(bad(format!("method is {}; expected CONNECT", head.method.escape_debug())));
        }
        let text = head.authority.unwrap_or_default();
        let authority = text.parse();
        let authority = authority.map_err(|_| bad(format!("no valid authority pseudo header: `{text}`")))?;
        Ok(Self { authority, headers: head.headers })
    }
}
