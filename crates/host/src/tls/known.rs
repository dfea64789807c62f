//! TLS to a server on this host that is already known by other means: the process that owns the listening socket.
//!
//! Guarantees: a connection here proves nothing about who answers and claims nothing. The caller has the kernel's word
//! for that, which is stronger than any certificate; so no certificate is refused, however old, self-made or strange.
//! It is only handed out, to be told of. Never use this for anything that leaves the host.
//!
//! No authority is loaded, so none costs memory, and a session is resumed where the server lets us: a look at a healthy
//! server then costs it no signature. Every read and write has the deadline of the stream underneath.

use crate::error::{Error, Kind, Result};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::Offset;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::sync::Arc;

/// Tickets of one server that are kept: it sends one or two with each handshake, and each is used once.
const SESSIONS_LIMIT: usize = 2;

/// What is remembered of one server: keep it as long as that server, and no longer. Its first handshake is a whole one.
#[derive(Debug, Clone)]
pub struct Client(Arc<ClientConfig>);

impl Client {
    /// One that remembers nothing yet.
    ///
    /// # Errors
    /// When the library does not support its own defaults.
    pub fn new() -> Result<Client> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let any = AnyCertificate(provider.signature_verification_algorithms.supported_schemes());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| Error::new(Kind::System, "preparing TLS", e.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(any))
            .with_no_client_auth();
        config.resumption = Resumption::in_memory_sessions(SESSIONS_LIMIT);
        Ok(Client(Arc::new(config)))
    }
}

/// An open connection. Reads and writes what the stream underneath carries sealed.
#[derive(Debug)]
pub struct Session<S: Read + Write> {
    inner: StreamOwned<ClientConnection, S>,
}

impl<S: Read + Write> Session<S> {
    /// Shakes hands over `stream`, which brings its own deadline. An error of the protocol is `InvalidData` or
    /// `UnexpectedEof`; all others are the stream's own.
    ///
    /// # Errors
    /// When the other side breaks off or does not speak TLS, and those of the stream.
    pub fn open(client: &Client, ip: IpAddr, mut stream: S) -> io::Result<Session<S>> {
        let name = ServerName::IpAddress(ip.into());
        let mut conn = ClientConnection::new(Arc::clone(&client.0), name).map_err(io::Error::other)?;
        while conn.is_handshaking() {
            conn.complete_io(&mut stream)?;
        }
        Ok(Session { inner: StreamOwned::new(conn, stream) })
    }

    /// The server's own certificate (DER), not verified in any way.
    #[must_use]
    pub fn certificate(&self) -> Option<&[u8]> {
        self.inner.conn.peer_certificates().and_then(|all| all.first()).map(|c| c.as_ref())
    }

    /// The stream underneath, for its deadline.
    pub fn stream_mut(&mut self) -> &mut S {
        &mut self.inner.sock
    }

    /// Says goodbye as TLS wants it said. That it could not be said changes nothing.
    pub fn close(&mut self) {
        self.inner.conn.send_close_notify();
        let _ = self.inner.flush();
    }
}

impl<S: Read + Write> Read for Session<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.inner.read(buf) {
            // An end without the goodbye. Whether something is missing is seen by what came.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
            other => other,
        }
    }
}

impl<S: Read + Write> Write for Session<S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.inner.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Accepts whatever is shown. A signature that we could not check (a key of a kind or size that our library does not
/// know) would otherwise make a healthy server look fallen.
#[derive(Debug)]
struct AnyCertificate(Vec<SignatureScheme>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let unknown_here = [SignatureScheme::ECDSA_NISTP521_SHA512, SignatureScheme::ED448];
        self.0.iter().copied().chain(unknown_here).collect()
    }
}

/// The first certificate of a PEM text (DER): the server's own, where a chain lies there.
#[must_use]
pub fn first_certificate(pem: &[u8]) -> Option<Vec<u8>> {
    CertificateDer::pem_slice_iter(pem).next()?.ok().map(|c| c.as_ref().to_vec())
}

/// From when to when a certificate claims to hold. `None` when it cannot be read; never trusted for anything.
#[must_use]
pub fn validity(der: &[u8]) -> Option<(Timestamp, Timestamp)> {
    const SEQUENCE: u8 = 0x30;
    const VERSION: u8 = 0xa0;
    let (_, certificate, _) = element(der)?;
    let (_, mut fields, _) = element(certificate)?;
    let (tag, _, rest) = element(fields)?;
    if tag == VERSION {
        fields = rest;
    }
    // Serial number, algorithm, issuer; then the two times.
    for _ in 0..3 {
        (_, _, fields) = element(fields)?;
    }
    let (tag, times, _) = element(fields)?;
    let (from_tag, from, rest) = element(times)?;
    let (until_tag, until, _) = element(rest)?;
    (tag == SEQUENCE).then_some((time(from_tag, from)?, time(until_tag, until)?))
}

/// One DER element: its tag, its content, what follows it.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        // More than four bytes of length is no certificate.
        let count = usize::from(first & 0x7f);
        let digits = rest.get(..count).filter(|d| (1..=4).contains(&d.len()))?;
        (digits.iter().fold(0, |n: usize, d| (n << 8) | usize::from(*d)), rest.get(count..)?)
    };
    Some((tag, rest.get(..length)?, rest.get(length..)?))
}

/// `YYMMDDHHMMSSZ` (years 1950 to 2049) or `YYYYMMDDHHMMSSZ`.
fn time(tag: u8, text: &[u8]) -> Option<Timestamp> {
    const UTC: u8 = 0x17;
    const GENERALIZED: u8 = 0x18;
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let (year, rest) = match (tag, text.len()) {
        (UTC, 12) => {
            let short: i16 = text.get(..2)?.parse().ok()?;
            (if short < 50 { 2000 + short } else { 1900 + short }, text.get(2..)?)
        }
        (GENERALIZED, 14) => (text.get(..4)?.parse().ok()?, text.get(4..)?),
        _ => return None,
    };
    let part = |n: usize| rest.get(2 * n..2 * n + 2)?.parse::<i8>().ok();
    let at = DateTime::new(year, part(0)?, part(1)?, part(2)?, part(3)?, part(4)?, 0).ok()?;
    Offset::UTC.to_timestamp(at).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
    use rustls::{ServerConfig, ServerConnection};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn certificate(years: std::ops::Range<i32>) -> (CertificateDer<'static>, PrivateKeyDer<'static>, String) {
        let mut params = rcgen::CertificateParams::new(vec!["openclaw-gateway".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(years.start, 1, 2);
        params.not_after = rcgen::date_time_ymd(years.end, 3, 4);
        let key = rcgen::KeyPair::generate().unwrap();
        let made = params.self_signed(&key).unwrap();
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        (made.der().clone(), der, made.pem())
    }

    #[test]
    fn times_are_read_in_both_forms() {
        for (years, from, until) in [
            (1999..2001, "1999-01-02T00:00:00Z", "2001-03-04T00:00:00Z"),
            (2020..2049, "2020-01-02T00:00:00Z", "2049-03-04T00:00:00Z"),
            (2049..2051, "2049-01-02T00:00:00Z", "2051-03-04T00:00:00Z"),
        ] {
            let (der, _, pem) = certificate(years);
            assert_eq!(validity(&der), Some((from.parse().unwrap(), until.parse().unwrap())));
            assert_eq!(first_certificate(pem.as_bytes()).as_deref(), Some(der.as_ref()));
        }
    }

    #[test]
    fn whatever_bytes_come_there_is_no_panic() {
        let (der, _, _) = certificate(2020..2030);
        for cut in 0..der.len() {
            let _ = validity(&der[..cut]);
            let mut bent = der.to_vec();
            for bits in [0x01, 0x80, 0xff] {
                bent[cut] ^= bits;
                let _ = validity(&bent);
            }
        }
        assert_eq!(validity(b""), None);
        assert_eq!(first_certificate(b"-----BEGIN CERTIFICATE-----\n!!"), None);
        assert_eq!(first_certificate(b"\xff\xfe"), None);
    }

    #[test]
    fn a_session_is_resumed_by_the_client_that_knows_it() {
        let (der, key, _) = certificate(1990..1991);
        let shown = der.as_ref().to_vec();
        let server = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![der], key)
            .unwrap();
        let server = Arc::new(server);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let known = Client::new().unwrap();
        let serving = std::thread::spawn(move || {
            let mut kinds = Vec::new();
            for _ in 0..3 {
                let (tcp, _) = listener.accept().unwrap();
                let conn = ServerConnection::new(Arc::clone(&server)).unwrap();
                let mut stream = StreamOwned::new(conn, tcp);
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                kinds.push(stream.conn.handshake_kind().unwrap());
                stream.write_all(&byte).unwrap();
                stream.flush().unwrap();
                while matches!(stream.read(&mut byte), Ok(n) if n > 0) {}
            }
            kinds
        });
        for client in [&known, &known, &Client::new().unwrap()] {
            let tcp = TcpStream::connect_timeout(&addr, std::time::Duration::from_secs(20)).unwrap();
            let mut session = Session::open(client, HERE, tcp).unwrap();
            // Expired for decades, self-made and for another name: handed out, not refused.
            assert_eq!(session.certificate(), Some(shown.as_slice()));
            session.write_all(b"x").unwrap();
            let mut byte = [0];
            session.read_exact(&mut byte).unwrap();
            session.close();
        }
        use rustls::HandshakeKind as K;
        assert_eq!(serving.join().unwrap(), [K::Full, K::Resumed, K::Full]);
    }
}
