//! h2spec against our server. It cannot show a client certificate, so it speaks in clear to a shim that does TLS for it.

use std::{collections::HashMap, io, net::SocketAddr, path::Path, process::Stdio, sync::Arc, time::Duration};

use mesh_hbone::Settings;
use mesh_identity::{client_config, peer_name};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy, split},
    net::{TcpListener, TcpStream},
    process::Command,
    task::spawn_local,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::{
    identities::{Identities, identity},
    ours::Server,
    programs::Program,
};

const H2SPEC: Program = Program {
    name: "h2spec",
    variable: "FAIRWAY_H2SPEC",
    how_to_get_it: "go install github.com/summerwind/h2spec/cmd/h2spec@latest; FAIRWAY_H2SPEC names the program",
};

/// All there are.
const TESTS: usize = 145;

const NO_BODY: &str = "wants a body in the answer; our 400 has none";
const NO_SIZE: &str = "measures the body of the answer; our 400 has none";
const NO_CONTENT: &str = "our 400 needs no content, so it comes before the content that would belie its length";

/// What does not pass, and why that is right.
const DEVIATIONS: [(&str, Expected, &str); 10] = [
    ("generic/2/2", Expected::Failure, NO_BODY),
    ("generic/2/3", Expected::Failure, NO_BODY),
    ("http2/5.3.1/2", Expected::Failure, "RFC 9113 §5.3.2 has no priorities any more: PRIORITY is skipped unread"),
    ("http2/6.5.3/1", Expected::Skip, NO_SIZE),
    ("http2/6.9.1/1", Expected::Skip, NO_SIZE),
    ("http2/6.9.2/1", Expected::Skip, NO_SIZE),
    ("http2/6.9.2/2", Expected::Skip, NO_SIZE),
    ("http2/8.1.2.6/1", Expected::Failure, NO_CONTENT),
    ("http2/8.1.2.6/2", Expected::Failure, NO_CONTENT),
    ("hpack/6.3/1", Expected::Failure, "our table's limit is in force only once acknowledged: it passes there"),
];

/// This one counts only without what the shim keeps back.
const WITH_ACKNOWLEDGEMENT: &str = "hpack/6.3/1";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Failure,
    Skip,
}

/// Requests that are no CONNECT are answered with 400 and no body: all that most sections need is an answer.
#[test]
fn everything_passes_but_what_is_listed() {
    H2SPEC.run(async |program| {
        let identities = Identities::generate();
        // What h2spec takes for too long a frame is one beyond the default.
        let settings = Settings { frame_size: 16 << 10, ..Settings::default() };
        let server = Server::start(identities.issue("server"), settings).await;

        let cases = ask(&program, shim(&identities, server.address, true).await, &[]).await;
        assert_eq!(cases.len(), TESTS);
        let wrong: Vec<_> = cases.iter().filter(|case| !case.is_as_listed()).collect();
        assert!(wrong.is_empty(), "{wrong:#?}");

        let cases = ask(&program, shim(&identities, server.address, false).await, &[WITH_ACKNOWLEDGEMENT]).await;
        assert!(matches!(&cases[..], [Case { outcome: Outcome::Pass, .. }]), "{cases:#?}");
    });
}

/// Runs `sections`, or everything.
async fn ask(program: &Path, address: SocketAddr, sections: &[&str]) -> Vec<Case> {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report.xml");
    // Its exit code says only whether anything failed; the report says what.
    let output = Command::new(program)
        .args(["--host", "127.0.0.1", "--port", &address.port().to_string(), "--timeout", "2", "--junit-report"])
        .arg(&report)
        .args(sections)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();
    let report = std::fs::read(&report).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stdout)));
    parse(&report)
}

/// Plaintext HTTP/2 to `server`, with a certificate. `keep_back` does so with the acknowledgement of our SETTINGS: h2spec's own HPACK
/// encoder does not do what it acknowledges, that our table holds nothing, and once that is in force nearly every request of it is a
/// compression error (RFC 9113 §4.3.1).
async fn shim(identities: &Identities, server: SocketAddr, keep_back: bool) -> SocketAddr {
    let accepted: Arc<[_]> = vec![identity("server")].into();
    let connector = TlsConnector::from(client_config(&identities.issue("client"), &accepted));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    spawn_local(async move {
        loop {
            let (near, _) = listener.accept().await.unwrap();
            let connector = connector.clone();
            spawn_local(async move {
                let far = TcpStream::connect(server).await?;
                near.set_nodelay(true)?;
                far.set_nodelay(true)?;
                let (mut from_server, to_server) = split(connector.connect(peer_name(), far).await?);
                let (from_h2spec, mut to_h2spec) = near.into_split();
                let answers = async {
                    copy(&mut from_server, &mut to_h2spec).await?;
                    to_h2spec.shutdown().await
                };
                tokio::try_join!(forward(from_h2spec, to_server, keep_back), answers)
            });
        }
    });
    address
}

/// Passes on what h2spec says in one breath as one piece, so that it does not depend on timing how much of a request is there before
/// the answer leaves; see [`shim`] for `keep_back`.
async fn forward(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, keep_back: bool) -> io::Result<()> {
    const BREATH: Duration = Duration::from_millis(10);
    const SETTINGS_ACK: [u8; 9] = [0, 0, 0, 4, 1, 0, 0, 0, 0];
    let (mut said, mut keep_back) = (Vec::new(), keep_back);
    while from.read_buf(&mut said).await? > 0 {
        while timeout(BREATH, from.read_buf(&mut said)).await.is_ok_and(|read| read.is_ok_and(|length| length > 0)) {}
        if keep_back && let Some(at) = said.windows(SETTINGS_ACK.len()).position(|bytes| bytes == SETTINGS_ACK) {
            said.drain(at..at + SETTINGS_ACK.len());
            keep_back = false;
        }
        to.write_all(&said).await?;
        to.flush().await?;
        said.clear();
    }
    to.shutdown().await
}

#[derive(Debug)]
struct Case {
    /// As on its command line: section and number.
    name: String,
    #[expect(dead_code, reason = "printed")]
    title: String,
    outcome: Outcome,
}

#[derive(Debug)]
enum Outcome {
    Pass,
    Skip,
    /// What was expected, and in the last line what came.
    Failure(#[expect(dead_code, reason = "printed")] String),
}

impl Case {
    fn is_as_listed(&self) -> bool {
        let listed = DEVIATIONS.iter().find(|(name, ..)| *name == self.name).map(|(_, expected, _)| *expected);
        match self.outcome {
            Outcome::Pass => listed.is_none(),
            Outcome::Skip => listed == Some(Expected::Skip),
            Outcome::Failure(_) => listed == Some(Expected::Failure),
        }
    }
}

/// The cases of a JUnit report. It may hold bytes that no XML may (payloads, as they are), so it is taken apart as text.
fn parse(report: &[u8]) -> Vec<Case> {
    let text = String::from_utf8_lossy(report);
    let mut numbers = HashMap::new();
    let cases = text.split("<testcase ").skip(1).map(|case| {
        let attribute = |name: &str| {
            let (_, rest) = case.split_once(&format!("{name}=\"")).unwrap_or_default();
            rest.split('"').next().unwrap_or_default().to_owned()
        };
        let body = case.split("</testcase>").next().unwrap_or_default();
        let between = |tag: &str| {
            let (_, rest) = body.split_once(&format!("<{tag}>"))?;
            Some(rest.split(&format!("</{tag}>")).next().unwrap_or_default().to_owned())
        };
        let outcome = match between("error").or_else(|| between("failure")) {
            Some(why) => Outcome::Failure(why),
            None if body.contains("<skipped") => Outcome::Skip,
            None => Outcome::Pass,
        };
        let section = attribute("package");
        let number: &mut u32 = numbers.entry(section.clone()).or_default();
        *number += 1;
        Case { name: format!("{section}/{number}"), title: attribute("classname"), outcome }
    });
    cases.collect()
}
