//! Wire ↔ model. Parsing fills in the wire's defaults once, so that past this border an impossible state cannot be written down.

mod policy;
mod service;
mod workload;

use std::{net::IpAddr, sync::Arc};

use bytes::Bytes;
use ipnet::IpNet;
use mesh_core::{
    addr::{NetworkAddress, canonical_ip},
    index::{Resource, ResourceKey},
    workload::{GatewayAddress, GatewayDestination},
};
use prost::Message;
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, workload as wire};

pub use policy::{policy_from_wire, policy_to_wire, unreadable_policy};
pub use service::{service_from_wire, service_to_wire};
pub use workload::{workload_from_wire, workload_to_wire};

/// Why one resource was not accepted: which field, and what about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Unacceptable {
    pub field: String,
    pub problem: String,
}

impl Unacceptable {
    pub(crate) fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

/// Decodes one resource of either type.
///
/// # Errors
/// The field that cannot be accepted; for an undecodable message or an unknown type the field is `resource` or `type_url`.
pub fn resource_from_wire(type_url: &str, body: &[u8]) -> Result<Resource, Unacceptable> {
    let undecodable = |e: prost::DecodeError| Unacceptable::new("resource", e.to_string());
    match type_url {
        ADDRESS_TYPE_URL => match wire::Address::decode(body).map_err(undecodable)?.r#type {
            Some(wire::address::Type::Workload(w)) => Ok(Resource::Workload(Arc::new(workload_from_wire(w)?))),
            Some(wire::address::Type::Service(s)) => Ok(Resource::Service(Arc::new(service_from_wire(s)?))),
            None => Err(Unacceptable::new("type", "neither a workload nor a service")),
        },
        AUTHORIZATION_TYPE_URL => {
            let policy = proto::security::Authorization::decode(body).map_err(undecodable)?;
            Ok(Resource::Policy(Arc::new(policy_from_wire(policy)?)))
        }
        other => Err(Unacceptable::new("type_url", format!("unknown resource type {other}"))),
    }
}

/// A resource's discovery name, aliases and encoded message.
pub fn resource_to_wire(resource: &Resource) -> Encoded {
    match resource {
        Resource::Workload(workload) => {
            let message = wire::address::Type::Workload(workload_to_wire(workload));
            Encoded {
                type_url: ADDRESS_TYPE_URL,
                name: workload.uid.clone(),
                aliases: workload
                    .addresses
                    .iter()
                    .map(|ip| NetworkAddress::new(workload.network.clone(), *ip).to_string().into())
                    .collect(),
                member_of: workload.services.keys().cloned().collect(),
                body: wire::Address { r#type: Some(message) }.encode_to_vec().into(),
            }
        }
        Resource::Service(service) => Encoded {
            type_url: ADDRESS_TYPE_URL,
            name: service.key(),
            aliases: service.vips.iter().map(|vip| vip.to_string().into()).collect(),
            member_of: Vec::new(),
            body: wire::Address { r#type: Some(wire::address::Type::Service(service_to_wire(service))) }
                .encode_to_vec()
                .into(),
        },
        Resource::Policy(policy) => Encoded {
            type_url: AUTHORIZATION_TYPE_URL,
            name: policy.key(),
            aliases: Vec::new(),
            member_of: Vec::new(),
            body: policy_to_wire(policy).encode_to_vec().into(),
        },
    }
}

/// See [`resource_to_wire`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    pub type_url: &'static str,
    pub name: Arc<str>,
    pub aliases: Vec<Arc<str>>,
    /// Primary names of the services it is an endpoint of; who asks for one of them is sent this too. Not on the wire.
    pub member_of: Vec<Arc<str>>,
    pub body: Bytes,
}

/// The key under which a discovery name of this type is removed.
pub fn key_from_name(type_url: &str, name: &str) -> ResourceKey {
    if type_url == AUTHORIZATION_TYPE_URL {
        ResourceKey::Policy(name.into())
    } else {
        ResourceKey::Address(name.into())
    }
}

fn ip_from_wire(field: &str, bytes: &[u8]) -> Result<IpAddr, Unacceptable> {
    let ip = match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    };
    ip.map(canonical_ip)
        .ok_or_else(|| Unacceptable::new(field, format!("an address has 4 or 16 bytes, this one {}", bytes.len())))
}

fn ip_to_wire(ip: IpAddr) -> Bytes {
    match ip {
        IpAddr::V4(ip) => Bytes::copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => Bytes::copy_from_slice(&ip.octets()),
    }
}

fn prefix_from_wire(field: &str, bytes: &[u8], length: u32) -> Result<IpNet, Unacceptable> {
    let ip = ip_from_wire(field, bytes)?;
    let length = u8::try_from(length).map_err(|_| Unacceptable::new(field, format!("prefix length {length}")))?;
    IpNet::new(ip, length).map_err(|_| Unacceptable::new(field, format!("prefix length {length} does not fit {ip}")))
}

fn port_from_wire(field: &str, port: u32) -> Result<u16, Unacceptable> {
    u16::try_from(port).map_err(|_| Unacceptable::new(field, format!("{port} is not a port")))
}

fn or_default(value: String, default: &str) -> Arc<str> {
    if value.is_empty() { default.into() } else { value.into() }
}

/// Back to the wire's way of saying a default: not at all.
fn unless_default(value: &str, default: &str) -> String {
    if value == default { String::new() } else { value.to_owned() }
}

fn unknown_enum(field: &str, value: i32) -> Unacceptable {
    Unacceptable::new(field, format!("unknown value {value}; this may come from a newer version"))
}

fn gateway_from_wire(field: &str, gateway: wire::GatewayAddress) -> Result<GatewayAddress, Unacceptable> {
    use wire::gateway_address::Destination;
    let destination = match gateway.destination {
        Some(Destination::Hostname(h)) => {
            GatewayDestination::Hostname { namespace: h.namespace.into(), hostname: h.hostname.into() }
        }
        Some(Destination::Address(a)) => {
            GatewayDestination::Address(NetworkAddress::new(a.network, ip_from_wire(field, &a.address)?))
        }
        None => return Err(Unacceptable::new(field, "has no destination")),
    };
    Ok(GatewayAddress { destination, hbone_mtls_port: port_from_wire(field, gateway.hbone_mtls_port)? })
}

fn gateway_to_wire(gateway: &GatewayAddress) -> wire::GatewayAddress {
    use wire::gateway_address::Destination;
    let destination = match &gateway.destination {
        GatewayDestination::Hostname { namespace, hostname } => Destination::Hostname(wire::NamespacedHostname {
            namespace: namespace.to_string(),
            hostname: hostname.to_string(),
        }),
        GatewayDestination::Address(a) => Destination::Address(wire::NetworkAddress {
            network: a.network.to_string(),
            address: ip_to_wire(a.ip),
            length: None,
        }),
    };
    wire::GatewayAddress { destination: Some(destination), hbone_mtls_port: gateway.hbone_mtls_port.into() }
}

#[cfg(test)]
mod tests;
