//! What discovery said, kept for the next start (`FAIRWAY_STATE_DIR`): a log of accepted responses, appended every few seconds and
//! rewritten without what is outdated when it has grown.
//!
//! ```text
//! file  = frame(header) frame(response)*
//! frame = length (4 bytes, big endian)  checksum (32 bytes)  payload
//! ```
//!
//! A log that is damaged anywhere is ignored whole: what comes before the damage was in force once, but may be laxer than what was in
//! force last, and nobody could tell.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mesh_runtime::drain::DrainWatcher;
use mesh_xds::{client::Journal, server::version_of};
use prost::Message as _;
use proto::discovery::{DeltaDiscoveryResponse, Resource};
use tokio::sync::Notify;

const NAME: &str = "discovery";
const MAGIC: &str = "fairway discovery 1";
const CHECKSUM: usize = 32;
/// Between writes: what changes within it is written together, and at most lost.
const PAUSE: Duration = Duration::from_secs(3);
/// A log is rewritten when it is twice what it was after the last time, and this much more.
const SLACK: u64 = 8 << 20;
/// Not yet written; beyond it the disk is too slow, and the log is given up.
const MAX_PENDING: usize = 512 << 20;
const MAX_FILE: u64 = 2 << 30;
/// Resources per frame of a rewritten log.
const CHUNK: usize = 1_000;

/// Where the log is, and whose it is: another control plane's facts are not ours.
#[derive(Clone, Debug)]
pub(super) struct Store {
    path: PathBuf,
    header: String,
}

impl Store {
    pub(super) fn new(directory: &Path, address: &str, cluster: &str, node: &str) -> Self {
        let header = format!("{MAGIC}\n{address}\n{cluster}\n{node}");
        Self { path: directory.join(NAME), header }
    }

    /// What can be read of the log; nothing when there is none, or when it is not this proxy's.
    pub(super) fn load(&self) -> Vec<DeltaDiscoveryResponse> {
        let path = self.path.display();
        match self.read() {
            Ok(responses) => responses,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                tracing::warn!(%path, %error, "saved state ignored");
                Vec::new()
            }
        }
    }

    fn read(&self) -> io::Result<Vec<DeltaDiscoveryResponse>> {
        if fs::metadata(&self.path)?.len() > MAX_FILE {
            return Err(io::Error::other("it is larger than 2 GiB"));
        }
        decode(&fs::read(&self.path)?, &self.header)
    }

    /// Writes what is current anew, beside the log, then in its place. Not by `whole_file`: what was written stays open, to be added to.
    fn rewrite(&self) -> io::Result<(File, u64)> {
        let responses = current(self.load());
        let beside = self.path.with_extension("new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        let mut bytes = frame(self.header.as_bytes());
        for response in responses {
            bytes.extend(frame(&response.encode_to_vec()));
        }
        file.write_all(&bytes)?;
        file.sync_data()?;
        fs::rename(&beside, &self.path)?;
        Ok((file, bytes.len() as u64))
    }
}

fn decode(mut bytes: &[u8], header: &str) -> io::Result<Vec<DeltaDiscoveryResponse>> {
    match next_frame(&mut bytes) {
        Some(found) if found == header.as_bytes() => {}
        Some(_) => return Err(io::Error::other("it is of another control plane, cluster, node or version")),
        None => return Err(io::Error::other("it has no readable header")),
    }
    let mut responses = Vec::new();
    while !bytes.is_empty() {
        let response = next_frame(&mut bytes).and_then(|payload| DeltaDiscoveryResponse::decode(payload).ok());
        responses.push(response.ok_or_else(|| io::Error::other("it is damaged"))?);
    }
    Ok(responses)
}

fn next_frame<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (checksum, rest) = rest.split_at_checked(CHECKSUM)?;
    let (payload, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
    *bytes = rest;
    (version_of(payload).as_bytes() == checksum).then_some(payload)
}

/// Empty for what no frame can hold, which discovery's own limit excludes.
fn frame(payload: &[u8]) -> Vec<u8> {
    let Ok(length) = u32::try_from(payload.len()) else { return Vec::new() };
    [&length.to_be_bytes()[..], version_of(payload).as_bytes(), payload].concat()
}

/// The same state in as few words: the last of each resource, and a word on every type that was heard of.
fn current(responses: Vec<DeltaDiscoveryResponse>) -> Vec<DeltaDiscoveryResponse> {
    let mut types: BTreeMap<String, BTreeMap<String, Resource>> = BTreeMap::new();
    for response in responses {
        let resources = types.entry(response.type_url).or_default();
        resources.extend(response.resources.into_iter().map(|resource| (resource.name.clone(), resource)));
        for removed in &response.removed_resources {
            resources.remove(removed);
        }
    }
    let mut out = Vec::new();
    for (type_url, resources) in types {
        let mut resources: Vec<Resource> = resources.into_values().collect();
        loop {
            let rest = resources.split_off(resources.len().min(CHUNK));
            let type_url = type_url.clone();
            out.push(DeltaDiscoveryResponse { type_url, resources, ..DeltaDiscoveryResponse::default() });
            if rest.is_empty() {
                break;
            }
            resources = rest;
        }
    }
    out
}

/// Frames on their way to the disk.
#[derive(Debug, Default)]
struct Pending {
    bytes: Mutex<Option<Vec<u8>>>,
    more: Notify,
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The client's end.
struct Recorder(Arc<Pending>);

impl Journal for Recorder {
    fn record(&mut self, accepted: DeltaDiscoveryResponse) {
        let mut pending = self.0.lock();
        // Nobody writes any more.
        let Some(bytes) = pending.as_mut() else { return };
        bytes.extend(frame(&accepted.encode_to_vec()));
        if bytes.len() > MAX_PENDING {
            *pending = None;
        }
        drop(pending);
        self.0.more.notify_one();
    }
}

/// The disk's end; to be run beside the client.
#[derive(Debug)]
pub(super) struct Writer {
    store: Store,
    pending: Arc<Pending>,
}

pub(super) fn journal(store: Store) -> (Box<dyn Journal>, Writer) {
    let pending = Arc::new(Pending { bytes: Mutex::new(Some(Vec::new())), more: Notify::new() });
    (Box::new(Recorder(pending.clone())), Writer { store, pending })
}

impl Writer {
    /// Writes until the drain, then what is left. A log that cannot be rewritten stays as it is; one that cannot be added to is removed:
    /// half of what happened would mislead the next start.
    pub(super) async fn run(self, drain: DrainWatcher) {
        let path = self.store.path.display();
        let begun = match self.rewrite().await {
            Ok(begun) => begun,
            Err(error) => {
                *self.pending.lock() = None;
                tracing::error!(%path, %error, "cannot save state; a start without the control plane will know what is saved already");
                return remove(&self.store.path.with_extension("new"));
            }
        };
        if let Err(error) = self.write_all(begun, drain).await {
            *self.pending.lock() = None;
            tracing::error!(%path, %error, "cannot save state; the next start will need the control plane");
            remove(&self.store.path);
        }
    }

    async fn write_all(&self, begun: (File, u64), drain: DrainWatcher) -> io::Result<()> {
        let stop = drain.signalled();
        tokio::pin!(stop);
        let (mut file, mut base) = begun;
        let mut size = base;
        loop {
            let stopping = tokio::select! {
                _ = &mut stop => true,
                () = self.pause() => false,
            };
            let Some(bytes) = self.pending.lock().as_mut().map(std::mem::take) else {
                return Err(io::Error::other("it does not keep up with discovery"));
            };
            size += bytes.len() as u64;
            let path = self.store.path.clone();
            let appended = blocking(move || append(file, &bytes, &path)).await?;
            let Some(appended) = appended else {
                tracing::info!("another process of this node keeps the state from now on");
                *self.pending.lock() = None;
                return Ok(());
            };
            file = appended;
            if stopping {
                return Ok(());
            }
            if size > 2 * base + SLACK {
                (file, base) = self.rewrite().await?;
                size = base;
            }
        }
    }

    /// Until there is something to write, and a little more of it.
    async fn pause(&self) {
        self.pending.more.notified().await;
        tokio::time::sleep(PAUSE).await;
    }

    async fn rewrite(&self) -> io::Result<(File, u64)> {
        let store = self.store.clone();
        blocking(move || store.rewrite()).await
    }
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::error!(path = %path.display(), %error, "cannot remove the saved state");
    }
}

/// Nothing when `file` is not the log any more: in an upgrade two processes overlap, and the one that started last replaced it.
fn append(mut file: File, bytes: &[u8], path: &Path) -> io::Result<Option<File>> {
    let (ours, now) = (file.metadata()?, fs::metadata(path)?);
    if (ours.dev(), ours.ino()) != (now.dev(), now.ino()) {
        return Ok(None);
    }
    file.write_all(bytes)?;
    file.sync_data()?;
    Ok(Some(file))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// For the fuzzer: must never panic, whatever a disk returns.
pub fn decode_any(bytes: &[u8]) -> usize {
    decode(bytes, MAGIC).map_or(0, |responses| current(responses).len())
}

#[cfg(test)]
mod tests {
    use mesh_runtime::drain;

    use super::*;

    fn response(names: &[&str], removed: &[&str]) -> DeltaDiscoveryResponse {
        let resource = |name: &&str| Resource { name: (*name).to_owned(), ..Resource::default() };
        DeltaDiscoveryResponse {
            type_url: "t".to_owned(),
            resources: names.iter().map(resource).collect(),
            removed_resources: removed.iter().map(|n| (*n).to_owned()).collect(),
            ..DeltaDiscoveryResponse::default()
        }
    }

    fn names(responses: Vec<DeltaDiscoveryResponse>) -> Vec<String> {
        current(responses).into_iter().flat_map(|r| r.resources).map(|r| r.name).collect()
    }

    async fn written(store: &Store, responses: Vec<DeltaDiscoveryResponse>) {
        let (mut journal, writer) = journal(store.clone());
        let (trigger, watcher) = drain::channel();
        responses.into_iter().for_each(|response| journal.record(response));
        let writing = tokio::spawn(writer.run(watcher));
        trigger.drain(Duration::from_secs(20)).await;
        writing.await.unwrap();
    }

    #[tokio::test]
    async fn what_is_recorded_is_read_again_without_what_went() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path(), "a", "c", "n");
        assert!(store.load().is_empty());
        written(&store, vec![response(&["a", "b"], &[]), response(&["c"], &["a"])]).await;
        assert_eq!(names(store.load()), ["b", "c"]);
        written(&store, vec![response(&[], &["b"])]).await;
        assert_eq!(names(store.load()), ["c"]);
        assert!(Store::new(directory.path(), "other", "c", "n").load().is_empty());
    }

    #[tokio::test]
    async fn a_damaged_log_is_no_log_since_its_beginning_may_be_laxer_than_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path(), "a", "c", "n");
        written(&store, vec![response(&["a"], &[]), response(&["b"], &[])]).await;
        let whole = fs::read(&store.path).unwrap();
        fs::write(&store.path, &whole[..whole.len() - 1]).unwrap();
        assert!(store.load().is_empty());
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(&store.path, flipped).unwrap();
        assert!(store.load().is_empty());
        fs::write(&store.path, b"nonsense").unwrap();
        assert!(store.load().is_empty());
    }

    #[tokio::test]
    async fn of_two_processes_the_one_that_started_last_keeps_the_state() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path(), "a", "c", "n");
        let (mut old, old_writer) = journal(store.clone());
        let (mut new, new_writer) = journal(store.clone());
        let (file, _) = old_writer.rewrite().await.unwrap();
        let (trigger, watcher) = drain::channel();
        new.record(response(&["new"], &[]));
        let writing = tokio::spawn(new_writer.run(watcher));
        trigger.drain(Duration::from_secs(20)).await;
        writing.await.unwrap();
        old.record(response(&["old"], &[]));
        let bytes = old_writer.pending.lock().take().unwrap();
        assert!(append(file, &bytes, &store.path).unwrap().is_none());
        assert_eq!(names(store.load()), ["new"]);
    }

    #[tokio::test]
    async fn a_disk_that_fails_leaves_no_half_truth() {
        let store = Store::new(Path::new("/nonexistent"), "a", "c", "n");
        let (mut journal, writer) = journal(store.clone());
        let (_trigger, watcher) = drain::channel();
        writer.run(watcher).await;
        journal.record(response(&["a"], &[]));
        assert!(store.load().is_empty());
    }
}
