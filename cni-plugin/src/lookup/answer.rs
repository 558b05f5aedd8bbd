//! An HTTP/1.1 answer, read to the end of its connection.

/// Status and body; `None` unless it is whole.
pub(crate) fn parse(bytes: &[u8]) -> Option<(u16, Vec<u8>)> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let body = &bytes[end + 4..];
    let mut lines = head.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    let fields: Vec<(String, &str)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim()))
        .collect();
    let field = |name: &str| fields.iter().find(|(n, _)| n == name).map(|(_, value)| *value);
    let body = if field("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
        join_chunks(body)?
    } else {
        match field("content-length").map(str::parse) {
            Some(length) => body.get(..length.ok()?)?.to_vec(),
            None => body.to_vec(),
        }
    };
    Some((status, body))
}

fn join_chunks(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|w| w == b"\r\n")?;
        let line = std::str::from_utf8(&rest[..end]).ok()?;
        let size = usize::from_str_radix(line.split(';').next()?.trim(), 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        rest = &rest[end + 2..];
        body.extend_from_slice(rest.get(..size)?);
        rest = rest[size..].strip_prefix(b"\r\n")?;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bodies_of_each_framing_are_whole_or_refused() {
        let answer =
            |text: &str| parse(text.as_bytes()).map(|(status, body)| (status, String::from_utf8(body).expect("text")));
        let whole = |status, body: &str| Some((status, body.to_owned()));
        for (text, expected) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", whole(200, "{}")),
            ("HTTP/1.1 404 Not Found\r\n\r\nx", whole(404, "x")),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\n{}\r\n3\r\nabc\r\n0\r\n\r\n",
                whole(200, "{}abc"),
            ),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", None),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n", None),
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{}", None),
            ("HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n{}", None),
            ("HTTP/2 200\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\n", None),
            ("", None),
        ] {
            assert_eq!(answer(text), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(head in "(HTTP/1.1 200 x\r\n)?((Transfer-Encoding: chunked|Content-Length: [0-9-]{1,20})\r\n){0,2}\r\n", body in "[0-9a-f\r\n;]{0,40}") {
            drop(parse(format!("{head}{body}").as_bytes()));
        }
    }
}
