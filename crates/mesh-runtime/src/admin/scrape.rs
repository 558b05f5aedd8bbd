//! The metrics page: one text, in the media type and the encoding that the scraper asks for.

use std::io::{self, Write};

use bytes::Bytes;
use http::{
    HeaderMap, StatusCode,
    header::{ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, HeaderName, HeaderValue},
};

use super::{Request, Response, answer, text};
use crate::metrics::Registry;

const OPENMETRICS: &str = "application/openmetrics-text";
const OPENMETRICS_TYPE: &str = "application/openmetrics-text;charset=utf-8;version=1.0.0";
const TEXT_TYPE: &str = "text/plain; charset=utf-8";
/// In between what a scrape costs here and what it costs on the wire.
const BROTLI_QUALITY: u32 = 4;
const BROTLI_WINDOW: u32 = 20;

const ZSTD: &str = "zstd";
const BROTLI: &str = "br";
const GZIP: &str = "gzip";
const DEFLATE: &str = "deflate";
/// Content codings (RFC 9110 §8.4.1, RFC 7932, RFC 8878), the preferred one first.
const CODINGS: [&str; 4] = [ZSTD, BROTLI, GZIP, DEFLATE];

/// Off the async threads: a large mesh has megabytes of series.
pub(super) async fn metrics(registry: Registry, request: Request) -> Response {
    let page = tokio::task::spawn_blocking(move || page(&registry.encode(), &request.headers));
    match page.await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot compress the metrics: {error}\n")),
        Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "cannot collect the metrics\n"),
    }
}

/// The media type of the metrics page for these request headers, and the content coding, if any.
pub fn negotiate(headers: &HeaderMap) -> (&'static str, Option<&'static str>) {
    let openmetrics = weight(headers, &ACCEPT, OPENMETRICS) > 0;
    (if openmetrics { OPENMETRICS_TYPE } else { TEXT_TYPE }, choose(headers))
}

fn page(body: &str, headers: &HeaderMap) -> io::Result<Response> {
    let (content_type, coding) = negotiate(headers);
    let Some(name) = coding else {
        return Ok(answer(StatusCode::OK, content_type, Bytes::copy_from_slice(body.as_bytes())));
    };
    let mut response = answer(StatusCode::OK, content_type, encode(name, body.as_bytes())?.into());
    response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static(name));
    Ok(response)
}

/// The coding of the greatest weight; `*` is not taken as a wish for one of ours.
fn choose(headers: &HeaderMap) -> Option<&'static str> {
    let weighed = CODINGS.iter().rev().map(|name| (weight(headers, &ACCEPT_ENCODING, name), *name));
    weighed.filter(|(weight, _)| *weight > 0).max_by_key(|(weight, _)| *weight).map(|(_, chosen)| chosen)
}

/// Thousandths of the weight (RFC 9110 §12.4.2) that a header gives to `wanted`; 0 when it does not name it.
fn weight(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> u16 {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    let items = values.flat_map(|value| value.split(','));
    let of_item = |item: &str| {
        let mut parts = item.split(';').map(str::trim);
        let named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case(wanted));
        named.then(|| parts.find_map(quality).unwrap_or(1000))
    };
    items.filter_map(of_item).max().unwrap_or(0)
}

fn quality(parameter: &str) -> Option<u16> {
    let (name, value) = parameter.split_once('=')?;
    let value: f32 = value.trim().parse().ok().filter(|_| name.trim().eq_ignore_ascii_case("q"))?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=1000")]
    Some((value.clamp(0.0, 1.0) * 1000.0) as u16)
}

fn encode(coding: &str, body: &[u8]) -> io::Result<Vec<u8>> {
    let fast = flate2::Compression::fast();
    match coding {
        ZSTD => zstd::stream::encode_all(body, 1),
        BROTLI => {
            let mut writer = brotli::CompressorWriter::new(Vec::new(), 4096, BROTLI_QUALITY, BROTLI_WINDOW);
            writer.write_all(body)?;
            Ok(writer.into_inner())
        }
        GZIP => {
            let mut writer = flate2::write::GzEncoder::new(Vec::new(), fast);
            writer.write_all(body)?;
            writer.finish()
        }
        _ => {
            let mut writer = flate2::write::ZlibEncoder::new(Vec::new(), fast);
            writer.write_all(body)?;
            writer.finish()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use http::header::CONTENT_TYPE;
    use http_body_util::BodyExt;

    use super::*;

    const BODY: &str = "# TYPE things counter\nthings_total 3\n# EOF\n";

    fn asked(headers: &[(HeaderName, &'static str)]) -> Response {
        let headers = headers.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value)));
        page(BODY, &headers.collect()).unwrap()
    }

    fn decoded(coding: &str, body: &[u8]) -> String {
        let mut out = String::new();
        match coding {
            "zstd" => return String::from_utf8(zstd::stream::decode_all(body).unwrap()).unwrap(),
            "br" => brotli::Decompressor::new(body, 4096).read_to_string(&mut out),
            "gzip" => flate2::read::GzDecoder::new(body).read_to_string(&mut out),
            "deflate" => flate2::read::ZlibDecoder::new(body).read_to_string(&mut out),
            _ => body.take(u64::MAX).read_to_string(&mut out),
        }
        .unwrap();
        out
    }

    #[tokio::test]
    async fn every_scraper_gets_the_same_text_in_the_encoding_it_prefers() {
        for (accepted, coding) in [
            ("gzip", "gzip"),
            ("deflate", "deflate"),
            ("br", "br"),
            ("zstd", "zstd"),
            ("gzip, deflate, br, zstd", "zstd"),
            ("gzip;q=1.0, zstd;q=0.5, br;q=0", "gzip"),
            ("GZIP ; Q=0.2", "gzip"),
            ("*", ""),
            ("identity", ""),
            ("gzip;q=0", ""),
        ] {
            let response = asked(&[(ACCEPT_ENCODING, accepted)]);
            let got = response.headers().get(CONTENT_ENCODING).map_or("", |v| v.to_str().unwrap()).to_owned();
            assert_eq!(got, coding, "{accepted}");
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(decoded(coding, &body), BODY, "{accepted}");
        }
    }

    #[test]
    fn the_media_type_is_openmetrics_for_those_who_know_it() {
        for (accepted, wanted) in [
            ("application/openmetrics-text;version=1.0.0,text/plain;q=0.3", OPENMETRICS_TYPE),
            ("text/plain;version=0.0.4", TEXT_TYPE),
            ("*/*", TEXT_TYPE),
            ("application/openmetrics-text;q=0", TEXT_TYPE),
        ] {
            assert_eq!(asked(&[(ACCEPT, accepted)]).headers()[CONTENT_TYPE], wanted, "{accepted}");
        }
        assert_eq!(asked(&[]).headers()[CONTENT_TYPE], TEXT_TYPE);
    }
}
