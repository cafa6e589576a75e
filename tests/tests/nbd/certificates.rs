//! Certificates of an authority of our own, made by OpenSSL, in the files that QEMU and libnbd look for.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::served::run;

/// An authority and those that it has signed.
pub(crate) struct Authority {
    folder: PathBuf,
}

impl Authority {
    pub(crate) fn new(folder: &Path) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        let this = Self { folder: folder.to_owned() };
        this.openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca-key.pem -out ca-cert.pem -days 2 \
             -subj '/CN=authority' -addext basicConstraints=critical,CA:TRUE -addext keyUsage=keyCertSign,cRLSign",
        );
        std::fs::write(folder.join("index.txt"), "").unwrap();
        std::fs::write(folder.join("number"), "01\n").unwrap();
        let config = "[ca]\ndefault_ca=own\n[own]\ndatabase=index.txt\ncrlnumber=number\ndefault_md=sha256\n\
                      default_crl_days=2\ncrl_extensions=crl\n[crl]\nauthorityKeyIdentifier=keyid\n";
        std::fs::write(folder.join("ca.conf"), config).unwrap();
        this
    }

    /// Its folder: what a server or, with a client's certificate, a client is given.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes `WHO-key.pem` and `WHO-cert.pem`; `who` is `server` or `client`.
    pub(crate) fn sign(&self, who: &str) -> &Self {
        let usage = format!("subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage={who}Auth\n");
        std::fs::write(self.folder.join("usage"), usage).unwrap();
        self.openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {who}-key.pem -out {who}.csr \
             -subj '/CN=localhost'"
        ));
        self.openssl(&format!(
            "x509 -req -in {who}.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -out {who}-cert.pem -days 2 \
             -extfile usage"
        ));
        self
    }

    /// Takes a certificate back: writes `ca-crl.pem`.
    pub(crate) fn revoke(&self, who: &str) {
        let authority = "-config ca.conf -cert ca-cert.pem -keyfile ca-key.pem";
        self.openssl(&format!("ca {authority} -revoke {who}-cert.pem"));
        self.openssl(&format!("ca {authority} -gencrl -out ca-crl.pem"));
    }

    fn openssl(&self, arguments: &str) {
        let script = format!("cd '{}' && openssl {arguments}", self.folder.display());
        run(Command::new("sh").arg("-c").arg(script));
    }
}
