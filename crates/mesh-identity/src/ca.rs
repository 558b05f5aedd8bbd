//! What the manager needs of a certificate authority.

use std::{future::Future, pin::Pin};

use mesh_core::identity::Identity;

pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Signs requests. Implementations bound their own waiting.
pub trait CaClient: Send + Sync {
    /// PEM of leaf, intermediates and, last, the root bundle.
    fn sign(&self, identity: &Identity, csr_pem: String) -> BoxFuture<'_, Result<Vec<String>, CaError>>;
}

/// Why a request was not signed.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("the CA did not answer within {0:?}")]
    Timeout(std::time::Duration),
    #[error("the CA refused: {0}")]
    Refused(String),
    #[error("cannot reach the CA at {address}: {cause}")]
    Unreachable { address: String, cause: String },
    #[error("cannot read the token {path}")]
    Token { path: String, source: std::io::Error },
    #[error("the token file {0} is empty")]
    EmptyToken(String),
    #[error("the token is not usable as a header value")]
    MalformedToken,
}
