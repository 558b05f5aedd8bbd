use std::collections::BTreeMap;

use k8s_openapi::api::authentication::v1::UserInfo;

use super::*;
use crate::{objects::Settings, source::Catalogue};

fn status(name: &str, audiences: &[&str], extra: &[(&str, &str)]) -> TokenReviewStatus {
    let extra: BTreeMap<String, Vec<String>> = extra
        .iter()
        .map(|(key, value)| (format!("authentication.kubernetes.io/{key}"), vec![(*value).to_owned()]))
        .collect();
    TokenReviewStatus {
        authenticated: Some(true),
        audiences: Some(audiences.iter().map(|audience| (*audience).to_owned()).collect()),
        user: Some(UserInfo { username: Some(name.to_owned()), extra: Some(extra), ..UserInfo::default() }),
        error: None,
    }
}

const ZTUNNEL: &str = "system:serviceaccount:istio-system:ztunnel";
const BOUND: [(&str, &str); 2] = [("pod-name", "z-1"), ("pod-uid", "u-1")];

#[test]
fn only_a_token_for_us_of_an_account_bound_to_a_pod_says_who_bears_it() {
    let bearer = judge(&status(ZTUNNEL, &["other", "istio-ca"], &BOUND)).unwrap();
    assert_eq!((&*bearer.namespace, &*bearer.service_account), ("istio-system", "ztunnel"));
    assert_eq!((&*bearer.pod, &*bearer.pod_uid), ("z-1", "u-1"));
    let refused = TokenReviewStatus { error: Some("expired".into()), ..TokenReviewStatus::default() };
    let table = [
        (refused, "does not believe the token: expired"),
        (TokenReviewStatus { authenticated: Some(false), ..status(ZTUNNEL, &["istio-ca"], &BOUND) }, "not authentic"),
        (status(ZTUNNEL, &["https://kubernetes.default.svc"], &BOUND), "not meant for istio-ca"),
        (status(ZTUNNEL, &[], &BOUND), "not meant for istio-ca"),
        (status("system:node:n1", &["istio-ca"], &BOUND), "`system:node:n1` is no service account"),
        (status(ZTUNNEL, &["istio-ca"], &[]), "bound to no pod"),
        (status(ZTUNNEL, &["istio-ca"], &BOUND[..1]), "bound to no pod"),
    ];
    for (status, told) in table {
        let error = judge(&status).unwrap_err();
        assert!(error.contains(told), "{error}");
    }
}

#[test]
fn a_bearers_node_is_that_of_its_very_pod() {
    let (mut catalogue, mut placements) = (
        Catalogue::new(Settings { root_namespace: "istio-system".into(), revision: "default".into() }),
        Placements::default(),
    );
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {namespace: istio-system, name: z-1, uid: u-1}\n\
               spec: {nodeName: n1, serviceAccountName: ztunnel}\n";
    catalogue.set_file(&"f.yaml".into(), pod);
    placements.apply(&catalogue.changes());
    let bearer = judge(&status(ZTUNNEL, &["istio-ca"], &BOUND)).unwrap();
    assert_eq!(&*place(&bearer, &placements).unwrap().node, "n1");
    let other = |change: fn(&mut Bearer)| {
        let mut bearer = bearer.clone();
        change(&mut bearer);
        place(&bearer, &placements).unwrap_err()
    };
    assert!(matches!(other(|b| b.pod = "z-2".into()), NotBelieved::Unknown(_)), "not delivered yet");
    assert!(matches!(other(|b| b.pod_uid = "u-2".into()), NotBelieved::Unknown(_)), "its successor neither");
    assert!(matches!(other(|b| b.service_account = "web".into()), NotBelieved::Refused(_)));
}
