//! TLS: certificates in the files that QEMU's `tls-creds-x509` has.
//!
//! There is no PSK: rustls has none. TLS 1.2 and 1.3 are spoken, as the specification asks ("TLS versions").

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use block::{Context, Error, ErrorKind, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

const AUTHORITY: &str = "ca-cert.pem";
const REVOKED: &str = "ca-crl.pem";
const CERTIFICATE: &str = "server-cert.pem";
const KEY: &str = "server-key.pem";

/// What a server shows of itself, and which clients it takes. With it, plain text is refused.
#[derive(Clone)]
pub struct Tls(Arc<ServerConfig>);

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    /// The names of the files that are read, as far as they are there.
    pub const FILES: [&str; 4] = [AUTHORITY, REVOKED, CERTIFICATE, KEY];

    /// Reads `server-cert.pem` and `server-key.pem` in `folder`. With `verify_clients` a client must have a certificate
    /// that the authority in `ca-cert.pem` signed and `ca-crl.pem`, if there is one, does not take back.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a file that is missing, [`ErrorKind::InvalidInput`] for one that holds something else,
    /// or a key that is not the certificate's.
    pub fn from_folder(folder: &Path, verify_clients: bool) -> Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(invalid)?;
        let builder = match verify_clients {
            false => builder.with_no_client_auth(),
            true => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(&folder.join(AUTHORITY))? {
                    roots.add(certificate).map_err(invalid)?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .with_crls(revocations(&folder.join(REVOKED))?)
                    .build()
                    .map_err(invalid)?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let chain = certificates(&folder.join(CERTIFICATE))?;
        let path = folder.join(KEY);
        let key = PrivateKeyDer::from_pem_slice(&read(&path)?)
            .map_err(invalid)
            .context(|| format!("read the key in {}", path.display()))?;
        let config = builder.with_single_cert(chain, key).map_err(invalid);
        Ok(Self(Arc::new(config.context(|| format!("use the certificates in {}", folder.display()))?)))
    }

    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.0)
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    let found = found.map_err(invalid).context(|| format!("read certificates in {}", path.display()))?;
    match found.is_empty() {
        true => Err(Error::new(ErrorKind::InvalidInput, format!("{} holds no certificate", path.display()))),
        false => Ok(found),
    }
}

fn revocations(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    let bytes = match read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        read => read?,
    };
    let found: std::result::Result<Vec<_>, _> =
        CertificateRevocationListDer::pem_slice_iter(&bytes).collect();
    found.map_err(invalid).context(|| format!("read the revocations in {}", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).context(|| format!("read {}", path.display()))
}

fn invalid(error: impl fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidInput, error.to_string())
}
