//! Everything that keeps a connection from going as asked, each with its [`Reason`].

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use mesh_core::{
    authorize::Decision,
    reason::{Fault, Reason},
};
use mesh_identity::IdentityError;
use mesh_net::{CopyOutcome, End, Side};

/// One connection's failure. `Display` says one level; [`ProxyError::chain`] says all of it.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error("attempted recursive call to ourselves")]
    Loop,
    #[error("cannot tell where the connection was going")]
    OriginalDestination(#[source] io::Error),
    #[error("failed to fetch information about local workload: {0}")]
    UnknownWorkload(String),
    /// No next hop.
    #[error("{detail}")]
    NoRoute { reason: Reason, detail: String },
    #[error("no certificate for the local identity")]
    Identity(#[source] IdentityError),
    #[error("connection to {to} failed")]
    Connect { to: SocketAddr, source: io::Error },
    #[error("{0}")]
    Tunnel(mesh_hbone::Error),
    #[error("tls handshake error")]
    Tls(#[source] io::Error),
    #[error("the peer did not finish its handshake within {0:?}")]
    HandshakeTimeout(Duration),
    #[error("the peer's certificate has expired since its handshake")]
    PeerExpired,
    #[error("{0} handshakes of this address are pending already")]
    TooManyHandshakes(usize),
    /// The peer broke SOCKS, or its CONNECT was not one.
    #[error("{0}")]
    BadRequest(String),
    #[error("ip mismatch: {dialled} != {asked}")]
    AddressMismatch { dialled: std::net::IpAddr, asked: std::net::IpAddr },
    #[error("unknown host or port: {0}")]
    UnknownTarget(String),
    #[error("connection closed due to policy rejection: {}", .0.explanation)]
    Denied(Box<Decision>),
    #[error("connection closed due to policy change: {}", .0.explanation)]
    PolicyChange(Box<Decision>),
    #[error("{} reset the connection", who(.0))]
    Reset(Side),
    #[error("copying to or from {} failed", who(.side))]
    Copy { side: Side, source: io::Error },
    #[error("connection closed due to connection drain")]
    Drain,
}

/// Flows are copied with the local application's socket first.
fn who(side: &Side) -> &'static str {
    match side {
        Side::First => "the local application",
        Side::Second => "the peer",
    }
}

impl ProxyError {
    pub fn reason(&self) -> Reason {
        match self {
            Self::Loop | Self::AddressMismatch { .. } | Self::UnknownTarget(_) => Reason::BadTarget,
            Self::OriginalDestination(_) => Reason::Internal,
            Self::UnknownWorkload(_) => Reason::UnknownWorkload,
            Self::NoRoute { reason, .. } => *reason,
            Self::Identity(_) => Reason::Identity,
            Self::Connect { source, .. } => connect_reason(source),
            Self::Tunnel(error) => error.reason(),
            Self::Tls(error) => tls_reason(error),
            Self::HandshakeTimeout(_) | Self::PeerExpired => Reason::Tls,
            Self::TooManyHandshakes(_) | Self::BadRequest(_) => Reason::BadRequest,
            Self::Denied(decision) | Self::PolicyChange(decision) => decision.reason.unwrap_or(Reason::Denied),
            Self::Reset(_) | Self::Copy { .. } => Reason::Reset,
            Self::Drain => Reason::Drain,
        }
    }

    pub fn fault(&self) -> Fault {
        self.reason().fault()
    }

    /// Whether another attempt at connecting may succeed; true only for failures before any application byte was sent.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Connect { source, .. } => connect_reason(source) != Reason::Internal,
            Self::Tunnel(error) => error.retryable(),
            _ => false,
        }
    }

    /// This error and its causes, `: `-joined.
    pub fn chain(&self) -> String {
        mesh_runtime::telemetry::error_chain(self)
    }
}

impl From<mesh_hbone::Error> for ProxyError {
    fn from(error: mesh_hbone::Error) -> Self {
        Self::Tunnel(error)
    }
}

/// What a failed TCP connect stands for. Running out of descriptors, ports or memory is nobody's fault but ours.
pub(crate) fn connect_reason(error: &io::Error) -> Reason {
    match error.kind() {
        io::ErrorKind::TimedOut => Reason::ConnectTimeout,
        io::ErrorKind::ConnectionRefused
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable
        | io::ErrorKind::NetworkDown
        | io::ErrorKind::PermissionDenied => Reason::Connect,
        _ => Reason::Internal,
    }
}

/// What a failed handshake stands for.
pub(crate) fn tls_reason(error: &io::Error) -> Reason {
    if mesh_identity::is_revocation(error) { Reason::Revoked } else { Reason::Tls }
}

/// How a copied flow ended.
pub(crate) fn flow_result(outcome: CopyOutcome) -> Result<(), ProxyError> {
    match outcome.end {
        End::Clean => Ok(()),
        End::Reset(side) => Err(ProxyError::Reset(side)),
        End::Error(side, source) => Err(match source.get_ref().and_then(|inner| inner.downcast_ref()) {
            // Ours: no copying failed.
            Some(cut @ mesh_hbone::Error::Cut { .. }) => ProxyError::Tunnel(cut.clone()),
            _ => ProxyError::Copy { side, source },
        }),
    }
}

/// Why a pod's listeners did not come up.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot listen on {address} for {what}")]
    Listen { what: &'static str, address: SocketAddr, source: io::Error },
    #[error("no worker threads are running")]
    NoWorkers,
    #[error(transparent)]
    Worker(#[from] mesh_runtime::workers::WorkerGone),
}

/// The cause of a dial that everyone who waited for it gets.
pub(crate) fn shared_cause(
    error: impl std::error::Error + Send + Sync + 'static,
) -> Option<Arc<dyn std::error::Error + Send + Sync>> {
    Some(Arc::new(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_names_every_level_once() {
        let source = io::Error::from(io::ErrorKind::ConnectionRefused);
        let error = ProxyError::Connect { to: ([127, 0, 0, 1], 80).into(), source };
        assert_eq!(error.to_string(), "connection to 127.0.0.1:80 failed");
        assert_eq!(error.chain(), "connection to 127.0.0.1:80 failed: connection refused");
        assert_eq!((error.reason(), error.retryable()), (Reason::Connect, true));
    }

    #[test]
    fn a_flow_whose_tunnel_we_cut_says_why_and_nothing_else() {
        let cut = mesh_hbone::Error::Cut { reason: Reason::Revoked, message: crate::tunnels::REVOKED };
        let end = End::Error(Side::Second, io::Error::other(cut));
        let error = flow_result(CopyOutcome { sent: 0, received: 0, end }).unwrap_err();
        assert_eq!(error.chain(), "connection closed: peer certificate revoked by CRL");
        assert_eq!(error.reason().response_flag(), "CERT_REVOKED");
    }

    #[test]
    fn a_verdict_is_final_and_an_unreachable_endpoint_is_not() {
        let denied = ProxyError::Denied(Box::new(Decision::deny(Reason::Denied, "no", 1)));
        assert!(!denied.retryable());
        assert!(!ProxyError::from(mesh_hbone::Error::Status(http::StatusCode::UNAUTHORIZED)).retryable());
        assert!(ProxyError::from(mesh_hbone::Error::GoAway).retryable());
    }
}
