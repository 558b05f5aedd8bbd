//! AuthorizationPolicy and PeerAuthentication → the layer-4 model.
//!
//! Unknown fields and unreadable values reject the whole object: dropping a condition could widen what it allows. What is well-formed
//! but needs layer 7 is left out the way ztunnel documents it, and reported.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use mesh_core::{
    origin::Origin,
    policy::{Action, Clause, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch},
};

use super::{AuthorizationPolicy, Kind, Labels, PeerAuthentication, Spec, decode::Meta};
use crate::{
    fields::{Cursor, Document, Fields, excerpt},
    problem::Problem,
};

/// What reading policies depends on.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Policies of this namespace apply to the whole mesh.
    pub(crate) root_namespace: Arc<str>,
    /// Configuration labelled with another `istio.io/rev` is none of ours.
    pub(crate) revision: Arc<str>,
}

const META_FIELDS: [&str; 4] = ["apiVersion", "kind", "metadata", "status"];

pub(super) fn authorization(meta: &Meta, fields: &Fields<'_>, settings: &Settings) -> Option<AuthorizationPolicy> {
    let origin = origin(meta, &fields.cursor, None);
    let spec = spec_of(fields);
    let Some(spec) = spec else {
        // A policy without a spec allows nothing.
        let policy = policy(meta, settings, &Labels::new(), Action::Allow, Vec::new(), origin);
        return Some(AuthorizationPolicy { policy: Some(policy), selector: Labels::new() });
    };
    let selector = selector(&spec);
    let target = target(&spec);
    let action = spec.get("action");
    let is_custom = action.as_ref().is_some_and(|action| action.text() == Some("CUSTOM"));
    // What a waypoint does by its provider's word is for the waypoint to read.
    let action = if target.is_some() && is_custom { None } else { action_of(action.as_ref()) };
    let translator = Translator { meta, action };
    if let Some(provider) = spec.get("provider").filter(|_| translator.action.is_some()) {
        provider.reject("a provider decides for CUSTOM only", "remove it");
    }
    let rules = spec.get("rules").map(|rules| rules.items()).unwrap_or_default();
    let mut omitted = Vec::new();
    let rules = rules.iter().filter_map(|rule| translator.rule(rule, &mut omitted)).collect();
    spec.deny_unknown();
    let origin = if omitted.is_empty() { origin } else { noted(origin, &omitted, "left out, so it allows nothing") };
    if let Some(target) = target {
        target.warn("a policy with targetRefs is enforced by waypoints only, not here", "use `selector` for layer 4");
        return Some(AuthorizationPolicy { policy: None, selector });
    }
    let Some(action_kind) = translator.action else {
        return Some(AuthorizationPolicy { policy: None, selector });
    };
    let policy = policy(meta, settings, &selector, action_kind, rules, origin);
    Some(AuthorizationPolicy { policy: Some(policy), selector })
}

/// What a policy for waypoints is attached to.
fn target<'a>(spec: &Fields<'a>) -> Option<Cursor<'a>> {
    // Both are asked for, so that both are known.
    let (one, list) = (spec.get("targetRef"), spec.get("targetRefs").filter(|list| !list.items().is_empty()));
    one.or(list)
}

/// `None` for AUDIT, which enforces nothing.
fn action_of(action: Option<&Cursor<'_>>) -> Option<Action> {
    let Some(action) = action else { return Some(Action::Allow) };
    match action.text() {
        Some("ALLOW") => Some(Action::Allow),
        Some("DENY") => Some(Action::Deny),
        Some("AUDIT") => {
            action.warn(
                "AUDIT has no effect at layer 4",
                "annotate an ALLOW or DENY policy with istio.io/dry-run: \"true\"",
            );
            None
        }
        Some("CUSTOM") => {
            action.unsupported(
                "CUSTOM needs an external authorizer, which is not supported at layer 4",
                "use ALLOW or DENY, or targetRefs",
            );
            None
        }
        Some(other) => {
            action.reject(format!("`{other}` is not an action"), "expected ALLOW or DENY");
            None
        }
        None => None,
    }
}

fn policy(
    meta: &Meta,
    settings: &Settings,
    selector: &Labels,
    action: Action,
    rules: Vec<Rule>,
    origin: Origin,
) -> Policy {
    let scope = match selector.is_empty() {
        false => Scope::WorkloadSelector,
        true if meta.key.namespace == settings.root_namespace => Scope::Global,
        true => Scope::Namespace,
    };
    let dry_run = meta.annotations.get("istio.io/dry-run").is_some_and(|value| **value == *"true");
    Policy { name: meta.key.name.clone(), namespace: meta.key.namespace.clone(), scope, action, rules, dry_run, origin }
}

/// What enforces in place of a policy that is wrong: everything it may have meant to restrict is denied.
pub(super) fn stand_in(meta: &Meta, cursor: &Cursor<'_>, problem: &Problem, settings: &Settings) -> Option<Spec> {
    let silent = Document::new(problem.place.clone());
    let fields = cursor.reported_to(&silent).fields()?;
    if spec_of(&fields).is_some_and(|spec| target(&spec).is_some()) {
        // Nothing of it was ever to be enforced here.
        return None;
    }
    // A selector that cannot be read selects everything in the namespace.
    let selector = spec_of(&fields).map(|spec| selector(&spec)).filter(|_| silent.is_usable()).unwrap_or_default();
    let told = format!("{} (rejected: {})", meta.key, problem.message).into();
    let origin = problem.place.origin(told, (!problem.field.is_empty()).then(|| problem.field.as_str().into()));
    match meta.key.kind {
        Kind::AuthorizationPolicy => {
            let rule = Rule { clauses: Vec::new(), origin: origin.clone() };
            let policy = policy(meta, settings, &selector, Action::Deny, vec![rule], origin);
            // A dry run that cannot be read stays one.
            Some(Spec::AuthorizationPolicy(Box::new(AuthorizationPolicy { policy: Some(policy), selector })))
        }
        Kind::PeerAuthentication => Some(Spec::PeerAuthentication(Box::new(PeerAuthentication {
            created: meta.created.clone(),
            selector,
            strict: Some(true),
            ports: Default::default(),
            origin,
        }))),
        _ => None,
    }
}

fn spec_of<'a>(fields: &Fields<'a>) -> Option<Fields<'a>> {
    for name in META_FIELDS {
        fields.get(name);
    }
    let spec = fields.get("spec");
    fields.deny_unknown();
    spec?.fields()
}

fn selector(spec: &Fields<'_>) -> Labels {
    let Some(fields) = spec.get("selector").and_then(|s| s.fields()) else { return Labels::new() };
    let labels = fields.get("matchLabels").map(|labels| labels.string_map()).unwrap_or_default();
    fields.deny_unknown();
    labels
}

fn origin(meta: &Meta, place: &Cursor<'_>, field: Option<String>) -> Origin {
    place.place().origin(meta.key.to_string().into(), field.map(Arc::from))
}

/// The origin of what lacks some of its conditions: who is denied by it must be told that it is not as written.
fn noted(origin: Origin, layer7: &[String], effect: &str) -> Origin {
    /// More would only repeat the first ones.
    const SHOWN: usize = 3;
    let shown: Vec<&str> = layer7.iter().take(SHOWN).map(|field| &**field).collect();
    let more = if layer7.len() > SHOWN { ", …" } else { "" };
    let needs = if layer7.len() == 1 { "needs" } else { "need" };
    let object = format!("{} ({}{more} {needs} a waypoint: {effect})", origin.object, shown.join(", "));
    Origin { object: object.into(), ..origin }
}

struct Translator<'a> {
    meta: &'a Meta,
    action: Option<Action>,
}

impl Translator<'_> {
    /// `None` leaves the rule out, and says in `omitted` for which fields.
    fn rule(&self, cursor: &Cursor<'_>, omitted: &mut Vec<String>) -> Option<Rule> {
        let fields = cursor.fields()?;
        let (to, from, when) = (fields.get("to"), fields.get("from"), fields.get("when"));
        fields.deny_unknown();
        let mut layer7 = Vec::new();
        let mut clauses = Vec::new();
        clauses.extend(to.map(|to| self.entries(&to, "operation", |f, m| self.operation(f, m, &mut layer7))));
        clauses.extend(from.map(|from| self.entries(&from, "source", |f, m| self.source(f, m, &mut layer7))));
        for condition in when.map(|when| when.items()).unwrap_or_default() {
            clauses.extend(self.condition(&condition, &mut layer7));
        }
        let omit = !layer7.is_empty() && self.action != Some(Action::Deny);
        if !layer7.is_empty() {
            self.report_layer7(cursor, &layer7, &clauses);
        }
        if omit {
            omitted.extend(layer7);
            return None;
        }
        let origin = origin(self.meta, cursor, Some(cursor.path().to_owned()));
        let effect = "left out, so the rule denies more than written";
        let origin = if layer7.is_empty() { origin } else { noted(origin, &layer7, effect) };
        Some(Rule { clauses, origin })
    }

    fn report_layer7(&self, rule: &Cursor<'_>, layer7: &[String], clauses: &[Clause]) {
        let never = clauses.iter().any(|c| !c.matches.is_empty() && c.matches.iter().all(|m| *m == Match::default()));
        let effect = match self.action {
            Some(Action::Deny) if never => "nothing is left of this rule, so it denies nothing",
            Some(Action::Deny) => "they are left out, so this rule denies more than written",
            _ => "the rule is left out, so it allows nothing",
        };
        rule.warn(
            format!("layer-7 conditions ({}) are not known at layer 4: {effect}", layer7.join(", ")),
            "use a waypoint, or ports and sources only",
        );
    }

    /// One clause from a list of `{<inner>: {…}}`.
    fn entries(&self, list: &Cursor<'_>, inner: &'static str, mut read: impl FnMut(&Fields<'_>, &mut Match)) -> Clause {
        let items = list.items();
        if items.is_empty() {
            list.reject("the list is empty", format!("add an entry `- {inner}: …`, or remove the field"));
        }
        let mut one = |item: &Cursor<'_>| {
            let outer = item.fields()?;
            let fields = outer.required(inner)?.fields()?;
            outer.deny_unknown();
            if fields.is_empty() {
                fields.cursor.reject("nothing is asked for", "add a condition, or remove the entry");
            }
            let mut m = Match::default();
            read(&fields, &mut m);
            fields.deny_unknown();
            Some(m)
        };
        Clause { matches: items.iter().filter_map(&mut one).collect() }
    }

    fn operation(&self, fields: &Fields<'_>, m: &mut Match, layer7: &mut Vec<String>) {
        m.destination_ports = values(fields.get("ports"), port);
        m.not_destination_ports = values(fields.get("notPorts"), port);
        note_layer7(fields, &["hosts", "notHosts", "methods", "notMethods", "paths", "notPaths"], layer7);
    }

    fn source(&self, fields: &Fields<'_>, m: &mut Match, layer7: &mut Vec<String>) {
        let account = |cursor: &Cursor<'_>, text: &str| self.service_account(cursor, text);
        m.source_ips = values(fields.get("ipBlocks"), network);
        m.not_source_ips = values(fields.get("notIpBlocks"), network);
        m.namespaces = values(fields.get("namespaces"), string);
        m.not_namespaces = values(fields.get("notNamespaces"), string);
        m.principals = values(fields.get("principals"), principal);
        m.not_principals = values(fields.get("notPrincipals"), principal);
        if let Some(domains) = fields.get("trustDomains") {
            if !m.principals.is_empty() {
                domains.reject(
                    "trust domains beside principals are not supported",
                    "write the domain in the principals: `DOMAIN/ns/…`",
                );
            }
            m.principals = values(Some(domains), trust_domain);
        }
        m.not_principals.extend(values(fields.get("notTrustDomains"), trust_domain));
        m.service_accounts = values(fields.get("serviceAccounts"), account);
        m.not_service_accounts = values(fields.get("notServiceAccounts"), account);
        note_layer7(
            fields,
            &["remoteIpBlocks", "notRemoteIpBlocks", "requestPrincipals", "notRequestPrincipals"],
            layer7,
        );
    }

    fn condition(&self, cursor: &Cursor<'_>, layer7: &mut Vec<String>) -> Option<Clause> {
        let fields = cursor.fields()?;
        let (key, given, not) = (fields.required("key"), fields.get("values"), fields.get("notValues"));
        fields.deny_unknown();
        let key = key?;
        if given.is_none() && not.is_none() {
            fields.cursor.reject("the condition has no values", "add `values:` or `notValues:`");
        }
        let mut m = Match::default();
        match key.text()? {
            "source.ip" => (m.source_ips, m.not_source_ips) = (values(given, network), values(not, network)),
            "source.namespace" => (m.namespaces, m.not_namespaces) = (values(given, string), values(not, string)),
            "source.principal" => (m.principals, m.not_principals) = (values(given, principal), values(not, principal)),
            "destination.ip" => {
                (m.destination_ips, m.not_destination_ips) = (values(given, network), values(not, network))
            }
            "destination.port" => {
                (m.destination_ports, m.not_destination_ports) = (values(given, port), values(not, port))
            }
            other if is_layer7_key(other) => layer7.push(format!("{} {}", key.path(), excerpt(other))),
            other => key.reject(
                format!("`{other}` is not a known condition"),
                "expected source.ip, source.namespace, source.principal, destination.ip or destination.port",
            ),
        }
        Some(Clause { matches: vec![m] })
    }

    /// `namespace/name`, or a name in the policy's own namespace.
    fn service_account(&self, cursor: &Cursor<'_>, text: &str) -> Option<ServiceAccountMatch> {
        let (namespace, name) = text.split_once('/').unwrap_or((&self.meta.key.namespace, text));
        if namespace.is_empty() || name.is_empty() || name.contains(['/', '*']) || namespace.contains('*') {
            cursor.reject(
                format!("`{text}` is not a service account"),
                "expected `namespace/name` or `name`, without wildcards",
            );
            return None;
        }
        Some(ServiceAccountMatch { namespace: namespace.into(), service_account: name.into() })
    }
}

fn is_layer7_key(key: &str) -> bool {
    ["request.", "connection.", "experimental.", "remote.ip"].iter().any(|prefix| key.starts_with(prefix))
}

/// The places of the fields that need layer 7.
fn note_layer7(fields: &Fields<'_>, names: &[&'static str], layer7: &mut Vec<String>) {
    layer7.extend(names.iter().filter_map(|name| fields.get(name)).map(|field| field.path().to_owned()));
}

/// A list whose every entry must be readable, and which must not be empty: an empty list would mean "any".
fn values<T>(list: Option<Cursor<'_>>, read: impl Fn(&Cursor<'_>, &str) -> Option<T>) -> Vec<T> {
    let Some(list) = list else { return Vec::new() };
    let texts = list.texts();
    if texts.is_empty() {
        list.reject("the list is empty", "add a value, or remove the field");
    }
    texts.iter().filter_map(|(cursor, text)| read(cursor, text)).collect()
}

fn port(cursor: &Cursor<'_>, _: &str) -> Option<u16> {
    cursor.port()
}

fn network(cursor: &Cursor<'_>, text: &str) -> Option<IpNet> {
    let parsed = text.parse::<IpAddr>().map(IpNet::from).or_else(|_| text.parse::<IpNet>());
    if parsed.is_err() {
        cursor.reject(
            format!("`{text}` is not an address or range"),
            "expected an IP address or CIDR range, like 10.0.0.0/8",
        );
    }
    parsed.ok().map(|network| network.trunc())
}

/// `*` is any value there is; a star at one end leaves that end open.
fn string(cursor: &Cursor<'_>, text: &str) -> Option<StringMatch> {
    let body = text.strip_prefix('*').or_else(|| text.strip_suffix('*')).unwrap_or(text);
    if text.is_empty() || body.contains('*') {
        cursor.reject(format!("`{text}` is not a pattern"), "a `*` may stand alone, at the start or at the end");
        return None;
    }
    Some(match () {
        () if text == "*" => StringMatch::Presence,
        () if text.starts_with('*') => StringMatch::Suffix(body.into()),
        () if text.ends_with('*') => StringMatch::Prefix(body.into()),
        () => StringMatch::Exact(text.into()),
    })
}

fn principal(cursor: &Cursor<'_>, text: &str) -> Option<StringMatch> {
    if text.starts_with("spiffe://") {
        cursor.reject("a principal is written without its scheme", "remove `spiffe://`");
        return None;
    }
    string(cursor, text)
}

/// A principal starts with its trust domain.
fn trust_domain(cursor: &Cursor<'_>, text: &str) -> Option<StringMatch> {
    match string(cursor, text)? {
        StringMatch::Exact(domain) => Some(StringMatch::Prefix(format!("{domain}/").into())),
        StringMatch::Suffix(_) => {
            cursor.reject(
                format!("`{}` cannot be told apart at layer 4", excerpt(text)),
                "write the whole trust domain, or its start and a `*`",
            );
            None
        }
        open => Some(open),
    }
}

pub(super) fn peer_authentication(meta: &Meta, fields: &Fields<'_>) -> Option<PeerAuthentication> {
    let mut read = PeerAuthentication {
        created: meta.created.clone(),
        selector: Labels::new(),
        strict: None,
        ports: Default::default(),
        origin: origin(meta, &fields.cursor, None),
    };
    let Some(spec) = spec_of(fields) else { return Some(read) };
    read.selector = selector(&spec);
    let mtls = spec.get("mtls");
    let ports = spec.get("portLevelMtls");
    spec.deny_unknown();
    if let Some(mtls) = mtls {
        read.strict = mode(&mtls);
        read.origin = origin(meta, &mtls, Some(mtls.path().to_owned()));
    }
    for (name, port) in ports.iter().filter_map(Cursor::fields).flat_map(|f| f.each().collect::<Vec<_>>()) {
        let Ok(number) = name.parse::<u16>() else {
            port.reject(format!("`{name}` is not a port"), "expected a port number, 0 to 65535");
            continue;
        };
        if let Some(strict) = mode(&port) {
            read.ports.insert(number, (strict, origin(meta, &port, Some(port.path().to_owned()))));
        }
    }
    if let Some(ports) = ports.filter(|_| read.selector.is_empty()) {
        ports.warn("port exceptions have no effect without a selector", "add `selector:`, or remove them");
    }
    Some(read)
}

/// `None` inherits. DISABLE is PERMISSIVE here: the mesh accepts both kinds of connection wherever it does not insist.
fn mode(cursor: &Cursor<'_>) -> Option<bool> {
    let fields = cursor.fields()?;
    let mode = fields.get("mode");
    fields.deny_unknown();
    mode?.one_of(&[("STRICT", Some(true)), ("PERMISSIVE", Some(false)), ("DISABLE", Some(false)), ("UNSET", None)])?
}
