//! The relay: the front-end's messages on their way to the framework, and the answers back.
//!
//! ```text
//!   front-end ═══ socket ═══ relay ═══ socket ═══ framework
//!        ▲                     │ inspects, keeps, answers
//!        └── back-end channel ─┘ (SET_BACKEND_REQ_FD)
//! ```
//! The framework knows nothing of in-flight records, keeps the back-end's own channel to itself, and takes any
//! descriptor for what the front-end says it is. So each message of the front-end's is looked at first, see
//! [`inspect`](crate::inspect): it goes on as it is, is answered here, or ends the session. Who sends what when, the
//! framework judges.
//!
//! A message goes on whole, its descriptors with its first byte, as the framework reads them. One that is longer than any
//! message is ends the session.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

pub(crate) use message::Message;
use message::{VERSION, receive};

mod message;

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, to the front-end.
const CONFIG_CHANGE: u32 = 2;

/// What becomes of a message.
pub(crate) enum Verdict {
    /// It goes on to the framework.
    Forward(Message),
    /// It goes no further, and this is the answer if it wants one.
    Answer(Option<Message>),
}

/// Passes messages on until one side closes its socket. `inspect` is shown each of the front-end's; an error of its own
/// ends the session, and so does `gone` as soon as it is readable.
pub(crate) fn run(
    front: impl AsFd,
    framework: impl AsFd,
    gone: BorrowedFd<'_>,
    mut inspect: impl FnMut(Message) -> io::Result<Verdict>,
) -> io::Result<()> {
    let (front, framework) = (front.as_fd(), framework.as_fd());
    loop {
        let [lost, answered, asked] = wait([(gone, IN), (framework, IN), (front, IN)])?;
        if lost {
            return Err(io::Error::other("memory that the front-end gave is gone"));
        }
        // Answers first: they are waited for.
        if answered {
            let Some(answer) = receive(framework)? else { return Ok(()) };
            answer.send(front)?;
        } else if asked {
            let Some(message) = receive(front)? else { return Ok(()) };
            match inspect(message)? {
                Verdict::Forward(message) => forward(&message, front, framework)?,
                Verdict::Answer(Some(answer)) => answer.send(front)?,
                Verdict::Answer(None) => {}
            }
        }
    }
}

const IN: PollFlags = PollFlags::IN;

/// Sends a message to the framework. One that is not taken at once waits for answers to be passed on: else a front-end
/// that asks and does not read could have the framework and us wait for each other, for ever.
fn forward(message: &Message, front: BorrowedFd<'_>, framework: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        let [writable, answered] = wait([(framework, PollFlags::OUT), (framework, IN)])?;
        if writable {
            // There is room for more than a message in a socket that says so.
            return message.send(framework);
        }
        if answered {
            let Some(answer) = receive(framework)? else { return Ok(()) };
            answer.send(front)?;
        }
    }
}

/// Waits until one of these is ready; which.
fn wait<const N: usize>(fds: [(BorrowedFd<'_>, PollFlags); N]) -> io::Result<[bool; N]> {
    let mut fds = fds.map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags));
    match poll(&mut fds, None) {
        Err(Errno::INTR) => Ok([false; N]),
        polled => {
            polled?;
            Ok(fds.map(|fd| !fd.revents().is_empty()))
        }
    }
}

/// Tells the front-end that the configuration has changed. Does not wait: `WouldBlock` from one that does not read.
pub(crate) fn tell_config_change(channel: impl AsFd) -> io::Result<()> {
    let message = [CONFIG_CHANGE, VERSION, 0].map(u32::to_ne_bytes).concat();
    let sent = send(channel, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
    // A Unix socket takes so few bytes whole or not at all.
    if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
mod tests;
