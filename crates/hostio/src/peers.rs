//! Who may connect to the Unix sockets of this process, besides what the sockets' modes say.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::sockopt::socket_peercred;

/// The users whose processes may; everybody's before it is set. One for the process, as its sockets have one purpose.
static ADMITTED: OnceLock<Vec<u32>> = OnceLock::new();

/// When the log last told of a stranger.
static TOLD: Mutex<Option<Instant>> = Mutex::new(None);

/// Whoever keeps trying must not fill the log.
const EVERY: Duration = Duration::from_secs(1);

/// From now on only processes of these users (user ids) are admitted. The first call counts.
pub fn admit_only(users: &[u32]) {
    let _ = ADMITTED.set(users.to_vec());
}

/// The next who connects; `None` if that is a process of another user than may: its connection is closed, and whoever comes
/// next is not to wait for it. The kernel noted whose process it is when it connected.
pub fn accept(listener: &UnixListener) -> io::Result<Option<UnixStream>> {
    let (stream, _) = listener.accept()?;
    let Some(users) = ADMITTED.get() else { return Ok(Some(stream)) };
    let user = socket_peercred(&stream)?.uid.as_raw();
    if users.contains(&user) {
        return Ok(Some(stream));
    }
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    if told.is_none_or(|told| told.elapsed() >= EVERY) {
        *told = Some(Instant::now());
        tracing::warn!(user, "a process of a user who is not on the list has been turned away");
    }
    Ok(None)
}
