//! The outside of a lab: starting one, finding one, talking to it.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, IsTerminal},
    net::TcpListener,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::linux::net::SocketAddrExt,
    os::unix::net::{SocketAddr, UnixListener, UnixStream},
    path::Path,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use mesh_net::{isolate::Isolated, unix::send_with_fds};

use crate::{
    components::{self, Options},
    protocol::{Reply, Request, Sight, Status, Wire},
};

/// First argument with which this program becomes a lab's init.
pub const INIT: &str = "lab-init";

/// The largest request: a manifest file.
const REQUEST_BYTES: usize = 4 * 1024 * 1024;

/// Why a lab could not be reached or did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    #[error("no lab named `{0}` is up; start one with `fairway lab up`")]
    NotUp(String),
    #[error("a lab named `{0}` is up already; end it with `fairway lab down`, or pick another name with --name")]
    AlreadyUp(String),
    #[error("the lab ended before it answered")]
    Ended,
    #[error("cannot start the lab")]
    Start(#[source] mesh_net::isolate::IsolateError),
    #[error("the connection to the lab failed")]
    Io(#[from] io::Error),
    #[error("the lab's answer cannot be read")]
    Answer(#[from] serde_json::Error),
    #[error("{0}")]
    Refused(String),
}

type Result<T> = std::result::Result<T, LabError>;

/// A lab that runs.
#[derive(Clone, Debug)]
pub struct Lab {
    name: String,
}

/// A lab that dies with this value, and with this process however that ends.
#[derive(Debug)]
pub struct OwnedLab {
    pub lab: Lab,
    waiter: Child,
}

impl Lab {
    /// Finds a running lab.
    ///
    /// # Errors
    /// [`LabError::NotUp`] when there is none of that name.
    pub fn find(name: &str) -> Result<Self> {
        let lab = Self { name: name.to_owned() };
        lab.connect()?;
        Ok(lab)
    }

    /// Starts a lab that outlives this process.
    ///
    /// # Errors
    /// When there is one of that name, or the kernel or a program refuses; then nothing is left.
    pub fn start(name: &str, options: &Options) -> Result<Self> {
        let mut waiter = launch(&std::env::current_exe()?, name, options, false)?;
        let lab = Self { name: name.to_owned() };
        lab.wait_up(&mut waiter)?;
        lab.publish_urls()?;
        Ok(lab)
    }

    /// Starts a lab that ends with the returned value or with the calling thread.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_owned(name: &str, options: &Options) -> Result<OwnedLab> {
        Self::start_owned_with(&std::env::current_exe()?, name, options)
    }

    /// [`Self::start_owned`] with another multi-call binary than this one: for tests, whose own binary is none.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_owned_with(program: &Path, name: &str, options: &Options) -> Result<OwnedLab> {
        let mut waiter = launch(program, name, options, true)?;
        let lab = Self { name: name.to_owned() };
        lab.wait_up(&mut waiter)?;
        lab.publish_urls()?;
        Ok(OwnedLab { lab, waiter })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// One request, one reply.
    ///
    /// # Errors
    /// When the lab is gone, or refuses (its reason).
    pub fn ask(&self, request: &Request) -> Result<Reply> {
        self.ask_with(request, &[])
    }

    fn ask_with(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply> {
        let stream = self.connect()?;
        let mut line = serde_json::to_vec(request)?;
        if line.len() > REQUEST_BYTES {
            let size = line.len();
            return Err(LabError::Refused(format!(
                "the request has {size} bytes, the limit is {REQUEST_BYTES}; apply smaller files"
            )));
        }
        line.push(b'\n');
        send_with_fds(&stream, &line, fds)?;
        let mut answer = String::new();
        BufReader::new(&stream).read_line(&mut answer)?;
        if answer.is_empty() {
            return Err(LabError::Ended);
        }
        let reply: Reply = serde_json::from_str(&answer)?;
        match reply.error {
            Some(error) => Err(LabError::Refused(error)),
            None => Ok(reply),
        }
    }

    /// # Errors
    /// As [`Self::ask`].
    pub fn status(&self) -> Result<Status> {
        Ok(self.ask(&Request::Status)?.status.unwrap_or_default())
    }

    /// What the control plane finds wrong with files that were applied, a line each, once it has read all of them.
    ///
    /// # Errors
    /// As [`Self::ask`]; and when the control plane does not read the files.
    pub fn problems(&self, files: &[String]) -> Result<Vec<String>> {
        let text = self.ask(&Request::Problems { files: files.to_vec() })?.text;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Runs a command and returns its exit status and what it printed.
    ///
    /// # Errors
    /// When it could not be started.
    pub fn run(&self, target: &str, command: &[&str]) -> Result<(i32, String)> {
        let command = command.iter().map(|s| (*s).to_owned()).collect();
        let reply = self.ask(&Request::Run { target: target.to_owned(), command })?;
        Ok((reply.exit.unwrap_or(-1), reply.text))
    }

    /// Runs a command with this process's own standard streams; returns its exit status.
    ///
    /// # Errors
    /// When it could not be started.
    pub fn exec(&self, target: &str, command: Vec<String>) -> Result<i32> {
        let mut env = BTreeMap::new();
        if io::stdin().is_terminal()
            && let Ok(term) = std::env::var("TERM")
        {
            env.insert("TERM".to_owned(), term);
        }
        let request = Request::Exec { target: target.to_owned(), command, env };
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        let reply = self.ask_with(&request, &[stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])?;
        Ok(reply.exit.unwrap_or(-1))
    }

    /// HTTP GET from inside: status and body.
    ///
    /// # Errors
    /// When there is no complete answer.
    pub fn get(&self, target: &str, url: &str) -> Result<(i32, String)> {
        let reply = self.ask(&Request::Get { target: target.to_owned(), url: url.to_owned() })?;
        Ok((reply.exit.unwrap_or(0), reply.text))
    }

    /// # Errors
    /// As [`Self::ask`].
    pub fn look(&self, nonce: Option<&str>) -> Result<Sight> {
        let look = Wire::Look { nonce: nonce.map(str::to_owned) };
        Ok(self.ask(&Request::Wire(look))?.sight.unwrap_or_default())
    }

    /// # Errors
    /// As [`Self::ask`].
    pub fn mark(&self) -> Result<()> {
        self.ask(&Request::Wire(Wire::Mark)).map(drop)
    }

    /// Ends the lab and everything in it, and waits until it is gone.
    ///
    /// # Errors
    /// When it does not go within ten seconds.
    pub fn down(&self) -> Result<()> {
        match self.ask(&Request::Down) {
            // It may be gone before its answer is read; whether it is, is seen below.
            Ok(_) | Err(LabError::Ended) => {}
            Err(error) => return Err(error),
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.connect().is_ok() {
            if Instant::now() > deadline {
                return Err(LabError::Refused("the lab does not go".to_owned()));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn connect(&self) -> Result<UnixStream> {
        let address = address(&self.name)?;
        UnixStream::connect_addr(&address).map_err(|_| LabError::NotUp(self.name.clone()))
    }

    /// The supervisor answers once the mesh is up, or says why it is not.
    fn wait_up(&self, waiter: &mut Child) -> Result<()> {
        let outcome = self.ask(&Request::Status);
        if outcome.is_err() {
            drop(waiter.kill());
            drop(waiter.wait());
        }
        outcome.map(drop)
    }

    /// Leads ports of the host's loopback to the programs' own pages.
    fn publish_urls(&self) -> Result<()> {
        let mut wanted = vec![("fairwayd".to_owned(), "control".to_owned(), components::CONTROL_ADMIN_PORT)];
        for node in self.status()?.nodes {
            let ztunnel = format!("ztunnel/{}", node.name);
            wanted.push((format!("{ztunnel} metrics"), ztunnel.clone(), components::ZTUNNEL_STATS_PORT));
            wanted.push((format!("{ztunnel} admin"), ztunnel, components::ZTUNNEL_ADMIN_PORT));
        }
        for (name, target, port) in wanted {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            self.ask_with(&Request::Forward { name, target, port }, &[listener.as_fd()])?;
        }
        Ok(())
    }
}

impl OwnedLab {
    /// The process whose end ends the lab.
    pub fn process(&self) -> u32 {
        self.waiter.id()
    }
}

impl Drop for OwnedLab {
    fn drop(&mut self) {
        drop(self.waiter.kill());
        drop(self.waiter.wait());
    }
}

/// An abstract name: no file is left behind, and it is this user's and this host's alone.
fn address(name: &str) -> Result<SocketAddr> {
    let user = nix::unistd::geteuid();
    Ok(SocketAddr::from_abstract_name(format!("fairway-lab-{user}-{name}"))?)
}

fn launch(program: &Path, name: &str, options: &Options, owned: bool) -> Result<Child> {
    // Bound out here, in the host's network namespace, where callers will look for it.
    let listener = UnixListener::bind_addr(&address(name)?).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => LabError::AlreadyUp(name.to_owned()),
        _ => LabError::Io(error),
    })?;
    let mut isolated = Isolated::new(program);
    isolated
        .command()
        .arg(INIT)
        .arg(serde_json::to_string(options)?)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::inherit());
    if owned {
        isolated.die_with_parent();
    } else {
        // Out of the terminal's foreground group: Ctrl-C here must not end it.
        std::os::unix::process::CommandExt::process_group(isolated.command(), 0);
        isolated.command().stderr(Stdio::null());
    }
    isolated.spawn().map_err(LabError::Start)
}
