//! What becomes of a query.

use hickory_proto::{op::ResponseCode, rr::RecordType};
use mesh_core::{names::Family, workload::Workload};
use rand::seq::SliceRandom as _;
use tokio::time::Duration;

use crate::{
    dns::{
        message::{self, Incoming, Reply, refusal},
        metrics::{Labels, Transport},
        resolve,
    },
    pods::PodContext,
    proxy::resolve::local_workload,
};

pub(super) enum Verdict {
    /// Nobody could be answered.
    Ignore,
    Reply(Vec<u8>),
    /// Not ours. The labels count what becomes of it.
    Relay(Labels),
}

/// Decides about one message of a client. Waits for the pod's own record where the answer depends on it.
pub(super) async fn decide(pod: &PodContext, query: &[u8], transport: Transport) -> Verdict {
    match message::read(query) {
        Incoming::Stub => Verdict::Ignore,
        Incoming::Refused(code) => Verdict::Reply(refusal(query, code)),
        Incoming::Other(kind) => {
            let source = pod.shared.state.local_workload(&pod.info, Duration::ZERO).await;
            Verdict::Relay(count(pod, kind, transport, source.as_deref()))
        }
        Incoming::Addresses { name, family } => {
            let kind = match family {
                Family::Ipv4 => RecordType::A,
                Family::Ipv6 => RecordType::AAAA,
            };
            let source = local_workload(pod).await.ok();
            let labels = count(pod, kind, transport, source.as_deref());
            let Some(source) = source else {
                log(pod, kind, &name, "the pod is not known", 0);
                return Verdict::Reply(refusal(query, ResponseCode::ServFail));
            };
            address(pod, &source, query, &name, (family, kind), transport).unwrap_or(Verdict::Relay(labels))
        }
    }
}

/// `None`: not ours.
fn address(
    pod: &PodContext,
    source: &Workload,
    query: &[u8],
    name: &str,
    (family, kind): (Family, RecordType),
    transport: Transport,
) -> Option<Verdict> {
    let Some(mut answer) = resolve(pod, source, name, family) else {
        log(pod, kind, name, "relayed", 0);
        return None;
    };
    answer.addresses.shuffle(&mut rand::rng());
    log(pod, kind, name, "answered", answer.addresses.len());
    let reply = Reply {
        alias_of: answer.alias_of.as_deref(),
        addresses: &answer.addresses,
        datagram: transport == Transport::Udp,
    };
    let bytes = message::answer(query, &reply).unwrap_or_else(|| refusal(query, ResponseCode::FormErr));
    Some(Verdict::Reply(bytes))
}

fn count(pod: &PodContext, kind: RecordType, transport: Transport, source: Option<&Workload>) -> Labels {
    let labels = Labels::new(kind, transport, source);
    pod.shared.outcomes.dns().asked(&labels);
    labels
}

fn log(pod: &PodContext, query: RecordType, domain: &str, result: &str, endpoints: usize) {
    let (workload, namespace) = (&*pod.info.name, &*pod.info.namespace);
    tracing::debug!(
        target: "dns",
        { src.workload = workload, src.namespace = namespace, query = %query, domain, result, endpoints },
        "dns query"
    );
}
