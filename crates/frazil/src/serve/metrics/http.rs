//! As much of HTTP/1.1 as a scraper needs: one GET a connection.
//!
//! Bounded in all that a client can choose: clients at once, bytes of a request, the time that one may take. A thread for
//! each client, so that a slow one holds up no other.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use httparse::{EMPTY_HEADER, Request, Status};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

/// Clients at once; more are turned away.
const MAX_CLIENTS: usize = 8;

/// Bytes of a request, and headers.
const MAX_HEAD: usize = 8 << 10;
const MAX_HEADERS: usize = 64;

/// For the whole of a request and its answer.
const DEADLINE: Duration = Duration::from_secs(5);

/// When there is no descriptor or thread left, others may need what there is.
const PAUSE: Duration = Duration::from_millis(100);

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers those whom `accept` brings with what `text` says, until `accept` fails for good.
pub(super) fn serve(
    accept: impl Fn() -> io::Result<OwnedFd>,
    text: Arc<dyn Fn() -> Option<String> + Send + Sync>,
) {
    let clients = Arc::new(());
    loop {
        let socket = match accept() {
            Ok(socket) => socket,
            // The socket has been shut down.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
            Err(_) => {
                std::thread::sleep(PAUSE);
                continue;
            }
        };
        // One of the references is our own.
        if Arc::strong_count(&clients) > MAX_CLIENTS {
            continue;
        }
        let (text, client) = (Arc::clone(&text), Arc::clone(&clients));
        let thread = std::thread::Builder::new().name("metrics-client".to_owned());
        // Without a thread the client is turned away.
        let _ = thread.spawn(move || {
            // A client that went away is no news.
            let _ = answer(Connection { socket: socket.into(), deadline: Instant::now() + DEADLINE }, &*text);
            drop(client);
        });
    }
}

/// A client, until its time is over.
struct Connection {
    /// A socket, read and written as any file.
    socket: File,
    deadline: Instant,
}

impl Connection {
    /// Has the next call end with the deadline.
    fn bounded(&self, which: Timeout) -> io::Result<&File> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // Less than a microsecond would be none, and for ever.
        set_socket_timeout(&self.socket, which, Some(left.max(Duration::from_micros(1))))?;
        Ok(&self.socket)
    }

    fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self.bounded(Timeout::Send)?.write(bytes)?;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }
}

fn answer(connection: Connection, text: &dyn Fn() -> Option<String>) -> io::Result<()> {
    let mut head = Vec::new();
    let (status, body) = loop {
        let mut piece = [0; 1024];
        let count = connection.bounded(Timeout::Recv)?.read(&mut piece)?;
        if count == 0 {
            return Ok(());
        }
        head.extend_from_slice(&piece[..count]);
        match judge(&head) {
            None if head.len() > MAX_HEAD => break ("431 Request Header Fields Too Large", None),
            None => {}
            Some("200 OK") => match text() {
                Some(text) => break ("200 OK", Some(text)),
                None => break ("500 Internal Server Error", None),
            },
            Some(refusal) => break (refusal, None),
        }
    };
    let body = body.unwrap_or_else(|| format!("{status}\n"));
    let kind = if status == "200 OK" { CONTENT_TYPE } else { "text/plain" };
    let len = body.len();
    connection.write(
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n"
        )
        .as_bytes(),
    )?;
    connection.write(body.as_bytes())
}

/// The status of the answer to this request; `None` if it is not complete.
fn judge(head: &[u8]) -> Option<&'static str> {
    let mut headers = [EMPTY_HEADER; MAX_HEADERS];
    let mut request = Request::new(&mut headers);
    match request.parse(head) {
        Ok(Status::Partial) => None,
        Err(_) => Some("400 Bad Request"),
        Ok(Status::Complete(_)) => {
            let path = request.path.unwrap_or_default();
            Some(match (request.method, path.split('?').next()) {
                (Some("GET"), Some("/metrics" | "/")) => "200 OK",
                (Some("GET"), _) => "404 Not Found",
                _ => "405 Method Not Allowed",
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_judged_once_they_are_complete() {
        assert_eq!(judge(b"GET /metrics HTTP/1.1\r\nHost: a\r\n"), None);
        assert_eq!(judge(b"GET /metrics?x HTTP/1.1\r\nHost: a\r\n\r\n"), Some("200 OK"));
        assert_eq!(judge(b"GET /etc/passwd HTTP/1.0\r\n\r\n"), Some("404 Not Found"));
        assert_eq!(judge(b"POST /metrics HTTP/1.1\r\n\r\n"), Some("405 Method Not Allowed"));
        assert_eq!(judge(b"\x16\x03\x01\x02\x00\x01"), Some("400 Bad Request"));
    }
}
