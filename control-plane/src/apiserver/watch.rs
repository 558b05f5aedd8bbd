//! List, then watch, for ever: what is there, and every change of it, in order.
//!
//! A failure never takes back what was told: the watch goes on where it was, or lists again, and whoever listens compares the two lists.

use std::time::Duration;

use futures_util::TryStreamExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ListMeta;
use kube::{
    Api, Resource,
    api::{ApiResource, ListParams, WatchEvent, WatchParams},
};
use mesh_runtime::telemetry::error_chain;
use mesh_xds::backoff::Backoff;
use serde::de::DeserializeOwned;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use super::{
    answer::{NoAnswer, within},
    served,
};

/// Objects per page of a list.
const PAGE: u32 = 500;
/// For the answer to one request; of a watch, for its beginning.
const ANSWER: Duration = Duration::from_secs(30);
/// The server ends a watch after so many seconds, so that one whose connection died unnoticed is soon replaced.
const WATCH_SECONDS: u32 = 60;
/// A watch that says nothing for longer is dead.
const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 10);
/// A watch that ends sooner has failed.
const BRIEF: Duration = Duration::from_secs(1);
/// How often a kind that the server does not know is asked for.
const UNKNOWN_RETRY: Duration = Duration::from_secs(10);
/// A kind that was known, or whose absence is doubted, must have been unknown for so long before its objects count as gone: a server that
/// starts knows its custom kinds a little later than the others.
const UNKNOWN_BELIEVED: Duration = Duration::from_secs(30);

/// What a watch tells. Between [`Event::Listing`] and [`Event::Listed`] everything there is comes as [`Event::Set`]; whatever was there
/// before and did not come again is gone. A list that fails in between is begun anew.
#[derive(Debug)]
pub(crate) enum Event<K> {
    Listing,
    Set(K),
    Listed,
    Gone(K),
    /// The server does not know this kind: there are no objects of it.
    Unknown,
    /// The server has this kind, and not as it is asked for. Like [`Event::Failing`], but the same until somebody changes it.
    Unserved(String),
    /// What was told stays true as far as is known, but may be old.
    Failing(String),
    Recovered,
}

impl<K> Event<K> {
    pub(crate) fn map<T>(self, of: impl FnOnce(K) -> T) -> Event<T> {
        match self {
            Self::Listing => Event::Listing,
            Self::Set(object) => Event::Set(of(object)),
            Self::Listed => Event::Listed,
            Self::Gone(object) => Event::Gone(of(object)),
            Self::Unknown => Event::Unknown,
            Self::Unserved(why) => Event::Unserved(why),
            Self::Failing(why) => Event::Failing(why),
            Self::Recovered => Event::Recovered,
        }
    }
}

/// Why a watch stopped.
enum Stopped {
    /// Nobody listens any more.
    Unheard,
    Failed {
        why: String,
        /// Something was missed, or may have been.
        relist: bool,
        unknown: bool,
    },
    /// In its time.
    Ended,
}

impl Stopped {
    fn of(error: &kube::Error) -> Self {
        let (relist, unknown) = match error {
            // What came and is no refusal was an event that was not understood, and is lost.
            kube::Error::Api(status) => (status.code == 410 || status.code < 400, status.code == 404),
            kube::Error::SerdeError(_) => (true, false),
            _ => (false, false),
        };
        Self::Failed { why: error_chain(error), relist, unknown }
    }

    fn unanswered(error: &NoAnswer) -> Self {
        match error {
            NoAnswer::Failed(error) => Self::of(error),
            NoAnswer::Late(_) => Self::failed(error.to_string()),
        }
    }

    fn failed(why: impl Into<String>) -> Self {
        Self::Failed { why: why.into(), relist: false, unknown: false }
    }
}

/// Watches the objects that `fields` select, all of them if it is empty, until nobody listens. That the server does not know the kind is
/// believed at once of one that was never known; where to take that for "there are none" would open what they close, the kind is
/// `doubted`: it must be there at no other version, and have no definition, or stay unknown for a while.
pub(crate) async fn watch<K, T>(
    api: Api<K>,
    fields: &str,
    doubted: Option<ApiResource>,
    told: mpsc::Sender<T>,
    tell: impl Fn(Event<K>) -> T,
) where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let mut watch = Watch { api, fields, doubted, told, tell, version: None, failing: false };
    let mut backoff = Backoff::default();
    let (mut was_listed, mut unknown_since) = (false, None);
    loop {
        let began = Instant::now();
        let stopped = match watch.version.clone() {
            None => watch.list().await,
            Some(version) => watch.follow(version).await,
        };
        if !matches!(stopped, Stopped::Failed { .. }) || began.elapsed() > BRIEF {
            backoff.reset();
        }
        let (why, relist, unknown) = match stopped {
            Stopped::Unheard => return,
            Stopped::Ended => {
                (was_listed, unknown_since) = (true, None);
                continue;
            }
            Stopped::Failed { why, relist, unknown } => (why, relist, unknown),
        };
        if relist || unknown {
            watch.version = None;
        }
        let pause = if unknown {
            let since = *unknown_since.get_or_insert(began);
            let patient = was_listed || watch.doubted.is_some() && !watch.is_undefined().await;
            let event = watch.instead().await.or_else(|| {
                let believed = !patient || began - since >= UNKNOWN_BELIEVED;
                believed.then_some(Event::Unknown)
            });
            match event {
                Some(Event::Unknown) => (was_listed, watch.failing) = (false, false),
                Some(_) => (unknown_since, watch.failing) = (None, true),
                None => {}
            }
            if let Some(event) = event
                && watch.send(event).await.is_err()
            {
                return;
            }
            UNKNOWN_RETRY
        } else {
            (unknown_since, watch.failing) = (None, true);
            if watch.send(Event::Failing(why)).await.is_err() {
                return;
            }
            backoff.next_delay(&mut rand::rng())
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = watch.told.closed() => return,
        }
    }
}

struct Watch<'f, K, T, F> {
    api: Api<K>,
    fields: &'f str,
    doubted: Option<ApiResource>,
    told: mpsc::Sender<T>,
    tell: F,
    /// Up to which everything was told; `None` before the first list, and when a new one is needed.
    version: Option<String>,
    failing: bool,
}

impl<K, T, F: Fn(Event<K>) -> T> Watch<'_, K, T, F>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    async fn send(&self, event: Event<K>) -> Result<(), Stopped> {
        self.told.send((self.tell)(event)).await.map_err(|_| Stopped::Unheard)
    }

    async fn is_undefined(&self) -> bool {
        let Some(resource) = &self.doubted else { return false };
        let client = self.api.clone().into_client();
        timeout(ANSWER, served::is_undefined(&client, resource)).await.unwrap_or(false)
    }

    /// What is the matter with a kind that was not found, but for its not being there.
    async fn instead(&self) -> Option<Event<K>> {
        let resource = self.doubted.as_ref()?;
        let client = self.api.clone().into_client();
        match within(ANSWER, served::versions(&client, resource)).await {
            Ok(versions) if versions.is_empty() => None,
            Ok(versions) => Some(Event::Unserved(served::otherwise(resource, &versions))),
            Err(error) => Some(Event::Failing(error_chain(&error))),
        }
    }

    async fn list(&mut self) -> Stopped {
        match self.pages().await {
            Ok(version) => {
                self.version = Some(version);
                Stopped::Ended
            }
            Err(stopped) => stopped,
        }
    }

    async fn pages(&mut self) -> Result<String, Stopped> {
        let mut params = ListParams::default().limit(PAGE);
        params.field_selector = Some(self.fields.to_owned()).filter(|fields| !fields.is_empty());
        self.send(Event::Listing).await?;
        loop {
            let page = within(ANSWER, self.api.list(&params)).await.map_err(|error| Stopped::unanswered(&error))?;
            self.recovered().await?;
            for object in page.items {
                self.send(Event::Set(object)).await?;
            }
            let ListMeta { continue_, resource_version, .. } = page.metadata;
            params.continue_token = continue_.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                self.send(Event::Listed).await?;
                return resource_version.ok_or_else(|| Stopped::failed("the list has no resourceVersion"));
            }
        }
    }

    async fn follow(&mut self, version: String) -> Stopped {
        match self.events(version).await {
            Ok(()) => Stopped::Ended,
            Err(stopped) => stopped,
        }
    }

    async fn events(&mut self, version: String) -> Result<(), Stopped> {
        let mut params = WatchParams::default().timeout(WATCH_SECONDS);
        params.field_selector = Some(self.fields.to_owned()).filter(|fields| !fields.is_empty());
        let began = Instant::now();
        let events = within(ANSWER, self.api.watch(&params, &version)).await;
        let events = events.map_err(|error| Stopped::unanswered(&error))?;
        let mut events = std::pin::pin!(events);
        // A refusal comes as if it were the first event: a watch works that says nothing of the kind for a moment.
        let mut works = false;
        loop {
            let event = match timeout(if works { SILENCE } else { BRIEF }, events.try_next()).await {
                Ok(event) => event.map_err(|error| Stopped::of(&error))?,
                Err(_) if works => return Err(Stopped::failed("the watch has fallen silent")),
                Err(_) => {
                    works = true;
                    self.recovered().await?;
                    continue;
                }
            };
            match event {
                Some(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                    self.seen(object.meta().resource_version.clone());
                    self.send(Event::Set(object)).await?;
                }
                Some(WatchEvent::Deleted(object)) => {
                    self.seen(object.meta().resource_version.clone());
                    self.send(Event::Gone(object)).await?;
                }
                Some(WatchEvent::Bookmark(bookmark)) => self.seen(Some(bookmark.metadata.resource_version)),
                Some(WatchEvent::Error(status)) => return Err(Stopped::of(&kube::Error::Api(status))),
                None if began.elapsed() < BRIEF => return Err(Stopped::failed("the watch ended at once")),
                None => return Ok(()),
            }
        }
    }

    fn seen(&mut self, version: Option<String>) {
        if let Some(version) = version.filter(|version| !version.is_empty()) {
            self.version = Some(version);
        }
    }

    async fn recovered(&mut self) -> Result<(), Stopped> {
        if std::mem::take(&mut self.failing) { self.send(Event::Recovered).await } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests;
