//! Waypoints: the Gateways that are some, and the labels that ask for one.

use std::{net::IpAddr, sync::Arc};

use mesh_core::{addr::canonical_ip, select::HBONE_PORT, workload::ApplicationTunnel};

use super::{Kind, Labels, ObjectKey, decode::Meta};
use crate::fields::{Cursor, Fields, excerpt};

const USE_WAYPOINT: &str = "istio.io/use-waypoint";
const USE_CANARY: &str = "istio.io/use-waypoint-canary";
const INGRESS: &str = "istio.io/ingress-use-waypoint";
const CLASSES: [&str; 2] = ["istio-waypoint", "fairway-waypoint"];

/// What an object's labels say about waypoints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Binding {
    /// `None` leaves it to the namespace.
    pub(crate) waypoint: Option<Wanted>,
    /// A second waypoint, and how many of 100 connections it gets.
    pub(crate) canary: Option<(ObjectKey, u32)>,
    /// Whether ingress gateways go through the waypoint as well; `None` leaves it to the namespace.
    pub(crate) ingress: Option<bool>,
    /// Of the labels that name the two.
    pub(crate) waypoint_at: FieldPlace,
    pub(crate) canary_at: FieldPlace,
}

/// Where something is written, for what is found out about it later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FieldPlace {
    pub(crate) line: u32,
    pub(crate) field: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    Gateway(ObjectKey),
    /// None, whatever the namespace says.
    Nothing,
}

impl Binding {
    pub(super) const fn none() -> Self {
        const NOWHERE: FieldPlace = FieldPlace { line: 0, field: String::new() };
        Self { waypoint: None, canary: None, ingress: None, waypoint_at: NOWHERE, canary_at: NOWHERE }
    }

    /// Labels, written at `labels`, that belong to `namespace`; `annotations` hold a canary's weight.
    pub(super) fn read(labels: &Cursor<'_>, values: &Labels, annotations: &Labels, namespace: &Arc<str>) -> Self {
        let label = |name: &str| values.get(name).filter(|value| !value.is_empty());
        let gateway =
            |name: &Arc<str>, home: &str| ObjectKey::new(Kind::Gateway, label(home).unwrap_or(namespace), name);
        let fields = labels.fields();
        let at = |name: &'static str| fields.as_ref().and_then(|f| f.get(name)).unwrap_or_else(|| labels.clone());
        let waypoint = label(USE_WAYPOINT).map(|name| match &**name {
            "none" => Wanted::Nothing,
            _ => Wanted::Gateway(gateway(name, "istio.io/use-waypoint-namespace")),
        });
        let canary = label(USE_CANARY).and_then(|name| {
            let canary = gateway(name, "istio.io/use-waypoint-canary-namespace");
            if waypoint == Some(Wanted::Gateway(canary.clone())) {
                at(USE_CANARY).warn("the canary is the waypoint itself", "name another Gateway here");
                return None;
            }
            let written = annotations.get("istio.io/use-waypoint-canary-weight");
            let weight = written.map_or(Some(0), |w| w.parse().ok().filter(|w| *w <= 100));
            if weight.is_none() {
                let written = written.map_or("", |written| written);
                at(USE_CANARY).warn(
                    format!("annotation istio.io/use-waypoint-canary-weight `{}` is no weight", excerpt(written)),
                    "expected a number, 0 to 100; until then the canary gets nothing",
                );
            }
            Some((canary, weight?))
        });
        let ingress = label(INGRESS).and_then(|value| {
            let said = value.parse().ok();
            if said.is_none() {
                let told = format!("`{}` is neither true nor false, so the label does not count", excerpt(value));
                at(INGRESS).warn(told, "expected true or false");
            }
            said
        });
        let place = |name, is_said| match is_said {
            true => FieldPlace { line: at(name).line(), field: at(name).path().to_owned() },
            false => FieldPlace::default(),
        };
        let (waypoint_at, canary_at) = (place(USE_WAYPOINT, waypoint.is_some()), place(USE_CANARY, canary.is_some()));
        Self { waypoint, canary, ingress, waypoint_at, canary_at }
    }

    pub(crate) fn names(&self, gateway: &ObjectKey) -> bool {
        matches!(&self.waypoint, Some(Wanted::Gateway(named)) if named == gateway)
            || self.canary.as_ref().is_some_and(|(named, _)| named == gateway)
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Gateway {
    pub(crate) is_waypoint: bool,
    pub(crate) listeners: Vec<Listener>,
    /// The address its status lists: a host name before an IP address.
    pub(crate) address: Option<GatewayHost>,
    pub(crate) serves_services: bool,
    pub(crate) serves_workloads: bool,
    /// For the proxy in its pods, where that leaves HBONE to ztunnel.
    pub(crate) application_tunnel: Option<ApplicationTunnel>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listener {
    pub(crate) port: u16,
    pub(crate) protocol: Arc<str>,
    pub(crate) from: AllowedFrom,
}

impl Listener {
    fn is_hbone(&self) -> bool {
        self.port == HBONE_PORT && *self.protocol == *"HBONE"
    }
}

/// Namespaces whose objects may use a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AllowedFrom {
    All,
    /// The gateway's own.
    Same,
    Selector(Labels),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GatewayHost {
    Ip(IpAddr),
    Name(Arc<str>),
}

impl Gateway {
    /// The listener that says who may use the waypoint.
    pub(crate) fn admits(&self) -> &AllowedFrom {
        let tunnel = self.application_tunnel.as_ref();
        let inbound = |l: &&Listener| {
            tunnel.is_some_and(|t| t.port.map_or(*l.protocol == *"istio.io/PROXY", |port| l.port == port))
        };
        let hbone = || self.listeners.iter().find(|l| l.is_hbone());
        let found = self.listeners.iter().find(inbound).or_else(hbone);
        found.map_or(&AllowedFrom::Same, |listener| &listener.from)
    }
}

pub(super) fn gateway(meta: &Meta, fields: &Fields<'_>) -> Option<Gateway> {
    let spec = fields.required("spec")?.fields()?;
    let class = spec.required("gatewayClassName")?;
    let of_class = class.text().is_some_and(|class| CLASSES.contains(&class));
    let application_tunnel = match (inbound_binding(meta), of_class) {
        (Some(Err(told)), true) => {
            class.reject(told, "expected NONE or PROXY, and a port if it is not the original one: PROXY/15088");
            None
        }
        (binding, _) => binding.and_then(Result::ok),
    };
    if !of_class && application_tunnel.is_none() {
        // Another controller's: what it says is between the two.
        return Some(Gateway::default());
    }
    let listeners = spec.get("listeners").map(|l| l.items()).unwrap_or_default();
    let listeners: Vec<Listener> = listeners.iter().filter_map(listener).collect();
    if application_tunnel.is_none() && !listeners.iter().any(Listener::is_hbone) {
        class.reject(
            "a waypoint needs a listener for HBONE",
            "add `- {name: mesh, port: 15008, protocol: HBONE}` to spec.listeners",
        );
    }
    let (serves_services, serves_workloads) = waypoint_for(meta, &class);
    let status = fields.get("status").and_then(|s| s.fields());
    let address = status.and_then(|s| s.get("addresses")).and_then(|l| status_address(&l));
    Some(Gateway { is_waypoint: true, listeners, address, serves_services, serves_workloads, application_tunnel })
}

fn waypoint_for(meta: &Meta, place: &Cursor<'_>) -> (bool, bool) {
    match meta.label("istio.io/waypoint-for").map(|value| &**value) {
        None | Some("service") => (true, false),
        Some("workload") => (false, true),
        Some("all") => (true, true),
        Some("none") => (false, false),
        Some(other) => {
            place.reject(
                format!("label istio.io/waypoint-for `{}` is not a kind of traffic", excerpt(other)),
                "expected service, workload, all or none",
            );
            (false, false)
        }
    }
}

/// `<PROTOCOL>` or `<PROTOCOL>/<port>`; or what is wrong with it.
fn inbound_binding(meta: &Meta) -> Option<Result<ApplicationTunnel, String>> {
    let text = meta.annotations.get("ambient.istio.io/waypoint-inbound-binding")?;
    let (protocol, port) = text.split_once('/').map_or((&**text, None), |(protocol, port)| (protocol, Some(port)));
    let proxy_protocol = match protocol {
        "NONE" => Some(false),
        "PROXY" => Some(true),
        _ => None,
    };
    let number = port.map(str::parse::<u16>).transpose();
    let (Some(proxy_protocol), Ok(port)) = (proxy_protocol, number) else {
        let shown = excerpt(text);
        return Some(Err(format!("annotation ambient.istio.io/waypoint-inbound-binding `{shown}` cannot be read")));
    };
    Some(Ok(ApplicationTunnel { proxy_protocol, port: port.filter(|port| *port != 0) }))
}

fn listener(cursor: &Cursor<'_>) -> Option<Listener> {
    let fields = cursor.fields()?;
    let (port, protocol) = (fields.required("port")?.port()?, fields.required("protocol")?.shared()?);
    let allowed = fields.get("allowedRoutes").and_then(|a| a.fields()).and_then(|a| a.get("namespaces"));
    let allowed = allowed.and_then(|n| n.fields());
    let from = allowed.as_ref().and_then(|n| n.get("from"));
    let from = match from.as_ref().and_then(|f| f.text()) {
        None | Some("Same") => AllowedFrom::Same,
        Some("All") => AllowedFrom::All,
        Some("Selector") => {
            let selector = allowed?.required("selector")?.fields()?;
            let labels = selector.get("matchLabels").map(|l| l.string_map()).unwrap_or_default();
            selector.deny_unknown();
            AllowedFrom::Selector(labels)
        }
        Some(_) => from?.one_of(&[("All", ()), ("Same", ()), ("Selector", ())]).map(|()| AllowedFrom::Same)?,
    };
    Some(Listener { port, protocol, from })
}

fn status_address(list: &Cursor<'_>) -> Option<GatewayHost> {
    let hosts = list.items().into_iter().filter_map(|item| {
        let fields = item.fields()?;
        let value = fields.required("value")?;
        match fields.get("type").and_then(|t| t.text()) {
            Some("Hostname") => Some(GatewayHost::Name(value.shared()?)),
            _ => value.parse("an IP address").map(canonical_ip).map(GatewayHost::Ip),
        }
    });
    let hosts: Vec<GatewayHost> = hosts.collect();
    let name = hosts.iter().find(|host| matches!(host, GatewayHost::Name(_)));
    name.or_else(|| hosts.first()).cloned()
}
