//! A control plane that ends every stream at once.

use std::sync::Mutex;

use mesh_runtime::drain;
use proto::{
    ADDRESS_TYPE_URL,
    discovery::aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
};
use tokio::io::DuplexStream;
use tonic::{
    Request, Response,
    transport::{Endpoint, Server},
};

use super::super::*;

type Answers = Pin<Box<dyn tokio_stream::Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

/// Ends every stream after so many responses.
#[derive(Clone, Copy)]
struct Brief(usize);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Brief {
    type DeltaAggregatedResourcesStream = Answers;

    async fn delta_aggregated_resources(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let response = DeltaDiscoveryResponse { type_url: ADDRESS_TYPE_URL.to_owned(), ..Default::default() };
        Ok(Response::new(Box::pin(tokio_stream::iter(vec![Ok(response); self.0]))))
    }
}

/// In memory, so that time passes only while both sides wait; remembers when it was asked.
struct Memory {
    server: Brief,
    asked: Arc<Mutex<Vec<Instant>>>,
}

impl Transport for Memory {
    fn channel(&self) -> Pin<Box<dyn Future<Output = Result<Channel, BoxError>> + Send + '_>> {
        self.asked.lock().unwrap().push(Instant::now());
        let (near, far) = tokio::io::duplex(1 << 16);
        let service = AggregatedDiscoveryServiceServer::new(self.server);
        let incoming = tokio_stream::iter([Ok::<DuplexStream, std::io::Error>(far)]);
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        let mut near = Some(near);
        Box::pin(async move {
            let connector = tower::service_fn(move |_| {
                let near = near.take();
                async move {
                    near.map(hyper_util::rt::TokioIo::new)
                        .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected))
                }
            });
            Ok(Endpoint::from_static("http://memory").connect_with_connector(connector).await?)
        })
    }

    fn metadata(&self) -> Result<MetadataMap, BoxError> {
        Ok(MetadataMap::new())
    }
}

struct Ignore;

impl Handler for Ignore {
    fn apply(&mut self, _: Update) {}
    fn synced(&mut self, _: &'static str) {}
    fn restore(&mut self, _: Vec<(&'static str, Update)>) {}
}

#[tokio::test(start_paused = true)]
async fn a_control_plane_that_ends_every_stream_at_once_is_asked_ever_more_rarely() {
    for responses in [0, 1] {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let transport = Memory { server: Brief(responses), asked: asked.clone() };
        let types = [ADDRESS_TYPE_URL];
        let client =
            Client::new(Arc::new(transport), Node::default(), &types, Box::new(Ignore), Box::new(|_: Event<'_>| {}));
        let (trigger, watcher) = drain::channel();
        let running = tokio::spawn(client.run(watcher));
        // Of the paused clock: it jumps from attempt to attempt.
        tokio::time::sleep(Duration::from_secs(600)).await;
        trigger.drain(Duration::from_secs(1)).await;
        running.await.unwrap();
        let asked = asked.lock().unwrap();
        // Eleven doublings, then at most one per half the cap.
        assert!((40..=95).contains(&asked.len()), "{responses}: {} attempts in ten minutes", asked.len());
        let last = asked[asked.len() - 1] - asked[asked.len() - 2];
        assert!(last >= Duration::from_millis(7500), "{responses}: {last:?}");
    }
}
