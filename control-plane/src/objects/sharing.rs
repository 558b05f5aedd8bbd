//! What objects of a cluster have in common, kept once: a hundred pods of a deployment differ in a name and an address.

use std::sync::Arc;

use mesh_core::pool::Pool;

use super::{EndpointSlice, Labels, NamedPorts, Object, Pod, Spec};

#[derive(Debug, Default)]
pub(crate) struct Sharing {
    texts: Pool<str>,
    labels: Pool<Labels>,
    ports: Pool<NamedPorts>,
}

impl Sharing {
    /// Has an object hold what equal parts of others hold. Only kinds of which there are many are worth it.
    pub(crate) fn share(&mut self, object: &mut Object) {
        self.texts.share(&mut object.key.namespace);
        self.texts.share(&mut object.key.name);
        match &mut object.spec {
            Spec::Pod(pod) => self.share_pod(pod),
            Spec::EndpointSlice(slice) => self.share_slice(slice),
            _ => {}
        }
    }

    fn share_pod(&mut self, pod: &mut Pod) {
        let Self { texts, labels, ports } = self;
        for text in [&mut pod.uid, &mut pod.node, &mut pod.service_account, &mut pod.workload_name] {
            texts.share(text);
        }
        let own = pod.labels.iter().map(|(name, value)| (texts.shared(name), texts.shared(value)));
        pod.labels = labels.shared(&Arc::new(own.collect()));
        let own = pod.named_ports.iter().map(|(name, port)| (texts.shared(name), *port));
        pod.named_ports = ports.shared(&Arc::new(own.collect()));
        pod.addresses.shrink_to_fit();
    }

    fn share_slice(&mut self, slice: &mut EndpointSlice) {
        slice.service.iter_mut().for_each(|service| self.texts.share(service));
        slice.ports.iter_mut().for_each(|(name, _)| self.texts.share(name));
        for endpoint in &mut slice.endpoints {
            endpoint.node.iter_mut().for_each(|node| self.texts.share(node));
            if let Some((name, uid)) = &mut endpoint.pod {
                self.texts.share(name);
                uid.iter_mut().for_each(|uid| self.texts.share(uid));
            }
        }
        slice.endpoints.shrink_to_fit();
    }
}
