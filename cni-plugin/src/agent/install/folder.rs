//! The folder of CNI configurations, read.

use std::{
    fs,
    io::{self, Read as _},
    path::Path,
};

use super::plan::{self, Content, Files};

/// A larger one is not read; containerd takes none either.
pub(super) const MAX_CONF: u64 = 2 << 20;

/// The configurations of the folder that a runtime would look at.
pub fn conf_files(folder: &Path) -> io::Result<Files> {
    let mut files = Files::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if plan::is_conf(&name)
            && let Some(content) = content(&entry.path())
        {
            files.insert(name, content);
        }
    }
    Ok(files)
}

/// `None` of what is no file, and of one that vanishes while we look: it was being replaced, and the next event brings its successor.
fn content(path: &Path) -> Option<Content> {
    let read = || {
        let file = fs::File::open(path)?;
        let mut bytes = Vec::new();
        file.take(MAX_CONF + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Ok(metadata) if !metadata.is_file() => return None,
        _ => {}
    }
    let read: io::Result<Vec<u8>> = read();
    match read {
        Ok(bytes) if bytes.len() as u64 > MAX_CONF => Some(Err(format!("it has more than {MAX_CONF} bytes"))),
        Ok(bytes) => Some(String::from_utf8(bytes).map_err(|error| format!("it is no text: {error}"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some(Err(format!("it cannot be read: {error}"))),
    }
}
