//! Who calls: the bearer of a token, for the CA and discovery alike.

use std::{pin::Pin, sync::Arc};

use mesh_xds::server::{Authenticate, Caller};
use tonic::{Status, metadata::MetadataMap};

use crate::metrics::Metrics;

/// Knows whose tokens are whose.
pub(crate) trait Tokens: Send + Sync + 'static {
    fn bearer<'a>(&'a self, token: &'a str) -> Pin<Box<dyn Future<Output = Result<Caller, NotBelieved>> + Send + 'a>>;
}

/// Why a bearer is not let in. For the log; the caller learns only whether to come again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotBelieved {
    #[error("{0}")]
    Refused(String),
    /// It cannot be told yet.
    #[error("{0}")]
    Unknown(String),
}

/// Lets in whom [`Tokens`] believe.
#[derive(Clone)]
pub(crate) struct Bearers {
    pub(crate) tokens: Arc<dyn Tokens>,
    pub(crate) metrics: Metrics,
}

impl Bearers {
    pub(crate) async fn caller(&self, metadata: &MetadataMap) -> Result<Caller, Status> {
        let believed = match token(metadata) {
            Ok(token) => self.tokens.bearer(token).await,
            Err(why) => Err(NotBelieved::Refused(why.to_owned())),
        };
        believed.map_err(|error| match error {
            NotBelieved::Refused(why) => {
                self.metrics.authentication_failures.inc();
                tracing::warn!(why, "caller not authenticated");
                Status::unauthenticated("authentication failure")
            }
            NotBelieved::Unknown(why) => {
                self.metrics.authentications_deferred.inc();
                tracing::info!(why, "caller told to come again");
                Status::unavailable("the caller cannot be authenticated yet")
            }
        })
    }
}

fn token(metadata: &MetadataMap) -> Result<&str, &'static str> {
    let header = metadata.get("authorization").ok_or("no authorization metadata")?;
    let token = header.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
    token.ok_or("the authorization metadata is not `Bearer <token>`")
}

impl Authenticate for Bearers {
    fn authenticate<'a>(
        &'a self,
        metadata: &'a MetadataMap,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, Status>> + Send + 'a>> {
        Box::pin(self.caller(metadata))
    }
}
