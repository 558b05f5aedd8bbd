//! Which pod runs where and as whom: what callers, and the identities they ask for, are held against.

use std::sync::Arc;

use rpds::HashTrieMapSync;

use crate::{
    objects::{Kind, ObjectKey, Pod, Spec},
    source::ObjectChange,
};

/// Every pod that is on a node and has not ended, with or without an address: certificates are asked for before it has one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Placements {
    pods: HashTrieMapSync<ObjectKey, Placement>,
    /// How many pods have an account, by node, namespace and account.
    accounts: HashTrieMapSync<Account, usize>,
}

type Account = (Arc<str>, Arc<str>, Arc<str>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    pub(crate) uid: Arc<str>,
    pub(crate) node: Arc<str>,
    pub(crate) service_account: Arc<str>,
}

impl Placements {
    pub(crate) fn apply(&mut self, changes: &[ObjectChange]) {
        for (key, object) in changes.iter().filter(|(key, _)| key.kind == Kind::Pod) {
            let new = object.as_deref().and_then(|object| match &object.spec {
                Spec::Pod(pod) => placement(pod),
                _ => None,
            });
            self.set(key, new);
        }
    }

    fn set(&mut self, key: &ObjectKey, new: Option<Placement>) {
        let old = self.pods.get(key).cloned();
        if old == new {
            return;
        }
        let account = |of: &Placement| (of.node.clone(), key.namespace.clone(), of.service_account.clone());
        if let Some(old) = old.as_ref().map(account) {
            match self.accounts.get(&old).copied().unwrap_or_default() {
                0 | 1 => drop(self.accounts.remove_mut(&old)),
                count => self.accounts.insert_mut(old, count - 1),
            }
        }
        match new {
            Some(new) => {
                let count = self.accounts.get(&account(&new)).copied().unwrap_or_default();
                self.accounts.insert_mut(account(&new), count + 1);
                self.pods.insert_mut(key.clone(), new);
            }
            None => drop(self.pods.remove_mut(key)),
        }
    }

    pub(crate) fn pod(&self, namespace: &Arc<str>, name: &Arc<str>) -> Option<&Placement> {
        self.pods.get(&ObjectKey::new(Kind::Pod, namespace, name))
    }

    /// Whether some pod on the node runs as that account.
    pub(crate) fn runs(&self, node: &Arc<str>, namespace: &Arc<str>, service_account: &Arc<str>) -> bool {
        self.accounts.contains_key(&(node.clone(), namespace.clone(), service_account.clone()))
    }
}

fn placement(pod: &Pod) -> Option<Placement> {
    let (uid, node, service_account) = (pod.uid.clone(), pod.node.clone(), pod.service_account.clone());
    (!pod.terminal && !node.is_empty()).then_some(Placement { uid, node, service_account })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{objects::Settings, source::Catalogue};

    #[test]
    fn accounts_are_where_pods_that_have_not_ended_run() {
        let settings = Settings { root_namespace: "istio-system".into(), revision: "default".into() };
        let (mut catalogue, mut placements) = (Catalogue::new(settings), Placements::default());
        let pod = |name: &str, node: &str, phase: &str| {
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{namespace: demo, name: {name}, uid: u-{name}}}\n\
                 spec: {{nodeName: {node}, serviceAccountName: web}}\nstatus: {{phase: {phase}}}\n---\n"
            )
        };
        // Manifests, and whether the account runs on n1 and on n2 after them.
        let steps = [
            (pod("a", "n1", "Pending"), (true, false)),
            (pod("a", "n1", "Running") + &pod("b", "n1", "Running"), (true, false)),
            (pod("a", "n1", "Succeeded") + &pod("b", "n1", "Running"), (true, false)),
            (pod("a", "n1", "Succeeded") + &pod("b", "n1", "Failed"), (false, false)),
            (pod("a", "n2", "Running") + &pod("b", "''", "Pending"), (false, true)),
            (String::new(), (false, false)),
        ];
        for (manifests, expected) in steps {
            catalogue.set_file(&"f.yaml".into(), &manifests);
            placements.apply(&catalogue.changes());
            let runs = |node: &str| placements.runs(&node.into(), &"demo".into(), &"web".into());
            assert_eq!((runs("n1"), runs("n2")), expected, "{manifests}");
        }
        assert!(placements.pods.is_empty() && placements.accounts.is_empty());
    }
}
