//! The same under TLS: who is let in, and that nothing is told without it.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use block::ErrorKind;
use nbd::{Address, Config, Server, Tls};

use super::certificates::Authority;
use super::served::{Content, attempt, contents, run};

struct Secure {
    server: Server,
    address: SocketAddr,
    content: Vec<u8>,
    folder: tempfile::TempDir,
    authority: Authority,
}

impl Secure {
    /// A server at a TCP port; clients need a certificate if it is to `verify` them.
    fn new(verify: bool, prepare: impl FnOnce(&Authority)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new(&folder.path().join("pki"));
        authority.sign("server").sign("client");
        prepare(&authority);
        let tls = Some(Tls::from_folder(authority.folder(), verify).unwrap());
        let server = Server::new(Config { tls, ..Config::default() });
        let Content { export, bytes, .. } = contents(folder.path()).remove(2);
        server.add_export(export).unwrap();
        let address = server.listen(Address::Tcp("127.0.0.1:0".to_owned())).unwrap().unwrap();
        Self { server, address, content: bytes, folder, authority }
    }

    fn uri(&self, pki: &Path) -> String {
        format!("nbds://localhost:{}/?tls-certificates={}", self.address.port(), pki.display())
    }

    fn is_let_in(&self, pki: &Path) -> bool {
        attempt(Command::new("nbdinfo").arg("--size").arg(self.uri(pki))).status.success()
    }
}

#[test]
fn disks_are_copied_under_tls() {
    let secure = Secure::new(true, |_| {});
    let (copy, pki) = (secure.folder.path().join("copy"), secure.authority.folder());
    run(Command::new("nbdcopy").arg(secure.uri(pki)).arg(&copy));
    assert!(std::fs::read(&copy).unwrap() == secure.content);
    std::fs::remove_file(&copy).unwrap();
    let object = format!("tls-creds-x509,id=tls,endpoint=client,dir={}", pki.display());
    let source = format!("driver=nbd,host=localhost,port={},tls-creds=tls", secure.address.port());
    run(Command::new("qemu-img")
        .args(["convert", "-m", "8", "--object", &object, "--image-opts", &source, "-O", "raw"])
        .arg(&copy));
    assert!(std::fs::read(&copy).unwrap() == secure.content);
}

#[test]
fn older_clients_speak_tls_1_2() {
    let secure = Secure::new(false, |_| {});
    let settings = secure.folder.path().join("gnutls");
    std::fs::write(&settings, "[overrides]\ndisabled-version = tls1.3\n").unwrap();
    let uri = secure.uri(secure.authority.folder());
    let set = format!("GNUTLS_SYSTEM_PRIORITY_FILE={}", settings.display());
    run(Command::new("env").args([&set, "nbdinfo", "--size", &uri]));
}

#[test]
fn who_has_no_certificate_of_our_authority_is_let_in_only_if_none_is_asked_for() {
    let secure = Secure::new(true, |_| {});
    let none = secure.folder.path().join("none");
    std::fs::create_dir(&none).unwrap();
    let ours = secure.authority.folder().join("ca-cert.pem");
    std::fs::copy(&ours, none.join("ca-cert.pem")).unwrap();
    let stranger = Authority::new(&secure.folder.path().join("stranger"));
    stranger.sign("client");
    // It trusts our server, so that the server's refusal is what is seen.
    std::fs::copy(&ours, stranger.folder().join("ca-cert.pem")).unwrap();
    assert!(secure.is_let_in(secure.authority.folder()));
    assert!(!secure.is_let_in(&none));
    assert!(!secure.is_let_in(stranger.folder()));
    let open = Secure::new(false, |_| {});
    std::fs::copy(open.authority.folder().join("ca-cert.pem"), none.join("ca-cert.pem")).unwrap();
    assert!(open.is_let_in(&none));
    assert!(
        !open.is_let_in(secure.authority.folder()),
        "a server of another authority is refused by the client"
    );
}

#[test]
fn a_certificate_that_was_taken_back_is_refused() {
    let secure = Secure::new(true, |authority| authority.revoke("client"));
    assert!(!secure.is_let_in(secure.authority.folder()));
}

#[test]
fn without_tls_nothing_is_told() {
    let secure = Secure::new(false, |_| {});
    let plain = format!("nbd://localhost:{}/", secure.address.port());
    for arguments in [&["--size"][..], &["--list"], &["--map"]] {
        let refused = attempt(Command::new("nbdinfo").args(arguments).arg(&plain));
        assert!(!refused.status.success());
        assert!(!String::from_utf8_lossy(&refused.stdout).contains("chain"));
    }
    let refused = attempt(Command::new("qemu-img").args(["info", &plain]));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("TLS"), "{refused:?}");
    assert_eq!(secure.server.exports()[0].clients, 0);
}

#[test]
fn files_that_are_missing_or_hold_something_else_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(&folder.path().join("pki"));
    let refused = |what: &str| {
        let error = Tls::from_folder(authority.folder(), true).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
        error.kind()
    };
    assert_eq!(refused("server-cert.pem"), ErrorKind::NotFound);
    authority.sign("server").sign("client");
    Tls::from_folder(authority.folder(), true).unwrap();
    std::fs::write(authority.folder().join("ca-crl.pem"), "junk").unwrap();
    Tls::from_folder(authority.folder(), false).unwrap();
    std::fs::copy(authority.folder().join("client-key.pem"), authority.folder().join("server-key.pem"))
        .unwrap();
    assert_eq!(refused("certificates"), ErrorKind::InvalidInput);
    std::fs::write(authority.folder().join("server-cert.pem"), "junk").unwrap();
    assert_eq!(refused("server-cert.pem"), ErrorKind::InvalidInput);
    std::fs::write(authority.folder().join("ca-cert.pem"), "").unwrap();
    assert_eq!(refused("ca-cert.pem"), ErrorKind::InvalidInput);
}
