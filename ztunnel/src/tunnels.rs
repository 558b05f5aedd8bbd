//! The live tunnels of one pod on one worker, and their peers verified again when revocation lists or trust roots change.
//!
//! Traffic does not come by here: a tunnel is added after its handshake, and what is over leaves when room is made.

use std::{cell::RefCell, sync::Arc, time::SystemTime};

use mesh_core::{identity::Identity, reason::Reason};
use mesh_hbone::{Cut, Secured};
use mesh_identity::{Anchors, Distrust, Manager, PeerRole, Svid, crl::Crls, distrust};
use rustls_pki_types::CertificateDer;

use crate::{flow::Direction, outcome::Outcomes};

/// Tunnels verified again before other tasks get their turn: a signature or two each.
const BATCH: usize = 16;
/// Below this many nothing is swept out.
const FEW: usize = 16;

pub(crate) const REVOKED: &str = "connection closed: peer certificate revoked by CRL";
const ROOT_GONE: &str = "connection closed: the trust root of the peer's certificate is gone";

/// What a handshake was judged by.
#[derive(Clone)]
pub(crate) struct Judged {
    anchors: Arc<Anchors>,
    crls: Arc<Crls>,
}

impl Judged {
    /// To be taken before the handshake with `svid`, so that no change falls between the two.
    pub(crate) fn by(svid: &Svid, identities: &Manager) -> Self {
        Self { anchors: svid.anchors().clone(), crls: identities.trust().crls() }
    }

    fn agrees(&self, other: &Self) -> bool {
        let same_roots = Arc::ptr_eq(&self.anchors, &other.anchors) || self.anchors.has_same_roots(&other.anchors);
        same_roots && Arc::ptr_eq(&self.crls, &other.crls)
    }
}

struct Tunnel {
    cut: Cut,
    chain: Vec<CertificateDer<'static>>,
    direction: Direction,
    /// Of this side.
    identity: Identity,
    since: SystemTime,
    judged: Judged,
}

/// See the module.
pub(crate) struct Tunnels {
    identities: Manager,
    outcomes: Outcomes,
    live: RefCell<Live>,
}

#[derive(Default)]
struct Live {
    tunnels: Vec<Tunnel>,
    sweep_at: usize,
}

impl Tunnels {
    pub(crate) fn new(identities: Manager, outcomes: Outcomes) -> Self {
        Self { identities, outcomes, live: RefCell::default() }
    }

    /// Watches over the tunnel that will run on `secured`, for as long as it lives. `since` and `judged` are from before its handshake.
    pub(crate) fn add(
        &self,
        secured: &Secured,
        direction: Direction,
        identity: &Identity,
        since: SystemTime,
        judged: Judged,
    ) {
        let chain = secured.peer_certificates().to_vec();
        let mut tunnel = Tunnel { cut: secured.cut(), chain, direction, identity: identity.clone(), since, judged };
        // What changed during the handshake announced itself before we were here.
        self.review(&mut tunnel);
        let live = &mut *self.live.borrow_mut();
        if live.tunnels.len() >= live.sweep_at.max(FEW) {
            live.tunnels.retain(|tunnel| !tunnel.cut.is_over());
            live.sweep_at = live.tunnels.len() * 2;
        }
        live.tunnels.push(tunnel);
    }

    /// Verifies every tunnel's peer again by what holds now, and cuts those that do not pass. Answers how many.
    pub(crate) async fn reverify(&self) -> usize {
        let mut left = std::mem::take(&mut self.live.borrow_mut().tunnels);
        let mut cut = 0;
        while !left.is_empty() {
            let mut batch = left.split_off(left.len().saturating_sub(BATCH));
            batch.retain(|tunnel| !tunnel.cut.is_over());
            batch.retain_mut(|tunnel| {
                let good = self.review(tunnel);
                cut += usize::from(!good);
                good
            });
            self.live.borrow_mut().tunnels.append(&mut batch);
            tokio::task::yield_now().await;
        }
        cut
    }

    /// Whether the tunnel may stay.
    fn review(&self, tunnel: &mut Tunnel) -> bool {
        // A certificate of ours that has lapsed took no root with it.
        let anchors = self.identities.cached(&tunnel.identity).map(|svid| svid.anchors().clone());
        let anchors = anchors.unwrap_or_else(|| tunnel.judged.anchors.clone());
        let now = Judged { anchors, crls: self.identities.trust().crls() };
        if now.agrees(&tunnel.judged) {
            return true;
        }
        let role = match tunnel.direction {
            Direction::Inbound => PeerRole::Client,
            Direction::Outbound => PeerRole::Server,
        };
        match distrust(&now.anchors, &tunnel.chain, role, tunnel.since) {
            None => {
                tunnel.judged = now;
                return true;
            }
            Some(Distrust::Revoked) => {
                self.outcomes.revoked(tunnel.direction);
                tunnel.cut.cut(Reason::Revoked, REVOKED);
            }
            Some(Distrust::RootGone) => tunnel.cut.cut(Reason::Tls, ROOT_GONE),
        }
        false
    }
}
