//! What is done, and what is counted of it.

use std::{
    future::Future,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use test_support::ApiServer;

use crate::{
    cluster::{self, Life, Shape},
    fairwayd::{self, Fairwayd, PATIENCE, Usage},
    node::{Counts, Fleet, Held},
    report,
};

/// After something large, until memory is looked at.
const SETTLE: Duration = Duration::from_secs(3);
/// Times the namespace that changes as a whole is changed while a node does not read.
const BULKS: usize = 6;

/// What a start cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loaded {
    pub(crate) pods: usize,
    pub(crate) ready: Duration,
    pub(crate) usage: Usage,
}

/// What something done cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spent {
    pub(crate) took: Duration,
    pub(crate) usage: Usage,
    pub(crate) own: Duration,
    pub(crate) counts: Counts,
}

/// Changes of one kind, one after the other.
pub(crate) struct Changes {
    pub(crate) what: &'static str,
    pub(crate) count: usize,
    /// Of every change at every node.
    pub(crate) latencies: Vec<Duration>,
    pub(crate) spent: Spent,
}

pub(crate) async fn load(shape: Shape) -> anyhow::Result<Loaded> {
    let api = ApiServer::start().await;
    shape.fill(&api);
    let fairwayd = Fairwayd::start(&api).await?;
    let ready = fairwayd.ready().await?;
    tokio::time::sleep(SETTLE).await;
    #[expect(clippy::cast_precision_loss, reason = "small enough")]
    let expected = (shape.pods + shape.nodes) as f64;
    let workloads = fairwayd.metric("fairwayd_workloads").await?;
    ensure!(workloads >= expected - shape.nodes as f64, "{workloads} workloads of {expected} pods");
    Ok(Loaded { pods: shape.pods, ready, usage: fairwayd.usage()? })
}

/// A cluster, its control plane, and the proxies of its nodes.
struct Mesh {
    api: ApiServer,
    fairwayd: Fairwayd,
    fleet: Arc<Fleet>,
    shape: Shape,
    nodes: usize,
}

pub(crate) async fn changes(shape: Shape, nodes: usize, changes: usize) -> anyhow::Result<()> {
    eprintln!("{} pods, {nodes} nodes", shape.pods);
    let api = ApiServer::start().await;
    shape.fill(&api);
    let fairwayd = Fairwayd::start(&api).await?;
    fairwayd.ready().await?;
    let tokens = (0..nodes).map(|node| cluster::admit(&api, node)).collect::<anyhow::Result<Vec<_>>>()?;
    let fleet = Fleet::new(fairwayd.discovery, connector(&roots(&api).await?)?, tokens);
    let mesh = Mesh { api, fairwayd, fleet, shape, nodes };

    let (connections, cold) = mesh.connect(&Held::Nothing).await?;
    let [addresses, policies] = mesh.fleet.agreed(0..nodes)?;
    ensure!(addresses >= shape.pods, "{addresses} resources of {} pods", shape.pods);
    let everything = ((addresses + policies) * nodes) as u64;
    ensure!(cold.counts.resources == everything, "{} resources instead of {everything}", cold.counts.resources);

    let one_by_one = mesh.one_by_one(changes).await?;
    let in_bulk = mesh.during_bulk(changes.div_ceil(10).next_multiple_of(2)).await?;
    mesh.fleet.agreed(0..nodes)?;

    let held = mesh.fleet.held()?;
    drop(connections);
    mesh.left().await?;
    let (connections, again) = mesh.connect(&held).await?;
    ensure!(again.counts.resources == 0, "{} resources are sent to nodes that have them", again.counts.resources);
    drop(connections);
    mesh.left().await?;
    let (connections, restarted) = mesh.connect(&Held::Nothing).await?;
    ensure!(
        restarted.counts.resources == everything,
        "{} resources instead of {everything}",
        restarted.counts.resources
    );

    let (stalled, beside_stalled) = mesh.stalled(changes).await?;
    drop(connections);

    println!("{addresses} addresses, {policies} policies, {nodes} nodes\n");
    let storms = [("first start", cold), ("back with versions", again), ("back without", restarted)];
    println!("{}", report::storms(&storms, nodes));
    let [bulk, terminating] = in_bulk;
    let rows: Vec<Changes> = one_by_one.into_iter().chain([terminating, bulk, beside_stalled]).collect();
    println!("{}", report::changes(&rows, nodes));
    println!("{}", report::stalled(&stalled));
    Ok(())
}

impl Mesh {
    async fn spent<T>(&self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<(T, Spent)> {
        self.fairwayd.forget_peak()?;
        let (before, own, counts) = (self.fairwayd.usage()?, fairwayd::own()?, self.fleet.counts());
        let began = Instant::now();
        let done = work.await?;
        let took = began.elapsed();
        let mut usage = self.fairwayd.usage()?;
        usage.cpu -= before.cpu;
        let own = fairwayd::own()?.cpu - own.cpu;
        Ok((done, Spent { took, usage, own, counts: self.fleet.counts().since(counts) }))
    }

    /// All nodes at once, until each has its first answers.
    async fn connect(&self, held: &Held) -> anyhow::Result<(tokio::task::JoinSet<()>, Spent)> {
        let connected = self.spent(async {
            let connections = self.fleet.connect(0..self.nodes, held);
            self.fleet.served(self.nodes).await?;
            Ok(connections)
        });
        connected.await
    }

    /// Until the server has noticed that all nodes are gone.
    async fn left(&self) -> anyhow::Result<()> {
        until("all nodes are gone", async || Ok(self.fairwayd.metric("pilot_xds").await? == 0.0)).await
    }

    /// A pod comes, stops being ready, is ready again, and goes.
    async fn one_by_one(&self, changes: usize) -> anyhow::Result<Vec<Changes>> {
        let new: Vec<_> = (0..changes).map(|n| self.shape.pod(self.shape.pods + n)).collect();
        let apply = |what: &'static str, change: fn(&ApiServer, cluster::Pod)| {
            let new = &new;
            async move {
                let all = self.spent(async {
                    let mut latencies = Vec::new();
                    for pod in new {
                        let arrived = self.fleet.arrival(&pod.workload(), || change(&self.api, *pod)).await?;
                        latencies.extend(arrived);
                    }
                    Ok(latencies)
                });
                let (latencies, spent) = all.await?;
                let (sent, told) = (spent.counts.resources + spent.counts.removals, (changes * self.nodes) as u64);
                // What is urgent may come again with the bulk, where a node had not answered yet.
                ensure!((told..=2 * told).contains(&sent), "{what}: {sent} resources and removals instead of {told}");
                anyhow::Ok(Changes { what, count: changes, latencies, spent })
            }
        };
        Ok(vec![
            apply("pod comes", |api, pod| pod.put(api, Life::Ready)).await?,
            apply("not ready", |api, pod| pod.put(api, Life::NotReady)).await?,
            apply("ready again", |api, pod| pod.put(api, Life::Ready)).await?,
            apply("terminating", |api, pod| pod.put(api, Life::Terminating)).await?,
            apply("pod goes", |api, pod| pod.delete(api)).await?,
        ])
    }

    /// A policy that changes every workload of a namespace comes or goes; while that is pushed, a pod terminates.
    async fn during_bulk(&self, changes: usize) -> anyhow::Result<[Changes; 2]> {
        let pods: Vec<_> = (0..changes).map(|n| self.shape.pod(self.shape.pods + n)).collect();
        for pod in &pods {
            self.fleet.arrival(&pod.workload(), || pod.put(&self.api, Life::Ready)).await?;
        }
        let workloads = (self.shape.bulk() * self.nodes) as u64;
        let (mut bulks, mut terminations) = (Vec::new(), Vec::new());
        let all = self.spent(async {
            for (n, pod) in pods.iter().enumerate() {
                let before = self.fleet.counts().resources;
                let pushed = async |count: u64| {
                    until("the bulk", async || Ok(self.fleet.counts().resources >= before + count)).await
                };
                let began = Instant::now();
                cluster::set_bulk(&self.api, n.is_multiple_of(2));
                pushed(1).await?;
                let name = pod.workload();
                let terminated = self.fleet.arrival(&name, || pod.put(&self.api, Life::Terminating));
                terminations.extend(terminated.await?);
                pushed(workloads).await?;
                bulks.push(began.elapsed());
            }
            Ok(())
        });
        let ((), spent) = all.await?;
        for pod in &pods {
            self.fleet.arrival(&pod.workload(), || pod.delete(&self.api)).await?;
        }
        let none = Spent { counts: Counts::default(), usage: Usage::default(), own: Duration::ZERO, ..spent };
        Ok([
            Changes { what: "policy of a namespace, whole", count: changes, latencies: bulks, spent },
            Changes { what: "terminating meanwhile", count: changes, latencies: terminations, spent: none },
        ])
    }

    /// One node stops reading, while much changes.
    async fn stalled(&self, changes: usize) -> anyhow::Result<(Stalled, Changes)> {
        let before = self.fairwayd.usage()?;
        if let Some(node) = self.fleet.nodes.last().filter(|_| self.nodes > 1) {
            node.stalled.store(true, Ordering::Relaxed);
        }
        let reading = self.nodes.max(2) - 1;
        let workloads = (self.shape.bulk() * reading) as u64;
        self.fairwayd.forget_peak()?;
        for n in 0..BULKS {
            let before = self.fleet.counts().resources;
            cluster::set_bulk(&self.api, n.is_multiple_of(2));
            until("the bulk", async || Ok(self.fleet.counts().resources >= before + workloads)).await?;
        }
        let coming = self.spent(async {
            let mut latencies = Vec::new();
            for pod in (0..changes).map(|n| self.shape.pod(self.shape.pods + n)) {
                latencies.extend(self.fleet.arrival(&pod.workload(), || pod.put(&self.api, Life::Ready)).await?);
            }
            Ok(latencies)
        });
        let (latencies, spent) = coming.await?;
        let after = self.fairwayd.usage()?;
        self.fleet.agreed(0..reading)?;
        let beside = Changes { what: "pod comes, one node stalled", count: changes, latencies, spent };
        Ok((Stalled { before, after, bulks: BULKS, workloads: self.shape.bulk() }, beside))
    }
}

/// What a node that does not read cost.
pub(crate) struct Stalled {
    pub(crate) before: Usage,
    pub(crate) after: Usage,
    pub(crate) bulks: usize,
    pub(crate) workloads: usize,
}

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let began = Instant::now();
    while !is_so().await? {
        ensure!(began.elapsed() < PATIENCE, "{what}: never");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// As every namespace has them.
async fn roots(api: &ApiServer) -> anyhow::Result<String> {
    let published = || {
        let map = api.get("api/v1/configmaps", cluster::BULK, "istio-ca-root-cert")?;
        Some(map["data"]["root-cert.pem"].as_str()?.to_owned())
    };
    until("roots are published", async || Ok(published().is_some())).await?;
    published().context("the roots are gone")
}

fn connector(roots_pem: &str) -> anyhow::Result<tokio_rustls::TlsConnector> {
    let mut roots = rustls::RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(roots_pem.as_bytes()) {
        roots.add(root?)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(tls).into())
}
