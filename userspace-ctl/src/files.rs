// SPDX-License-Identifier: GPL-2.0

//! Files that an operator names, read with a bound, and files of our own, replaced as a whole.

use serde::Serialize;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Reads a file of at most `most` bytes, so that a device or a wrong file does not fill the memory.
pub fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        let said = format!("it is longer than {} MiB", most >> 20);
        return Err(io::Error::new(ErrorKind::FileTooLarge, said));
    }
    Ok(bytes)
}

/// Replaces a file that only root may read by a value as JSON, all at once.
pub fn replace_private(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let new = path.with_extension("json.new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_never_ends_is_not_read() {
        let error = read(Path::new("/dev/zero"), 1 << 20).unwrap_err();
        assert_eq!(error.to_string(), "it is longer than 1 MiB");
        assert_eq!(read(Path::new("/dev/null"), 0).unwrap(), b"");
    }

    #[test]
    fn replaced_as_a_whole_and_private() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("a.json");
        for value in [[1, 2], [3, 4]] {
            replace_private(&path, &value).unwrap();
            let text = format!("[{},{}]", value[0], value[1]);
            assert_eq!(read(&path, 100).unwrap(), text.as_bytes());
        }
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(replace_private(&dir.path().join("no/a.json"), &0).is_err());
    }
}
