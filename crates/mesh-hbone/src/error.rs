//! Why a tunnel, or a stream in it, could not be opened.

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use mesh_core::reason::{Fault, Reason};

use crate::engine::limits::Abuse;

type Cause = Arc<dyn std::error::Error + Send + Sync>;

/// Cheap to clone: everyone who waited for one dial gets it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The peer did not wait for the answer to its CONNECT.
    #[error("the peer has given up")]
    Abandoned,
    /// The tunnel's owner ended it; see [`crate::Cut`].
    #[error("{message}")]
    Cut { reason: Reason, message: &'static str },
    /// The connector did not produce a TLS stream.
    #[error("{message}")]
    Dial { reason: Reason, message: String, source: Option<Cause> },
    #[error("the peer did not answer a CONNECT within {0:?}")]
    AnswerTimeout(Duration),
    /// The peer ran into a limit; it was told ENHANCE_YOUR_CALM.
    #[error("the peer misbehaves: {}", .0.label())]
    Abuse(Abuse),
    #[error("the peer is going away (GOAWAY)")]
    GoAway,
    #[error("HTTP/2 handshake did not finish within {0:?}")]
    HandshakeTimeout(Duration),
    /// A PING was not answered, or SETTINGS never came.
    #[error("{0}")]
    Silent(&'static str),
    /// The tunnel broke while the CONNECT was open.
    #[error("the tunnel was lost")]
    Lost { source: Cause },
    /// RST_STREAM with REFUSED_STREAM (RFC 9113 §8.7): not processed.
    #[error("the peer refused the stream")]
    Refused,
    #[error("the source pod is gone")]
    Retired,
    #[error("http status: {0}")]
    Status(StatusCode),
}

impl Error {
    /// For connectors: what failed, in one line, and its cause.
    pub fn dial(reason: Reason, message: impl Into<String>, source: Option<Cause>) -> Self {
        Self::Dial { reason, message: message.into(), source }
    }

    pub fn reason(&self) -> Reason {
        match self {
            Self::Cut { reason, .. } | Self::Dial { reason, .. } => *reason,
            Self::Abandoned
            | Self::AnswerTimeout(_)
            | Self::GoAway
            | Self::HandshakeTimeout(_)
            | Self::Silent(_)
            | Self::Abuse(_)
            | Self::Lost { .. }
            | Self::Refused
            | Self::Status(_) => Reason::Tunnel,
            Self::Retired => Reason::Drain,
        }
    }

    pub fn fault(&self) -> Fault {
        self.reason().fault()
    }

    /// Whether another attempt may succeed. No application byte was ever sent when one of these is returned, so it is also safe.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Dial { reason, .. } => {
                matches!(
                    reason,
                    Reason::Connect
                        | Reason::ConnectTimeout
                        | Reason::NetworkPolicy
                        | Reason::Revoked
                        | Reason::Tls
                        | Reason::Tunnel
                )
            }
            // The next tunnel's handshake decides anew.
            Self::Cut { .. }
            | Self::GoAway
            | Self::AnswerTimeout(_)
            | Self::HandshakeTimeout(_)
            | Self::Silent(_)
            | Self::Abuse(_)
            | Self::Lost { .. }
            | Self::Refused => true,
            // 503: the far side could not reach the application. Other statuses are verdicts.
            Self::Status(status) => *status == StatusCode::SERVICE_UNAVAILABLE,
            Self::Abandoned | Self::Retired => false,
        }
    }
}
