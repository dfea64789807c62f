//! Small secrets of koboshi's own, sealed with the store's key beside the store: whoever copies koboshi's state without
//! its key has nothing of them.

use crate::key::Key;
use crate::seal::{self, FileKind};
use host::{Context, Result};
use std::path::Path;

/// Seals `plain` into `file` (0600), whole or not at all.
///
/// # Errors
/// When there is no key, or the file cannot be written.
pub fn write_note(file: &Path, key_file: &Path, plain: &[u8]) -> Result<()> {
    let what = || format!("sealing {}", file.display());
    let key = Key::read(key_file)?;
    let beside = file.with_extension(format!("{}.tmp", std::process::id()));
    // Left by a writer of this number that was killed.
    let _ = std::fs::remove_file(&beside);
    let written = seal::write_small(beside.clone(), FileKind::Note, &key, plain)
        .and_then(|(sealed, _)| sealed.sync_all().context(what))
        .and_then(|()| std::fs::rename(&beside, file).context(what));
    if written.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    written?;
    let dir = file.parent().unwrap_or(Path::new("/"));
    std::fs::File::open(dir).and_then(|d| d.sync_all()).context(what)
}

/// Opens it. `NotFound` when there is none.
///
/// # Errors
/// `Corrupt` when it is damaged, or was sealed with another key.
pub fn read_note(file: &Path, key_file: &Path) -> Result<Vec<u8>> {
    std::fs::metadata(file).context(|| format!("opening {}", file.display()))?;
    seal::read_small(file, FileKind::Note, &Key::read(key_file)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use host::Kind;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_note_opens_with_its_key_and_in_no_other_way() {
        let dir = tempfile::tempdir().unwrap();
        let (file, key, other) = (dir.path().join("n"), dir.path().join("k/1"), dir.path().join("k/2"));
        assert!(write_note(&file, &key, b"hush").is_err(), "no key, no note");
        assert!(!file.exists());
        Key::create(&key).unwrap();
        Key::create(&other).unwrap();
        assert_eq!(read_note(&file, &key).unwrap_err().kind, Kind::NotFound);
        write_note(&file, &key, b"hush").unwrap();
        assert_eq!(read_note(&file, &key).unwrap(), b"hush");
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(4).any(|w| w == b"hush"));
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read_note(&file, &other).unwrap_err().kind, Kind::Corrupt);
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            std::fs::write(&file, &bad).unwrap();
            assert!(read_note(&file, &key).is_err(), "byte {at}");
            std::fs::write(&file, &bytes[..at]).unwrap();
            assert!(read_note(&file, &key).is_err(), "cut at {at}");
        }
    }
}
