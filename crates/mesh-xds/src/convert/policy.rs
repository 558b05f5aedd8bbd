//! `istio.security.Authorization`.

use std::sync::Arc;

use ipnet::IpNet;
use mesh_core::{
    origin::Origin,
    policy::{Action, Clause, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch},
};
use prost::Message;
use proto::{fairway::v1 as ours, security as wire, workload::Extension};

use super::{Unacceptable, ip_to_wire, port_from_wire, prefix_from_wire, unknown_enum};

/// The extension that carries a [`ours::PolicyOrigin`].
const ORIGIN_EXTENSION: &str = "fairway.origin";
/// Policies of this namespace may cover the whole mesh.
const ROOT_NAMESPACE: &str = "istio-system";
const ORIGIN_TYPE_URL: &str = "type.googleapis.com/fairway.v1.PolicyOrigin";

/// # Errors
/// An unknown scope or action, a string match without a kind, a malformed prefix or port. Nothing is dropped silently: an entry
/// left out of a list can widen what the policy allows. (Upstream drops such entries.)
pub fn policy_from_wire(p: wire::Authorization) -> Result<Policy, Unacceptable> {
    if p.name.is_empty() {
        return Err(Unacceptable::new("name", "is empty"));
    }
    let written = origin_from_extensions(&p.extensions);
    let mut rules: Vec<Rule> = p.rules.into_iter().map(rule_from_wire).collect::<Result<_, _>>()?;
    let origin = policy_origin(&p.namespace, &p.name, written.as_ref());
    for (rule, place) in rules.iter_mut().zip(written.iter().flat_map(|w| &w.rules)) {
        rule.origin = Origin {
            field: Some(place.field.as_str().into()),
            line: (place.line != 0).then_some(place.line),
            ..origin.clone()
        };
    }
    Ok(Policy {
        name: p.name.into(),
        namespace: p.namespace.into(),
        scope: match wire::Scope::try_from(p.scope) {
            Ok(wire::Scope::Global) => Scope::Global,
            Ok(wire::Scope::Namespace) => Scope::Namespace,
            Ok(wire::Scope::WorkloadSelector) => Scope::WorkloadSelector,
            Err(_) => return Err(unknown_enum("scope", p.scope)),
        },
        action: match wire::Action::try_from(p.action) {
            Ok(wire::Action::Allow) => Action::Allow,
            Ok(wire::Action::Deny) => Action::Deny,
            Err(_) => return Err(unknown_enum("action", p.action)),
        },
        rules,
        dry_run: p.dry_run,
        origin,
    })
}

pub fn policy_to_wire(p: &Policy) -> wire::Authorization {
    wire::Authorization {
        name: p.name.to_string(),
        namespace: p.namespace.to_string(),
        scope: match p.scope {
            Scope::Global => wire::Scope::Global,
            Scope::Namespace => wire::Scope::Namespace,
            Scope::WorkloadSelector => wire::Scope::WorkloadSelector,
        } as i32,
        action: match p.action {
            Action::Allow => wire::Action::Allow,
            Action::Deny => wire::Action::Deny,
        } as i32,
        rules: p.rules.iter().map(rule_to_wire).collect(),
        dry_run: p.dry_run,
        extensions: origin_to_extension(p).into_iter().collect(),
    }
}

/// What stands in for a policy that was sent but cannot be understood: it denies everything in its scope, and says why. A policy
/// whose very envelope is unreadable denies the most it can have covered: the namespace in the resource name, or the mesh if that is
/// the root namespace.
pub fn unreadable_policy(name: &str, body: &[u8], problem: &Unacceptable) -> Policy {
    let envelope = wire::Authorization::decode(body).unwrap_or_default();
    let (namespace, short) = name.split_once('/').unwrap_or(("", name));
    // Zero is also what an unreadable envelope decodes to; only believe it where the rest was readable.
    let scope = match wire::Scope::try_from(envelope.scope) {
        Ok(wire::Scope::Global) if envelope.name == short => Scope::Global,
        Ok(wire::Scope::Namespace) => Scope::Namespace,
        Ok(wire::Scope::WorkloadSelector) => Scope::WorkloadSelector,
        Ok(wire::Scope::Global) | Err(_) if namespace == ROOT_NAMESPACE => Scope::Global,
        Ok(wire::Scope::Global) | Err(_) => Scope::Namespace,
    };
    let written = origin_from_extensions(&envelope.extensions);
    let mut origin = policy_origin(namespace, short, written.as_ref());
    origin.field = Some(problem.to_string().into());
    Policy {
        name: short.into(),
        namespace: namespace.into(),
        scope,
        action: Action::Deny,
        rules: vec![Rule { clauses: Vec::new(), origin: origin.clone() }],
        dry_run: false,
        origin,
    }
}

fn policy_origin(namespace: &str, name: &str, written: Option<&ours::PolicyOrigin>) -> Origin {
    let Some(written) = written else {
        return Origin { object: format!("AuthorizationPolicy {namespace}/{name}").into(), ..Origin::default() };
    };
    Origin {
        object: written.object.as_str().into(),
        file: (!written.file.is_empty()).then(|| written.file.as_str().into()),
        line: (written.line != 0).then_some(written.line),
        field: None,
    }
}

fn origin_from_extensions(extensions: &[Extension]) -> Option<ours::PolicyOrigin> {
    let config = extensions.iter().find(|e| e.name == ORIGIN_EXTENSION)?.config.as_ref()?;
    // Only for people to read: an undecodable one must not cost the policy.
    ours::PolicyOrigin::decode(&config.value[..]).ok()
}

fn origin_to_extension(p: &Policy) -> Option<Extension> {
    if p.origin == Origin::default() {
        return None;
    }
    let text = |s: &Option<Arc<str>>| s.as_deref().unwrap_or_default().to_owned();
    let message = ours::PolicyOrigin {
        object: p.origin.object.to_string(),
        file: text(&p.origin.file),
        line: p.origin.line.unwrap_or(0),
        rules: p
            .rules
            .iter()
            .map(|r| ours::RuleOrigin { field: text(&r.origin.field), line: r.origin.line.unwrap_or(0) })
            .collect(),
    };
    let config = prost_types::Any { type_url: ORIGIN_TYPE_URL.to_owned(), value: message.encode_to_vec() };
    Some(Extension { name: ORIGIN_EXTENSION.to_owned(), config: Some(config) })
}

fn rule_from_wire(r: wire::Rule) -> Result<Rule, Unacceptable> {
    let clause = |c: wire::Clause| {
        c.matches.into_iter().map(match_from_wire).collect::<Result<_, _>>().map(|matches| Clause { matches })
    };
    Ok(Rule { clauses: r.clauses.into_iter().map(clause).collect::<Result<_, _>>()?, origin: Origin::default() })
}

fn rule_to_wire(r: &Rule) -> wire::Rule {
    let clause = |c: &Clause| wire::Clause { matches: c.matches.iter().map(match_to_wire).collect() };
    wire::Rule { clauses: r.clauses.iter().map(clause).collect() }
}

fn match_from_wire(m: wire::Match) -> Result<Match, Unacceptable> {
    Ok(Match {
        namespaces: strings_from_wire("namespaces", m.namespaces)?,
        not_namespaces: strings_from_wire("not_namespaces", m.not_namespaces)?,
        principals: strings_from_wire("principals", m.principals)?,
        not_principals: strings_from_wire("not_principals", m.not_principals)?,
        source_ips: prefixes_from_wire("source_ips", &m.source_ips)?,
        not_source_ips: prefixes_from_wire("not_source_ips", &m.not_source_ips)?,
        destination_ips: prefixes_from_wire("destination_ips", &m.destination_ips)?,
        not_destination_ips: prefixes_from_wire("not_destination_ips", &m.not_destination_ips)?,
        destination_ports: ports_from_wire("destination_ports", &m.destination_ports)?,
        not_destination_ports: ports_from_wire("not_destination_ports", &m.not_destination_ports)?,
        service_accounts: accounts_from_wire(m.service_accounts),
        not_service_accounts: accounts_from_wire(m.not_service_accounts),
    })
}

fn match_to_wire(m: &Match) -> wire::Match {
    wire::Match {
        namespaces: strings_to_wire(&m.namespaces),
        not_namespaces: strings_to_wire(&m.not_namespaces),
        principals: strings_to_wire(&m.principals),
        not_principals: strings_to_wire(&m.not_principals),
        source_ips: prefixes_to_wire(&m.source_ips),
        not_source_ips: prefixes_to_wire(&m.not_source_ips),
        destination_ips: prefixes_to_wire(&m.destination_ips),
        not_destination_ips: prefixes_to_wire(&m.not_destination_ips),
        destination_ports: m.destination_ports.iter().copied().map(Into::into).collect(),
        not_destination_ports: m.not_destination_ports.iter().copied().map(Into::into).collect(),
        service_accounts: accounts_to_wire(&m.service_accounts),
        not_service_accounts: accounts_to_wire(&m.not_service_accounts),
        extensions: Vec::new(),
    }
}

fn strings_from_wire(field: &str, matches: Vec<wire::StringMatch>) -> Result<Vec<StringMatch>, Unacceptable> {
    use wire::string_match::MatchType;
    let one = |m: wire::StringMatch| match m.match_type {
        Some(MatchType::Exact(s)) => Ok(StringMatch::Exact(s.into())),
        Some(MatchType::Prefix(s)) => Ok(StringMatch::Prefix(s.into())),
        Some(MatchType::Suffix(s)) => Ok(StringMatch::Suffix(s.into())),
        Some(MatchType::Presence(())) => Ok(StringMatch::Presence),
        None => Err(Unacceptable::new(field, "a match of no kind known here; this may come from a newer version")),
    };
    matches.into_iter().map(one).collect()
}

fn strings_to_wire(matches: &[StringMatch]) -> Vec<wire::StringMatch> {
    use wire::string_match::MatchType;
    let one = |m: &StringMatch| match m {
        StringMatch::Exact(s) => MatchType::Exact(s.to_string()),
        StringMatch::Prefix(s) => MatchType::Prefix(s.to_string()),
        StringMatch::Presence => MatchType::Presence(()),
        StringMatch::Suffix(s) => MatchType::Suffix(s.to_string()),
    };
    matches.iter().map(|m| wire::StringMatch { match_type: Some(one(m)) }).collect()
}

fn prefixes_from_wire(field: &str, addresses: &[wire::Address]) -> Result<Vec<IpNet>, Unacceptable> {
    addresses.iter().map(|a| prefix_from_wire(field, &a.address, a.length)).collect()
}

fn prefixes_to_wire(prefixes: &[IpNet]) -> Vec<wire::Address> {
    prefixes.iter().map(|p| wire::Address { address: ip_to_wire(p.addr()), length: p.prefix_len().into() }).collect()
}

fn ports_from_wire(field: &str, ports: &[u32]) -> Result<Vec<u16>, Unacceptable> {
    ports.iter().map(|p| port_from_wire(field, *p)).collect()
}

fn accounts_from_wire(accounts: Vec<wire::ServiceAccountMatch>) -> Vec<ServiceAccountMatch> {
    accounts
        .into_iter()
        .map(|a| ServiceAccountMatch { namespace: a.namespace.into(), service_account: a.service_account.into() })
        .collect()
}

fn accounts_to_wire(accounts: &[ServiceAccountMatch]) -> Vec<wire::ServiceAccountMatch> {
    accounts
        .iter()
        .map(|a| wire::ServiceAccountMatch {
            namespace: a.namespace.to_string(),
            service_account: a.service_account.to_string(),
        })
        .collect()
}
