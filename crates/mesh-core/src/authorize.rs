//! The layer-4 authorisation decision.
//!
//! ```text
//! an enforced DENY matches                 → deny
//! a referenced policy is not known here    → deny, naming it (fails closed)
//! no enforced ALLOW policy                 → allow
//! an enforced ALLOW matches                → allow
//! otherwise                                → deny
//! ```
//! Shapes that are part of the contract: a policy without rules never matches; a rule without clauses matches everything; a clause
//! without matches holds; a match without any field is skipped, so a clause of only such matches does not hold.

mod nearest;

use std::{net::IpAddr, net::SocketAddr, sync::Arc};

use ipnet::IpNet;

use crate::{
    addr::canonical_ip,
    identity::Identity,
    origin::Origin,
    policy::{Action, Clause, Match, Policy, Rule, ServiceAccountMatch, StringMatch},
    reason::Reason,
};

pub use self::nearest::{Nearest, nearest};

/// What is asked: may this peer reach this destination?
#[derive(Clone, Copy, Debug)]
pub struct Connection<'a> {
    pub source_ip: IpAddr,
    /// The verified peer; `None` for plaintext.
    pub source_identity: Option<&'a Identity>,
    pub destination: SocketAddr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    Allow,
    Deny,
}

/// The answer, and what made it so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub verdict: Verdict,
    /// Set exactly when the verdict is [`Verdict::Deny`].
    pub reason: Option<Reason>,
    /// `namespace/name` of the deciding policy.
    pub policy: Option<Arc<str>>,
    /// Where the deciding rule was written, as precisely as known.
    pub origin: Option<Origin>,
    /// For logs and `fairway why`.
    pub explanation: String,
    /// Version of the state that was asked.
    pub version: u64,
    /// Keys of dry-run policies that would have denied.
    pub dry_run: Vec<Arc<str>>,
}

impl Decision {
    pub fn allow(explanation: impl Into<String>, version: u64) -> Self {
        let explanation = explanation.into();
        Self {
            verdict: Verdict::Allow,
            reason: None,
            policy: None,
            origin: None,
            explanation,
            version,
            dry_run: Vec::new(),
        }
    }

    pub fn deny(reason: Reason, explanation: impl Into<String>, version: u64) -> Self {
        Self { verdict: Verdict::Deny, reason: Some(reason), ..Self::allow(explanation, version) }
    }

    pub fn is_allowed(&self) -> bool {
        self.verdict == Verdict::Allow
    }
}

/// The policies in force for one workload, and whether that is known to be all of them.
#[derive(Clone, Debug, Default)]
pub struct PolicySet {
    pub policies: Vec<Arc<Policy>>,
    /// Keys the workload lists that are not known here.
    pub missing: Vec<Arc<str>>,
    /// False until the first policy sync, and while only local facts about the workload are known.
    pub complete: bool,
    pub version: u64,
}

/// Decides; a pure function of its arguments.
pub fn authorize(policies: &PolicySet, connection: &Connection<'_>) -> Decision {
    let request = Subject::new(connection);
    let mut decision = enforced(policies, &request);
    decision.dry_run = dry_run_denials(policies, &request);
    decision
}

fn enforced(set: &PolicySet, request: &Subject<'_>) -> Decision {
    if let Some((policy, rule)) = of(set, Action::Deny, false).find_map(|p| Some((p, matching_rule(p, request)?))) {
        let decision = Decision::deny(Reason::Denied, format!("explicitly denied by: {}", policy.key()), set.version);
        return decided_by(decision, policy, Some(rule));
    }
    if let Some(unknown) = unknown(set) {
        return unknown;
    }
    let Some(first) = of(set, Action::Allow, false).next() else {
        return Decision::allow("no allow policies apply", set.version);
    };
    match of(set, Action::Allow, false).find_map(|p| Some((p, matching_rule(p, request)?))) {
        Some((policy, rule)) => {
            decided_by(Decision::allow(format!("allowed by: {}", policy.key()), set.version), policy, Some(rule))
        }
        None => {
            let explanation = "allow policies exist, but none allowed";
            let mut decision = decided_by(Decision::deny(Reason::Denied, explanation, set.version), first, None);
            if let (Some(origin), Some(rule)) = (&mut decision.origin, first.rules.first()) {
                // None of the rules matched: the list as a whole decides, and its first entry is where one reads on.
                origin.line = rule.origin.line.or(origin.line);
                origin.field = Some("spec.rules".into());
            }
            decision
        }
    }
}

fn unknown(set: &PolicySet) -> Option<Decision> {
    if let Some(missing) = set.missing.first() {
        let explanation = format!("denied until policy {missing} is known: the workload references it");
        return Some(Decision {
            policy: Some(missing.clone()),
            ..Decision::deny(Reason::PolicyUnknown, explanation, set.version)
        });
    }
    (!set.complete).then(|| {
        Decision::deny(
            Reason::PolicyUnknown,
            "denied until the policies of this workload are known to be complete",
            set.version,
        )
    })
}

fn dry_run_denials(set: &PolicySet, request: &Subject<'_>) -> Vec<Arc<str>> {
    let denies = of(set, Action::Deny, true).filter(|p| matching_rule(p, request).is_some());
    // Dry-run ALLOW policies would deny only if not one of them, nor of the enforced ones, lets the connection through.
    let allowed = |dry_run| of(set, Action::Allow, dry_run).any(|p| matching_rule(p, request).is_some());
    let none_allows = !allowed(true) && !allowed(false);
    denies.chain(of(set, Action::Allow, true).filter(|_| none_allows)).map(|p| p.key()).collect()
}

fn of(set: &PolicySet, action: Action, dry_run: bool) -> impl Iterator<Item = &Arc<Policy>> {
    set.policies.iter().filter(move |p| p.action == action && p.dry_run == dry_run)
}

fn decided_by(decision: Decision, policy: &Policy, rule: Option<usize>) -> Decision {
    Decision { policy: Some(policy.key()), origin: Some(origin(policy, rule)), ..decision }
}

/// The rule's own place; for a rule that arrived without one, the policy's with the rule's position.
fn origin(policy: &Policy, rule: Option<usize>) -> Origin {
    let mut origin = policy.origin.clone();
    if let Some(position) = rule {
        match policy.rules.get(position) {
            Some(rule) if rule.origin != Origin::default() => origin = rule.origin.clone(),
            _ => origin.field = Some(format!("spec.rules[{position}]").into()),
        }
    }
    if origin.object.is_empty() {
        origin.object = format!("AuthorizationPolicy {}", policy.key()).into();
    }
    origin
}

/// A connection in the forms that matches compare.
struct Subject<'a> {
    source_ip: IpAddr,
    identity: Option<&'a Identity>,
    principal: Option<String>,
    destination_ip: IpAddr,
    destination_port: u16,
}

impl<'a> Subject<'a> {
    fn new(connection: &Connection<'a>) -> Self {
        Self {
            source_ip: canonical_ip(connection.source_ip),
            identity: connection.source_identity,
            principal: connection.source_identity.map(Identity::principal),
            destination_ip: canonical_ip(connection.destination.ip()),
            destination_port: connection.destination.port(),
        }
    }

    fn namespace(&self) -> &str {
        self.identity.map_or("", |identity| &identity.namespace)
    }
}

fn matching_rule(policy: &Policy, request: &Subject<'_>) -> Option<usize> {
    policy.rules.iter().position(|rule| rule_holds(rule, request))
}

fn rule_holds(rule: &Rule, request: &Subject<'_>) -> bool {
    rule.clauses.iter().all(|clause| clause_holds(clause, request))
}

fn clause_holds(clause: &Clause, request: &Subject<'_>) -> bool {
    clause.matches.is_empty() || clause.matches.iter().any(|m| *m != Match::default() && match_holds(m, request))
}

fn match_holds(m: &Match, request: &Subject<'_>) -> bool {
    Field::ALL.iter().all(|field| field.holds(m, request))
}

/// What a match may ask for, each in a positive and a negative list.
#[derive(Clone, Copy, Debug)]
enum Field {
    Namespaces,
    Principals,
    ServiceAccounts,
    SourceIps,
    DestinationIps,
    DestinationPorts,
}

impl Field {
    const ALL: [Self; 6] = [
        Self::Namespaces,
        Self::Principals,
        Self::ServiceAccounts,
        Self::SourceIps,
        Self::DestinationIps,
        Self::DestinationPorts,
    ];

    fn holds(self, m: &Match, request: &Subject<'_>) -> bool {
        let namespace = |s: &StringMatch| string_matches(s, request.namespace());
        let principal = |s: &StringMatch| request.principal.as_deref().is_some_and(|p| string_matches(s, p));
        let account = |s: &ServiceAccountMatch| {
            request.identity.is_some_and(|i| i.namespace == s.namespace && i.service_account == s.service_account)
        };
        match self {
            Self::Namespaces => field_holds(&m.namespaces, &m.not_namespaces, namespace),
            Self::Principals => field_holds(&m.principals, &m.not_principals, principal),
            Self::ServiceAccounts => field_holds(&m.service_accounts, &m.not_service_accounts, account),
            Self::SourceIps => {
                field_holds(&m.source_ips, &m.not_source_ips, |net: &IpNet| net.contains(&request.source_ip))
            }
            Self::DestinationIps => field_holds(&m.destination_ips, &m.not_destination_ips, |net: &IpNet| {
                net.contains(&request.destination_ip)
            }),
            Self::DestinationPorts => field_holds(&m.destination_ports, &m.not_destination_ports, |port: &u16| {
                *port == request.destination_port
            }),
        }
    }
}

fn field_holds<T>(positive: &[T], negative: &[T], hit: impl Fn(&T) -> bool) -> bool {
    (positive.is_empty() || positive.iter().any(&hit)) && !negative.iter().any(&hit)
}

fn string_matches(pattern: &StringMatch, value: &str) -> bool {
    match pattern {
        StringMatch::Exact(exact) => **exact == *value,
        StringMatch::Prefix(prefix) => value.starts_with(&**prefix),
        StringMatch::Presence => !value.is_empty(),
        StringMatch::Suffix(suffix) => value.ends_with(&**suffix),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Scope;

    fn policy(name: &str, action: Action, rules: Vec<Rule>) -> Policy {
        Policy {
            name: name.into(),
            namespace: "demo".into(),
            scope: Scope::Namespace,
            action,
            rules,
            dry_run: false,
            origin: Origin { object: format!("AuthorizationPolicy demo/{name}").into(), ..Origin::default() },
        }
    }

    fn set(policies: impl IntoIterator<Item = Policy>) -> PolicySet {
        PolicySet {
            policies: policies.into_iter().map(Arc::new).collect(),
            missing: Vec::new(),
            complete: true,
            version: 7,
        }
    }

    fn clauses(clauses: Vec<Vec<Match>>) -> Rule {
        Rule { clauses: clauses.into_iter().map(|matches| Clause { matches }).collect(), origin: Origin::default() }
    }

    fn one(m: Match) -> Vec<Rule> {
        vec![clauses(vec![vec![m]])]
    }

    fn ask(set: &PolicySet, identity: Option<&str>) -> Decision {
        let identity: Option<Identity> = identity.map(|i| i.parse().unwrap());
        let (source_ip, destination) = ("10.0.0.9".parse().unwrap(), "10.0.0.1:80".parse().unwrap());
        authorize(set, &Connection { source_ip, source_identity: identity.as_ref(), destination })
    }

    const CLIENT: Option<&str> = Some("spiffe://cluster.local/ns/demo/sa/client");

    #[test]
    fn without_policies_everything_is_allowed() {
        assert!(ask(&set([]), None).is_allowed());
    }

    #[test]
    fn a_matching_deny_wins_over_a_matching_allow_and_is_named() {
        let any = || vec![Rule::default()];
        let decision = ask(&set([policy("a", Action::Allow, any()), policy("d", Action::Deny, any())]), CLIENT);
        assert_eq!(decision.reason, Some(Reason::Denied));
        assert_eq!(decision.explanation, "explicitly denied by: demo/d");
        assert_eq!(decision.policy.as_deref(), Some("demo/d"));
        assert_eq!(decision.origin.unwrap().to_string(), "AuthorizationPolicy demo/d (spec.rules[0])");
        assert_eq!(decision.version, 7);
    }

    #[test]
    fn allow_policies_that_do_not_match_deny_and_the_first_is_named() {
        let mut allow = policy("first", Action::Allow, Vec::new());
        allow.origin.file = Some("p.yaml".into());
        allow.origin.line = Some(3);
        let decision = ask(&set([allow.clone(), policy("second", Action::Allow, Vec::new())]), CLIENT);
        assert_eq!((decision.verdict, decision.reason), (Verdict::Deny, Some(Reason::Denied)));
        assert_eq!(decision.explanation, "allow policies exist, but none allowed");
        assert_eq!(decision.origin.unwrap().to_string(), "AuthorizationPolicy demo/first (p.yaml:3)");
        let never = vec![vec![Match { destination_ports: vec![81], ..Match::default() }]];
        allow.rules = vec![clauses(never)];
        allow.rules[0].origin = Origin { line: Some(9), ..allow.origin.clone() };
        let decision = ask(&set([allow]), CLIENT);
        assert_eq!(decision.origin.unwrap().to_string(), "AuthorizationPolicy demo/first (p.yaml:9, spec.rules)");
    }

    #[test]
    fn the_deciding_rule_is_named_by_its_own_origin() {
        let place = Origin {
            object: "AuthorizationPolicy demo/a".into(),
            file: Some("p.yaml".into()),
            line: Some(12),
            field: Some("spec.rules[1]".into()),
        };
        let never = clauses(vec![vec![Match { destination_ports: vec![81], ..Match::default() }]]);
        let decision = ask(
            &set([policy("a", Action::Allow, vec![never, Rule { origin: place.clone(), clauses: Vec::new() }])]),
            CLIENT,
        );
        assert_eq!((decision.verdict, decision.origin), (Verdict::Allow, Some(place)));
    }

    #[test]
    fn a_missing_policy_denies_by_name() {
        let mut set = set([]);
        set.missing = vec!["demo/strict".into()];
        let decision = ask(&set, CLIENT);
        assert_eq!((decision.reason, decision.policy.as_deref()), (Some(Reason::PolicyUnknown), Some("demo/strict")));
    }

    #[test]
    fn incomplete_policies_deny() {
        let decision = ask(&PolicySet { complete: false, ..set([]) }, CLIENT);
        assert_eq!(decision.reason, Some(Reason::PolicyUnknown));
    }

    #[test]
    fn empty_shapes_mean_what_the_contract_says() {
        let empty_match = || clauses(vec![vec![Match::default()]]);
        let port = |port| Match { destination_ports: vec![port], ..Match::default() };
        let table: Vec<(&str, Vec<Rule>, bool)> = vec![
            ("no rules never matches", vec![], false),
            ("a rule without clauses matches everything", vec![Rule::default()], true),
            ("a clause without matches holds", vec![clauses(vec![vec![]])], true),
            ("a clause of only empty matches does not hold", vec![empty_match()], false),
            ("an empty match beside a hit is skipped", vec![clauses(vec![vec![Match::default(), port(80)]])], true),
            ("clauses are all needed", vec![clauses(vec![vec![port(80)], vec![port(81)]])], false),
            ("matches are alternatives", vec![clauses(vec![vec![port(81), port(80)]])], true),
            ("rules are alternatives", vec![empty_match(), Rule::default()], true),
        ];
        for (case, rules, matches) in table {
            assert_eq!(ask(&set([policy("d", Action::Deny, rules)]), CLIENT).is_allowed(), !matches, "{case}");
        }
    }

    #[test]
    fn fields_compare_as_documented() {
        let exact = |s: &str| StringMatch::Exact(s.into());
        let account =
            |namespace: &str| ServiceAccountMatch { namespace: namespace.into(), service_account: "client".into() };
        let table: Vec<(&str, Match, bool, bool)> = vec![
            // name, match, holds for the client, holds for plaintext
            (
                "principal",
                Match { principals: vec![exact("cluster.local/ns/demo/sa/client")], ..Match::default() },
                true,
                false,
            ),
            (
                "principal prefix",
                Match { principals: vec![StringMatch::Prefix("".into())], ..Match::default() },
                true,
                false,
            ),
            (
                "principal suffix",
                Match { principals: vec![StringMatch::Suffix("/sa/client".into())], ..Match::default() },
                true,
                false,
            ),
            ("principal presence", Match { principals: vec![StringMatch::Presence], ..Match::default() }, true, false),
            (
                "not presence is plaintext",
                Match { not_principals: vec![StringMatch::Presence], ..Match::default() },
                false,
                true,
            ),
            ("namespace", Match { namespaces: vec![exact("demo")], ..Match::default() }, true, false),
            ("not namespace", Match { not_namespaces: vec![exact("demo")], ..Match::default() }, false, true),
            ("service account", Match { service_accounts: vec![account("demo")], ..Match::default() }, true, false),
            (
                "foreign service account",
                Match { service_accounts: vec![account("other")], ..Match::default() },
                false,
                false,
            ),
            ("source ip", Match { source_ips: vec!["10.0.0.0/24".parse().unwrap()], ..Match::default() }, true, true),
            (
                "not source ip",
                Match { not_source_ips: vec!["10.0.0.0/24".parse().unwrap()], ..Match::default() },
                false,
                false,
            ),
            (
                "destination ip",
                Match { destination_ips: vec!["10.0.0.1/32".parse().unwrap()], ..Match::default() },
                true,
                true,
            ),
            ("not port", Match { not_destination_ports: vec![80], ..Match::default() }, false, false),
            (
                "fields are all needed",
                Match { destination_ports: vec![80], namespaces: vec![exact("x")], ..Match::default() },
                false,
                false,
            ),
        ];
        for (case, m, client, plaintext) in table {
            let set = set([policy("a", Action::Allow, one(m))]);
            assert_eq!((ask(&set, CLIENT).is_allowed(), ask(&set, None).is_allowed()), (client, plaintext), "{case}");
        }
    }

    #[test]
    fn mapped_addresses_match_ipv4_policies() {
        let set = set([policy(
            "d",
            Action::Deny,
            one(Match { source_ips: vec!["10.0.0.9/32".parse().unwrap()], ..Match::default() }),
        )]);
        let connection = Connection {
            source_ip: "::ffff:10.0.0.9".parse().unwrap(),
            source_identity: None,
            destination: "10.0.0.1:80".parse().unwrap(),
        };
        assert!(!authorize(&set, &connection).is_allowed());
    }

    #[test]
    fn dry_run_policies_are_reported_and_never_enforced() {
        let dry = |name, action, rules| Policy { dry_run: true, ..policy(name, action, rules) };
        let decision =
            ask(&set([dry("d", Action::Deny, vec![Rule::default()]), dry("a", Action::Allow, vec![])]), CLIENT);
        assert!(decision.is_allowed());
        assert_eq!(decision.dry_run.iter().map(|k| &**k).collect::<Vec<_>>(), ["demo/d", "demo/a"]);
    }
}
