//! Who calls: the bearer of a token, for the CA and discovery alike.

use std::{
    net::{IpAddr, Ipv4Addr},
    pin::Pin,
    sync::Arc,
};

use mesh_xds::server::{self, Authenticate, Caller};
use tonic::{Extensions, Status, metadata::MetadataMap};

use crate::{guests::Peer, metrics::Metrics};

/// Knows whose tokens are whose.
pub(crate) trait Tokens: Send + Sync + 'static {
    /// Of a token that came from an address, which proves nothing.
    fn bearer<'a>(
        &'a self,
        token: &'a str,
        from: IpAddr,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, NotBelieved>> + Send + 'a>>;
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

/// `(namespace, service account)` of node proxies, which may ask on behalf of pods.
#[derive(Clone, Debug, Default)]
pub(crate) struct TrustedAccounts(Arc<[(Arc<str>, Arc<str>)]>);

impl TrustedAccounts {
    pub(crate) fn new(accounts: impl IntoIterator<Item = (Arc<str>, Arc<str>)>) -> Self {
        Self(accounts.into_iter().collect())
    }

    pub(crate) fn contains(&self, caller: &Caller) -> bool {
        self.0.iter().any(|(namespace, account)| *namespace == caller.namespace && *account == caller.service_account)
    }
}

/// Of a request of anybody else: enough to name 100,000 resources, and too little to fill the memory.
const MAX_REQUEST: usize = 8 * 1024 * 1024;

/// Lets in whom [`Tokens`] believe.
#[derive(Clone)]
pub(crate) struct Bearers {
    pub(crate) tokens: Arc<dyn Tokens>,
    pub(crate) trusted: TrustedAccounts,
    pub(crate) metrics: Metrics,
}

impl Bearers {
    /// Who makes a call. Its connection may stay from then on.
    pub(crate) async fn caller(&self, metadata: &MetadataMap, extensions: &Extensions) -> Result<Caller, Status> {
        let peer = extensions.get::<Peer>();
        // Every connection of ours has a peer.
        let from = peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), Peer::address);
        let believed = match token(metadata) {
            Ok(token) => self.tokens.bearer(token, from).await,
            Err(why) => Err(NotBelieved::Refused(why.to_owned())),
        };
        if let (Ok(_), Some(peer)) = (&believed, peer) {
            peer.accept();
        }
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
        extensions: &'a Extensions,
    ) -> Pin<Box<dyn Future<Output = Result<Caller, Status>> + Send + 'a>> {
        Box::pin(self.caller(metadata, extensions))
    }

    fn max_request(&self, caller: &Caller) -> usize {
        if self.trusted.contains(caller) { server::MAX_REQUEST } else { MAX_REQUEST }
    }
}

#[cfg(test)]
mod tests {
    use mesh_runtime::metrics::Registry;

    use super::*;

    struct Nobody;

    impl Tokens for Nobody {
        fn bearer<'a>(
            &'a self,
            _: &'a str,
            _: IpAddr,
        ) -> Pin<Box<dyn Future<Output = Result<Caller, NotBelieved>> + Send + 'a>> {
            Box::pin(std::future::ready(Err(NotBelieved::Refused("nobody is believed".to_owned()))))
        }
    }

    #[test]
    fn only_node_proxies_may_send_requests_that_take_much_memory() {
        let trusted = TrustedAccounts::new([("istio-system".into(), "ztunnel".into())]);
        let metrics = Metrics::register(&Registry::new());
        let bearers = Bearers { tokens: Arc::new(Nobody), trusted, metrics };
        let caller = |namespace: &str, account: &str| Caller {
            node: "n".into(),
            namespace: namespace.into(),
            service_account: account.into(),
            pod: "p".into(),
        };
        assert_eq!(bearers.max_request(&caller("istio-system", "ztunnel")), server::MAX_REQUEST);
        for (namespace, account) in [("istio-system", "other"), ("tenant", "ztunnel")] {
            assert_eq!(bearers.max_request(&caller(namespace, account)), MAX_REQUEST);
        }
    }
}
