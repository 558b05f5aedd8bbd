//! Events for pods that should be captured and are not: for their owners, who do not read our log.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use mesh_runtime::{drain::DrainWatcher, telemetry::error_chain};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::report::{PodReport, PodState, Reports};

/// Who tells, and when.
#[derive(Clone, Debug)]
pub struct Settings {
    pub node: String,
    /// How long capturing a pod may take before it is worth an Event.
    pub patience: Duration,
}

const WRITE_LIMIT: Duration = Duration::from_secs(5);
/// An Event's note is at most 1 kB.
const LONGEST_REASON: usize = 700;

/// Pods that are uncaptured, since when, and whether that has been told. Each time it begins it is told once.
#[derive(Debug, Default)]
struct Uncaptured(HashMap<String, (Instant, bool)>);

impl Uncaptured {
    /// Those that are due now.
    fn due<'a>(&mut self, reports: &'a [PodReport], now: Instant, patience: Duration) -> Vec<&'a PodReport> {
        let uncaptured: Vec<&PodReport> = reports.iter().filter(|r| r.state == PodState::Uncaptured).collect();
        self.0.retain(|uid, _| uncaptured.iter().any(|r| r.uid == *uid));
        let mut due = Vec::new();
        for report in uncaptured {
            let (since, told) = self.0.entry(report.uid.clone()).or_insert((now, false));
            if !*told && now.duration_since(*since) >= patience {
                *told = true;
                due.push(report);
            }
        }
        due
    }

    fn forget(&mut self, uid: &str) {
        self.0.remove(uid);
    }
}

/// Tells until the drain starts. An Event that cannot be written is tried again after another while.
pub async fn run(client: Client, settings: Settings, mut reports: watch::Receiver<Reports>, drain: DrainWatcher) {
    let reporter = Reporter { controller: "fairway-node".into(), instance: Some(settings.node.clone()) };
    let recorder = Recorder::new(client, reporter);
    let mut uncaptured = Uncaptured::default();
    loop {
        let now = reports.borrow_and_update().clone();
        for report in uncaptured.due(&now, Instant::now(), settings.patience) {
            let (event, pod) = event(report, &settings.node);
            match timeout(WRITE_LIMIT, recorder.publish(&event, &pod)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(pod = report.name, error = error_chain(&error), "cannot write an Event");
                    uncaptured.forget(&report.uid);
                }
                Err(_) => uncaptured.forget(&report.uid),
            }
        }
        tokio::select! {
            _ = drain.signalled() => return,
            changed = reports.changed() => if changed.is_err() { return },
            // Time passes without reports too.
            () = sleep(settings.patience.max(Duration::from_millis(100)) / 2) => {}
        }
    }
}

fn event(report: &PodReport, node: &str) -> (Event, ObjectReference) {
    let reason: String =
        report.reason.as_deref().unwrap_or("no reason is known").chars().take(LONGEST_REASON).collect();
    let event = Event {
        type_: EventType::Warning,
        reason: "FairwayNotCaptured".into(),
        note: Some(format!("the pod belongs to the mesh and is not captured on node {node}: {reason}")),
        action: "Capture".into(),
        secondary: None,
    };
    let pod = ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        namespace: Some(report.namespace.clone()),
        name: Some(report.name.clone()),
        uid: Some(report.uid.clone()),
        ..ObjectReference::default()
    };
    (event, pod)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eligibility::DecidedBy;

    fn report(uid: &str, state: PodState) -> PodReport {
        PodReport {
            namespace: "demo".into(),
            name: "a".into(),
            uid: uid.into(),
            state,
            reason: Some("é".repeat(2000)),
            decided_by: DecidedBy { object: String::new(), field: String::new(), value: None },
            rules: false,
            announced: false,
            dns: false,
            older_flows: None,
            captured_flows: None,
        }
    }

    #[test]
    fn each_time_a_pod_stays_uncaptured_it_is_told_once() {
        const PATIENCE: Duration = Duration::from_secs(30);
        let (start, mut uncaptured) = (Instant::now(), Uncaptured::default());
        let mut due = |seconds: u64, state| {
            let reports = [report("u1", state)];
            uncaptured.due(&reports, start + Duration::from_secs(seconds), PATIENCE).len()
        };
        assert_eq!(due(0, PodState::Uncaptured), 0);
        assert_eq!(due(29, PodState::Uncaptured), 0);
        assert_eq!(due(30, PodState::Uncaptured), 1);
        assert_eq!(due(90, PodState::Uncaptured), 0, "once");
        assert_eq!(due(91, PodState::Enrolled), 0);
        assert_eq!(due(92, PodState::Uncaptured), 0);
        assert_eq!(due(122, PodState::Uncaptured), 1, "and again when it happens again");
        assert_eq!(due(500, PodState::Awaited), 0);
    }

    #[test]
    fn an_event_names_the_pod_and_fits() {
        let (event, pod) = event(&report("u1", PodState::Uncaptured), "n1");
        assert_eq!((pod.uid.as_deref(), event.reason.as_str()), (Some("u1"), "FairwayNotCaptured"));
        assert!(event.note.is_some_and(|note| note.chars().count() < 1000));
    }
}
