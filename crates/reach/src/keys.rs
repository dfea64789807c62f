//! Keys in OpenSSH's form: reading what is pinned, making what we offer.

use host::{Context, Error, Kind, Result, files};
use russh::keys::ssh_key::LineEnding;
use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
use russh::keys::{HashAlg, PrivateKey, PublicKey};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// A key file is a few lines.
const MAX_KEY_BYTES: u64 = 64 << 10;

/// Reads a public key as it stands in `known_hosts` behind the host, or in a `.pub` file.
///
/// # Errors
/// When it is none, or of a kind that is not spoken (RSA, DSA).
pub fn public(text: &str) -> Result<PublicKey> {
    let what = || format!("reading the host key `{}`", text.chars().take(60).collect::<String>());
    PublicKey::from_openssh(text).map_err(|e| {
        Error::new(Kind::Usage, what(), e).hint(
            "write it as `ssh-ed25519 AAAA…`: the second and third word of `ssh-keyscan -t ed25519 HOST`",
        )
    })
}

/// The fingerprint that people compare: `SHA256:…`.
#[must_use]
pub fn fingerprint(key: &PublicKey) -> String {
    key.fingerprint(HashAlg::Sha256).to_string()
}

/// Reads the private key that is offered to a peer. Never one with a passphrase: nobody is there to type it.
pub(crate) fn private(path: &Path) -> Result<PrivateKey> {
    let what = || format!("reading the key {}", path.display());
    let open = std::fs::metadata(path).context(what)?.permissions().mode() & 0o077;
    if open != 0 {
        return Err(Error::new(Kind::Denied, what(), "others may read it")
            .hint(format!("chmod 600 {}", path.display())));
    }
    let bytes = files::read_bounded(path, MAX_KEY_BYTES)?;
    // What the parser has to say might quote the key.
    let key = PrivateKey::from_openssh(&bytes)
        .map_err(|_| Error::new(Kind::Usage, what(), "it is no OpenSSH private key"))?;
    if key.is_encrypted() {
        return Err(Error::new(Kind::Usage, what(), "it has a passphrase")
            .hint("use a key of koboshi's own: koboshi fleet enroll HOST"));
    }
    Ok(key)
}

/// The public half of the key at `path`, as one line; the key is made when there is none.
///
/// # Errors
/// When it can neither be read nor made.
pub fn ensure(path: &Path, comment: &str) -> Result<String> {
    if !path.exists() {
        make(path, comment)?;
    }
    let what = || format!("reading the key {}", path.display());
    private(path)?.public_key().to_openssh().map_err(|e| Error::new(Kind::System, what(), e))
}

fn make(path: &Path, comment: &str) -> Result<()> {
    let what = || format!("making the key {}", path.display());
    let bad = |e: russh::keys::ssh_key::Error| Error::new(Kind::System, what(), e);
    let mut seed = [0_u8; 32];
    let got = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty()).context(what)?;
    if got != seed.len() {
        return Err(Error::new(Kind::System, what(), "the kernel gave too little randomness"));
    }
    let key =
        PrivateKey::new(KeypairData::Ed25519(Ed25519Keypair::from_seed(&seed)), comment).map_err(bad)?;
    seed.fill(0);
    let text = key.to_openssh(LineEnding::LF).map_err(bad)?;
    files::make_private_dir(path.parent().unwrap_or(Path::new("/")))?;
    files::write_atomic(path, text.as_bytes(), 0o600)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_others_may_not_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys/donate");
        let line = ensure(&path, "koboshi").unwrap();
        assert!(line.starts_with("ssh-ed25519 "), "{line}");
        assert_eq!(ensure(&path, "koboshi").unwrap(), line);
        assert!(fingerprint(&public(&line).unwrap()).starts_with("SHA256:"));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(private(&path).unwrap_err().kind, Kind::Denied);
    }

    #[test]
    fn what_is_no_key_is_one_clear_error() {
        for text in ["", "ssh-ed25519", "ssh-ed25519 !!!", "|1|abc= ssh-ed25519", "-----BEGIN"] {
            let e = public(text).unwrap_err();
            assert!(e.hint.is_some(), "{text}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        files::write_atomic(&path, b"secret words", 0o600).unwrap();
        assert!(!private(&path).unwrap_err().to_string().contains("secret words"));
    }
}
