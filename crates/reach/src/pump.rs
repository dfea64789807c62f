//! The SSH part, run in a child of its own: connects, proves the host, offers the one key, and then carries bytes
//! between its standard streams and the peer's forced command until either side ends.
//!
//! Each phase has a limit, and so has silence; above all of them stands the caller, who kills the child. What the peer
//! writes to its standard error is dropped: it is nobody's evidence.

use crate::keys;
use host::clock::Deadline;
use host::{Context, Error, Kind, Result};
use russh::client::{self, Handler};
use russh::keys::{Algorithm, EcdsaCurve, PrivateKeyWithHashAlg, PublicKey, PublicKeyOrCertificate};
use russh::{ChannelMsg, Disconnect, Preferred};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// One address is tried for this long.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 4;
/// From the first byte to the running command: two key exchanges' worth on a busy machine.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(15);
/// A conversation without a deadline of its caller's ends after this.
const TOTAL_LIMIT: Duration = Duration::from_secs(120);
/// Bytes on their way that nobody has taken yet: one copy fills it many times.
const WINDOW_BYTES: u32 = 8 << 20;
/// What is read of the caller's requests at a time.
const PIECE_BYTES: usize = 64 << 10;
/// The command we ask for. The peer's `authorized_keys` decides what runs; a key without a forced command runs this.
const COMMAND: &str = "koboshi donate";

/// Whom to talk to, and how to know them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Target {
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// The account there.
    pub user: String,
    /// The one key that the host must prove, in OpenSSH's form. Empty only for [`scan`].
    pub host_key: String,
    /// The private key that is offered.
    pub identity: PathBuf,
}

impl Target {
    fn words(&self) -> String {
        format!("{}@{} port {}", self.user, self.host, self.port)
    }
}

/// Accepts exactly one key; remembers what was shown instead.
struct Pinned {
    key: Option<PublicKey>,
    shown: Arc<Mutex<Option<PublicKey>>>,
}

impl Handler for Pinned {
    type Error = russh::Error;

    async fn check_server_key(
        &mut self,
        shown: &PublicKeyOrCertificate,
    ) -> std::result::Result<bool, russh::Error> {
        let PublicKeyOrCertificate::PublicKey { key, .. } = shown else { return Ok(false) };
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = Some(key.clone());
        // Without comments, which prove nothing.
        Ok(self.key.as_ref().is_some_and(|pinned| pinned.key_data() == key.key_data()))
    }
}

fn config(key: Option<&PublicKey>) -> client::Config {
    let mut kinds = vec![
        Algorithm::Ed25519,
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 },
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP384 },
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP521 },
    ];
    if let Some(key) = key {
        // The host must show the key that is pinned, not the one it likes best.
        kinds = vec![key.algorithm()];
    }
    client::Config {
        preferred: Preferred {
            kex: Cow::Borrowed(&[
                russh::kex::CURVE25519,
                russh::kex::CURVE25519_PRE_RFC_8731,
                russh::kex::EXTENSION_SUPPORT_AS_CLIENT,
                russh::kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
            ]),
            key: Cow::Owned(kinds),
            cipher: Cow::Borrowed(&[russh::cipher::AES_256_GCM, russh::cipher::CHACHA20_POLY1305]),
            compression: Cow::Borrowed(&[russh::compression::NONE]),
            ..Preferred::default()
        },
        window_size: WINDOW_BYTES,
        nodelay: true,
        ..client::Config::default()
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .context(|| "preparing to speak SSH".into())
}

fn connect(target: &Target) -> Result<tokio::net::TcpStream> {
    let what = || format!("connecting to {} port {}", target.host, target.port);
    let addresses = (target.host.as_str(), target.port).to_socket_addrs().context(what)?;
    let mut last = Error::new(Kind::NotFound, what(), "the name has no address");
    for address in addresses.take(MAX_ADDRESSES) {
        match TcpStream::connect_timeout(&address, CONNECT_LIMIT) {
            Ok(stream) => {
                stream.set_nonblocking(true).context(what)?;
                return tokio::net::TcpStream::from_std(stream).context(what);
            }
            Err(e) => last = Error::io(what(), &e),
        }
    }
    Err(last)
}

/// Within this limit, or an error that says so.
async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = T>) -> Result<T> {
    tokio::time::timeout(limit, work)
        .await
        .map_err(|_| Error::new(Kind::TimedOut, what, format!("no answer within {} s", limit.as_secs())))
}

type Session = client::Handle<Pinned>;

async fn shake_hands(
    target: &Target,
    key: Option<PublicKey>,
    shown: &Arc<Mutex<Option<PublicKey>>>,
) -> Result<std::result::Result<Session, russh::Error>> {
    let what = format!("speaking SSH with {}", target.words());
    let config = Arc::new(config(key.as_ref()));
    let handler = Pinned { key, shown: Arc::clone(shown) };
    let stream = connect(target)?;
    within(HANDSHAKE_LIMIT, &what, client::connect_stream(config, stream, handler)).await
}

/// The key that a host shows, in OpenSSH's form, without believing anything: for somebody to compare and pin.
///
/// # Errors
/// When the host cannot be reached or shows none.
pub fn scan(target: &Target) -> Result<String> {
    let shown = Arc::new(Mutex::new(None));
    let runtime = runtime()?;
    // That it ends in a refusal is what is wanted: nobody was pinned.
    let said = runtime.block_on(shake_hands(target, None, &shown))?.err();
    runtime.shutdown_background();
    let key = shown.lock().unwrap_or_else(PoisonError::into_inner).take();
    let what = format!("asking {} for its host key", target.host);
    match key {
        Some(key) => key.to_openssh().map_err(|e| Error::new(Kind::System, what, e)),
        None => {
            let why = said.map_or_else(|| "it showed none".to_owned(), |e| e.to_string());
            Err(Error::new(Kind::System, what, why))
        }
    }
}

/// Carries bytes between the standard streams and the peer's command.
///
/// # Errors
/// When the peer cannot be reached, is not the pinned one, takes no key of ours, or falls silent.
pub fn pump(target: &Target) -> Result<()> {
    let limit = Deadline::from_env().map_or(TOTAL_LIMIT, Deadline::left);
    let runtime = runtime()?;
    let what = format!("talking with {}", target.words());
    let done = runtime.block_on(async { Box::pin(within(limit, &what, talk(target))).await? });
    // A thread that still waits for our own input must not hold the process.
    runtime.shutdown_background();
    done
}

async fn talk(target: &Target) -> Result<()> {
    let what = || format!("speaking SSH with {}", target.words());
    let ssh = |e: russh::Error| Error::new(Kind::System, what(), e);
    let pinned = keys::public(&target.host_key)?;
    let identity = keys::private(&target.identity)?;
    let shown = Arc::new(Mutex::new(None));
    let mut session = match shake_hands(target, Some(pinned), &shown).await? {
        Ok(session) => session,
        Err(e) => return Err(stranger(target, &shown).unwrap_or_else(|| ssh(e))),
    };
    let mut channel = within(HANDSHAKE_LIMIT, &what(), async {
        let key = PrivateKeyWithHashAlg::new(Arc::new(identity), None);
        if !session.authenticate_publickey(&target.user, key).await.map_err(ssh)?.success() {
            return Err(Error::new(Kind::Denied, what(), "it does not take our key")
                .hint(format!("koboshi fleet enroll {}", target.host)));
        }
        let channel = session.channel_open_session().await.map_err(ssh)?;
        channel.exec(false, COMMAND).await.map_err(ssh)?;
        Ok(channel)
    })
    .await??;
    let mut requests = requests();
    let mut out = std::io::stdout();
    let broken = |e: std::io::Error| Error::io(what(), &e);
    let mut asking = true;
    loop {
        tokio::select! {
            said = channel.wait() => match said {
                Some(ChannelMsg::Data { data }) => {
                    // Blocks while the caller is busy: that is what slows the peer down.
                    out.write_all(&data).map_err(broken)?;
                    out.flush().map_err(broken)?;
                }
                None | Some(ChannelMsg::Eof | ChannelMsg::Close) => break,
                Some(_) => {}
            },
            request = requests.recv(), if asking => match request {
                Some(bytes) => channel.data_bytes(bytes).await.map_err(ssh)?,
                None => {
                    asking = false;
                    channel.eof().await.map_err(ssh)?;
                }
            },
        }
    }
    let _ = session.disconnect(Disconnect::ByApplication, "", "").await;
    Ok(())
}

/// The error for a host that shows another key than the pinned one.
fn stranger(target: &Target, shown: &Arc<Mutex<Option<PublicKey>>>) -> Option<Error> {
    let shown = shown.lock().unwrap_or_else(PoisonError::into_inner).take()?;
    let what = format!("speaking SSH with {}", target.words());
    let pinned = keys::public(&target.host_key).ok()?;
    if pinned.key_data() == shown.key_data() {
        return None;
    }
    let why = format!(
        "it shows the host key {}, pinned is {}",
        keys::fingerprint(&shown),
        keys::fingerprint(&pinned)
    );
    Some(Error::new(Kind::Denied, what, why).hint("if the host was really set up anew, enroll it again"))
}

/// Our standard input, read by a thread, since a pipe from a parent cannot be waited for everywhere.
fn requests() -> tokio::sync::mpsc::Receiver<Vec<u8>> {
    let (send, receive) = tokio::sync::mpsc::channel(2);
    std::thread::spawn(move || {
        let mut from = std::io::stdin();
        let mut piece = vec![0; PIECE_BYTES];
        while let Ok(n) = from.read(&mut piece) {
            if n == 0 || send.blocking_send(piece[..n].to_vec()).is_err() {
                break;
            }
        }
    });
    receive
}
