use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{Context, Error, Result};

/// A small, blocking QMP client, for QEMU's own monitor and for Frazil's.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    /// Events that came before an answer, the oldest first, at most [`MAX_EVENTS`].
    events: VecDeque<Value>,
}

/// Of those that nobody waits for the oldest go.
const MAX_EVENTS: usize = 256;

impl Qmp {
    /// Connects and negotiates.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).context(socket.display())?;
        let mut qmp = Self { reader: BufReader::new(stream), events: VecDeque::new() };
        let greeting = qmp.read(Duration::from_secs(10))?;
        if greeting.get("QMP").is_none() {
            return Err(Error::new(format!("not a QMP greeting: {greeting}")));
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and gives what it returns; up to a minute.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.reader.get_mut(), "{request}").context(command)?;
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let message = self.read(deadline.saturating_duration_since(Instant::now())).context(command)?;
            if let Some(value) = message.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = message.get("error") {
                return Err(Error::new(format!("{command}: {error}")));
            }
            self.events.push_back(message);
            if self.events.len() > MAX_EVENTS {
                self.events.pop_front();
            }
        }
    }

    /// Waits for an event of that name. Those that came before it are forgotten.
    pub fn wait_for_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.read(deadline.saturating_duration_since(Instant::now())).context(name)?,
            };
            if event.get("event").is_some_and(|found| found == name) {
                return Ok(event);
            }
        }
    }

    fn read(&mut self, limit: Duration) -> Result<Value> {
        if limit.is_zero() {
            return Err(Error::new("no answer in time"));
        }
        self.reader.get_ref().set_read_timeout(Some(limit))?;
        let mut line = String::new();
        self.reader.read_line(&mut line).context("QMP")?;
        if line.is_empty() {
            return Err(Error::new("the QMP server has closed the connection"));
        }
        Ok(serde_json::from_str(&line)?)
    }
}
