//! The plugin's question to the agent, `POST /cmdadd`: the JSON of the upstream agent (Go names and types) plus fields of ours,
//! which upstream ignores; and the small blocking HTTP/1.1 client that carries it.

use std::{
    io::{self, Read, Write},
    net::IpAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{base64, spec::PreviousIp};

/// The agent's socket in its run directory.
pub fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join("pluginevent.sock")
}

/// Longest request and answer read.
pub const MAX_BODY: usize = 64 * 1024;

/// A new sandbox and the pod it is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct AddRequest {
    pub netns: String,
    pub pod_name: String,
    pub pod_namespace: String,
    #[serde(rename = "IPs", default)]
    pub ips: Option<Vec<IpConfig>>,
    /// Ours: the pod's uid, where the runtime told.
    #[serde(rename = "PodUID", default)]
    pub pod_uid: Option<String>,
    /// Ours: the sender has not decided; a pod outside the mesh is an answer, not an error.
    #[serde(default)]
    pub undecided: bool,
}

/// The agent's answer to an undecided sender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddAnswer {
    pub enrolled: bool,
}

/// An address as Go's CNI types print it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct IpConfig {
    #[serde(default)]
    pub interface: Option<i64>,
    pub address: GoIpNet,
    #[serde(default)]
    pub gateway: String,
}

/// Go's `net.IPNet`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoIpNet {
    #[serde(rename = "IP")]
    pub ip: IpAddr,
    /// Base64 of the mask's bytes.
    #[serde(rename = "Mask", default)]
    pub mask: Option<String>,
}

impl From<&PreviousIp> for IpConfig {
    fn from(previous: &PreviousIp) -> Self {
        let mask = mask_bytes(&previous.address);
        Self {
            interface: previous.interface,
            address: GoIpNet { ip: previous.address.addr(), mask: Some(base64::encode(&mask)) },
            gateway: previous.gateway.map(|g| g.to_string()).unwrap_or_default(),
        }
    }
}

/// Reads a request body.
pub fn parse_request(body: &[u8]) -> Result<AddRequest, String> {
    let request: AddRequest =
        serde_json::from_slice(body).map_err(|e| format!("the body is not an ADD request: {e}"))?;
    for (field, value) in
        [("Netns", &request.netns), ("PodName", &request.pod_name), ("PodNamespace", &request.pod_namespace)]
    {
        if value.is_empty() {
            return Err(format!("{field} is empty"));
        }
    }
    Ok(request)
}

impl AddRequest {
    /// The pod's addresses, IPv4-mapped ones as IPv4.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.ips.iter().flatten().map(|ip| ip.address.ip.to_canonical()).collect()
    }
}

/// Posts JSON to `path` and returns status and body; `TimedOut` after `limit`, whatever the server does.
pub fn post(socket: &Path, path: &str, body: Vec<u8>, limit: Duration) -> io::Result<(u16, String)> {
    let (socket, path) = (socket.to_owned(), path.to_owned());
    let (answer, answered) = mpsc::sync_channel(1);
    // A unix connect has no deadline of its own; the thread ends with the process if it hangs.
    thread::Builder::new().name("agent-call".into()).spawn(move || {
        // Nobody listens any more after the deadline.
        drop(answer.send(exchange(&socket, &path, &body, limit)));
    })?;
    answered.recv_timeout(limit).unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time")))
}

fn exchange(socket: &Path, path: &str, body: &[u8], limit: Duration) -> io::Result<(u16, String)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: agent\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(&[head.as_bytes(), body].concat())?;
    let mut answer = Vec::new();
    stream.take(MAX_BODY as u64).read_to_end(&mut answer)?;
    parse_answer(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP/1.1"))
}

/// Status and body of an answer whose end is the end of the connection.
pub fn parse_answer(answer: &[u8]) -> Option<(u16, String)> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.lines().next()?.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.trim().to_owned()))
}

fn mask_bytes(net: &IpNet) -> Vec<u8> {
    match net.netmask() {
        IpAddr::V4(mask) => mask.octets().to_vec(),
        IpAddr::V6(mask) => mask.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(parse_request(&bytes));
            parse_answer(&bytes);
        }
    }

    #[test]
    fn the_body_is_what_the_upstream_agent_reads() {
        let previous = PreviousIp {
            address: "10.0.0.7/24".parse().expect("net"),
            gateway: Some("10.0.0.1".parse().expect("ip")),
            interface: Some(0),
        };
        let request = AddRequest {
            netns: "/var/run/netns/x".into(),
            pod_name: "a".into(),
            pod_namespace: "b".into(),
            ips: Some(vec![(&previous).into()]),
            pod_uid: None,
            undecided: false,
        };
        let json = serde_json::to_string(&request).expect("JSON");
        let address = r#""IPs":[{"Interface":0,"Address":{"IP":"10.0.0.7","Mask":"////AA=="},"Gateway":"10.0.0.1"}]"#;
        assert!(json.starts_with(r#"{"Netns":"/var/run/netns/x","PodName":"a","PodNamespace":"b","#), "{json}");
        assert!(json.contains(address), "{json}");
        assert_eq!(parse_request(json.as_bytes()), Ok(request));
    }

    #[test]
    fn a_body_of_the_upstream_plugin_is_understood() {
        let body = br#"{"Netns":"/n","PodName":"a","PodNamespace":"b","IPs":[{"Interface":null,"Address":{"IP":"::ffff:10.0.0.7","Mask":"/////w=="},"Gateway":""}]}"#;
        let request = parse_request(body).expect("understood");
        assert_eq!(request.addresses(), ["10.0.0.7".parse::<IpAddr>().expect("ip")]);
        assert_eq!(parse_request(br#"{"Netns":"","PodName":"a","PodNamespace":"b"}"#), Err("Netns is empty".into()));
    }

    #[test]
    fn an_absent_agent_is_an_error_at_once() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let error = post(&socket_path(dir.path()), "/cmdadd", vec![], Duration::from_secs(5)).expect_err("absent");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
