//! What plugins ask: each question waits until its pod is captured, or it is known why not.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_net::NetNs;
use mesh_runtime::telemetry::error_chain;

use super::{AddReply, Driver};
use crate::{
    agent::enroll::{State, Uid, Wanted},
    eligibility::Pod,
    request::{AddAnswer, AddRequest},
};

/// Shorter than the plugin waits, so that it gets the reason.
const ADD_LIMIT: Duration = Duration::from_millis(4500);

impl Driver {
    pub(super) fn take_call(&mut self, request: AddRequest, reply: AddReply, deadline: Instant) {
        let found = self.view.find(&request.pod_namespace, &request.pod_name);
        let same = found.filter(|(uid, _)| request.pod_uid.as_deref().is_none_or(|wanted| wanted == &***uid));
        let Some((uid, pod)) = same.map(|(uid, pod)| (uid.clone(), pod.clone())) else {
            self.unknown.push((request, reply, deadline));
            return;
        };
        match self.verdict(&pod) {
            Err(_) if request.undecided => self.reply(reply, Ok(AddAnswer { enrolled: false })),
            Err(why) => {
                let who = format!("{}/{}", pod.namespace, pod.name);
                self.reply(reply, Err(format!("pod {who} is not to be captured: {why}")));
            }
            Ok(()) => match self.settings.host.open_netns(request.netns.as_ref()) {
                Ok(ns) => {
                    self.addresses.insert(uid.clone(), request.addresses());
                    self.enrol(uid, pod, ns, reply);
                }
                Err(error) => self.reply(reply, Err(error_chain(&error))),
            },
        }
    }

    fn enrol(&mut self, uid: Uid, pod: Arc<Pod>, ns: NetNs, reply: AddReply) {
        self.pods.insert(uid.clone(), pod);
        self.netns.insert(uid.clone(), ns);
        self.machine.observe(&uid, Wanted::Enrolled, None);
        self.machine.give_netns(&uid);
        self.waiting.entry(uid).or_default().push((reply, Instant::now() + ADD_LIMIT));
    }

    pub(super) fn answer_waiting(&mut self, now: Instant) {
        let mut answers = Vec::new();
        for (request, reply, deadline) in std::mem::take(&mut self.unknown) {
            if deadline > now {
                self.unknown.push((request, reply, deadline));
                continue;
            }
            let AddRequest { pod_namespace, pod_name, .. } = request;
            let why = format!("pod {pod_namespace}/{pod_name} is not among the pods of node {}", self.settings.node);
            answers.push((reply, Err(why)));
        }
        let mut all_waiting = std::mem::take(&mut self.waiting);
        for (uid, waiting) in &mut all_waiting {
            let state = self.machine.get(uid);
            let is_marked = self.are_probes_marked(uid);
            for (reply, deadline) in std::mem::take(waiting) {
                match state {
                    Some(state) if state.is_captured() && is_marked => {
                        answers.push((reply, Ok(AddAnswer { enrolled: true })))
                    }
                    Some(State { error: Some(why), .. }) => answers.push((reply, Err(why.clone()))),
                    Some(_) if deadline > now => waiting.push((reply, deadline)),
                    _ => answers.push((reply, Err("the pod could not be captured in time".into()))),
                }
            }
        }
        all_waiting.retain(|_, waiting| !waiting.is_empty());
        self.waiting = all_waiting;
        answers.into_iter().for_each(|(reply, answer)| self.reply(reply, answer));
    }

    fn reply(&self, reply: AddReply, answer: Result<AddAnswer, String>) {
        let code = if answer.is_ok() { "200" } else { "500" };
        self.metrics.requests.with_label_values(&[code]).inc();
        // A plugin that has given up will ask again.
        drop(reply.send(answer));
    }
}
