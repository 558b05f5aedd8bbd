//! The inside of a lab: the PID namespace's init, and the supervisor that owns the cluster and answers its control socket.

use std::{
    io::{self, Write},
    os::fd::{AsFd, OwnedFd},
    os::unix::net::{UnixListener, UnixStream},
    process::{Command, ExitCode, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use mesh_net::{isolate::kill_group, unix::recv_with_fds};
use nix::{
    errno::Errno,
    sys::{
        signal::Signal,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tokio::{
    io::AsyncWriteExt,
    sync::{mpsc, oneshot},
};

use crate::{
    cluster::{Cluster, http_get},
    components::Options,
    protocol::{Reply, Request, Wire},
};

/// Name under which the init starts the supervisor; also the program's first argument.
pub const SUPERVISOR: &str = "lab-supervisor";
/// A lab whose starter does not ask for it within this time of its being up has lost him.
const CLAIM_WITHIN: Duration = Duration::from_secs(10);
/// Until the cluster is up it belongs to whoever waits for it: a caller that goes away takes it along.
static STARTING: AtomicBool = AtomicBool::new(true);
/// Requests waiting for the cluster.
const QUEUE: usize = 64;

/// Pid 1: starts the supervisor and reaps whatever is orphaned. When the supervisor ends, so does everything.
pub fn init_main(arguments: &[String]) -> ExitCode {
    let program = std::env::current_exe().unwrap_or_default();
    let child = match Command::new(program).arg(SUPERVISOR).args(arguments).spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("cannot start the lab's supervisor: {error}");
            return ExitCode::FAILURE;
        }
    };
    let supervisor = i32::try_from(child.id()).unwrap_or(0);
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::empty())) {
            Ok(WaitStatus::Exited(pid, code)) if pid.as_raw() == supervisor => {
                return ExitCode::from(u8::try_from(code).unwrap_or(1));
            }
            Ok(WaitStatus::Signaled(pid, _, _)) if pid.as_raw() == supervisor => return ExitCode::FAILURE,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return ExitCode::FAILURE,
        }
    }
}

/// The supervisor: standard input is the listening control socket, `arguments[0]` the options as JSON.
pub fn supervisor_main(arguments: &[String]) -> ExitCode {
    match supervise(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn supervise(arguments: &[String]) -> anyhow::Result<()> {
    let options: Options = serde_json::from_str(arguments.first().map_or("{}", String::as_str))?;
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    listener.set_nonblocking(false)?;
    let (orders, queue) = mpsc::channel(QUEUE);
    thread::Builder::new().name("control".to_owned()).spawn(move || accept(&listener, &orders))?;
    // One thread: the cluster is one owner's, and namespaces are entered per thread.
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve(options, queue))
}

/// A request, what came with it, and where its reply goes.
struct Order {
    request: Request,
    fds: Vec<OwnedFd>,
    /// Process group started for it, so that it can be ended with its caller.
    started: Arc<AtomicU32>,
    reply: oneshot::Sender<Reply>,
}

fn accept(listener: &UnixListener, orders: &mpsc::Sender<Order>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let orders = orders.clone();
        let spawned = thread::Builder::new().spawn(move || {
            if let Err(error) = converse(&stream, &orders) {
                tracing::debug!(%error, "control connection ended");
            }
        });
        drop(spawned);
    }
}

fn converse(stream: &UnixStream, orders: &mpsc::Sender<Order>) -> io::Result<()> {
    let (line, fds) = read_request(stream)?;
    let started = Arc::new(AtomicU32::new(0));
    let (reply, answer) = oneshot::channel();
    let reply = match serde_json::from_slice(&line) {
        Ok(request) => {
            let order = Order { request, fds, started: started.clone(), reply };
            let watch = stream.try_clone()?;
            thread::Builder::new().spawn(move || end_with_caller(&watch, &started))?;
            match orders.blocking_send(order) {
                Ok(()) => answer.blocking_recv().unwrap_or_else(|_| Reply::error("the lab is going down")),
                Err(_) => Reply::error("the lab is going down"),
            }
        }
        Err(error) => Reply::error(format!("request not understood: {error}")),
    };
    let mut text = serde_json::to_vec(&reply).map_err(io::Error::other)?;
    text.push(b'\n');
    (&mut &*stream).write_all(&text)?;
    stream.shutdown(std::net::Shutdown::Both)
}

fn read_request(stream: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let (mut line, mut fds, mut buffer) = (Vec::new(), Vec::new(), vec![0; 64 * 1024]);
    loop {
        let (n, mut came) = recv_with_fds(stream, &mut buffer)?;
        fds.append(&mut came);
        line.extend_from_slice(&buffer[..n]);
        // Bounded by `control::REQUEST_BYTES` on the caller's side; the caller is this lab's own user.
        if line.ends_with(b"\n") {
            return Ok((line, fds));
        }
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// A caller that goes away (Ctrl-C) takes its command along.
fn end_with_caller(stream: &UnixStream, started: &AtomicU32) {
    let mut byte = [0];
    drop(io::Read::read(&mut &*stream, &mut byte));
    if STARTING.load(Ordering::Acquire) {
        // Pid 1 ends with us, and everything inside with it.
        std::process::exit(1);
    }
    let group = started.load(Ordering::Acquire);
    if group != 0 {
        kill_group(group, Signal::SIGTERM as i32).unwrap_or_default();
    }
}

async fn serve(options: Options, mut queue: mpsc::Receiver<Order>) -> anyhow::Result<()> {
    let mut cluster = match Cluster::start(options).await {
        Ok(cluster) => cluster,
        Err(error) => {
            // The caller waits on the socket: tell it there.
            if let Ok(Some(order)) = tokio::time::timeout(Duration::from_secs(5), queue.recv()).await {
                drop(order.reply.send(Reply::error(format!("the lab could not start: {error:#}"))));
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            return Err(error);
        }
    };
    STARTING.store(false, Ordering::Release);
    let Ok(mut next) = tokio::time::timeout(CLAIM_WITHIN, queue.recv()).await else {
        anyhow::bail!("nobody asked for this lab");
    };
    while let Some(order) = next {
        let down = order.request == Request::Down;
        handle(&mut cluster, order).await;
        if down {
            // Let the reply reach its caller before pid 1 takes everything down.
            tokio::time::sleep(Duration::from_millis(50)).await;
            break;
        }
        next = queue.recv().await;
    }
    Ok(())
}

async fn handle(cluster: &mut Cluster, order: Order) {
    let Order { request, fds, started, reply } = order;
    let answer = match request {
        Request::Exec { target, command, env } => {
            let spawned = spawn_exec(cluster, &target, &command, &env, fds);
            return finish(spawned, reply, &started, false);
        }
        Request::Run { target, command } => {
            let spawned = spawn_run(cluster, &target, &command);
            return finish(spawned, reply, &started, true);
        }
        Request::Get { target, url } => return get(cluster, &target, &url, reply),
        Request::Forward { name, target, port } => forward(cluster, name, &target, port, fds),
        other => simple(cluster, other).await,
    };
    // The caller may have given up.
    drop(reply.send(answer.unwrap_or_else(|error| Reply::error(format!("{error:#}")))));
}

async fn simple(cluster: &mut Cluster, request: Request) -> anyhow::Result<Reply> {
    Ok(match request {
        Request::Status => Reply { status: Some(cluster.status()), ..Reply::ok() },
        Request::Apply { file, text } => Reply::text(cluster.apply(&file, &text).await?),
        Request::Problems { files } => Reply::text(cluster.problems(&files).await?),
        Request::Delete { pod, file } => {
            if let Some(pod) = pod {
                cluster.delete_pod(&pod).await?;
            }
            if let Some(file) = file {
                cluster.delete_file(&file)?;
            }
            Reply::ok()
        }
        Request::Label { namespace, pod, key, value } => {
            cluster.label(&namespace, pod.as_deref(), &key, value.as_deref())?;
            Reply::ok()
        }
        Request::Logs { name, lines } => Reply::text(cluster.log_tail(&name, lines)),
        Request::Fault(fault) => Reply::text(cluster.fault(fault).await?),
        Request::Inventory { target } => Reply::text(inventory(&cluster.namespace_of(&target)?)?),
        Request::Ready { program } => cluster.wait_ready(&program).await.map(|()| Reply::ok())?,
        Request::Wire(Wire::Mark) => {
            cluster.recorder.mark();
            Reply::ok()
        }
        Request::Wire(Wire::Look { nonce }) => {
            Reply { sight: Some(cluster.recorder.look(nonce.as_deref())), ..Reply::ok() }
        }
        Request::Wire(Wire::Pcap { file }) => {
            std::fs::write(&file, cluster.recorder.pcap())?;
            Reply::text(file)
        }
        Request::Down => Reply::ok(),
        Request::Exec { .. } | Request::Run { .. } | Request::Get { .. } | Request::Forward { .. } => {
            unreachable!("handled by `handle`")
        }
    })
}

/// Links, tables, rules and routes of a namespace, one per line.
fn inventory(ns: &mesh_net::NetNs) -> anyhow::Result<String> {
    use mesh_net::{
        link::Netlink,
        nft::{Family, Nft},
    };
    let mut lines = Vec::new();
    let mut links = Netlink::in_ns(ns)?;
    lines.extend(links.links()?.iter().map(|l| format!("link {}", l.name)));
    lines.extend(links.rules()?.iter().map(|r| format!("rule mark {:#x}/{:#x} table {}", r.mark, r.mask, r.table)));
    lines.extend(links.routes(MESH_TABLE)?.iter().map(|r| format!("route table {MESH_TABLE} {}", r.dst)));
    let mut nft = Nft::in_ns(ns)?;
    for table in nft.tables(Family::Inet)? {
        lines.push(format!("table {table}"));
        let rules = nft.rules(Family::Inet, &table)?;
        lines.extend(rules.iter().map(|r| format!("nft {table} {} {}", r.chain, r.comment)));
    }
    Ok(lines.join("\n"))
}

/// The routing table that captured pods use.
const MESH_TABLE: u32 = 100;

type Spawned = anyhow::Result<tokio::process::Child>;

fn spawn_exec(
    cluster: &Cluster,
    target: &str,
    argv: &[String],
    env: &std::collections::BTreeMap<String, String>,
    fds: Vec<OwnedFd>,
) -> Spawned {
    let (ns, mut command) = cluster.command_at(target, argv, env)?;
    let mut streams = fds.into_iter();
    let (Some(stdin), Some(stdout), Some(stderr)) = (streams.next(), streams.next(), streams.next()) else {
        anyhow::bail!("exec needs three descriptors");
    };
    command.stdin(Stdio::from(stdin)).stdout(Stdio::from(stdout)).stderr(Stdio::from(stderr));
    spawn(ns, command)
}

fn spawn_run(cluster: &Cluster, target: &str, argv: &[String]) -> Spawned {
    let (ns, mut command) = cluster.command_at(target, argv, &std::collections::BTreeMap::new())?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    spawn(ns, command)
}

fn spawn(ns: Option<mesh_net::NetNs>, command: Command) -> Spawned {
    let mut command = tokio::process::Command::from(command);
    Ok(match ns {
        Some(ns) => ns.run(|| command.spawn())??,
        None => command.spawn()?,
    })
}

/// Waits for a command beside the cluster's other business.
fn finish(spawned: Spawned, reply: oneshot::Sender<Reply>, started: &AtomicU32, capture: bool) {
    let child = match spawned {
        Ok(child) => child,
        Err(error) => return drop(reply.send(Reply::error(format!("{error:#}")))),
    };
    started.store(child.id().unwrap_or(0), Ordering::Release);
    // Ends with the command; the command ends with the lab at the latest.
    tokio::spawn(async move {
        let answer = match child.wait_with_output().await {
            Ok(output) => {
                let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
                if capture {
                    text.push_str(&String::from_utf8_lossy(&output.stderr));
                }
                Reply { text, exit: Some(exit_code(output.status)), ..Reply::ok() }
            }
            Err(error) => Reply::error(error),
        };
        drop(reply.send(answer));
    });
}

fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn get(cluster: &Cluster, target: &str, url: &str, reply: oneshot::Sender<Reply>) {
    let url = url.to_owned();
    let parsed = url.strip_prefix("http://").and_then(|rest| {
        let (address, path) = rest.split_once('/').unwrap_or((rest, ""));
        Some((address.parse().ok()?, format!("/{path}")))
    });
    let Some((address, path)) = parsed else {
        return drop(reply.send(Reply::error(format!("`{url}` is not of the form http://IP:PORT/PATH"))));
    };
    match cluster.namespace_of(target) {
        Err(error) => drop(reply.send(Reply::error(error))),
        Ok(ns) => drop(tokio::spawn(async move {
            let answer = match http_get(&ns, address, &path).await {
                Ok((status, text)) => Reply { text, exit: Some(i32::from(status)), ..Reply::ok() },
                Err(error) => Reply::error(format!("{url}: {error}")),
            };
            drop(reply.send(answer));
        })),
    }
}

/// Serves a listening socket of the host's namespace with connections to a port inside.
fn forward(cluster: &mut Cluster, name: String, target: &str, port: u16, fds: Vec<OwnedFd>) -> anyhow::Result<Reply> {
    let Some(fd) = fds.into_iter().next() else { anyhow::bail!("forward needs a listening socket") };
    let listener = std::net::TcpListener::from(fd);
    listener.set_nonblocking(true)?;
    cluster.urls.insert(name, format!("http://{}", listener.local_addr()?));
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let ns = cluster.namespace_of(target)?;
    // Ends with the lab.
    tokio::spawn(async move {
        while let Ok((mut outside, _)) = listener.accept().await {
            let ns = ns.clone();
            tokio::spawn(async move {
                let address = std::net::SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, port));
                let Ok(socket) = mesh_net::sockets::tcp_socket(Some(&ns), None, address, &Default::default()) else {
                    return;
                };
                if let Ok(mut inside) = mesh_net::sockets::connect(socket, address, Duration::from_secs(2)).await {
                    drop(tokio::io::copy_bidirectional(&mut outside, &mut inside).await);
                } else {
                    drop(outside.shutdown().await);
                }
            });
        }
    });
    Ok(Reply::ok())
}
