//! Sockets that a service manager has opened for this process.
#![allow(unsafe_code, reason = "a descriptor that is passed on comes as a number")]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use block::{Context, Result};

/// The sockets that a service manager has opened for this process and passed on (`LISTEN_FDS`, sd_listen_fds(3)), each with
/// its name (`LISTEN_FDNAMES`), in its order. Nobody else in this process may take them; who asks again finds none.
///
/// # Errors
/// An I/O error if what the manager says makes no sense.
pub fn inherited() -> Result<Vec<(String, OwnedFd)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    let passed = sd_notify::listen_fds_with_names().context(|| "find the sockets that were passed on")?;
    Ok(passed.map(|(number, name)| (name, own(number))).collect())
}

fn own(number: RawFd) -> OwnedFd {
    // SAFETY: the service manager has opened it for this process, and said so by the process's id, so it is open and
    // nobody's; it is asked for once.
    unsafe { OwnedFd::from_raw_fd(number) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Listener;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::Command;

    const CHILD: &str = "FRAZIL_TEST_INHERITS";

    #[test]
    fn sockets_of_a_service_manager_are_taken_once_and_outlive_their_use() {
        if std::env::var_os(CHILD).is_some() {
            return inherit();
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passed");
        let socket: OwnedFd = UnixListener::bind(&path).unwrap().into();
        // As the manager does it: descriptor 3, and the process's own id.
        let script =
            r#"exec 3<&0; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=this exec "$0" --exact --nocapture "$1""#;
        let name = "inherited::tests::sockets_of_a_service_manager_are_taken_once_and_outlive_their_use";
        for _ in 0..2 {
            let mut child = Command::new("sh")
                .args(["-c", script])
                .arg(std::env::current_exe().unwrap())
                .arg(name)
                .env(CHILD, "1")
                .stdin(socket.try_clone().unwrap())
                .spawn()
                .unwrap();
            let mut stream = UnixStream::connect(&path).unwrap();
            let mut greeting = [0; 5];
            stream.read_exact(&mut greeting).unwrap();
            assert_eq!(&greeting, b"hello");
            assert!(child.wait().unwrap().success());
        }
        assert!(path.exists(), "its file is the manager's");
    }

    fn inherit() {
        let mut passed = inherited().unwrap();
        assert_eq!(passed.len(), 1);
        assert!(inherited().unwrap().is_empty());
        let (name, socket) = passed.remove(0);
        assert_eq!(name, "this");
        let listener = Listener::inherited(socket).unwrap();
        listener.socket().accept().unwrap().0.write_all(b"hello").unwrap();
    }
}
