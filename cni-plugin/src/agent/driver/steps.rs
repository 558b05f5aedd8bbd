//! The steps of the state machine, started and carried out.

use std::{collections::HashMap, sync::Arc, time::Instant};

use mesh_net::NetNs;
use mesh_runtime::telemetry::error_chain;
use tokio::task::spawn_blocking;

use super::{Driver, Finished, Settings};
use crate::{
    agent::{
        enroll::{Outcome, Step, Uid},
        sandbox::SandboxError,
        zds::{Workload, Zds},
    },
    eligibility::Pod,
    rules::{self, Options},
};

/// What came of a step.
pub(super) enum Ended {
    Done,
    Found(NetNs),
    Applied { older_flows: Option<usize> },
    Flows(usize),
}

impl Driver {
    pub(super) fn start(&mut self, uid: Uid, step: Step) {
        let Some(pod) = self.pods.get(&uid).cloned() else {
            // Every pod the machine knows has been put into `pods` before it.
            self.machine.finish(&uid, step, &Outcome::Failed("the pod is not known".into()), Instant::now());
            return;
        };
        if step == Step::FindNetns {
            self.to_find.push(uid);
            return;
        }
        // What was written on a pod is gone with it.
        let is_gone = || !self.view.pods.contains_key(&uid);
        if step == Step::WriteStatus(None) && !self.settings.status.outlives_pods() && is_gone() {
            self.machine.finish(&uid, step, &Outcome::Done, Instant::now());
            return;
        }
        let netns = self.netns.get(&uid).cloned();
        let (settings, zds) = (self.settings.clone(), self.zds.clone());
        self.steps.spawn(async move {
            let result = take_step(step, &settings, &zds, &pod, netns.clone()).await;
            vec![Finished { uid, step, netns, result }]
        });
    }

    /// Starts a search for all namespaces wanted now: it costs the same for one as for all.
    pub(super) fn search(&mut self) {
        if self.searching || self.to_find.is_empty() {
            return;
        }
        self.searching = true;
        let uids = std::mem::take(&mut self.to_find);
        let pods: Vec<Arc<Pod>> = uids.iter().filter_map(|uid| self.pods.get(uid).cloned()).collect();
        let settings = self.settings.clone();
        self.steps.spawn(async move {
            let searched = spawn_blocking(move || settings.sandboxes.find(&settings.host, &pods)).await;
            let mut found = searched.unwrap_or_else(|error| {
                tracing::error!(%error, "the search for namespaces failed");
                HashMap::new()
            });
            let finished = uids.into_iter().map(|uid| {
                let result = found.remove(&uid).unwrap_or(Err(SandboxError::NoProcess));
                let result = result.map(Ended::Found).map_err(|e| error_chain(&e));
                Finished { uid, step: Step::FindNetns, netns: None, result }
            });
            finished.collect()
        });
    }
}

/// Takes a step and waits for what comes of it.
async fn take_step(
    step: Step,
    settings: &Arc<Settings>,
    zds: &Zds,
    pod: &Arc<Pod>,
    netns: Option<NetNs>,
) -> Result<Ended, String> {
    match step {
        Step::Announce => zds.announce(workload(pod, netns)).await.map(|()| Ended::Done).map_err(|e| error_chain(&e)),
        Step::Withdraw => {
            zds.withdraw(&pod.uid.as_str().into()).await;
            Ok(Ended::Done)
        }
        Step::WriteStatus(redirection) => settings.status.write(pod, redirection).await.map(|()| Ended::Done),
        step => {
            let (settings, pod) = (settings.clone(), pod.clone());
            let blocking = spawn_blocking(move || take_blocking_step(step, &settings, &pod, netns));
            blocking.await.unwrap_or_else(|e| Err(e.to_string()))
        }
    }
}

fn take_blocking_step(step: Step, settings: &Settings, pod: &Pod, netns: Option<NetNs>) -> Result<Ended, String> {
    let in_ns = |act: &dyn Fn(&NetNs) -> Result<Ended, String>| {
        netns.as_ref().map_or_else(|| Err("the pod's network namespace is not known".into()), act)
    };
    match step {
        Step::ApplyRules => in_ns(&|ns| {
            let changed = rules::apply(ns, &options_of(pod, &settings.options)).map_err(|e| error_chain(&e))?;
            let older_flows = if changed { rules::older_flows(ns).ok() } else { None };
            Ok(Ended::Applied { older_flows })
        }),
        Step::FlushRedirects => {
            in_ns(&|ns| rules::flush_redirects(ns).map(|()| Ended::Done).map_err(|e| error_chain(&e)))
        }
        Step::CountFlows => in_ns(&|ns| rules::captured_flows(ns).map(Ended::Flows).map_err(|e| error_chain(&e))),
        Step::RemoveRules => in_ns(&|ns| rules::remove(ns).map(|()| Ended::Done).map_err(|e| error_chain(&e))),
        // Asynchronous, see `take_step`; or of many pods at once, see `search`.
        Step::FindNetns | Step::WriteStatus(_) | Step::Announce | Step::Withdraw => Ok(Ended::Done),
    }
}

/// A pod as ztunnel is told of it.
pub(super) fn workload(pod: &Pod, netns: Option<NetNs>) -> Workload {
    Workload {
        uid: pod.uid.as_str().into(),
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        service_account: pod.service_account.clone(),
        netns,
    }
}

/// The annotations that change a pod's rules. One that cannot be read is ignored with a warning.
pub(super) fn options_of(pod: &Pod, defaults: &Options) -> Options {
    let mut options = defaults.clone();
    if let Some(bypass) = switch(pod, "ambient.istio.io/bypass-inbound-capture") {
        options.inbound = !bypass;
    }
    if let Some(dns) = switch(pod, "ambient.istio.io/dns-capture") {
        options.dns = dns;
    }
    if let Some(interfaces) = pod.annotations.get("istio.io/reroute-virtual-interfaces") {
        let names = interfaces.split(',').map(str::trim).filter(|name| !name.is_empty() && name.len() < 16);
        options.reroute_interfaces = names.map(str::to_owned).collect();
    }
    options
}

fn switch(pod: &Pod, annotation: &str) -> Option<bool> {
    let value = pod.annotations.get(annotation)?;
    let read = value.parse().ok();
    if read.is_none() {
        tracing::warn!(pod = pod.name, annotation, value, "must be \"true\" or \"false\"; ignored");
    }
    read
}

/// The label of the metric.
pub(super) fn step_name(step: Step) -> &'static str {
    match step {
        Step::FindNetns => "find-netns",
        Step::ApplyRules => "apply-rules",
        Step::Announce => "announce",
        Step::WriteStatus(_) => "write-status",
        Step::FlushRedirects => "flush-redirects",
        Step::CountFlows => "count-flows",
        Step::RemoveRules => "remove-rules",
        Step::Withdraw => "withdraw",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_change_the_rules_and_nonsense_does_not() {
        let with = |key: &str, value: &str| {
            let annotations = [(key.to_owned(), value.to_owned())].into();
            options_of(&Pod { annotations, ..Pod::default() }, &Options::default())
        };
        assert!(!with("ambient.istio.io/bypass-inbound-capture", "true").inbound);
        assert!(with("ambient.istio.io/bypass-inbound-capture", "perhaps").inbound);
        assert!(!with("ambient.istio.io/dns-capture", "false").dns);
        assert!(with("ambient.istio.io/dns-capture", "no").dns);
        let reroute = with("istio.io/reroute-virtual-interfaces", "vm0, ,docker0,much-too-long-a-name");
        assert_eq!(reroute.reroute_interfaces, ["vm0", "docker0"]);
    }
}
