//! Names of the mesh and their addresses, as a client's DNS queries mean them.
//!
//! A client's resolver appends search domains to short names, and people write service names with anything from one label to five. So a
//! name stands for several, tried in order until one is a host of the registry:
//!
//! ```text
//! the name itself ─▶ its Kubernetes forms (x ─▶ x.<namespace>.svc.<domain>, …)
//! the name without each search domain ─▶ the Kubernetes forms of that
//! and for each of these: the host itself ─▶ a pod of a headless service ─▶ *.rest ─▶ *.rest of the rest
//! ```
//! Whatever is not found is somebody else's name. Behaviour is that of upstream's proxy (Istio ztunnel), plus pods of headless services.

use std::{net::IpAddr, sync::Arc};

use crate::{index::Index, service::Service, workload::Workload};

/// Who asks, and what short names mean to it.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    pub namespace: &'a str,
    /// Only addresses of its own network are of use to it.
    pub network: &'a str,
    /// Names of services end in `.svc.` and this.
    pub cluster_domain: &'a str,
    /// What its resolver appends, in order, lower case and without the last dot; see [`kubernetes_search`].
    pub search: &'a [Arc<str>],
    /// Its services come before those of other foreign namespaces, after canonical ones.
    pub preferred_namespace: Option<&'a str>,
}

/// What a query wants: A or AAAA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    pub fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }
}

/// The answer to a name that is ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The name the client meant when a search domain had been appended to it; it then owns the addresses, and the name asked for is an
    /// alias of it (CNAME). `None`: the name asked for owns them.
    pub alias_of: Option<String>,
    /// Without duplicates, in no meaningful order. Empty: the name exists and has no address of this family for this client.
    pub addresses: Vec<IpAddr>,
    /// What it was found as.
    pub service: Arc<Service>,
}

/// The search domains kubelet gives to the pods of a namespace.
pub fn kubernetes_search(namespace: &str, cluster_domain: &str) -> Vec<Arc<str>> {
    let domains = [format!("{namespace}.svc.{cluster_domain}"), format!("svc.{cluster_domain}")];
    domains.into_iter().map(Arc::from).chain([cluster_domain.into()]).collect()
}

/// The addresses of `name`, which is lower case and without the last dot; `None` when the mesh does not own it.
pub fn resolve(index: &Index, client: &Client<'_>, name: &str, family: Family) -> Option<Answer> {
    let finder = Finder { index, client };
    if let Some(found) = finder.find_forms(name) {
        return Some(finder.answer(found, None, family));
    }
    let stripped = client.search.iter().filter_map(|domain| strip_domain(name, domain));
    let (short, found) = stripped.filter_map(|short| Some((short, finder.find_forms(short)?))).next()?;
    // Every client of a wildcard's names means another one: no single owner could be named.
    let alias_of = (!found.service.hostname.starts_with("*.")).then(|| short.to_owned());
    Some(finder.answer(found, alias_of, family))
}

/// What is left of a name below `domain`.
fn strip_domain<'a>(name: &'a str, domain: &str) -> Option<&'a str> {
    name.strip_suffix(domain)?.strip_suffix('.').filter(|rest| !rest.is_empty())
}

struct Found<'a> {
    service: &'a Arc<Service>,
    /// The one endpoint meant.
    pod: Option<&'a Arc<Workload>>,
}

struct Finder<'a> {
    index: &'a Index,
    client: &'a Client<'a>,
}

impl<'a> Finder<'a> {
    /// The name as it is, then as short for the name of a Kubernetes service.
    fn find_forms(&self, name: &str) -> Option<Found<'a>> {
        let Client { namespace, cluster_domain: domain, .. } = *self.client;
        let mut text = String::with_capacity(name.len() + namespace.len() + domain.len() + ".svc..".len());
        let mut found = |middle: &[&str]| {
            text.clear();
            text.push_str(name);
            for part in middle.iter().chain(&[domain]) {
                text.push('.');
                text.push_str(part);
            }
            self.find_host(&text)
        };
        let ends_in_svc = name.ends_with(".svc");
        self.find_host(name).or_else(|| match name.split('.').count() {
            1 => found(&[namespace, "svc"]),
            2 => found(&["svc"]).or_else(|| found(&[namespace, "svc"])),
            3 if ends_in_svc => found(&[]).or_else(|| found(&["svc"])),
            3 => found(&["svc"]),
            4 if ends_in_svc => found(&[]),
            _ => None,
        })
    }

    /// The host itself, a pod of it, and every wildcard above it.
    fn find_host(&self, host: &str) -> Option<Found<'a>> {
        if let Some(service) = self.best(host) {
            return Some(Found { service, pod: None });
        }
        if let Some(found) = self.find_pod(host) {
            return Some(found);
        }
        let mut wildcard = String::with_capacity(host.len() + 1);
        for (dot, _) in host.match_indices('.') {
            wildcard.clear();
            wildcard.push('*');
            wildcard.push_str(&host[dot..]);
            if let Some(service) = self.best(&wildcard) {
                return Some(Found { service, pod: None });
            }
        }
        None
    }

    /// `<pod>.<headless service>`, as StatefulSets name their pods. One that is not there is not ours to deny.
    fn find_pod(&self, host: &str) -> Option<Found<'a>> {
        let (pod, rest) = host.split_once('.')?;
        let service = self.best(rest).filter(|service| is_headless(service))?;
        let pod = self.endpoints(service).find(|endpoint| *endpoint.name == *pod)?;
        Some(Found { service, pod: Some(pod) })
    }

    /// Among the services of one host that have an answer and that the client may see: its own namespace's, then canonical ones, then the
    /// preferred namespace's, then the smallest key.
    fn best(&self, host: &str) -> Option<&'a Arc<Service>> {
        let Client { namespace, preferred_namespace, .. } = *self.client;
        let candidates = self.index.services_by_hostname(host).iter();
        let answerable =
            candidates.filter(|s| s.is_visible_to(namespace) && (!is_headless(s) || self.in_cluster(host)));
        answerable.min_by_key(|s| {
            let preferred = preferred_namespace.is_some_and(|preferred| *s.namespace == *preferred);
            (s.rank_for(namespace), !preferred)
        })
    }

    fn in_cluster(&self, host: &str) -> bool {
        host.strip_suffix(self.client.cluster_domain).is_some_and(|rest| rest.ends_with(".svc."))
    }

    /// Those that connections to the service would be given, on the client's network.
    fn endpoints(&self, service: &Service) -> impl Iterator<Item = &'a Arc<Workload>> + use<'a> {
        let (policy, network) = (service.health_policy(), self.client.network);
        let usable = move |w: &&Arc<Workload>| *w.network == *network && policy.takes(w.health);
        self.index.endpoints(&service.key()).filter(usable)
    }

    fn answer(&self, found: Found<'a>, alias_of: Option<String>, family: Family) -> Answer {
        let Found { service, pod } = found;
        let of_family = |ip: &IpAddr| Family::of(*ip) == family && service.ip_families.allow(*ip);
        let first = |workload: &Workload| workload.addresses.iter().copied().find(of_family);
        let mut addresses: Vec<IpAddr> = match pod {
            Some(pod) => first(pod).into_iter().collect(),
            None if is_headless(service) => self.endpoints(service).filter_map(|w| first(w)).collect(),
            None => virtual_addresses(service, self.client.network).filter(of_family).collect(),
        };
        addresses.sort_unstable();
        addresses.dedup();
        Answer { alias_of, addresses, service: service.clone() }
    }
}

/// A range of one address is an address; of a longer one, none would be the right one to give.
fn single_addresses(service: &Service) -> impl Iterator<Item = (&Arc<str>, IpAddr)> {
    let single = service.cidr_vips.iter().filter(|(_, range)| range.prefix_len() == range.max_prefix_len());
    single.map(|(network, range)| (network, range.addr()))
}

fn is_headless(service: &Service) -> bool {
    service.vips.is_empty() && single_addresses(service).next().is_none()
}

fn virtual_addresses(service: &Service, network: &str) -> impl Iterator<Item = IpAddr> {
    let vips = service.vips.iter().map(|vip| (&vip.network, vip.ip));
    vips.chain(single_addresses(service)).filter(move |(of, _)| ***of == *network).map(|(_, ip)| ip)
}

#[cfg(test)]
mod tests;
