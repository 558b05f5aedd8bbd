//! Carries out what the state machine asks for, and feeds it what the world answers.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_net::NetNs;
use mesh_runtime::{drain::DrainWatcher, readiness::Pending};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::sleep_until,
};

use super::{
    enroll::{Machine, Outcome, Pace, Redirection, State, Step, Uid, Wanted},
    host::Host,
    probes::Probes,
    report::{Metrics, Reports},
    sandbox::Sandboxes,
    server::AddCall,
    source::View,
    status::StatusWriter,
    zds::Zds,
};
use crate::{
    decision::Decisions,
    eligibility::{Exclusion, Labels, Pod, decide},
    request::{AddAnswer, AddRequest},
    rules::Options,
};

mod probing;
mod publish;
mod questions;
mod steps;

use self::{
    probing::marked,
    steps::{Ended, step_name, workload},
};

/// What the driver needs to know of its node.
pub struct Settings {
    pub node: String,
    pub run_dir: PathBuf,
    pub sandboxes: Sandboxes,
    pub status: Box<dyn StatusWriter>,
    pub excluded_namespaces: Vec<String>,
    /// The rules of a pod without annotations.
    pub options: Options,
    pub pace: Pace,
    pub host: Host,
}

/// How long a question of the plugin may wait for the source to bring the pod.
const SOURCE_LAG: Duration = Duration::from_secs(3);

type AddReply = oneshot::Sender<Result<AddAnswer, String>>;

/// Owns everything the agent knows; one task.
pub struct Driver {
    settings: Arc<Settings>,
    machine: Machine,
    zds: Zds,
    view: Arc<View>,
    /// Pods the machine has to do with, also those that the view no longer has.
    pods: HashMap<Uid, Arc<Pod>>,
    netns: HashMap<Uid, NetNs>,
    /// As the runtime told them; the API shows them later.
    addresses: HashMap<Uid, Vec<IpAddr>>,
    /// None where nobody probes.
    probes: Option<Probes>,
    older_flows: HashMap<Uid, usize>,
    steps: JoinSet<Vec<Finished>>,
    /// Pods whose namespace is to be found, all in one search; one search at a time.
    to_find: Vec<Uid>,
    searching: bool,
    /// Questions about pods the source has not brought yet.
    unknown: Vec<(AddRequest, AddReply, Instant)>,
    waiting: HashMap<Uid, Vec<(AddReply, Instant)>>,
    decisions: Decisions,
    decisions_due: Instant,
    reports: watch::Sender<Reports>,
    metrics: Metrics,
    /// Ready, and open for ztunnels, when everything has been tried once.
    first_pass: Option<(Pending, oneshot::Sender<()>)>,
}

/// A step that has ended, in the namespace it was for.
struct Finished {
    uid: Uid,
    step: Step,
    netns: Option<NetNs>,
    result: Result<Ended, String>,
}

impl Driver {
    /// `synced` is told when ztunnels may be given the whole picture.
    pub fn new(
        settings: Settings,
        zds: Zds,
        probes: Option<Probes>,
        metrics: Metrics,
        reports: watch::Sender<Reports>,
        pending: Pending,
        synced: oneshot::Sender<()>,
    ) -> Self {
        Self {
            machine: Machine::new(settings.pace),
            settings: Arc::new(settings),
            zds,
            view: Arc::default(),
            pods: HashMap::new(),
            netns: HashMap::new(),
            addresses: HashMap::new(),
            probes,
            older_flows: HashMap::new(),
            steps: JoinSet::new(),
            to_find: Vec::new(),
            searching: false,
            unknown: Vec::new(),
            waiting: HashMap::new(),
            decisions: Decisions::default(),
            decisions_due: Instant::now(),
            reports,
            metrics,
            first_pass: Some((pending, synced)),
        }
    }

    /// Runs until the drain starts. Pods stay enrolled: their rules and ztunnel need no agent.
    pub async fn run(
        mut self,
        mut views: watch::Receiver<Option<Arc<View>>>,
        mut calls: mpsc::Receiver<AddCall>,
        drain: DrainWatcher,
    ) {
        // Nothing is decided before the first complete view: to an empty one every pod would be gone.
        let first = tokio::select! {
            _ = drain.signalled() => return,
            view = views.wait_for(Option::is_some) => view.ok().and_then(|view| view.clone()),
        };
        let Some(first) = first else { return };
        self.take_view(first);
        let zds = self.zds.clone();
        loop {
            self.advance();
            let wake = self.wakes_at().into();
            tokio::select! {
                _ = drain.signalled() => break,
                Ok(()) = views.changed() => {
                    let view = views.borrow_and_update().clone();
                    view.into_iter().for_each(|view| self.take_view(view));
                }
                Some(call) = calls.recv() => self.take_call(call.request, call.reply, Instant::now() + SOURCE_LAG),
                Some(finished) = self.steps.join_next(), if !self.steps.is_empty() => {
                    // A step that panicked stays in flight: that pod stops, and the panic is in the log.
                    finished.into_iter().flatten().for_each(|finished| self.take_finished(finished));
                }
                () = zds.synced() => self.machine.ztunnel_connected(),
                () = marked(&mut self.probes) => {}
                () = sleep_until(wake) => {}
            }
        }
        self.steps.shutdown().await;
    }

    // --- what the world says

    fn take_view(&mut self, view: Arc<View>) {
        self.view = view.clone();
        for (uid, pod) in &view.pods {
            let wanted = self.wanted(pod);
            let status = view.enrolments.get(uid).map(|e| e.redirection);
            if wanted == Wanted::Enrolled || status.is_some() || self.pods.contains_key(uid) {
                self.pods.insert(uid.clone(), pod.clone());
                self.keep_for_later(uid, pod, wanted, status);
                self.machine.observe(uid, wanted, status);
            }
        }
        for (uid, enrolment) in view.enrolments.iter().filter(|(uid, _)| !view.pods.contains_key(*uid)) {
            let pod = Pod {
                uid: uid.to_string(),
                namespace: enrolment.namespace.clone(),
                name: enrolment.name.clone(),
                ..Pod::default()
            };
            self.pods.entry(uid.clone()).or_insert_with(|| Arc::new(pod));
            self.machine.observe(uid, Wanted::Gone, Some(enrolment.redirection));
        }
        let gone: Vec<Uid> = self.pods.keys().filter(|uid| !view.pods.contains_key(*uid)).cloned().collect();
        gone.iter().for_each(|uid| self.machine.observe(uid, Wanted::Gone, None));
        for (request, reply, deadline) in std::mem::take(&mut self.unknown) {
            self.take_call(request, reply, deadline);
        }
        self.decisions_due = Instant::now();
    }

    fn wanted(&self, pod: &Pod) -> Wanted {
        match self.verdict(pod) {
            Ok(()) => Wanted::Enrolled,
            Err(Exclusion::Terminal) => Wanted::Gone,
            Err(_) => Wanted::Unenrolled,
        }
    }

    fn verdict(&self, pod: &Pod) -> Result<(), Exclusion> {
        decide(pod, self.labels_of(&pod.namespace), &self.settings.excluded_namespaces)
    }

    fn labels_of(&self, namespace: &str) -> &Labels {
        static NONE: Labels = Labels::new();
        self.view.namespaces.get(namespace).unwrap_or(&NONE)
    }

    /// After a restart, a ztunnel that serves the pod must keep it, also while its namespace has not been found again.
    fn keep_for_later(&self, uid: &Uid, pod: &Pod, wanted: Wanted, status: Option<Redirection>) {
        if self.machine.get(uid).is_none() && wanted == Wanted::Enrolled && status == Some(Redirection::Enabled) {
            self.zds.remember(workload(pod, None));
        }
    }

    fn take_finished(&mut self, finished: Finished) {
        let Finished { uid, step, netns, result } = finished;
        self.searching &= step != Step::FindNetns;
        let replaced = match (&netns, self.netns.get(&uid)) {
            (Some(then), Some(now)) => !then.same_handle(now),
            _ => false,
        };
        let outcome = match result {
            _ if replaced => Outcome::Outdated,
            Ok(ended) => self.take_ended(&uid, ended),
            Err(reason) => {
                // A pod without address has no sandbox yet: the plugin will bring it.
                let awaited = step == Step::FindNetns && self.pods.get(&uid).is_some_and(|pod| pod.ips.is_empty());
                if !awaited {
                    tracing::warn!(%uid, ?step, reason, "a step failed and will be repeated");
                }
                Outcome::Failed(reason)
            }
        };
        self.machine.finish(&uid, step, &outcome, Instant::now());
        if step == Step::ApplyRules && outcome == Outcome::Done {
            self.compare_status(&uid);
        }
    }

    /// As often as the rules are looked at, so is what is written down. A view that is older than our own writing makes us write it
    /// twice, which does no harm.
    fn compare_status(&mut self, uid: &Uid) {
        let written = self.machine.get(uid).and_then(State::status);
        let seen = self.view.enrolments.get(uid).map(|enrolment| enrolment.redirection);
        if written == Some(Redirection::Enabled) && seen != written {
            tracing::info!(%uid, "what was written down about a pod is gone, and is written again");
            self.machine.status_is(uid, seen);
        }
    }

    fn take_ended(&mut self, uid: &Uid, ended: Ended) -> Outcome {
        match ended {
            Ended::Done => Outcome::Done,
            Ended::Flows(flows) => Outcome::Flows(flows),
            Ended::Found(ns) => {
                self.netns.entry(uid.clone()).or_insert(ns);
                Outcome::Done
            }
            Ended::Applied { older_flows } => {
                if let Some(flows) = older_flows {
                    self.older_flows.insert(uid.clone(), flows);
                }
                // From here on a ztunnel that connects must hear of it.
                if let Some(pod) = self.pods.get(uid) {
                    self.zds.remember(workload(pod, self.netns.get(uid).cloned()));
                }
                Outcome::Done
            }
        }
    }

    // --- what follows from it

    fn advance(&mut self) {
        let now = Instant::now();
        for (uid, step) in self.machine.start_due(now) {
            self.metrics.steps.with_label_values(&[step_name(step)]).inc();
            self.start(uid, step);
        }
        self.search();
        for uid in self.machine.forget_finished() {
            self.pods.remove(&uid);
            self.netns.remove(&uid);
            self.addresses.remove(&uid);
            self.older_flows.remove(&uid);
        }
        self.want_probes();
        self.answer_waiting(now);
        if self.machine.has_tried_everything()
            && let Some((pending, synced)) = self.first_pass.take()
        {
            drop(pending);
            if synced.send(()).is_err() {
                tracing::debug!("stopping before ztunnels were let in");
            }
        }
        self.publish(now);
    }

    fn wakes_at(&self) -> Instant {
        let questions = self.unknown.iter().map(|(_, _, at)| *at);
        let waiting = self.waiting.values().flatten().map(|(_, at)| *at);
        questions.chain(waiting).chain(self.machine.wakes_at()).fold(self.decisions_due, Instant::min)
    }
}
