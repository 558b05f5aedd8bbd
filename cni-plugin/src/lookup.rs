//! Asking the API server whether a pod belongs to the mesh, while the agent is away: blocking, and over in seconds.

use std::{
    fs, io,
    io::{Read, Write},
    net::{TcpStream, ToSocketAddrs},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use rustls::{ClientConfig, ClientConnection, StreamOwned, crypto::aws_lc_rs::default_provider};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use serde::{Deserialize, de::DeserializeOwned};

use crate::{
    base64,
    eligibility::{Labels, Pod},
    object::{self, Metadata, Spec, Status},
    spec::PodArgs,
};

mod answer;
mod trust;

/// Of both questions together, and of each wait for the network.
const LIMIT: Duration = Duration::from_secs(4);
const STEP_LIMIT: Duration = Duration::from_secs(2);
/// A pod is at most 1.5 MiB.
const MAX_ANSWER: u64 = 4 << 20;
const MAX_KUBECONFIG: u64 = 1 << 20;

/// Why it could not be found out.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    #[error("{0} cannot be read")]
    Kubeconfig(PathBuf, #[source] io::Error),
    #[error("the API server cannot be asked")]
    Unreachable(#[from] io::Error),
    #[error("the API server refuses {0} with status {1}")]
    Refused(String, u16),
    #[error("the API server knows another pod of this name, with the uid {0}")]
    OtherPod(String),
}

/// The pod and its namespace's labels, as the API server has them now.
pub fn lookup(run_dir: &Path, pod: &PodArgs) -> Result<(Pod, Labels), LookupError> {
    let path = Kubeconfig::path(run_dir);
    let kubeconfig = read(&path).map_err(|e| LookupError::Kubeconfig(path, e))?;
    let pod = pod.clone();
    let (answer, answered) = mpsc::sync_channel(1);
    // Name resolution has no deadline of its own; the thread ends with the process if it hangs.
    thread::Builder::new().name("lookup".into()).spawn(move || {
        // Nobody listens any more after the deadline.
        drop(answer.send(ask(&kubeconfig, &pod)));
    })?;
    let timed_out = || Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time").into());
    answered.recv_timeout(LIMIT).unwrap_or_else(|_| timed_out())
}

fn read(path: &Path) -> io::Result<Kubeconfig> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_KUBECONFIG).read_to_end(&mut bytes)?;
    Kubeconfig::parse(&bytes).map_err(io::Error::other)
}

#[derive(Deserialize)]
struct Object {
    metadata: Metadata,
    spec: Option<Spec>,
    status: Option<Status>,
}

#[derive(Deserialize)]
struct Namespace {
    metadata: Metadata,
}

fn ask(kubeconfig: &Kubeconfig, args: &PodArgs) -> Result<(Pod, Labels), LookupError> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{what} is not as it should be"));
    let PodArgs { namespace, name, uid } = args;
    let found: Object = get(kubeconfig, &format!("/api/v1/namespaces/{namespace}/pods/{name}"))?;
    let pod = object::pod(found.metadata, found.spec, found.status).ok_or_else(|| invalid("the pod"))?;
    if uid.as_ref().is_some_and(|uid| *uid != pod.uid) {
        return Err(LookupError::OtherPod(pod.uid));
    }
    let namespace: Namespace = get(kubeconfig, &format!("/api/v1/namespaces/{namespace}"))?;
    Ok((pod, namespace.metadata.labels.unwrap_or_default()))
}

fn get<T: DeserializeOwned>(kubeconfig: &Kubeconfig, path: &str) -> Result<T, LookupError> {
    // What the runtime says is put into a request line.
    if !path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/-.".contains(&b)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("`{path}` is no path of an object")).into());
    }
    let (status, body) = exchange(kubeconfig, path)?;
    match status {
        200 => Ok(serde_json::from_slice(&body).map_err(io::Error::from)?),
        status => Err(LookupError::Refused(path.to_owned(), status)),
    }
}

fn exchange(kubeconfig: &Kubeconfig, path: &str) -> io::Result<(u16, Vec<u8>)> {
    let Server { tls, host, port } = &kubeconfig.server;
    let mut error = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
    for address in (host.as_str(), *port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, STEP_LIMIT) {
            Ok(stream) => {
                stream.set_read_timeout(Some(STEP_LIMIT))?;
                stream.set_write_timeout(Some(STEP_LIMIT))?;
                let request = request(kubeconfig, path);
                return if *tls { speak(secured(kubeconfig, stream)?, &request) } else { speak(stream, &request) };
            }
            Err(refused) => error = refused,
        }
    }
    Err(error)
}

fn request(Kubeconfig { server, token, .. }: &Kubeconfig, path: &str) -> String {
    let host = if server.host.contains(':') { format!("[{}]", server.host) } else { server.host.clone() };
    let bearer = token.as_ref().map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
    format!(
        "GET {path} HTTP/1.1\r\nhost: {host}\r\n{bearer}accept: application/json\r\nuser-agent: fairway-cni\r\nconnection: close\r\n\r\n"
    )
}

fn secured(kubeconfig: &Kubeconfig, stream: TcpStream) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let provider = Arc::new(default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let builder = builder.map_err(io::Error::other)?;
    let config = match &kubeconfig.ca {
        Some(ca) => builder.with_root_certificates(trust::roots(ca)?).with_no_client_auth(),
        None => builder.dangerous().with_custom_certificate_verifier(trust::anybody(&provider)).with_no_client_auth(),
    };
    let name = ServerName::try_from(kubeconfig.server.host.clone()).map_err(io::Error::other)?;
    let connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    Ok(StreamOwned::new(connection, stream))
}

fn speak(mut stream: impl Read + Write, request: &str) -> io::Result<(u16, Vec<u8>)> {
    stream.write_all(request.as_bytes())?;
    stream.flush()?;
    let mut bytes = Vec::new();
    match stream.take(MAX_ANSWER).read_to_end(&mut bytes) {
        // Without a last word of TLS; whether anything is missing, the answer itself says.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        read => drop(read?),
    }
    answer::parse(&bytes).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "its answer is not whole HTTP/1.1"))
}

/// What the plugin needs of the kubeconfig that the agent has written. In JSON: a reader of YAML would double the plugin.
#[derive(Debug, PartialEq, Eq)]
pub struct Kubeconfig {
    server: Server,
    /// None: whoever answers is trusted, as SKIP_TLS_VERIFY asks for.
    ca: Option<Vec<CertificateDer<'static>>>,
    token: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct Server {
    tls: bool,
    host: String,
    port: u16,
}

impl Kubeconfig {
    /// The file's place in the agent's run directory.
    pub fn path(run_dir: &Path) -> PathBuf {
        run_dir.join("fairway-cni-kubeconfig")
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let file: File = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        let [NamedCluster { cluster }] = file.clusters;
        let token = file.users.into_iter().next().and_then(|named| named.user.token);
        if token.as_ref().is_some_and(|token| token.bytes().any(|b| !b.is_ascii_graphic())) {
            return Err("the token is none".into());
        }
        let server =
            parse_server(&cluster.server).ok_or_else(|| format!("server `{}` is no address", cluster.server))?;
        let ca = match &cluster.certificate_authority_data {
            _ if cluster.insecure_skip_tls_verify => None,
            Some(data) => Some(certificates(data).ok_or("certificate-authority-data holds no certificate")?),
            None if server.tls => return Err("certificate-authority-data is missing".into()),
            None => None,
        };
        Ok(Self { server, ca, token })
    }
}

fn certificates(data: &str) -> Option<Vec<CertificateDer<'static>>> {
    let pem = base64::decode(data)?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().ok()?;
    (!found.is_empty()).then_some(found)
}

/// `https://HOST[:PORT]`, an IPv6 host in brackets.
fn parse_server(url: &str) -> Option<Server> {
    let (scheme, rest) = url.split_once("://")?;
    let (tls, usual) = match scheme {
        "https" => (true, 443),
        "http" => (false, 80),
        _ => return None,
    };
    let authority = rest.trim_end_matches('/');
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map(|(host, rest)| (host, rest.strip_prefix(':')))?,
        None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
    };
    let is_host = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:".contains(&b));
    let port = port.map_or(Some(usual), |port| port.parse().ok())?;
    is_host.then(|| Server { tls, host: host.to_owned(), port })
}

#[derive(Deserialize)]
struct File {
    clusters: [NamedCluster; 1],
    #[serde(default)]
    users: Vec<NamedUser>,
}

#[derive(Deserialize)]
struct NamedCluster {
    cluster: Cluster,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    server: String,
    certificate_authority_data: Option<String>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
}

#[derive(Deserialize)]
struct NamedUser {
    user: User,
}

#[derive(Deserialize)]
struct User {
    token: Option<String>,
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread::JoinHandle};

    use proptest::prelude::*;
    use rustls::{ServerConfig, ServerConnection};
    use serde_json::json;

    use super::*;

    proptest! {
        #[test]
        fn no_file_makes_the_parser_panic(url in "(https?://)?[\\[\\]a-z0-9.:/-]{0,30}", token in "\\PC{0,8}") {
            let file = json!({"clusters": [{"cluster": {"server": url}}], "users": [{"user": {"token": token}}]});
            drop(Kubeconfig::parse(file.to_string().as_bytes()));
        }
    }

    #[test]
    fn servers_are_read_as_urls() {
        let server = |tls, host: &str, port| Some(Server { tls, host: host.into(), port });
        for (url, expected) in [
            ("https://10.96.0.1:443", server(true, "10.96.0.1", 443)),
            ("https://[fd00::1]:6443/", server(true, "fd00::1", 6443)),
            ("https://[fd00::1]", server(true, "fd00::1", 443)),
            ("http://kubernetes.default.svc", server(false, "kubernetes.default.svc", 80)),
            ("10.96.0.1:443", None),
            ("https://", None),
            ("https://a:b", None),
            ("https://a\r\nx: y", None),
        ] {
            assert_eq!(parse_server(url), expected, "{url}");
        }
    }

    const POD: &str = r#"{"metadata":{"name":"a","namespace":"demo","uid":"u1"},"spec":{"nodeName":"n1"},"status":{}}"#;
    const NAMESPACE: &str = r#"{"metadata":{"name":"demo","labels":{"istio.io/dataplane-mode":"ambient"}}}"#;

    fn http(status: u16, body: &str) -> String {
        format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    }

    /// Answers one connection after the other and returns what was asked.
    fn serve(tls: Option<Arc<ServerConfig>>, answers: Vec<String>) -> (u16, JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = listener.local_addr().expect("address").port();
        let server = thread::spawn(move || {
            let answer = |mut stream: Box<dyn ReadWrite>, answer: &str| {
                let mut asked = vec![0; 4096];
                let length = stream.read(&mut asked).unwrap_or(0);
                stream.write_all(answer.as_bytes()).unwrap_or_default();
                stream.flush().unwrap_or_default();
                String::from_utf8_lossy(&asked[..length]).into_owned()
            };
            let mut asked = Vec::new();
            for text in answers {
                let (stream, _) = listener.accept().expect("accept");
                let stream: Box<dyn ReadWrite> = match &tls {
                    Some(config) => {
                        Box::new(StreamOwned::new(ServerConnection::new(config.clone()).expect("tls"), stream))
                    }
                    None => Box::new(stream),
                };
                asked.push(answer(stream, &text));
            }
            asked
        });
        (port, server)
    }

    trait ReadWrite: Read + Write {}
    impl<T: Read + Write> ReadWrite for T {}

    fn ask_at(cluster: serde_json::Value, uid: &str) -> Result<(Pod, Labels), LookupError> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = json!({"clusters": [{"cluster": cluster}], "users": [{"user": {"token": "t0ken"}}]});
        fs::write(Kubeconfig::path(dir.path()), file.to_string()).expect("write");
        lookup(dir.path(), &PodArgs { namespace: "demo".into(), name: "a".into(), uid: Some(uid.into()) })
    }

    #[test]
    fn pod_and_namespace_are_asked_for_with_the_token() {
        let (port, server) = serve(None, vec![http(200, POD), http(200, NAMESPACE)]);
        let (pod, labels) = ask_at(json!({"server": format!("http://127.0.0.1:{port}")}), "u1").expect("an answer");
        assert_eq!((pod.uid.as_str(), labels["istio.io/dataplane-mode"].as_str()), ("u1", "ambient"));
        let asked = server.join().expect("server");
        assert!(asked[0].starts_with("GET /api/v1/namespaces/demo/pods/a HTTP/1.1\r\n"), "{}", asked[0]);
        assert!(asked[1].starts_with("GET /api/v1/namespaces/demo HTTP/1.1\r\n"), "{}", asked[1]);
        assert!(asked.iter().all(|a| a.contains("authorization: Bearer t0ken\r\n")), "{asked:?}");
    }

    #[test]
    fn what_leaves_doubt_is_an_error() {
        let with = |answer: String, uid: &str| {
            let (port, _server) = serve(None, vec![answer]);
            ask_at(json!({"server": format!("http://127.0.0.1:{port}")}), uid).expect_err("doubt")
        };
        assert!(matches!(with(http(404, "{}"), "u1"), LookupError::Refused(_, 404)));
        assert!(matches!(with(http(401, "{}"), "u1"), LookupError::Refused(_, 401)));
        assert!(matches!(with(http(200, POD), "u2"), LookupError::OtherPod(uid) if uid == "u1"));
        assert!(matches!(with(http(200, "{"), "u1"), LookupError::Unreachable(_)));
        assert!(matches!(
            with("HTTP/1.1 200 x\r\ncontent-length: 900\r\n\r\n{}".into(), "u1"),
            LookupError::Unreachable(_)
        ));
        let dir = tempfile::tempdir().expect("temporary directory");
        let args = PodArgs { namespace: "demo".into(), name: "a".into(), uid: None };
        assert!(matches!(lookup(dir.path(), &args), Err(LookupError::Kubeconfig(..))));
        let odd = PodArgs { name: "a b".into(), ..args };
        fs::write(Kubeconfig::path(dir.path()), r#"{"clusters":[{"cluster":{"server":"http://127.0.0.1:1"}}]}"#)
            .expect("write");
        assert!(
            matches!(lookup(dir.path(), &odd), Err(LookupError::Unreachable(e)) if e.kind() == io::ErrorKind::InvalidInput)
        );
    }

    #[test]
    fn only_a_server_of_the_clusters_authority_is_believed() {
        let issued = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("certificate");
        let key = rustls_pki_types::PrivateKeyDer::try_from(issued.signing_key.serialize_der()).expect("key");
        let config =
            ServerConfig::builder_with_provider(Arc::new(default_provider())).with_safe_default_protocol_versions();
        let config = config.expect("versions").with_no_client_auth();
        let config = Arc::new(config.with_single_cert(vec![issued.cert.der().clone()], key).expect("server"));
        let stranger = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("certificate");
        for (cluster, believed) in [
            (json!({"certificate-authority-data": base64::encode(issued.cert.pem().as_bytes())}), true),
            (json!({"insecure-skip-tls-verify": true}), true),
            (json!({"certificate-authority-data": base64::encode(stranger.cert.pem().as_bytes())}), false),
        ] {
            let (port, _server) = serve(Some(config.clone()), vec![http(200, POD), http(200, NAMESPACE)]);
            let mut cluster = cluster;
            cluster["server"] = format!("https://127.0.0.1:{port}").into();
            let answer = ask_at(cluster, "u1");
            assert_eq!(answer.is_ok(), believed, "{answer:?}");
        }
        assert!(matches!(ask_at(json!({"server": "https://127.0.0.1:1"}), "u1"), Err(LookupError::Kubeconfig(..))));
    }
}
