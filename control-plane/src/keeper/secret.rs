//! The CA in a Secret, as Istio's self-signed CA writes it.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Api, api::PostParams};
use mesh_identity::authority::SigningAuthority;
use mesh_runtime::drain::DrainWatcher;
use mesh_xds::backoff::Backoff;
use tokio::{sync::mpsc, time::Instant};

use super::{Keeper, KeeperError, within};
use crate::{
    apiserver::{
        listed::Unlisted,
        watch::{self, Event},
    },
    app::TaskFailed,
};

pub(crate) const NAME: &str = "istio-ca-secret";
const TYPE: &str = "istio.io/ca-root";
/// Who made the Secret, by which an uninstall tells ours from what it must leave alone.
const MADE_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "fairwayd");
/// A start without the Secret is given up after this.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why there is no authority to start with.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("Secret {namespace}/{NAME} holds no usable CA; correct it, or delete it to have a new one made")]
    Content {
        namespace: String,
        #[source]
        source: KeeperError,
    },
    #[error("Secret {namespace}/{NAME} can neither be read nor made: {why}")]
    ApiServer { namespace: String, why: String },
}

/// What the Secret holds.
pub(crate) fn authority(secret: &Secret, now: SystemTime) -> Result<SigningAuthority, KeeperError> {
    let part = |name: &str| {
        let bytes = secret.data.as_ref()?.get(name)?;
        String::from_utf8(bytes.0.clone()).ok()
    };
    super::authority(part, now)
}

/// The authority in the Secret of `namespace`; the first who finds none makes one.
///
/// # Errors
/// When what is there is not usable, or the API server does not let us have it for two minutes.
pub(crate) async fn open(
    api: &Api<Secret>,
    namespace: &str,
    trust_domain: &str,
) -> Result<SigningAuthority, SecretError> {
    let (until, mut backoff) = (Instant::now() + PATIENCE, Backoff::default());
    let content = |source| SecretError::Content { namespace: namespace.to_owned(), source };
    loop {
        match found_or_made(api, namespace, trust_domain).await {
            Ok(Ok(secret)) => return authority(&secret, SystemTime::now()).map_err(content),
            Ok(Err(error)) => return Err(content(error)),
            Err(why) if Instant::now() >= until => {
                return Err(SecretError::ApiServer { namespace: namespace.to_owned(), why });
            }
            Err(why) => tracing::warn!(why, "the CA's Secret cannot be had yet"),
        }
        tokio::time::sleep(backoff.next_delay(&mut rand::rng())).await;
    }
}

async fn found_or_made(
    api: &Api<Secret>,
    namespace: &str,
    trust_domain: &str,
) -> Result<Result<Secret, KeeperError>, String> {
    if let Some(secret) = within(api.get_opt(NAME)).await? {
        return Ok(Ok(secret));
    }
    let made = match SigningAuthority::generate(trust_domain) {
        Ok(authority) => secret(namespace, &authority),
        Err(error) => return Ok(Err(error.into())),
    };
    match within(api.create(&PostParams::default(), &made)).await {
        Ok(secret) => {
            tracing::info!(secret = NAME, namespace, "a new CA was made");
            Ok(Ok(secret))
        }
        // Another replica may have been first: its CA is the one.
        Err(why) => within(api.get_opt(NAME)).await?.map(Ok).ok_or(why),
    }
}

/// Follows the Secret until the drain. One that is deleted leaves the authority in force: who deletes it by mistake can put it back.
pub(crate) async fn follow(keeper: Arc<Keeper>, api: Api<Secret>, drain: DrainWatcher) -> Result<(), TaskFailed> {
    let (sender, mut events) = mpsc::channel(4);
    let fields = format!("metadata.name={NAME}");
    let watching = watch::watch(api, &fields, None, sender, std::convert::identity);
    let following = async {
        let mut unlisted = Unlisted::default();
        while let Some(event) = events.recv().await {
            match event {
                Event::Listing => unlisted.begin([NAME]),
                Event::Set(secret) => {
                    unlisted.named(&NAME);
                    keeper.offer(authority(&secret, SystemTime::now()));
                }
                Event::Listed if !unlisted.end().is_empty() => keeper.keep_last_good(gone()),
                Event::Gone(_) | Event::Unknown => keeper.keep_last_good(gone()),
                Event::Failing(why) | Event::Unserved(why) => {
                    if keeper.metrics.watch_failed("Secret") {
                        tracing::warn!(why, "the CA's Secret cannot be watched; what was read stays in force");
                    }
                }
                Event::Recovered => keeper.metrics.watch_recovered("Secret"),
                Event::Listed => {}
            }
        }
    };
    tokio::select! {
        ((), ()) = async { tokio::join!(watching, following) } => {
            Err(TaskFailed::of("watching the CA's Secret")("it ended without being told to"))
        }
        _ = drain.signalled() => Ok(()),
    }
}

fn gone() -> String {
    "the Secret is gone; the next start would make a new CA".to_owned()
}

/// The Secret as it is made; one that was found never gets the label.
pub(super) fn secret(namespace: &str, authority: &SigningAuthority) -> Secret {
    let parts = [
        ("ca-cert.pem", authority.certificate_pem()),
        ("ca-key.pem", authority.key_pem()),
        ("root-cert.pem", authority.root_pem()),
        // Upstream's has them too.
        ("cert-chain.pem", ""),
        ("key.pem", ""),
    ];
    let data = parts.map(|(name, pem)| (name.to_owned(), ByteString(pem.as_bytes().to_vec())));
    let (name, namespace) = (Some(NAME.to_owned()), Some(namespace.to_owned()));
    let labels = Some(BTreeMap::from([(MADE_BY.0.to_owned(), MADE_BY.1.to_owned())]));
    Secret {
        metadata: ObjectMeta { name, namespace, labels, ..ObjectMeta::default() },
        type_: Some(TYPE.to_owned()),
        data: Some(BTreeMap::from(data)),
        ..Secret::default()
    }
}
