//! Who may connect to the Unix sockets of this process, besides what the sockets' modes say.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use rustix::net::sockopt::socket_peercred;

/// The users whose processes may; everybody's before it is set. One for the process, as its sockets have one purpose.
static ADMITTED: OnceLock<Vec<u32>> = OnceLock::new();

/// From now on only processes of these users (user ids) are admitted. The first call counts.
pub fn admit_only(users: &[u32]) {
    let _ = ADMITTED.set(users.to_vec());
}

/// The stream of a peer that may connect. The kernel noted who that is when it connected. Of others,
/// [`io::ErrorKind::PermissionDenied`].
pub fn admit(stream: UnixStream) -> io::Result<UnixStream> {
    let Some(users) = ADMITTED.get() else { return Ok(stream) };
    let user = socket_peercred(&stream)?.uid.as_raw();
    match users.contains(&user) {
        true => Ok(stream),
        false => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("a process of user {user}, who is not on the list, has been turned away"),
        )),
    }
}
