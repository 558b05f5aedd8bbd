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

/// What a handshake is judged by.
pub(crate) struct Judged {
    /// Of this side.
    identity: Identity,
    anchors: Arc<Anchors>,
    crls: Arc<Crls>,
    at: SystemTime,
}

struct Tunnel {
    cut: Cut,
    chain: Vec<CertificateDer<'static>>,
    direction: Direction,
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

    /// What holds now for who speaks as `svid`. To be taken before a handshake, so that no change falls between the two.
    pub(crate) fn judged_by(&self, svid: &Svid) -> Judged {
        let crls = self.identities.trust().crls();
        Judged { identity: svid.identity.clone(), anchors: svid.anchors().clone(), crls, at: SystemTime::now() }
    }

    /// Watches over the tunnel that will run on `secured`, for as long as it lives.
    pub(crate) fn add(&self, secured: &Secured, direction: Direction, judged: Judged) {
        let mut tunnel = Tunnel { cut: secured.cut(), chain: secured.peer_certificates().to_vec(), direction, judged };
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
        let judged = &mut tunnel.judged;
        // A certificate of ours that has lapsed took no root with it.
        let anchors = self.identities.cached(&judged.identity).map(|svid| svid.anchors().clone());
        let anchors = anchors.unwrap_or_else(|| judged.anchors.clone());
        let crls = self.identities.trust().crls();
        let same_roots = Arc::ptr_eq(&anchors, &judged.anchors) || anchors.has_same_roots(&judged.anchors);
        if same_roots && Arc::ptr_eq(&crls, &judged.crls) {
            return true;
        }
        let role = match tunnel.direction {
            Direction::Inbound => PeerRole::Client,
            Direction::Outbound => PeerRole::Server,
        };
        match distrust(&anchors, &tunnel.chain, role, judged.at) {
            None => {
                (judged.anchors, judged.crls) = (anchors, crls);
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
