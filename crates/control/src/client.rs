//! A small client, for the command line: one command after the other, waiting for each.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// How long the server may take to greet. It does so from a thread that does nothing else.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest line that is accepted.
const MAX_LINE: u64 = 64 << 20;

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket failed. [`io::ErrorKind::NotFound`] and [`io::ErrorKind::ConnectionRefused`] mean that no daemon
    /// listens, [`io::ErrorKind::UnexpectedEof`] that it went away (or, at first, that it has too many clients).
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What answered does not speak QMP.
    #[error("not a QMP server: {0}")]
    Protocol(String),
    /// The daemon refused, or the command failed.
    #[error("{desc}")]
    Command {
        /// The error class, such as `DeviceNotFound`.
        class: String,
        /// The reason, for people.
        desc: String,
    },
}

/// A connection that has negotiated.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the daemon's control socket and negotiates.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(GREETING_TIMEOUT))?;
        let mut client = Self { stream: BufReader::new(stream) };
        let greeting = client.receive()?;
        if greeting.get("QMP").is_none() {
            return Err(ClientError::Protocol(format!("it began with {greeting}")));
        }
        client.execute("qmp_capabilities", json!({}), |_, _| {})?;
        // From here on a command may take as long as it takes.
        client.stream.get_ref().set_read_timeout(None)?;
        Ok(client)
    }

    /// Runs a command and waits for its reply. Events that come meanwhile are given to `on_event`, name and data;
    /// those between two commands to the next one's.
    pub fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        mut on_event: impl FnMut(&str, &Value),
    ) -> Result<Value, ClientError> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream.get_mut().write_all(request.to_string().as_bytes())?;
        loop {
            let mut message = self.receive()?;
            if let Some(name) = message.get("event").and_then(Value::as_str) {
                on_event(name, message.get("data").unwrap_or(&Value::Null));
            } else if let Some(error) = message.get("error") {
                let text = |member| error.get(member).and_then(Value::as_str).unwrap_or_default().to_owned();
                return Err(ClientError::Command { class: text("class"), desc: text("desc") });
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            } else {
                return Err(ClientError::Protocol(format!("it answered {message}")));
            }
        }
    }

    fn receive(&mut self) -> Result<Value, ClientError> {
        let mut line = Vec::new();
        (&mut self.stream).take(MAX_LINE).read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            return Err(
                io::Error::new(io::ErrorKind::UnexpectedEof, "the daemon closed the connection").into()
            );
        }
        serde_json::from_slice(&line).map_err(|error| ClientError::Protocol(error.to_string()))
    }
}
