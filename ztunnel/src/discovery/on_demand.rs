//! Asking for what a connection needs, where this proxy does not hold the whole mesh (`XDS_ON_DEMAND`).

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use futures_util::future::try_join_all;
use mesh_core::{
    addr::NetworkAddress,
    index::Index,
    workload::{GatewayAddress, GatewayDestination, Workload},
};
use mesh_xds::client::Unanswered;

use crate::{inpod::WorkloadInfo, state::State};

/// A destination, its waypoint, the waypoint's own gateway: what an answer leads to is asked for in turn, this often.
const ROUNDS: usize = 4;

/// Returns when everything is known that decides where `source` gets to at `destination`, also that there is no such thing.
///
/// # Errors
/// When the control plane does not say: to go on would be to take a member of the mesh for a stranger, and call it in clear text.
pub(crate) async fn destination_known(state: &State, source: &Workload, destination: IpAddr) -> Result<(), Unanswered> {
    let Some(demand) = state.demand() else { return Ok(()) };
    let mut asked = BTreeSet::new();
    for _ in 0..ROUNDS {
        let mut missing = missing(&state.snapshot(), source, destination);
        missing.retain(|name| asked.insert(name.clone()));
        if missing.is_empty() {
            break;
        }
        try_join_all(missing.into_iter().map(|name| demand.fetch(name))).await?;
    }
    Ok(())
}

/// Asks for the record of a pod of this process, under the uid that control planes give pods of their cluster.
pub(crate) async fn own_record(state: &State, cluster: &str, info: &WorkloadInfo) {
    let Some(demand) = state.demand() else { return };
    let known = |index: &Index| {
        index.local_workload(state.node(), &info.namespace, &info.name, &info.service_account).is_some()
    };
    if !known(&state.snapshot()) {
        let uid = format!("{cluster}//Pod/{}/{}", info.namespace, info.name);
        // Unanswered: whoever waits for the record has a deadline of his own.
        demand.fetch(uid.into()).await.unwrap_or_default();
    }
}

fn missing(index: &Index, source: &Workload, destination: IpAddr) -> Vec<Arc<str>> {
    let address = NetworkAddress::new(source.network.clone(), destination);
    let service = index.service_by_vip(&address, &source.namespace);
    let workload = index.workload_by_address(&address);
    if service.is_none() && workload.is_none() {
        return vec![address.to_string().into()];
    }
    let key = service.map(|service| service.key());
    let endpoints = key.iter().flat_map(|key| index.endpoints(key));
    let gateways = service.into_iter().flat_map(|service| {
        service.waypoint.iter().chain(service.weighted_waypoints.iter().map(|(waypoint, _)| waypoint))
    });
    let gateways = gateways
        .chain(workload.into_iter().flat_map(|w| w.waypoint.iter().chain(&w.network_gateway)))
        .chain(endpoints.flat_map(|w| w.network_gateway.iter()));
    gateways.filter_map(|gateway| unknown(index, gateway, &source.namespace)).collect()
}

fn unknown(index: &Index, gateway: &GatewayAddress, client_namespace: &str) -> Option<Arc<str>> {
    match &gateway.destination {
        GatewayDestination::Address(address) => {
            let known = index.service_by_vip(address, client_namespace).is_some()
                || index.workload_by_address(address).is_some();
            (!known).then(|| address.to_string().into())
        }
        GatewayDestination::Hostname { namespace, hostname } => {
            let key = format!("{namespace}/{hostname}");
            let known = index.service(&key).is_some() || index.workload_by_hostname(namespace, hostname).is_some();
            (!known).then(|| key.into())
        }
    }
}
