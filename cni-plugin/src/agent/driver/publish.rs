//! What is shown of the pods: to the plugin, in metrics and to people.

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use super::{Driver, steps::options_of};
use crate::{
    agent::{
        enroll::{State, Uid},
        report::{PodReport, PodState},
    },
    decision::{Listed, REFRESH},
    eligibility::{Pod, decided_by},
};

impl Driver {
    pub(super) fn publish(&mut self, now: Instant) {
        if self.decisions_due <= now {
            self.decisions_due = now + REFRESH;
            self.write_decisions();
        }
        let reports: Vec<PodReport> = self.view.pods.iter().map(|(uid, pod)| self.report(uid, pod)).collect();
        self.metrics.update(&reports, self.zds.connected());
        self.reports.send_if_modified(|shown| {
            let differs = **shown != reports;
            if differs {
                *shown = Arc::new(reports);
            }
            differs
        });
    }

    fn write_decisions(&mut self) {
        let listed = |pod: &Arc<Pod>| {
            let key = format!("{}/{}", pod.namespace, pod.name);
            (key, Listed { uid: pod.uid.clone(), enrolled: self.verdict(pod).is_ok() })
        };
        let pods = self.view.pods.values().map(listed).collect();
        self.decisions.pods = pods;
        if let Err(error) = self.decisions.write(&self.settings.run_dir, SystemTime::now()) {
            tracing::warn!(%error, "cannot write the decision file; the plugin will ask instead");
        }
    }

    fn report(&self, uid: &Uid, pod: &Pod) -> PodReport {
        let state = self.machine.get(uid);
        let (shown, reason) = match (self.verdict(pod), state) {
            (Ok(()), Some(state)) if state.is_captured() => (PodState::Enrolled, state.error.clone()),
            (Ok(()), _) if pod.ips.is_empty() && !self.netns.contains_key(uid) => {
                (PodState::Awaited, Some("it has no sandbox yet".into()))
            }
            (Ok(()), state) => {
                let why = state.and_then(|s| s.error.clone()).unwrap_or_else(|| "enrolment is under way".into());
                (PodState::Uncaptured, Some(why))
            }
            (Err(why), Some(_)) => (PodState::Leaving, Some(why.to_string())),
            (Err(why), None) => (PodState::Outside, Some(why.to_string())),
        };
        PodReport {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            state: shown,
            reason,
            decided_by: decided_by(pod, self.labels_of(&pod.namespace), self.verdict(pod)),
            rules: state.is_some_and(State::has_rules),
            announced: state.is_some_and(State::is_announced),
            dns: options_of(pod, &self.settings.options).dns,
            older_flows: self.older_flows.get(uid).copied(),
            captured_flows: state.and_then(State::captured_flows),
        }
    }
}
