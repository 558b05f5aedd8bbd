//! What the receiving end's policies say of a connection, in words that somebody can act on.

use serde_json::Value;

use super::Finding;
use crate::why::facts::Facts;

/// Before a PeerAuthentication's name in that of the policy it becomes.
const CONVERTED: &str = "converted_peer_authentication_";
/// What istiod makes of all that make a namespace or the mesh STRICT.
pub(in crate::why) const STATIC_STRICT: &str = "istio_converted_static_strict";

/// The receiving end's policies.
pub(super) fn admitted(facts: &Facts, answer: &Value) -> Option<Finding> {
    let decision = &answer["decision"];
    let text = |field: &str| decision[field].as_str().map(str::to_owned);
    let dry_run: Vec<&str> = decision["dryRun"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if decision["verdict"] != "deny" {
        let says = format!("would be denied by {}, were it not a dry run", dry_run.join(", "));
        return (!dry_run.is_empty()).then(|| {
            let object = format!("AuthorizationPolicy {}", dry_run[0]);
            Finding::new("destination", says).in_field(object, "metadata.annotations[istio.io/dry-run]")
        });
    }
    let mut finding = Finding::blocking("destination", text("explanation").unwrap_or_default());
    finding.reason = text("reason");
    finding.object = text("object").filter(|object| !object.is_empty()).or_else(|| text("policy"));
    finding.place = text("place");
    finding.field = text("field");
    let finding = finding.remedy(text("remedy").unwrap_or_default());
    let identity = answer["sourceIdentity"].as_str();
    Some(match strict(facts, &finding, decision["policy"].as_str().unwrap_or_default()) {
        Some(named) => named,
        None => unlike(finding, identity, &decision["nearest"]),
    })
}

/// What a PeerAuthentication was made into is nothing that anybody could look up: the object itself is named.
fn strict(facts: &Facts, finding: &Finding, policy: &str) -> Option<Finding> {
    let (namespace, name) = policy.split_once('/')?;
    let named = match name.strip_prefix(CONVERTED) {
        Some(name) => vec![format!("{namespace}/{name}")],
        None if name == STATIC_STRICT => facts.strict.clone(),
        None => return None,
    };
    let object = match named.as_slice() {
        [] => "a PeerAuthentication of the namespace or the mesh".to_owned(),
        named => format!("PeerAuthentication {}", named.join(", ")),
    };
    let says = format!(
        "explicitly denied by: {object}, which is STRICT, and {} comes in clear and proves no identity",
        facts.source.name
    );
    let remedy = match facts.is_captured() {
        false => {
            "bring the source into the mesh: label its namespace istio.io/dataplane-mode=ambient; else make the PeerAuthentication PERMISSIVE"
        }
        true => {
            "see why the source does not use a tunnel: the destination may not have been captured when it was last heard of; else make the PeerAuthentication PERMISSIVE"
        }
    };
    let field = finding.field.clone().filter(|_| facts.strict.is_empty());
    Some(Finding { says, object: Some(object), field, ..finding.clone() }.remedy(remedy))
}

/// Nothing allows the caller: who that is, and what the rule wants that it came nearest to.
fn unlike(finding: Finding, identity: Option<&str>, nearest: &Value) -> Finding {
    let Some(rule) = nearest["rule"].as_str() else { return finding };
    let wants: Vec<&str> = nearest["wants"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let caller = match identity {
        Some(identity) => format!("the caller is {identity}"),
        None => "the caller proves no identity".to_owned(),
    };
    let says = format!("{}: {caller}; the nearest rule, {rule}, wants {}", finding.says, wants.join(" and "));
    let remedy = match identity.and_then(|identity| identity.strip_prefix("spiffe://")) {
        Some(principal) => format!("add `{principal}` to the principals of that rule, if it shall be allowed"),
        None => "bring the source into the mesh, so that it has an identity".to_owned(),
    };
    let wants_caller = wants.iter().any(|wanted| wanted.contains("principals") || wanted.contains("service accounts"));
    let remedy = if wants_caller { remedy } else { finding.remedy.clone() };
    Finding { says, ..finding }.remedy(remedy)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::tests::facts, *};

    #[test]
    fn a_refusal_names_the_caller_and_what_the_nearest_rule_wants() {
        let nearest = json!({"rule": "AuthorizationPolicy t/p (spec.rules[0])", "wants": ["principals td/ns/t/sa/x"]});
        let decision = json!({"verdict": "deny", "reason": "denied", "explanation": "none allowed", "policy": "t/p", "nearest": nearest});
        let answer = json!({"decision": decision, "sourceIdentity": "spiffe://td/ns/t/sa/a"});
        let finding = admitted(&facts(json!({})), &answer).unwrap();
        assert_eq!(
            finding.says,
            "none allowed: the caller is spiffe://td/ns/t/sa/a; the nearest rule, AuthorizationPolicy t/p (spec.rules[0]), wants principals td/ns/t/sa/x"
        );
        assert!(finding.remedy.contains("`td/ns/t/sa/a`"), "{}", finding.remedy);
    }

    #[test]
    fn strict_is_said_by_the_peer_authentication_and_the_source_is_brought_in_first() {
        let refused = |policy: &str| json!({"decision": {"verdict": "deny", "reason": "denied", "policy": policy}});
        let mut outside = facts(json!({}));
        outside.source.report = None;
        let ours = admitted(&outside, &refused("t/converted_peer_authentication_strict")).unwrap();
        assert_eq!(ours.object.as_deref(), Some("PeerAuthentication t/strict"));
        assert!(ours.remedy.starts_with("bring the source into the mesh"), "{}", ours.remedy);
        outside.strict = vec!["t/default".to_owned(), "t/other".to_owned()];
        let theirs = admitted(&outside, &refused("istio-system/istio_converted_static_strict")).unwrap();
        assert_eq!(theirs.object.as_deref(), Some("PeerAuthentication t/default, t/other"));
    }
}
