//! What would have had to be otherwise: for people who ask why nothing allowed a connection.

use super::{Action, Clause, Connection, Field, Match, PolicySet, Subject, clause_holds, matching_rule, of, origin};
use crate::{
    origin::Origin,
    policy::{ServiceAccountMatch, StringMatch},
};

/// Values of one list that are told.
const TOLD: usize = 3;

/// The allowing rule that a connection came nearest to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nearest {
    pub origin: Origin,
    /// Each thing that it wants and the connection is not: `principals cluster.local/ns/t/sa/a`. Never empty.
    pub wants: Vec<String>,
}

/// Of the rules that could allow: the one with the fewest unmet wishes, and of several the first. `None` where one
/// allows, where there is none, and where a denying one decides.
pub fn nearest(policies: &PolicySet, connection: &Connection<'_>) -> Option<Nearest> {
    let request = Subject::new(connection);
    if of(policies, Action::Deny, false).any(|policy| matching_rule(policy, &request).is_some()) {
        return None;
    }
    let allowing = of(policies, Action::Allow, false);
    let rules = allowing.flat_map(|policy| policy.rules.iter().enumerate().map(move |rule| (policy, rule)));
    let judged = rules.map(|(policy, (position, rule))| {
        let unmet = rule.clauses.iter().filter(|clause| !clause_holds(clause, &request));
        let wants = unmet.flat_map(|clause| unmet_of(clause, &request)).collect();
        Nearest { origin: origin(policy, Some(position)), wants }
    });
    judged.min_by_key(|nearest| nearest.wants.len()).filter(|nearest| !nearest.wants.is_empty())
}

/// One of a clause's matches is enough: the one that lacks least is told.
fn unmet_of(clause: &Clause, request: &Subject<'_>) -> Vec<String> {
    let unmet = |m: &Match| -> Vec<String> {
        Field::ALL.iter().filter(|field| !field.holds(m, request)).map(|field| field.wants(m)).collect()
    };
    let told = clause.matches.iter().filter(|m| **m != Match::default()).map(unmet);
    told.min_by_key(Vec::len).unwrap_or_else(|| vec!["what is not understood here".to_owned()])
}

impl Field {
    /// As it is written.
    fn wants(self, m: &Match) -> String {
        let strings = |list: &[StringMatch]| list.iter().map(pattern).collect();
        let accounts = |list: &[ServiceAccountMatch]| {
            list.iter().map(|a| format!("{}/{}", a.namespace, a.service_account)).collect()
        };
        let (name, wanted, unwanted) = match self {
            Self::Namespaces => ("namespaces", strings(&m.namespaces), strings(&m.not_namespaces)),
            Self::Principals => ("principals", strings(&m.principals), strings(&m.not_principals)),
            Self::ServiceAccounts => {
                ("service accounts", accounts(&m.service_accounts), accounts(&m.not_service_accounts))
            }
            Self::SourceIps => ("source addresses", texts(&m.source_ips), texts(&m.not_source_ips)),
            Self::DestinationIps => ("destination addresses", texts(&m.destination_ips), texts(&m.not_destination_ips)),
            Self::DestinationPorts => ("ports", texts(&m.destination_ports), texts(&m.not_destination_ports)),
        };
        let told =
            |prefix: &str, list: Vec<String>| (!list.is_empty()).then(|| format!("{prefix}{name} {}", some(list)));
        [told("", wanted), told("other than ", unwanted)].into_iter().flatten().collect::<Vec<_>>().join(" and ")
    }
}

fn pattern(pattern: &StringMatch) -> String {
    match pattern {
        StringMatch::Exact(exact) => exact.to_string(),
        StringMatch::Prefix(prefix) => format!("{prefix}*"),
        StringMatch::Presence => "*".to_owned(),
        StringMatch::Suffix(suffix) => format!("*{suffix}"),
    }
}

fn texts(list: &[impl ToString]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

fn some(mut list: Vec<String>) -> String {
    let more = list.len().saturating_sub(TOLD);
    list.truncate(TOLD);
    let told = list.join(" or ");
    if more > 0 { format!("{told} or {more} more") } else { told }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::policy::{Policy, Rule, Scope};

    fn rule(matches: Vec<Match>) -> Rule {
        Rule { clauses: matches.into_iter().map(|m| Clause { matches: vec![m] }).collect(), origin: Origin::default() }
    }

    fn principals(name: &str) -> Match {
        Match { principals: vec![StringMatch::Exact(name.into())], ..Match::default() }
    }

    fn port(port: u16) -> Match {
        Match { destination_ports: vec![port], ..Match::default() }
    }

    fn told(rules: Vec<Rule>, action: Action) -> Option<(String, Vec<String>)> {
        let policy = Policy {
            name: "p".into(),
            namespace: "t".into(),
            scope: Scope::Namespace,
            action,
            rules,
            dry_run: false,
            origin: Origin::default(),
        };
        let set = PolicySet { policies: vec![Arc::new(policy)], complete: true, ..PolicySet::default() };
        let identity = "spiffe://cluster.local/ns/t/sa/b".parse().unwrap();
        let (source_ip, destination) = ("10.0.0.9".parse().unwrap(), "10.0.0.1:80".parse().unwrap());
        let connection = Connection { source_ip, source_identity: Some(&identity), destination };
        nearest(&set, &connection).map(|nearest| (nearest.origin.to_string(), nearest.wants))
    }

    #[test]
    fn the_rule_with_the_fewest_unmet_wishes_is_named_with_what_it_wants() {
        let a = "cluster.local/ns/t/sa/a";
        let wants = told(vec![rule(vec![principals(a), port(81)]), rule(vec![principals(a), port(80)])], Action::Allow);
        let (origin, wants) = wants.unwrap();
        assert_eq!(origin, "AuthorizationPolicy t/p (spec.rules[1])");
        assert_eq!(wants, ["principals cluster.local/ns/t/sa/a"]);
    }

    #[test]
    fn lists_and_exceptions_are_told_in_short() {
        let ports =
            Match { destination_ports: vec![1, 2, 3, 4, 5], not_destination_ports: vec![80], ..Match::default() };
        assert_eq!(
            told(vec![rule(vec![ports])], Action::Allow).unwrap().1,
            ["ports 1 or 2 or 3 or 2 more and other than ports 80"]
        );
        let not_understood = told(vec![rule(vec![Match::default()])], Action::Allow).unwrap().1;
        assert_eq!(not_understood, ["what is not understood here"]);
    }

    #[test]
    fn where_something_allows_or_nothing_could_nothing_is_nearest() {
        assert_eq!(told(vec![rule(vec![port(80)])], Action::Allow), None);
        assert_eq!(told(Vec::new(), Action::Allow), None);
        assert_eq!(told(vec![rule(vec![port(81)])], Action::Deny), None);
    }
}
