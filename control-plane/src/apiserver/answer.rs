//! One answer of the API server, within a deadline.

use std::time::Duration;

use tokio::time::timeout;

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoAnswer {
    #[error(transparent)]
    Failed(#[from] kube::Error),
    #[error("the API server did not answer within {0:?}")]
    Late(Duration),
}

/// The answer to a request, which is given up after `limit`: it may still be carried out.
pub(crate) async fn within<T>(limit: Duration, answer: impl Future<Output = kube::Result<T>>) -> Result<T, NoAnswer> {
    match timeout(limit, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(NoAnswer::Late(limit)),
    }
}
