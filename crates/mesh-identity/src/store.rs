//! Certificates and their keys in files, so that a process that was killed while the CA was away comes back with them.
//!
//! Opt-in, and meant for a file system in memory: whoever reads the files is the workloads. One file per identity, for its owner only,
//! replaced whole.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use mesh_core::identity::Identity;
use mesh_runtime::{private::PrivateFolder, whole_file};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use crate::{
    svid::{Svid, SvidError},
    trust::Trust,
};

const MAGIC: &[u8] = b"fairway svid 1\n";
/// A chain and a bundle of roots take a few kilobytes.
const MAX_FILE: usize = 1 << 20;
const MAX_PARTS: usize = 256;
/// Identities that are read; a node has fewer pods.
const MAX_FILES: usize = 4096;
const SUFFIX: &str = ".svid";

/// A folder of keys.
#[derive(Debug)]
pub struct KeyStore {
    folder: PrivateFolder,
}

impl KeyStore {
    pub fn new(folder: PrivateFolder) -> Self {
        Self { folder }
    }

    /// Every certificate that is valid at `now`; what is outdated or was left unfinished is removed, and what is no
    /// certificate is left alone and reported.
    pub(crate) fn load(&self, now: SystemTime, trust: &Arc<Trust>) -> Vec<Svid> {
        let files = match fs::read_dir(self.folder.path()) {
            Ok(files) => files,
            Err(error) => {
                tracing::warn!(folder = %self.folder.path().display(), %error, "cannot read the folder of keys");
                return Vec::new();
            }
        };
        let paths = files.filter_map(|file| file.ok().map(|file| file.path()));
        let paths = paths.filter(|path| has_suffix(path, SUFFIX) || is_unfinished(path));
        let mut loaded = Vec::new();
        for (index, path) in paths.take(MAX_FILES).enumerate() {
            if is_unfinished(&path) {
                discard(&path);
                continue;
            }
            match self.read(&path, index as u64 + 1, trust) {
                Ok(svid) if svid.is_valid_at(now) => loaded.push(svid),
                Ok(svid) => self.remove(&svid.identity),
                Err(why) => tracing::warn!(path = %path.display(), why, "not a certificate of ours; ignored"),
            }
        }
        loaded
    }

    fn read(&self, path: &Path, generation: u64, trust: &Arc<Trust>) -> Result<Svid, String> {
        let found = fs::symlink_metadata(path).map_err(|error| error.to_string())?;
        if !found.is_file() || found.uid() != self.folder.owner() || found.mode() & 0o077 != 0 {
            return Err("not a private file; expected mode 0600 and this process's user".to_owned());
        }
        if found.len() > MAX_FILE as u64 {
            return Err(format!("{} bytes long; expected at most {MAX_FILE}", found.len()));
        }
        let bytes = fs::read(path).map_err(|error| error.to_string())?;
        let svid = decode(&bytes).ok_or("damaged")?.into_svid(generation, trust.clone());
        let svid = svid.map_err(|error| error.to_string())?;
        if self.path(&svid.identity) != path {
            return Err(format!("speaks for {}, which its name does not say", svid.identity));
        }
        Ok(svid)
    }

    /// Keeps `svid` in place of what was kept for its identity.
    pub(crate) fn save(&self, svid: &Svid) {
        let path = self.path(&svid.identity);
        if let Err(error) = whole_file::replace(&path, &encode(&Kept::of(svid)), 0o600) {
            tracing::warn!(path = %path.display(), %error, "certificate not kept for a restart");
        }
    }

    pub(crate) fn remove(&self, identity: &Identity) {
        discard(&self.path(identity));
    }

    fn path(&self, identity: &Identity) -> PathBuf {
        self.folder.path().join(escaped(&identity.to_string()) + SUFFIX)
    }
}

fn discard(path: &Path) {
    if let Err(error) = whole_file::remove(path) {
        tracing::warn!(path = %path.display(), %error, "cannot remove a key that is not needed any more");
    }
}

/// No two texts have the same.
fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// Of a process that was killed meanwhile.
fn is_unfinished(path: &Path) -> bool {
    path.file_name().is_some_and(|name| whole_file::is_unfinished(&name.to_string_lossy()))
}

fn has_suffix(path: &Path, suffix: &str) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(suffix))
}

/// What a file holds.
#[derive(Debug)]
pub struct Kept {
    key: PrivatePkcs8KeyDer<'static>,
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
}

const KEY: u8 = b'k';
const CHAIN: u8 = b'c';
const ROOT: u8 = b'r';

impl Kept {
    fn of(svid: &Svid) -> Self {
        Self { key: svid.key.clone_key(), chain: svid.chain.clone(), roots: svid.roots.to_vec() }
    }

    fn into_svid(self, generation: u64, trust: Arc<Trust>) -> Result<Svid, SvidError> {
        let got = crate::peer_identity(&self.chain);
        let identity = got.ok_or(SvidError::Malformed(0))?;
        Svid::from_parts(identity, self.key, self.chain, self.roots, generation, trust)
    }
}

/// After the magic, parts in the order of [`Kept`]'s fields: a kind, a length (32 bits, big endian) and so many bytes of DER.
pub fn encode(kept: &Kept) -> Vec<u8> {
    let key = std::iter::once((KEY, kept.key.secret_pkcs8_der()));
    let chain = kept.chain.iter().map(|certificate| (CHAIN, &**certificate));
    let roots = kept.roots.iter().map(|certificate| (ROOT, &**certificate));
    let mut bytes = MAGIC.to_vec();
    for (kind, der) in key.chain(chain).chain(roots) {
        bytes.push(kind);
        bytes.extend(u32::try_from(der.len()).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(der);
    }
    bytes
}

/// Takes a file apart; nothing for one that is not whole. What is in it is not looked at yet.
pub fn decode(bytes: &[u8]) -> Option<Kept> {
    let mut rest = bytes.strip_prefix(MAGIC).filter(|_| bytes.len() <= MAX_FILE)?;
    let (mut key, mut chain, mut roots) = (None, Vec::new(), Vec::new());
    while let Some((kind, after)) = rest.split_first() {
        let (length, after) = after.split_first_chunk()?;
        let (der, after) = after.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        match *kind {
            KEY if key.is_none() && chain.is_empty() && roots.is_empty() => {
                key = Some(PrivatePkcs8KeyDer::from(der.to_vec()))
            }
            CHAIN if roots.is_empty() && key.is_some() => chain.push(CertificateDer::from(der.to_vec())),
            ROOT if key.is_some() => roots.push(CertificateDer::from(der.to_vec())),
            _ => return None,
        }
        if chain.len() + roots.len() > MAX_PARTS {
            return None;
        }
        rest = after;
    }
    key.map(|key| Kept { key, chain, roots })
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt as _, time::Duration};

    use super::*;
    use crate::{authority::SigningAuthority, svid::tests::issue};

    const HOUR: Duration = Duration::from_secs(3600);

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn store() -> (tempfile::TempDir, KeyStore) {
        let above = tempfile::tempdir().unwrap();
        let store = KeyStore::new(PrivateFolder::open(&above.path().join("keys")).unwrap());
        (above, store)
    }

    fn loaded(store: &KeyStore, now: SystemTime) -> Vec<Identity> {
        store.load(now, &Arc::default()).into_iter().map(|svid| svid.identity).collect()
    }

    #[test]
    fn what_was_kept_is_there_again_until_it_expires() {
        let (_above, store) = store();
        let authority = SigningAuthority::generate("cluster.local").unwrap();
        let svid = issue(&authority, &Identity::new("cluster.local", "demo", "a"), HOUR);
        store.save(&svid);
        store.save(&svid);
        let unfinished = store.folder.path().join("a.svid.tmp.7");
        fs::write(&unfinished, "half").unwrap();
        let again = store.load(SystemTime::now(), &Arc::default()).remove(0);
        assert_eq!((&again.chain, &again.roots, again.identity), (&svid.chain, &svid.roots, svid.identity.clone()));
        assert!(!unfinished.exists(), "of a process that was killed");
        let path = store.path(&svid.identity);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(loaded(&store, SystemTime::now() + 2 * HOUR).is_empty() && !path.exists(), "expired: removed");
    }

    #[test]
    fn files_that_are_damaged_open_to_others_or_misnamed_are_ignored() {
        let (_above, store) = store();
        let authority = SigningAuthority::generate("cluster.local").unwrap();
        let svids =
            ["a", "b", "c", "d"].map(|name| issue(&authority, &Identity::new("cluster.local", "demo", name), HOUR));
        svids.iter().for_each(|svid| store.save(svid));
        let [a, b, c, _] = svids.each_ref().map(|svid| store.path(&svid.identity));
        let whole = fs::read(&a).unwrap();
        fs::write(&a, &whole[..whole.len() - 1]).unwrap();
        mode(&b, 0o640);
        fs::rename(&c, store.folder.path().join("c.svid")).unwrap();
        assert_eq!(loaded(&store, SystemTime::now()), [svids[3].identity.clone()]);
    }
}
