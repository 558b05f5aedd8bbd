//! What the control plane has made while it ran. Control planes of other meshes use the same names, and Istio's may have made it before ours.

use serde_json::Value;

use super::{INSTALL, MANAGED_BY};
use crate::{
    cluster::{Cluster, escape},
    output::say,
};

pub(super) const ROOTS: &str = "istio-ca-root-cert";
pub(super) const CA: &str = "istio-ca-secret";
/// The control plane, in the name of its Lease and in what it makes.
const MAKER: &str = "fairwayd";

/// What becomes of the CA's Secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Absent,
    Goes,
    Wanted,
    /// It holds the root of somebody else's mesh, of which there may be no other copy.
    Foreign,
}

impl Fate {
    fn of(secret: Option<&Value>, keep: bool) -> Self {
        match secret {
            None => Self::Absent,
            Some(_) if keep => Self::Wanted,
            Some(secret) if secret["metadata"]["labels"][MANAGED_BY] == MAKER => Self::Goes,
            Some(_) => Self::Foreign,
        }
    }
}

#[derive(Debug)]
pub(super) struct Made {
    namespace: String,
    /// Who else would miss what is named alike.
    others: Vec<String>,
    ca: Fate,
}

impl Made {
    pub(super) async fn find(cluster: &Cluster, namespace: &str, keep_ca: bool) -> anyhow::Result<Self> {
        let secret = cluster.get_metadata(&format!("/api/v1/namespaces/{namespace}/secrets/{CA}")).await?;
        let others = others(cluster, namespace).await?;
        Ok(Self { namespace: namespace.to_owned(), others, ca: Fate::of(secret.as_ref(), keep_ca) })
    }

    pub(super) fn is_shared(&self) -> bool {
        !self.others.is_empty()
    }

    /// What is asked before anything is removed.
    pub(super) fn question(&self, server: &str) -> String {
        let namespace = &self.namespace;
        let ca = match self.ca {
            Fate::Goes if !self.is_shared() => {
                format!(", with Secret {namespace}/{CA}, the only key of the mesh's CA (--keep-ca keeps it),")
            }
            Fate::Absent => String::new(),
            _ => format!(", but for Secret {namespace}/{CA},"),
        };
        format!("remove all of it{ca} from {server}? [y/N] ")
    }

    pub(super) async fn remove(&self, cluster: &Cluster) -> anyhow::Result<()> {
        let namespace = &self.namespace;
        cluster.delete(&format!("/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{MAKER}")).await?;
        if self.is_shared() {
            say!("{} is still there: ConfigMaps {ROOTS} and the CA's Secret stay", self.others.join(", "));
            return Ok(());
        }
        match self.ca {
            Fate::Absent => {}
            Fate::Goes => {
                cluster.delete(&format!("/api/v1/namespaces/{namespace}/secrets/{CA}")).await?;
                say!("Secret {CA} deleted: the next installation has a new CA");
            }
            Fate::Wanted => say!("Secret {CA} stays: the next installation goes on with this CA"),
            Fate::Foreign => say!(
                "Secret {CA} stays: it is not {MAKER}'s (label {MANAGED_BY}), and may be the only copy of another mesh's root; \
                 `kubectl -n {namespace} delete secret {CA}` if nobody needs it"
            ),
        }
        let roots = roots(cluster).await?;
        for root in &roots {
            let within = root["metadata"]["namespace"].as_str().unwrap_or_default();
            cluster.delete(&format!("/api/v1/namespaces/{within}/configmaps/{ROOTS}")).await?;
        }
        say!("ConfigMap {ROOTS} deleted in {} namespaces", roots.len());
        Ok(())
    }
}

/// The control planes but that of the installation in a namespace, whoever installed them.
pub(super) async fn others(cluster: &Cluster, own: &str) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for selector in ["app=istiod", "app.kubernetes.io/name=fairwayd"] {
        let selector = format!("labelSelector={}", escape(selector));
        found.extend(cluster.list_metadata("/apis/apps/v1/deployments", &selector).await?);
    }
    let told = |plane: &Value| {
        let metadata = &plane["metadata"];
        let text = |field: &str| metadata[field].as_str().unwrap_or_default();
        (metadata["labels"][INSTALL] != own).then(|| format!("control plane {}/{}", text("namespace"), text("name")))
    };
    Ok(found.iter().filter_map(told).collect())
}

pub(super) async fn roots(cluster: &Cluster) -> anyhow::Result<Vec<Value>> {
    cluster.list_metadata("/api/v1/configmaps", &format!("fieldSelector=metadata.name%3D{ROOTS}")).await
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_a_secret_that_our_control_plane_made_goes_and_the_question_names_it() {
        let by = |maker: Value| json!({"metadata": {"name": CA, "labels": {MANAGED_BY: maker}}});
        for (secret, keep, others, fate, said) in [
            (None, false, "", Fate::Absent, "remove all of it from s"),
            (Some(by("fairwayd".into())), false, "", Fate::Goes, "with Secret m/istio-ca-secret, the only key"),
            (Some(by("fairwayd".into())), false, "istiod", Fate::Goes, "but for Secret m/istio-ca-secret"),
            (Some(by("fairwayd".into())), true, "", Fate::Wanted, "but for Secret m/istio-ca-secret"),
            (Some(by("other".into())), false, "", Fate::Foreign, "but for Secret m/istio-ca-secret"),
            // As Istio's CA writes it.
            (Some(json!({"metadata": {"name": CA}})), false, "", Fate::Foreign, "but for Secret m/istio-ca-secret"),
        ] {
            let others = Some(others.to_owned()).filter(|other| !other.is_empty()).into_iter().collect();
            let made = Made { namespace: "m".to_owned(), others, ca: Fate::of(secret.as_ref(), keep) };
            assert_eq!(made.ca, fate, "{secret:?}");
            assert!(made.question("s").contains(said), "{}", made.question("s"));
        }
    }
}
