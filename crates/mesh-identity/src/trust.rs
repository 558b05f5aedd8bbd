//! What decides, beside its roots, whether a peer's certificate is believed: the process's policy, and the revocation lists of the
//! moment. One per process, shared by every certificate's configurations.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::crypto::CryptoProvider;
use tokio::sync::watch;

use crate::{
    crl::Crls,
    tls::{Compliance, provider_of},
};

/// Cheap to share; changes reach every handshake that verifies after them.
#[derive(Debug)]
pub struct Trust {
    names: Vec<Arc<str>>,
    pub(crate) provider: Arc<CryptoProvider>,
    crls: ArcSwap<Crls>,
    /// Counts what may make a live tunnel's peer unacceptable.
    changes: watch::Sender<u64>,
}

impl Default for Trust {
    fn default() -> Self {
        Self::new(Vec::new(), Compliance::default())
    }
}

impl Trust {
    /// `names`: trust domains that are one, under all its names while they migrate; empty or one unless they do.
    pub fn new(names: Vec<Arc<str>>, compliance: Compliance) -> Self {
        let provider = provider_of(compliance);
        Self { names, provider, crls: ArcSwap::default(), changes: watch::Sender::new(0) }
    }

    /// Replaces the revocation lists, for handshakes from now on and, through [`Self::changes`], for live tunnels.
    pub fn set_crls(&self, crls: Crls) {
        self.crls.store(Arc::new(crls));
        self.changed();
    }

    /// The lists in force.
    pub fn crls(&self) -> Arc<Crls> {
        self.crls.load_full()
    }

    /// Marked changed when lists were replaced, or an identity's roots: live tunnels are then to be verified again.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    pub(crate) fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// Whether two trust domains are one.
    pub(crate) fn same_domain(&self, a: &Arc<str>, b: &Arc<str>) -> bool {
        a == b || (self.names.contains(a) && self.names.contains(b))
    }
}
