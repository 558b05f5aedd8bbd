//! What a CONNECT carries.

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use mesh_core::headers::Authority;

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

impl ConnectRequest {
    /// RFC 9113 §8.5: `:scheme` and `:path` are absent from CONNECT.
    pub(crate) fn to_http(&self) -> Option<http::Request<()>> {
        let authority = http::uri::Authority::try_from(self.authority.to_string()).ok()?;
        let mut request = http::Request::new(());
        *request.method_mut() = http::Method::CONNECT;
        *request.uri_mut() = authority.into();
        *request.version_mut() = http::Version::HTTP_2;
        request.headers_mut().extend(self.headers.iter().cloned());
        Some(request)
    }
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
    pub(crate) fn parse(request: &http::Request<h2::RecvStream>) -> Result<Self, Malformed> {
        let bad = |detail: String| Malformed { status: StatusCode::BAD_REQUEST, detail };
        if request.method() != http::Method::CONNECT {
            return Err(bad(format!("method is {}; expected CONNECT", request.method())));
        }
        let text = request.uri().authority().map(http::uri::Authority::as_str).unwrap_or_default();
        let authority = text.parse().map_err(|_| bad(format!("no valid authority pseudo header: `{text}`")))?;
        Ok(Self { authority, headers: request.headers().clone() })
    }
}
