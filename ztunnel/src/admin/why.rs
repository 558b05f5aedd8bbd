//! `/debug/why/*`: the live process says what it would do with a connection, by the very functions that decide connections.

use std::{net::IpAddr, net::SocketAddr, str::FromStr, sync::Arc};

use http::StatusCode;
use mesh_core::{
    addr::NetworkAddress,
    authorize::{Connection, Decision, PolicySet, Verdict, authorize, nearest},
    balance::{Ineligible, examine},
    headers::Authority,
    identity::Identity,
    index::Index,
    names::Family,
    reason::Reason,
    select::{InnerTunnel, NextHop, Selection, Tunnel, select},
    service::Service,
    workload::Workload,
};
use mesh_identity::{EntryState, Manager};
use mesh_runtime::admin::{Request, Response, text};
use serde_json::{Value, json};

use super::{Context, answer};
use crate::{
    discovery::on_demand,
    dns,
    proxy::{
        probe::{Blocked, Way},
        resolve::inbound_target,
    },
};

/// What would this pod's connection to `destination` do? With `probe=true`, the way is tried as well.
pub async fn outbound(context: Context, request: Request) -> Response {
    let explained = explain_outbound(&context, &request).await;
    respond(match explained {
        Ok((mut answer, source, hop)) => {
            if let Some(way) = way_of(hop, source)
                && wants_probe(&request)
            {
                answer["probe"] = probe(&context, &request, way).await;
            }
            Ok(answer)
        }
        Err(unanswerable) => Err(unanswerable),
    })
}

/// May this peer reach this pod at `destination`? With `probe=true`, the application is knocked at as well.
pub async fn inbound(context: Context, request: Request) -> Response {
    let explained = explain_inbound(&context, &request);
    respond(match explained {
        Ok((mut answer, destination)) => {
            if wants_probe(&request) {
                answer["probe"] = probe(&context, &request, Way::Tcp(destination)).await;
            }
            Ok(answer)
        }
        Err(unanswerable) => Err(unanswerable),
    })
}

fn wants_probe(request: &Request) -> bool {
    request.query("probe") == Some("true")
}

/// Beyond waypoints and gateways the way is not ours to try.
fn way_of(hop: NextHop, source: Arc<Workload>) -> Option<Way> {
    match hop {
        NextHop::Hbone(tunnel) | NextHop::Waypoint(tunnel) | NextHop::DoubleHbone { outer: tunnel, .. } => {
            Some(Way::Tunnel(source, tunnel))
        }
        NextHop::Passthrough { address } | NextHop::Tcp { address } => Some(Way::Tcp(address)),
        NextHop::Lookup { .. } | NextHop::Reject { .. } => None,
    }
}

async fn probe(context: &Context, request: &Request, way: Way) -> Value {
    let (namespace, name) = (request.query("namespace").unwrap_or_default(), request.query("pod").unwrap_or_default());
    let Some(prober) = context.pods.prober(namespace, name) else {
        return json!({ "open": false, "reason": Reason::UnknownWorkload.as_str(), "remedy": Reason::UnknownWorkload.remedy(),
            "detail": format!("this ztunnel does not serve pod {namespace}/{name}") });
    };
    match prober.probe(way).await {
        Ok(()) => json!({ "open": true }),
        Err(Blocked { reason, detail }) => {
            json!({ "open": false, "reason": reason.as_str(), "remedy": reason.remedy(), "detail": detail })
        }
    }
}

/// Status and text of a question that cannot be answered.
type Unanswerable = (StatusCode, String);

fn respond(result: Result<Value, Unanswerable>) -> Response {
    match result {
        Ok(value) => answer(&value),
        Err((status, problem)) => text(status, problem + "\n"),
    }
}

async fn explain_outbound(
    context: &Context,
    request: &Request,
) -> Result<(Value, Arc<Workload>, NextHop), Unanswerable> {
    let named: Authority = required(request, "destination", "IP:PORT or HOST:PORT")?;
    let state = &context.shared.state;
    let index = state.snapshot();
    let source = pod(context, &index, request)?;
    let destination = match &named {
        Authority::Address(address) => *address,
        Authority::Host { host, port } => SocketAddr::new(address_of(context, &index, &source, host)?, *port),
    };
    // As a connection would.
    on_demand::destination_known(state, &source, destination.ip().to_canonical())
        .await
        .map_err(|unanswered| (StatusCode::GATEWAY_TIMEOUT, unanswered.to_string()))?;
    let index = state.snapshot();
    let source_ip = source.addresses.first().copied().unwrap_or_else(|| unspecified(destination));
    let asked = mesh_core::select::Request {
        source: &source,
        source_ip,
        destination,
        exclude: &[],
        outbound_policy: context.shared.config.outbound_policy,
        lookups: &[],
    };
    let selection = select(&index, &asked, &mut rand::rng());
    let identity = source.identity();
    let answer = json!({
        "direction": "outbound",
        "source": party(&source),
        "destination": destination,
        "name": matches!(named, Authority::Host { .. }).then(|| named.to_string()),
        "service": selection.service.as_ref().map(|service| service.key()),
        "servicePorts": selection.service.as_ref().map(|s| s.ports.iter().map(|p| p.mapping.service_port).collect::<Vec<_>>()),
        "endpoints": selection.service.as_ref().map(|service| endpoints(&index, service, &source, destination.port())),
        "destinationWorkload": selection.destination_workload.as_deref().map(party),
        "nextHop": next_hop(&selection.next_hop),
        "decision": decision(&selection.decision),
        "farSide": far_side(&index, &selection, source_ip, &identity),
        "certificate": certificate(&context.shared.identities, &identity),
        "version": index.version(),
    });
    Ok((answer, source, selection.next_hop))
}

fn endpoints(index: &Index, service: &Service, source: &Workload, port: u16) -> Vec<Value> {
    let one = |(workload, judged): (&Arc<Workload>, Result<u16, Ineligible>)| {
        let mut out = party(workload);
        match judged {
            Ok(port) => out["port"] = json!(port),
            Err(why) => {
                out["ineligible"] = json!(why.to_string());
                out["unhealthy"] = json!(why == Ineligible::Unhealthy);
            }
        }
        out
    };
    examine(index, service, source, port).into_iter().map(one).collect()
}

/// What the destination's own proxy would say, as far as this one knows its policies: the same state reaches both.
fn far_side(index: &Index, selection: &Selection, source_ip: IpAddr, source: &Identity) -> Option<Value> {
    let (source_identity, destination) = match &selection.next_hop {
        NextHop::Hbone(Tunnel { authority: Authority::Address(address), .. }) => (Some(source), *address),
        NextHop::Tcp { address } => (None, *address),
        // Through a waypoint or gateway, the peer that the destination sees is not this one.
        _ => return None,
    };
    let policies = index.policies_for(selection.destination_workload.as_ref()?);
    Some(judged(&policies, &Connection { source_ip, source_identity, destination }))
}

/// The decision, and where nothing allowed the rule that came nearest.
fn judged(policies: &PolicySet, connection: &Connection<'_>) -> Value {
    let decided = authorize(policies, connection);
    let mut answer = decision(&decided);
    if !decided.is_allowed()
        && let Some(nearest) = nearest(policies, connection)
    {
        answer["nearest"] = json!({ "rule": nearest.origin.to_string(), "wants": nearest.wants });
    }
    answer
}

fn explain_inbound(context: &Context, request: &Request) -> Result<(Value, SocketAddr), Unanswerable> {
    let destination: SocketAddr = required(request, "destination", "IP:PORT")?;
    let source_ip: IpAddr = required(request, "source_ip", "an IP address")?;
    let source_identity: Option<Identity> = optional(request, "source_identity", "spiffe://<td>/ns/<ns>/sa/<sa>")?;
    let index = context.shared.state.snapshot();
    let workload = pod(context, &index, request)?;
    // A waypoint is dialled for the addresses of others.
    let destination = match optional::<IpAddr>(request, "dialled", "an IP address")? {
        Some(dialled) => inbound_target(|_| false, &index, &workload, dialled, &Authority::Address(destination))
            .map_err(|refused| (StatusCode::BAD_REQUEST, refused.to_string()))?,
        None => destination,
    };
    let connection = Connection { source_ip, source_identity: source_identity.as_ref(), destination };
    let policies = index.policies_for(&workload);
    let source = index.workload_by_address(&NetworkAddress::new(workload.network.clone(), source_ip));
    let answer = json!({
        "direction": "inbound",
        "source": source.map(|workload| party(workload)),
        "sourceIdentity": source_identity.as_ref().map(ToString::to_string),
        "destination": destination,
        "destinationWorkload": party(&workload),
        "decision": judged(&policies, &connection),
        "policies": policies.policies.iter().map(|policy| policy.key()).collect::<Vec<_>>(),
        "missingPolicies": policies.missing,
        "policiesComplete": policies.complete,
        "certificate": certificate(&context.shared.identities, &workload.identity()),
        "version": index.version(),
    });
    Ok((answer, destination))
}

/// What the DNS proxy tells the pod of a name.
fn address_of(context: &Context, index: &Index, source: &Workload, host: &str) -> Result<IpAddr, Unanswerable> {
    let config = &context.shared.config;
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    let search = dns::search_of(config, &source.namespace);
    let ask = |family| dns::resolve_for(config, index, &search, source, &name, family);
    let mut answers = [Family::Ipv4, Family::Ipv6].into_iter().filter_map(ask).peekable();
    if answers.peek().is_none() {
        let problem = format!("{}: `{host}` is not a name of the mesh for {}", Reason::Lookup, source.uid);
        return Err((StatusCode::NOT_FOUND, problem));
    }
    answers.flat_map(|answer| answer.addresses).next().ok_or_else(|| {
        (StatusCode::NOT_FOUND, format!("{}: `{host}` has no address that {} can use", Reason::Lookup, source.uid))
    })
}

/// The pod asked about, preferably this node's of that name.
fn pod(context: &Context, index: &Index, request: &Request) -> Result<Arc<Workload>, Unanswerable> {
    let namespace: String = required(request, "namespace", "the pod's namespace")?;
    let name: String = required(request, "pod", "the pod's name")?;
    let node = context.shared.state.node();
    let named = |w: &&Arc<Workload>| *w.name == *name && *w.namespace == *namespace;
    let found = index.workloads().filter(named).max_by_key(|w| w.node == *node);
    found.cloned().ok_or_else(|| {
        let problem =
            format!("{}: no workload {namespace}/{name} in version {}", Reason::UnknownWorkload, index.version());
        (StatusCode::NOT_FOUND, format!("{problem}; {}", Reason::UnknownWorkload.remedy()))
    })
}

fn required<T: FromStr>(request: &Request, name: &str, expected: &str) -> Result<T, Unanswerable> {
    optional(request, name, expected)?
        .ok_or_else(|| (StatusCode::BAD_REQUEST, format!("parameter `{name}` is missing: expected {expected}")))
}

fn optional<T: FromStr>(request: &Request, name: &str, expected: &str) -> Result<Option<T>, Unanswerable> {
    let Some(value) = request.query(name) else { return Ok(None) };
    let bad = |_| (StatusCode::BAD_REQUEST, format!("parameter `{name}` is `{value}`: expected {expected}"));
    value.parse().map(Some).map_err(bad)
}

fn unspecified(destination: SocketAddr) -> IpAddr {
    if destination.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) }
}

fn party(workload: &Workload) -> Value {
    json!({
        "uid": workload.uid,
        "name": workload.name,
        "namespace": workload.namespace,
        "identity": workload.identity().to_string(),
        "node": workload.node,
        "addresses": workload.addresses,
    })
}

fn next_hop(hop: &NextHop) -> Value {
    match hop {
        NextHop::DoubleHbone { outer, inner } => {
            let InnerTunnel { authority, accepted } = inner;
            json!({
                "type": "doubleHbone",
                "outer": tunnel(outer),
                "inner": { "authority": authority.to_string(), "accepted": names(accepted) },
            })
        }
        NextHop::Hbone(t) => json!({ "type": "hbone", "tunnel": tunnel(t) }),
        NextHop::Lookup { host } => json!({ "type": "lookup", "host": host }),
        NextHop::Passthrough { address } => json!({ "type": "passthrough", "address": address }),
        NextHop::Reject { reason, detail } => {
            json!({ "type": "reject", "reason": reason.as_str(), "detail": detail, "remedy": reason.remedy() })
        }
        NextHop::Tcp { address } => json!({ "type": "tcp", "address": address }),
        NextHop::Waypoint(t) => json!({ "type": "waypoint", "tunnel": tunnel(t) }),
    }
}

fn tunnel(t: &Tunnel) -> Value {
    json!({ "address": t.address, "authority": t.authority.to_string(), "accepted": names(&t.accepted) })
}

fn names(identities: &[Identity]) -> Vec<String> {
    identities.iter().map(ToString::to_string).collect()
}

fn decision(d: &Decision) -> Value {
    json!({
        "verdict": match d.verdict { Verdict::Allow => "allow", Verdict::Deny => "deny" },
        "reason": d.reason.map(Reason::as_str),
        "remedy": d.reason.map(Reason::remedy),
        "policy": d.policy,
        "origin": d.origin.as_ref().map(ToString::to_string),
        "object": d.origin.as_ref().map(|origin| &origin.object),
        "place": d.origin.as_ref().and_then(|origin| origin.place()),
        "field": d.origin.as_ref().and_then(|origin| origin.field.as_deref()),
        "explanation": d.explanation,
        "version": d.version,
        "dryRun": d.dry_run,
    })
}

fn certificate(identities: &Manager, identity: &Identity) -> Value {
    let entry = identities.entries().into_iter().find(|entry| entry.identity == *identity);
    let state = match entry.as_ref().map(|entry| &entry.state) {
        None => "not held".to_owned(),
        Some(EntryState::Available) => "available".to_owned(),
        Some(EntryState::Initializing) => "being fetched".to_owned(),
        Some(EntryState::Unavailable(error)) => format!("unavailable: {error}"),
    };
    let expires = entry.and_then(|entry| entry.svid).and_then(|svid| {
        svid.not_after.duration_since(std::time::SystemTime::UNIX_EPOCH).ok().map(|since| since.as_secs())
    });
    json!({ "identity": identity.to_string(), "state": state, "expiresUnixSeconds": expires })
}
