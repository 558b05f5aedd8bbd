//! The pages of a pod's programs, through the API server: admin ports listen on the pod's loopback only.

use std::time::Duration;

use anyhow::Context as _;
use http::{Request, header::HOST};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;

use super::Cluster;

const DEADLINE: Duration = Duration::from_secs(20);
/// What a ztunnel knows of a very large mesh.
const PAGE_LIMIT: usize = 1 << 30;

impl Cluster {
    /// HTTP GET of a port of a pod: status and body.
    pub(crate) async fn page(
        &self,
        namespace: &str,
        pod: &str,
        port: u16,
        path: &str,
    ) -> anyhow::Result<(u16, String)> {
        let what = || format!("{namespace}/{pod}, port {port}, through {}", self.server);
        let answer = tokio::time::timeout(DEADLINE, self.exchange(namespace, pod, port, path)).await;
        let answer = answer.unwrap_or_else(|_| Err(anyhow::anyhow!("nothing within {} s", DEADLINE.as_secs())));
        answer.with_context(|| format!("no answer of {}", what()))
    }

    async fn exchange(&self, namespace: &str, pod: &str, port: u16, path: &str) -> anyhow::Result<(u16, String)> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let mut forwarder =
            pods.portforward(pod, &[port]).await.context("cannot forward a port (permission pods/portforward)")?;
        let stream = forwarder.take_stream(port).context("the forwarded port has no stream")?;
        let answer = get(TokioIo::new(stream), path).await;
        forwarder.abort();
        answer
    }
}

async fn get<S>(stream: S, path: &str) -> anyhow::Result<(u16, String)>
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin,
{
    let (mut sender, connection) = http1::handshake(stream).await?;
    let request = Request::get(path).header(HOST, "localhost").body(Empty::<Bytes>::new())?;
    let exchange = async {
        let (parts, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, PAGE_LIMIT).collect().await.map_err(|error| anyhow::anyhow!(error))?;
        anyhow::Ok((parts.status.as_u16(), String::from_utf8_lossy(&body.to_bytes()).into_owned()))
    };
    tokio::pin!(exchange, connection);
    tokio::select! {
        answer = &mut exchange => answer,
        // The other end may close as soon as it has said everything.
        ended = &mut connection => { ended?; exchange.await }
    }
}
