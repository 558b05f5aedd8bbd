//! The demo where the kernel refuses namespaces: "pods" are loopback addresses, each with a dedicated ztunnel, and applications
//! enter the mesh through its SOCKS5 port. Identity, mutual TLS and policy are the real thing; transparent capture is what is
//! missing.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use lab::apps::http::read_answer;
use serde_json::{Value, json};

use crate::demo::{Evidence, Printer, eventually};

const HTTP_PORT: u16 = 8080;
const SOCKS_PORT: u16 = 15080;
const POLICY: &str = include_str!("demo/policy.yaml");

/// The stand-ins for pods.
const PODS: [Pod; 3] =
    [Pod { name: "client", host: 2 }, Pod { name: "server", host: 3 }, Pod { name: "visitor", host: 4 }];

#[derive(Clone, Copy)]
struct Pod {
    name: &'static str,
    host: u8,
}

/// Everything started; killed when dropped, and when this process dies.
struct Mesh {
    dir: tempfile::TempDir,
    /// Third byte of every address, so that two demos on one machine keep apart.
    subnet: u8,
    children: Vec<Child>,
}

pub(crate) fn run(report: &mut Printer) -> anyhow::Result<()> {
    let mut mesh = Mesh::new()?;
    report.step(1, "Control plane, three applications and their ztunnels are up on loopback", || mesh.start());
    report.step(2, "A request through the mesh: both ends know each other", || mesh.identity());
    report.step(3, "Policy by identity", || mesh.policy());
    Ok(())
}

impl Mesh {
    fn new() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        fs::create_dir_all(dir.path().join("manifests/enrolment"))?;
        // 127.0.0.0/8 is all ours: any byte will do, as long as two runs differ.
        let subnet = u8::try_from(std::process::id() % 250).unwrap_or(0) + 1;
        Ok(Self { dir, subnet, children: Vec::new() })
    }

    fn address(&self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, 77, self.subnet, host)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&mut self) -> Evidence {
        for pod in PODS {
            self.write_manifests(pod)?;
        }
        let control = self.address(1);
        let (listen, admin) = (format!("{control}:15012"), format!("{control}:15014"));
        let (manifests, state) = (self.path("manifests"), self.path("state"));
        let arguments = ["run", "--listen", &listen, "--admin", &admin].map(str::to_owned);
        let mut fairwayd = own("fairwayd")?;
        fairwayd.args(arguments).arg("--manifests").arg(manifests).arg("--state").arg(&state);
        self.spawn("fairwayd", fairwayd)?;
        self.wait(&admin, "/healthz/ready", "fairwayd")?;
        for pod in PODS {
            self.start_pod(pod, &listen)?;
        }
        for pod in PODS {
            self.wait(
                &format!("{}:15021", self.address(pod.host)),
                "/healthz/ready",
                &format!("ztunnel-{}", pod.name),
            )?;
        }
        Ok(vec![format!("pods at {}, {}, {}", self.address(2), self.address(3), self.address(4))])
    }

    fn write_manifests(&self, pod: Pod) -> io::Result<()> {
        let (name, ip) = (pod.name, self.address(pod.host));
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "demo", "uid": name, "labels": {"app": name}},
            "spec": {"nodeName": name, "serviceAccountName": name, "containers": [{"name": "app"}]},
            "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": "True"}]},
        });
        let enrolment = json!({
            "apiVersion": "fairway.dev/v1alpha1", "kind": "PodEnrolment",
            "metadata": {"namespace": "demo", "name": name}, "spec": {"podUid": name, "redirection": "enabled"},
        });
        let dir = self.path("manifests");
        fs::write(
            dir.join("namespace.yaml"),
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "demo"}}).to_string(),
        )?;
        fs::write(dir.join(format!("{name}.yaml")), object.to_string())?;
        fs::write(dir.join(format!("enrolment/demo_{name}.yaml")), enrolment.to_string())
    }

    fn start_pod(&mut self, pod: Pod, control: &str) -> anyhow::Result<()> {
        let (name, ip) = (pod.name, self.address(pod.host));
        let state = self.path("state");
        let token = own("fairwayd")?
            .arg("token")
            .arg("--state")
            .arg(&state)
            .args(["--node", name, "--namespace", "demo", "--service-account", name, "--pod", name, "--pod-uid", name])
            .output()?;
        ensure!(token.status.success(), "fairwayd token: {}", String::from_utf8_lossy(&token.stderr).trim());
        let token_file = self.path(&format!("{name}.token"));
        fs::write(&token_file, String::from_utf8_lossy(&token.stdout).trim())?;
        let root = state.join("root-cert.pem");
        let mut ztunnel = own("ztunnel")?;
        ztunnel
            .args(["proxy", "ztunnel"])
            .env("PROXY_MODE", "dedicated")
            .env("PROXY_WORKLOAD_INFO", format!("demo/{name}/{name}"))
            .env("FAIRWAY_LOCAL_ADDRESS", ip.to_string())
            .env("UNSTABLE_ENABLE_SOCKS5", "true")
            .env("NODE_NAME", name)
            .env("POD_NAME", name)
            .env("POD_NAMESPACE", "demo")
            .env("SERVICE_ACCOUNT", name)
            .env("INSTANCE_IP", ip.to_string())
            .env("XDS_ADDRESS", format!("https://{control}"))
            .env("CA_ADDRESS", format!("https://{control}"))
            .env("XDS_ROOT_CA", &root)
            .env("CA_ROOT_CA", &root)
            .env("AUTH_TOKEN", &token_file)
            .env("ISTIO_META_DNS_CAPTURE", "false");
        self.spawn(&format!("ztunnel-{name}"), ztunnel)?;
        if name == "server" {
            let mut app = own("app")?;
            app.args(["http", "--name", "server", "--listen", &format!("{ip}:{HTTP_PORT}")]);
            self.spawn("server", app)?;
        }
        Ok(())
    }

    fn identity(&self) -> Evidence {
        let answer = eventually("the server to answer through the mesh", || self.request("client"))?;
        let line = eventually("the server's access log", || {
            let log = fs::read_to_string(self.path("ztunnel-server.log"))?;
            let wanted =
                |l: &&str| l.contains("connection complete") && l.contains("sa/client") && l.contains("sa/server");
            log.lines().find(wanted).map(str::to_owned).context("no access log line with both identities yet")
        })?;
        let field = |name: &str| {
            line.split(&format!("{name}=")).nth(1).and_then(|r| r.split_whitespace().next()).unwrap_or("?").to_owned()
        };
        Ok(vec![
            answer.trim().to_owned(),
            format!(
                "the server's ztunnel: who called {}, who answered {}",
                field("src.identity"),
                field("dst.identity")
            ),
        ])
    }

    fn policy(&self) -> Evidence {
        self.request("visitor").context("before the policy, the visitor was refused")?;
        fs::write(self.path("manifests/policy.yaml"), POLICY)?;
        eventually("the policy to refuse the visitor", || {
            ensure!(self.request("visitor").is_err(), "the visitor still gets through");
            Ok(())
        })?;
        self.request("client").context("the client, which the policy allows, was refused")?;
        let server = self.address(3);
        let query = format!(
            "/debug/why/inbound?namespace=demo&pod=server&source_ip={}&source_identity=spiffe://cluster.local/ns/demo/sa/visitor&destination={server}:{HTTP_PORT}",
            self.address(4)
        );
        let (_, body) = get(&format!("{server}:15000"), &query)?;
        let verdict: Value = serde_json::from_str(&body).with_context(|| body.clone())?;
        let text = verdict.to_string();
        ensure!(text.contains("only-the-client") && text.contains("policy.yaml"), "the policy is not named: {text}");
        Ok(vec![
            "client allowed, visitor refused".to_owned(),
            format!(
                "why: {} ({})",
                verdict["decision"]["explanation"].as_str().unwrap_or_default(),
                verdict["decision"]["origin"].as_str().unwrap_or_default()
            ),
        ])
    }

    /// One HTTP request through a pod's SOCKS5 port (RFC 1928: no authentication, CONNECT to an IPv4 address).
    fn request(&self, from: &str) -> anyhow::Result<String> {
        let pod = PODS.iter().find(|p| p.name == from).context("no such pod")?;
        let timeout = Duration::from_secs(5);
        let socks = SocketAddr::from((self.address(pod.host), SOCKS_PORT));
        let mut stream = TcpStream::connect_timeout(&socks, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.write_all(&[5, 1, 0])?;
        stream.read_exact(&mut [0; 2])?;
        let mut connect = vec![5, 1, 0, 1];
        connect.extend(self.address(3).octets());
        connect.extend(HTTP_PORT.to_be_bytes());
        stream.write_all(&connect)?;
        let mut reply = [0; 10];
        stream.read_exact(&mut reply)?;
        ensure!(reply[1] == 0, "SOCKS5 refused with {}", reply[1]);
        stream.write_all(b"GET /hello HTTP/1.1\r\nhost: server\r\nconnection: close\r\n\r\n")?;
        let answer = read_answer(&mut BufReader::new(&stream))?;
        Ok(answer.body)
    }

    fn spawn(&mut self, name: &str, mut command: Command) -> anyhow::Result<()> {
        let log = File::create(self.path(&format!("{name}.log")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        mesh_net::isolate::die_with_spawner(&mut command);
        self.children.push(command.spawn().with_context(|| format!("cannot start {name}"))?);
        Ok(())
    }

    fn wait(&self, address: &str, path: &str, program: &str) -> anyhow::Result<()> {
        let outcome = eventually(&format!("{program} to be ready"), || {
            let (status, body) = get(address, path)?;
            ensure!(status == 200, "{}", body.trim());
            Ok(())
        });
        outcome.map_err(|error| error.context(tail(&self.path(&format!("{program}.log")))))
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        for child in &mut self.children {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// This binary as another program.
fn own(program: &str) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(program);
    Ok(command)
}

fn get(address: &str, path: &str) -> anyhow::Result<(u16, String)> {
    let stream = TcpStream::connect_timeout(&address.parse()?, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    (&stream).write_all(format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").as_bytes())?;
    let answer = read_answer(&mut BufReader::new(&stream))?;
    Ok((answer.status, answer.body))
}

fn tail(file: &Path) -> String {
    let lines: Vec<String> =
        File::open(file).map(|f| BufReader::new(f).lines().map_while(Result::ok).collect()).unwrap_or_default();
    lines[lines.len().saturating_sub(12)..].join("\n")
}
