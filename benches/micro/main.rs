//! Decisions and codecs on their own, in a mesh of 100,000 workloads; and the tunnel engine's parts.

#![forbid(unsafe_code)]

mod tunnel;

use std::{
    hint::black_box,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use mesh_core::{
    addr::NetworkAddress,
    authorize::{Connection, authorize},
    headers::{encode_baggage, parse_baggage},
    index::{Delta, Index, Provenance, Resource},
    origin::Origin,
    policy::{Action, Clause, Match, Policy, Rule, Scope, StringMatch},
    select::{Request, select},
    service::{AppProtocol, Service, ServicePort},
    workload::{OutboundPolicy, PortMapping, TunnelProtocol, Workload},
};
use mesh_xds::convert::{resource_from_wire, resource_to_wire};
use rand::{SeedableRng as _, rngs::StdRng};

const WORKLOADS: u32 = 100_000;
/// Endpoints of each service.
const ENDPOINTS: u32 = 10;
/// Workloads of each namespace.
const NAMESPACE: u32 = 100;
const PORT: u16 = 80;

fn workload(n: u32) -> Workload {
    let namespace = format!("ns-{}", n / NAMESPACE);
    let mut workload = Workload::new(format!("Kubernetes//Pod/{namespace}/pod-{n}"), namespace, format!("pod-{n}"));
    workload.service_account = format!("account-{}", n % NAMESPACE / ENDPOINTS).into();
    workload.addresses = vec![pod_ip(n)];
    workload.node = format!("node-{}", n % 1000).into();
    workload.tunnel_protocol = TunnelProtocol::Hbone;
    workload.canonical_name = format!("service-{}", n / ENDPOINTS).into();
    workload.workload_name = workload.canonical_name.clone();
    workload.locality.region = "region".into();
    workload.locality.zone = format!("zone-{}", n % 3).into();
    workload.services = [(service(n / ENDPOINTS).key(), [MAPPING].into_iter().collect())].into_iter().collect();
    workload
}

const MAPPING: PortMapping = PortMapping { service_port: PORT, target_port: 8080 };

fn service(n: u32) -> Service {
    let namespace = format!("ns-{}", n * ENDPOINTS / NAMESPACE);
    let mut service =
        Service::new(&*namespace, format!("service-{n}"), format!("service-{n}.{namespace}.svc.cluster.local"));
    service.vips = vec![NetworkAddress::new("", service_ip(n))];
    service.ports = vec![ServicePort { mapping: MAPPING, app_protocol: AppProtocol::Unknown }];
    service
}

fn pod_ip(n: u32) -> IpAddr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 1).to_bits() + n).into()
}

fn service_ip(n: u32) -> IpAddr {
    Ipv4Addr::from_bits(Ipv4Addr::new(172, 16, 0, 1).to_bits() + n).into()
}

/// Ten rules of which the last one allows.
fn policy(namespace: &str) -> Policy {
    let rule = |account: String| {
        let principals = vec![StringMatch::Exact(format!("cluster.local/ns/{namespace}/sa/{account}").into())];
        let one = Match { principals, destination_ports: vec![8080], ..Match::default() };
        Rule { clauses: vec![Clause { matches: vec![one] }], origin: Origin::default() }
    };
    let rules = (0..10).rev().map(|n| rule(format!("account-{n}"))).collect();
    Policy {
        name: "allow".into(),
        namespace: namespace.into(),
        scope: Scope::Namespace,
        action: Action::Allow,
        rules,
        dry_run: false,
        origin: Origin { object: format!("AuthorizationPolicy {namespace}/allow").into(), ..Origin::default() },
    }
}

fn everything() -> Vec<Resource> {
    let services = (0..WORKLOADS / ENDPOINTS).map(|n| Resource::Service(Arc::new(service(n))));
    let workloads = (0..WORKLOADS).map(|n| Resource::Workload(Arc::new(workload(n))));
    let policy = Resource::Policy(Arc::new(policy("ns-0")));
    services.chain(workloads).chain([policy]).collect()
}

fn delta(upserts: Vec<Resource>) -> Delta {
    Delta { provenance: Provenance::Xds, upserts, removals: Vec::new() }
}

fn full_index(resources: &[Resource]) -> Index {
    let mut index = Index::default();
    index.apply(delta(resources.to_vec()));
    index.set_policies_complete(true);
    index
}

/// One endpoint moves, in place and as a writer does it: on a copy that is then published. Against building everything anew.
fn apply(c: &mut Criterion) {
    let resources = everything();
    let index = full_index(&resources);
    let moved = |zone: &str| {
        let mut workload = workload(5000);
        workload.locality.zone = zone.into();
        Resource::Workload(Arc::new(workload))
    };
    let changes = [moved("zone-a"), moved("zone-b")];
    let mut group = c.benchmark_group("index of 100,000 workloads");
    let mut turn = 0;
    group.bench_function("one endpoint changes", |b| {
        b.iter_batched(
            || {
                turn += 1;
                (index.clone(), delta(vec![changes[turn % 2].clone()]))
            },
            |(mut index, delta)| {
                index.apply(delta);
                index
            },
            BatchSize::SmallInput,
        );
    });
    group.sample_size(10);
    group.bench_function("rebuild", |b| b.iter_with_large_drop(|| full_index(&resources)));
}

fn decide(c: &mut Criterion) {
    let index = full_index(&everything());
    let source = workload(0);
    let request = |destination: SocketAddr| Request {
        source: &source,
        source_ip: pod_ip(0),
        destination,
        exclude: &[],
        outbound_policy: OutboundPolicy::AllowAny,
        lookups: &[],
    };
    let mut rng = StdRng::seed_from_u64(1);
    let mut group = c.benchmark_group("decide");
    for (name, destination) in [
        ("select: a service of 10 endpoints", SocketAddr::new(service_ip(7), PORT)),
        ("select: a pod", SocketAddr::new(pod_ip(70), 8080)),
        ("select: not of the mesh", SocketAddr::from(([192, 0, 2, 1], 443))),
    ] {
        group.bench_function(name, |b| b.iter(|| select(&index, &request(black_box(destination)), &mut rng)));
    }
    let destination = workload(50);
    let identity = source.identity();
    let connection = Connection {
        source_ip: pod_ip(0),
        source_identity: Some(&identity),
        destination: SocketAddr::new(pod_ip(50), 8080),
    };
    let policies = index.policies_for(&destination);
    group.bench_function("authorize: the tenth rule allows", |b| {
        b.iter(|| authorize(black_box(&policies), black_box(&connection)));
    });
    group.bench_function("authorize: with the policies looked up", |b| {
        b.iter(|| authorize(&index.policies_for(black_box(&destination)), &connection));
    });
}

fn codecs(c: &mut Criterion) {
    let workload = workload(7);
    let header = encode_baggage(&workload);
    let mut group = c.benchmark_group("codec");
    group.bench_function("baggage: write", |b| b.iter(|| encode_baggage(black_box(&workload))));
    group.bench_function("baggage: read", |b| b.iter(|| parse_baggage(black_box(&header))));
    let named = [
        ("discovery: read a workload", Resource::Workload(Arc::new(workload.clone()))),
        ("discovery: read a service", Resource::Service(Arc::new(service(7)))),
        ("discovery: read a policy of 10 rules", Resource::Policy(Arc::new(policy("ns-0")))),
    ];
    for (name, resource) in named {
        let encoded = resource_to_wire(&resource);
        group.bench_function(name, |b| b.iter(|| resource_from_wire(encoded.type_url, black_box(&encoded.body))));
    }
}

criterion_group!(mesh, apply, decide, codecs);
criterion_group!(tunnels, tunnel::aead, tunnel::hpack, tunnel::chunks);
criterion_main!(mesh, tunnels);
