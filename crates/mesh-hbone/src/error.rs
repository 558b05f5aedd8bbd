//! Why a tunnel, or a stream in it, could not be opened.

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use mesh_core::reason::{Fault, Reason};

type Cause = Arc<dyn std::error::Error + Send + Sync>;

/// Cheap to clone: everyone who waited for one dial gets it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The connector did not produce a TLS stream.
    #[error("{message}")]
    Dial { reason: Reason, message: String, source: Option<Cause> },
    #[error("the peer did not answer a CONNECT within {0:?}")]
    AnswerTimeout(Duration),
    #[error("the authority cannot be written as a header")]
    Authority,
    #[error("the peer is going away (GOAWAY)")]
    GoAway,
    #[error("HTTP/2 handshake failed")]
    Handshake { source: Cause },
    #[error("HTTP/2 handshake did not finish within {0:?}")]
    HandshakeTimeout(Duration),
    #[error("the peer did not answer a PING within {0:?}")]
    KeepAlive(Duration),
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
            Self::Dial { reason, .. } => *reason,
            Self::AnswerTimeout(_)
            | Self::GoAway
            | Self::Handshake { .. }
            | Self::HandshakeTimeout(_)
            | Self::KeepAlive(_)
            | Self::Lost { .. }
            | Self::Refused
            | Self::Status(_) => Reason::Tunnel,
            Self::Authority => Reason::Internal,
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
                    Reason::Connect | Reason::ConnectTimeout | Reason::NetworkPolicy | Reason::Tls | Reason::Tunnel
                )
            }
            Self::GoAway
            | Self::AnswerTimeout(_)
            | Self::Handshake { .. }
            | Self::HandshakeTimeout(_)
            | Self::KeepAlive(_)
            | Self::Lost { .. }
            | Self::Refused => true,
            // 503: the far side could not reach the application. Other statuses are verdicts.
            Self::Status(status) => *status == StatusCode::SERVICE_UNAVAILABLE,
            Self::Authority | Self::Retired => false,
        }
    }

    /// Of a stream whose answer was awaited.
    pub(crate) fn of_stream(error: h2::Error) -> Self {
        match error.reason() {
            Some(h2::Reason::REFUSED_STREAM) => Self::Refused,
            _ if error.is_go_away() => Self::GoAway,
            _ => Self::Lost { source: Arc::new(error) },
        }
    }
}
