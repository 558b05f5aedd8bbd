//! The certificates of the configuration dump.

use mesh_identity::{Entry, EntryState};
use rustls_pki_types::CertificateDer;
use serde_json::{Value, json};
use x509_parser::prelude::{ASN1Time, FromDer, X509Certificate};

/// In the order given.
pub(super) fn dump(entries: &[Entry]) -> Vec<Value> {
    entries.iter().map(entry).collect()
}

fn entry(entry: &Entry) -> Value {
    let state = match &entry.state {
        EntryState::Available => "Available".to_owned(),
        EntryState::Initializing => "Initializing".to_owned(),
        EntryState::Unavailable(error) => format!("Unavailable: {error}"),
    };
    let (chain, roots) = match &entry.svid {
        Some(svid) => (certificates(&svid.chain), certificates(&svid.roots)),
        None => (Vec::new(), Vec::new()),
    };
    json!({ "identity": entry.identity.to_string(), "state": state, "certChain": chain, "rootCerts": roots })
}

fn certificates(list: &[CertificateDer<'static>]) -> Vec<Value> {
    list.iter().filter_map(certificate).collect()
}

fn certificate(der: &CertificateDer<'static>) -> Option<Value> {
    let (_, parsed) = X509Certificate::from_der(der).ok()?;
    Some(json!({
        // As istioctl expects it: base64 of the PEM text, which is base64 itself.
        "pem": base64(pem(der).as_bytes()),
        "serialNumber": parsed.serial.to_string(),
        "validFrom": rfc3339(&parsed.validity.not_before),
        "expirationTime": rfc3339(&parsed.validity.not_after),
    }))
}

fn rfc3339(time: &ASN1Time) -> String {
    let t = time.to_datetime();
    let (date, hour, minute, second) = (t.date(), t.hour(), t.minute(), t.second());
    format!("{}-{:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", date.year(), u8::from(date.month()), date.day())
}

/// RFC 7468.
fn pem(der: &[u8]) -> String {
    let text = base64(der);
    let mut out = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = &*text;
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(64));
        out.push_str(line);
        out.push('\n');
        rest = tail;
    }
    out + "-----END CERTIFICATE-----\n"
}

/// RFC 4648 §4, padded.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let group = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            let digit = ALPHABET[(group >> (18 - 6 * i) & 63) as usize];
            out.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration, time::SystemTime};

    use mesh_core::identity::Identity;
    use mesh_identity::{Svid, authority::SigningAuthority, csr::Csr};
    use rustls_pki_types::pem::PemObject;

    use super::*;

    #[test]
    fn base64_matches_the_rfc() {
        for (plain, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn shows_state_chain_and_roots() {
        let identity = Identity::new("cluster.local", "demo", "a");
        let (authority, csr) =
            (SigningAuthority::generate("cluster.local").unwrap(), Csr::generate(&identity).unwrap());
        let issued = authority.sign(&csr.pem, &identity, Duration::from_secs(3600), SystemTime::now()).unwrap();
        let svid = Arc::new(Svid::new(identity.clone(), csr.key, &issued, 1).unwrap());
        assert_eq!(CertificateDer::from_pem_slice(pem(&svid.chain[0]).as_bytes()).unwrap(), svid.chain[0]);
        let available = Entry { identity: identity.clone(), state: EntryState::Available, svid: Some(svid) };
        let failing = Entry { identity, state: EntryState::Unavailable("no".into()), svid: None };
        let shown = dump(&[available, failing]);
        assert_eq!(shown[0]["identity"], "spiffe://cluster.local/ns/demo/sa/a");
        assert!(shown[0]["certChain"][0]["expirationTime"].as_str().unwrap().ends_with('Z'));
        assert!(shown[0]["certChain"][0]["serialNumber"].as_str().unwrap().bytes().all(|b| b.is_ascii_digit()));
        assert_eq!(shown[0]["rootCerts"].as_array().unwrap().len(), 1);
        assert_eq!((&shown[1]["state"], &shown[1]["certChain"]), (&json!("Unavailable: no"), &json!([])));
    }
}
