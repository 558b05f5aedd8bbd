//! The control plane as a process of its own, and what it takes.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use test_support::ApiServer;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// Far more than anything here takes; only keeps a failure from hanging.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);
/// The kernel counts time in these.
const TICKS_PER_SECOND: f64 = 100.0;

pub(crate) struct Fairwayd {
    process: Child,
    pub(crate) discovery: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) started: Instant,
    _kubeconfig: tempfile::TempDir,
}

/// What a process has taken so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) cpu: Duration,
    pub(crate) resident: u64,
    /// Since the start, or since [`Fairwayd::forget_peak`].
    pub(crate) peak: u64,
}

impl Fairwayd {
    pub(crate) async fn start(api: &ApiServer) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir().context("no room for a kubeconfig")?;
        let kubeconfig = folder.path().join("config");
        fs::write(&kubeconfig, api.kubeconfig())?;
        let started = Instant::now();
        let mut process = Command::new(env!("CARGO_BIN_EXE_fairway-benched"))
            .args(["fairwayd", "run", "--kubernetes", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .args(["--server-name", "127.0.0.1", "--ca-folder", "/nowhere"])
            .env("KUBECONFIG", &kubeconfig)
            .env_remove("KUBERNETES_SERVICE_HOST")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("fairwayd cannot be started")?;
        let lines = BufReader::new(process.stderr.take().context("its log is piped")?).lines();
        let (tell, told) = mpsc::channel();
        // Ends with the process.
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if std::env::var_os("SCALE_LOG").is_some() || line.contains("\terror\t") || line.contains("panicked") {
                    eprintln!("fairwayd: {line}");
                }
                drop(tell.send(line));
            }
        });
        let addresses = tokio::task::spawn_blocking(move || {
            loop {
                let line = told.recv_timeout(PATIENCE).context("fairwayd does not say where it listens")?;
                if line.contains("control plane started") {
                    return anyhow::Ok((said(&line, "address=")?, said(&line, "admin=")?));
                }
            }
        });
        let (discovery, admin) = addresses.await??;
        let this = Self { process, discovery, admin, started, _kubeconfig: folder };
        Ok(this)
    }

    /// Until it says that it is; how long that took from its start.
    pub(crate) async fn ready(&self) -> anyhow::Result<Duration> {
        while self.started.elapsed() < PATIENCE {
            if self.page("/healthz/ready").await?.starts_with("HTTP/1.1 200") {
                return Ok(self.started.elapsed());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        bail!("fairwayd is not ready: {}", self.page("/healthz/ready").await?)
    }

    pub(crate) async fn page(&self, path: &str) -> anyhow::Result<String> {
        let mut stream = TcpStream::connect(self.admin).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    /// A metric's only series.
    pub(crate) async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let page = self.page("/metrics").await?;
        let line = page.lines().find(|line| line.split([' ', '{']).next() == Some(name));
        let value =
            line.and_then(|line| line.split_whitespace().last()).with_context(|| format!("no metric {name}"))?;
        Ok(value.parse()?)
    }

    pub(crate) fn usage(&self) -> anyhow::Result<Usage> {
        usage(&self.process.id().to_string())
    }

    /// The peak is counted from now on.
    pub(crate) fn forget_peak(&self) -> anyhow::Result<()> {
        Ok(fs::write(format!("/proc/{}/clear_refs", self.process.id()), "5")?)
    }
}

impl Drop for Fairwayd {
    fn drop(&mut self) {
        // It may have ended by itself, which whoever waits for it has noticed.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn said(line: &str, field: &str) -> anyhow::Result<SocketAddr> {
    let rest = line.split(field).nth(1).with_context(|| format!("{field} is not in {line:?}"))?;
    Ok(rest.split_whitespace().next().unwrap_or_default().trim_matches('"').parse()?)
}

/// Of this process.
pub(crate) fn own() -> anyhow::Result<Usage> {
    usage("self")
}

fn usage(process: &str) -> anyhow::Result<Usage> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // Behind the name, which may contain anything.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| -> anyhow::Result<f64> { Ok(fields.get(at).context("a short stat")?.parse()?) };
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let kilobytes = |name: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or(0)
    };
    Ok(Usage {
        cpu: Duration::from_secs_f64((ticks(11)? + ticks(12)?) / TICKS_PER_SECOND),
        resident: kilobytes("VmRSS:") * 1024,
        peak: kilobytes("VmHWM:") * 1024,
    })
}
