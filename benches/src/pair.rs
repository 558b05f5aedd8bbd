//! A proxy in two halves and nothing else: no policy, no discovery, no metrics. `near` takes connections and carries them through
//! tunnels to `far`, which connects to where they want to go. Both halves are one thread, with either engine.
//!
//! What both engines have in common: the certificates and TLS 1.3 with AES-256-GCM, the handshake by rustls on aws-lc-rs, socket
//! options, streams per tunnel, the allocator. What they seal records with is their own choice, as it is in the proxy.

mod engine;
pub mod stalled;
pub mod tls;

use std::{
    ffi::OsString,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    rc::Rc,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Builder,
    task::{JoinSet, LocalSet},
    time::sleep,
};

use crate::{
    control::{far::Server, near::Tunnels},
    pair::tls::Certificates,
};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 4096;

/// One half of a proxy, for benchmarks.
#[derive(Debug, Parser)]
#[command(name = "pair")]
enum Command {
    /// Take connections and carry them to the far half.
    Near {
        #[arg(long, value_enum)]
        engine: Engine,
        /// Ports to listen on; each leads to the same port of the target.
        #[arg(long, value_delimiter = ',', required = true)]
        listen: Vec<u16>,
        /// Where the far half listens.
        #[arg(long)]
        far: SocketAddr,
        /// Whom connections are for.
        #[arg(long)]
        target: IpAddr,
        /// What `tls::Certificates::write` has written.
        #[arg(long)]
        certificates: PathBuf,
    },
    /// Take tunnels and connect to where their streams want to go.
    Far {
        #[arg(long, value_enum)]
        engine: Engine,
        #[arg(long)]
        listen: u16,
        #[arg(long)]
        certificates: PathBuf,
    },
    /// Make the certificates that the halves need, in this folder.
    Certificates { folder: PathBuf },
    /// Be readers that stall, and then others, who ask something: how many are answered?
    Stalled(stalled::Options),
}

/// What tunnels are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// Ours.
    Engine,
    /// The control.
    H2,
}

impl Engine {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Engine => "engine",
            Self::H2 => "h2",
        }
    }
}

/// Runs what the arguments say, which start with the program's name.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let command = match Command::try_parse_from(arguments) {
        Ok(command) => command,
        Err(error) => {
            drop(error.print());
            return ExitCode::from(2);
        }
    };
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pair: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Near { .. } | Command::Far { .. } => serve(command),
        Command::Certificates { folder } => Certificates::generate()?.write(&folder),
        Command::Stalled(options) => {
            println!("{}", serde_json::to_string(&stalled::run(&options)?)?);
            Ok(())
        }
    }
}

fn serve(command: Command) -> anyhow::Result<()> {
    mesh_net::limits::raise_descriptor_limit()?;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        match command {
            Command::Near { engine, listen, far, target, certificates } => {
                let tls = Certificates::read(&certificates)?.client_config()?;
                let listen = Listen { ports: listen, target };
                match engine {
                    Engine::Engine => {
                        let near = Rc::new(engine::Near::new(far, tls));
                        listen.forever(|tcp, target| engine::Near::carry(near.clone(), tcp, target)).await
                    }
                    Engine::H2 => {
                        let near = Rc::new(Tunnels::new(far, tls, tls::server_name()));
                        listen
                            .forever(|tcp, target| {
                                let near = near.clone();
                                async move { near.carry(tcp, target).await }
                            })
                            .await
                    }
                }
            }
            Command::Far { engine, listen, certificates } => {
                let tls = Certificates::read(&certificates)?.server_config()?;
                let listen = Listen { ports: vec![listen], target: Ipv6Addr::UNSPECIFIED.into() };
                match engine {
                    Engine::Engine => listen.forever(|tcp, _| engine::serve(tcp, tls.clone())).await,
                    Engine::H2 => {
                        let server = Rc::new(Server::new(tls));
                        listen
                            .forever(|tcp, _| {
                                let server = server.clone();
                                async move { server.serve(tcp).await }
                            })
                            .await
                    }
                }
            }
            Command::Certificates { .. } | Command::Stalled(_) => Ok(()),
        }
    })
}

/// Ports, and whom the connections they take are for.
struct Listen {
    ports: Vec<u16>,
    target: IpAddr,
}

impl Listen {
    /// Gives each connection to a task of its own. Ends only when a port cannot be had.
    async fn forever<F>(&self, carry: impl Fn(TcpStream, SocketAddr) -> F) -> anyhow::Result<()>
    where
        F: Future<Output = anyhow::Result<()>> + 'static,
    {
        let mut listeners = Vec::new();
        for port in &self.ports {
            let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, *port));
            let listener = mesh_net::sockets::listen_tcp(None, address, BACKLOG, &mesh_net::SocketOptions::default());
            let (listener, _) = listener.with_context(|| format!("cannot listen on port {port}"))?;
            listeners.push((TcpListener::from_std(listener)?, SocketAddr::new(self.target, *port)));
        }
        let carry = &carry;
        let accepting = listeners.iter().map(|(listener, target)| async move {
            let mut flows = JoinSet::new();
            loop {
                while flows.try_join_next().is_some() {}
                match listener.accept().await {
                    Ok((tcp, _)) => {
                        // It is not inherited on every kernel.
                        drop(tcp.set_nodelay(true));
                        let flow = carry(tcp, *target);
                        flows.spawn_local(async move {
                            if let Err(error) = flow.await {
                                eprintln!("{error:#}");
                            }
                        });
                    }
                    // Out of descriptors, for instance: those that are open stay.
                    Err(_) => sleep(Duration::from_millis(100)).await,
                }
            }
        });
        futures_util::future::join_all(accepting).await;
        Ok(())
    }
}
