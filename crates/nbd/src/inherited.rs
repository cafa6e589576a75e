//! Sockets that a service manager has opened for this process.
#![allow(unsafe_code, reason = "a descriptor that is passed on comes as a number")]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use block::{Context, Result};

use crate::Address;

/// The sockets that a service manager has opened for this process and passed on (`LISTEN_FDS`, sd_listen_fds(3)), in its
/// order. Nobody else in this process may take them; who asks again finds none.
///
/// # Errors
/// An I/O error if what the manager says makes no sense.
pub fn inherited() -> Result<Vec<Address>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    let passed = sd_notify::listen_fds().context(|| "find the sockets that were passed on")?;
    Ok(passed.map(|number| Address::Inherited(own(number))).collect())
}

fn own(number: RawFd) -> OwnedFd {
    // SAFETY: the service manager has opened it for this process, and said so by the process's id, so it is open and
    // nobody's; it is asked for once.
    unsafe { OwnedFd::from_raw_fd(number) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Server};
    use std::io::Read;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::Command;
    use std::time::Duration;

    const CHILD: &str = "FRAZIL_TEST_INHERITS";

    #[test]
    fn sockets_of_a_service_manager_are_taken_once() {
        if std::env::var_os(CHILD).is_some() {
            return inherit();
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passed");
        let socket: OwnedFd = UnixListener::bind(&path).unwrap().into();
        // As the manager does it: descriptor 3, and the process's own id.
        let script = r#"exec 3<&0; LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" --exact --nocapture "$1""#;
        let name = "inherited::tests::sockets_of_a_service_manager_are_taken_once";
        let mut child = Command::new("sh")
            .args(["-c", script])
            .arg(std::env::current_exe().unwrap())
            .arg(name)
            .env(CHILD, "1")
            .stdin(socket)
            .spawn()
            .unwrap();
        let mut stream = UnixStream::connect(&path).unwrap();
        let mut greeting = [0; 8];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"NBDMAGIC");
        // It was answered, so the child has found what it must; it serves until it is ended.
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn inherit() {
        let mut passed = inherited().unwrap();
        assert_eq!(passed.len(), 1);
        assert!(inherited().unwrap().is_empty());
        let server = Server::new(Config::default());
        server.listen(passed.remove(0)).unwrap();
        std::thread::sleep(Duration::from_secs(60));
    }
}
