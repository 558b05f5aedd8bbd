//! Tar archives of which every byte is decided by what goes in: no times, no owners but root, in the order given.

/// An archive being written.
#[derive(Debug, Default)]
pub(crate) struct Tar(Vec<u8>);

const BLOCK: usize = 512;

impl Tar {
    pub(crate) fn folder(&mut self, path: &str, mode: u32) {
        self.header(&format!("{path}/"), mode, 0, b'5');
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.header(path, mode, content.len(), b'0');
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        self.0
    }

    /// POSIX.1-1988 (ustar), which has room for paths of 100 bytes and files of 8 GiB.
    fn header(&mut self, path: &str, mode: u32, size: usize, kind: u8) {
        assert!(path.len() <= 100 && size < 1 << 33, "{path} does not fit an archive of this form");
        let mut header = [0_u8; BLOCK];
        let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, path);
        put(100, &format!("{mode:07o}"));
        put(108, "0000000");
        put(116, "0000000");
        put(124, &format!("{size:011o}"));
        put(136, "00000000000");
        // The sum is taken with blanks in its own place.
        put(148, "        ");
        put(257, "ustar\x0000");
        header[156] = kind;
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&header);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn the_systems_tar_reads_it() {
        let mut tar = Tar::default();
        tar.folder("usr", 0o755);
        tar.file("usr/empty", 0o644, b"");
        tar.file("usr/program", 0o755, &[7; 513]);
        let mut list = Command::new("tar")
            .args(["--list", "--verbose", "--numeric-owner", "--utc", "--file", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("tar is there");
        list.stdin.take().expect("piped").write_all(&tar.finish()).expect("tar reads");
        let output = list.wait_with_output().expect("tar ends");
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).expect("text");
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(lines[0], ["drwxr-xr-x", "0/0", "0", "1970-01-01", "00:00", "usr/"]);
        assert_eq!(lines[1], ["-rw-r--r--", "0/0", "0", "1970-01-01", "00:00", "usr/empty"]);
        assert_eq!(lines[2], ["-rwxr-xr-x", "0/0", "513", "1970-01-01", "00:00", "usr/program"]);
    }
}
