//! Addresses of hosts that the registry knows by name only, from the process's own resolver.

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use hickory_proto::rr::Name;
use hickory_resolver::{TokioResolver, config::LookupIpStrategy};
use tokio::{runtime::Handle, time::timeout};

/// What a connection waits for a name.
const DEADLINE: Duration = Duration::from_secs(5);
/// Per nameserver and attempt.
const PATIENCE: Duration = Duration::from_secs(2);
const CACHE: u64 = 4096;
/// Names looked up at once; more fail.
const FLIGHTS: usize = 1024;

type Found = Arc<[IpAddr]>;
type Flight = Shared<BoxFuture<'static, Found>>;

/// Looks up, and remembers for as long as the answer says. Cheap to clone; clones share the cache.
#[derive(Clone)]
pub struct Lookups(Arc<Inner>);

struct Inner {
    /// Why there is none, otherwise.
    resolver: Result<TokioResolver, String>,
    /// Where the resolver's own tasks run: workers come and go.
    runtime: Handle,
    flights: Mutex<HashMap<Arc<str>, Flight>>,
}

impl fmt::Debug for Lookups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lookups").field("resolver", &self.0.resolver.as_ref().map(|_| "system")).finish_non_exhaustive()
    }
}

impl Lookups {
    /// Of the system's configuration; without a usable one every look-up fails, and the log says why.
    ///
    /// # Panics
    /// Outside a runtime.
    pub fn new(ipv6: bool) -> Self {
        let resolver = resolver(ipv6);
        if let Err(error) = &resolver {
            tracing::warn!(error, "hosts known by name only cannot be reached");
        }
        Self(Arc::new(Inner { resolver, runtime: Handle::current(), flights: Mutex::default() }))
    }

    /// The addresses of a host, of both families where the mesh has both; none when it has none or cannot be looked up in time. All who
    /// ask meanwhile wait for one look-up. Cancel safe.
    pub async fn addresses(&self, host: &Arc<str>) -> Found {
        self.flight(host).await
    }

    fn flight(&self, host: &Arc<str>) -> Flight {
        let mut flights = self.flights();
        if let Some(flight) = flights.get(host) {
            return flight.clone();
        }
        if flights.len() >= FLIGHTS {
            tracing::warn!(%host, limit = FLIGHTS, "too many names are being looked up");
            return std::future::ready(Found::default()).boxed().shared();
        }
        let (lookups, name) = (self.clone(), host.clone());
        // The landing is made by the task: a runtime that has ended drops its tasks here and now, under our lock.
        let task = self.0.runtime.spawn(async move {
            let landing = Landing(lookups, name);
            landing.0.look_up(&landing.1).await
        });
        let flight = async move { task.await.unwrap_or_default() }.boxed().shared();
        flights.insert(host.clone(), flight.clone());
        flight
    }

    async fn look_up(&self, host: &str) -> Found {
        let resolver = match &self.0.resolver {
            Ok(resolver) => resolver,
            Err(error) => {
                tracing::debug!(host, error, "cannot look up");
                return Found::default();
            }
        };
        let Ok(mut name) = Name::from_utf8(host) else { return Found::default() };
        // A name with a dot is whole: search domains would ask strangers about it.
        name.set_fqdn(name.num_labels() > 1 || host.ends_with('.'));
        match timeout(DEADLINE, resolver.lookup_ip(name)).await {
            Ok(Ok(found)) => found.iter().map(|ip| ip.to_canonical()).collect(),
            Ok(Err(error)) => {
                tracing::debug!(host, %error, "cannot look up");
                Found::default()
            }
            Err(_) => {
                tracing::debug!(host, deadline = ?DEADLINE, "no answer");
                Found::default()
            }
        }
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<Arc<str>, Flight>> {
        self.0.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A flight is over however it ends.
struct Landing(Lookups, Arc<str>);

impl Drop for Landing {
    fn drop(&mut self) {
        self.0.flights().remove(&self.1);
    }
}

fn resolver(ipv6: bool) -> Result<TokioResolver, String> {
    let mut builder = TokioResolver::builder_tokio().map_err(|error| error.to_string())?;
    let options = builder.options_mut();
    options.cache_size = CACHE;
    options.timeout = PATIENCE;
    options.ip_strategy = if ipv6 { LookupIpStrategy::Ipv4AndIpv6 } else { LookupIpStrategy::Ipv4Only };
    builder.build().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_who_ask_for_a_name_wait_for_one_look_up_which_is_then_forgotten() {
        let lookups = Lookups::new(false);
        let host: Arc<str> = "localhost".into();
        let (first, second) = (lookups.flight(&host), lookups.flight(&host));
        assert!(first.ptr_eq(&second));
        assert_eq!(*first.await, [IpAddr::from([127, 0, 0, 1])]);
        second.await;
        assert!(lookups.flights().is_empty());
    }

    #[tokio::test]
    async fn a_runtime_that_has_ended_finds_nothing_and_stops_nobody() {
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let ended = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let lookups = ended.block_on(async { Lookups::new(false) });
            drop(ended);
            drop(tell.send(lookups.flight(&"localhost".into())));
        });
        let flight = told.recv_timeout(DEADLINE).expect("an answer");
        assert!(flight.await.is_empty());
    }
}
