use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::{Context, Error, Result};

/// Ends a command's output; see `guest/init` for the protocol.
const MARK: u8 = 0x1e;

/// The harness's end of the guest's control port.
#[derive(Debug)]
pub(super) struct Control {
    reader: BufReader<UnixStream>,
    last_id: u64,
    /// Bytes of a line that had not ended when a wait timed out.
    partial: Vec<u8>,
}

impl Control {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { reader: BufReader::new(stream), last_id: 0, partial: Vec::new() }
    }

    /// Waits until the guest takes commands.
    pub(super) fn wait_until_ready(&mut self, limit: Duration) -> Result<()> {
        self.answer(0, limit).context("the guest's boot").map(drop)
    }

    /// Runs one line of shell in the guest; gives its output and exit status.
    ///
    /// After a wait that timed out the shell is busy until that command ends; its answer is then skipped.
    pub(super) fn run(&mut self, command: &str, limit: Duration) -> Result<(String, i32)> {
        if command.contains('\n') {
            return Err(Error::new("a command for the guest is one line"));
        }
        self.last_id += 1;
        writeln!(self.reader.get_mut(), "{} {command}", self.last_id).context("control port")?;
        self.answer(self.last_id, limit).context(format!("in the guest: {command}"))
    }

    fn answer(&mut self, id: u64, limit: Duration) -> Result<(String, i32)> {
        let deadline = Instant::now() + limit;
        let mut output = Vec::new();
        loop {
            let line = self.line(deadline)?;
            let Some(mark) = line.iter().position(|&byte| byte == MARK) else {
                output.extend_from_slice(&line);
                continue;
            };
            output.extend_from_slice(&line[..mark]);
            let end = String::from_utf8_lossy(&line[mark + 1..]);
            let mut words = end.split_whitespace().map(str::parse::<u64>);
            let (Some(Ok(of)), Some(Ok(status))) = (words.next(), words.next()) else {
                return Err(Error::new(format!("control port: not an end of command: {end:?}")));
            };
            if of == id {
                let status = i32::try_from(status).context("exit status")?;
                return Ok((String::from_utf8_lossy(&output).into_owned(), status));
            }
            output.clear();
        }
    }

    fn line(&mut self, deadline: Instant) -> Result<Vec<u8>> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::new("no answer in time"));
        }
        self.reader.get_ref().set_read_timeout(Some(left))?;
        match self.reader.read_until(b'\n', &mut self.partial) {
            Ok(_) if self.partial.ends_with(b"\n") => Ok(std::mem::take(&mut self.partial)),
            Ok(_) => Err(Error::new("QEMU has closed the control port")),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Err(Error::new("no answer in time"))
            }
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_status_are_told_apart_and_a_late_answer_is_skipped() -> Result<()> {
        let (ours, mut guest) = UnixStream::pair()?;
        let mut control = Control::new(ours);
        guest.write_all(b"\x1e0 0\n")?;
        control.wait_until_ready(Duration::from_secs(1))?;

        guest.write_all(b"half")?;
        assert!(control.run("slow", Duration::from_millis(10)).is_err());
        guest.write_all(b" and half\n\x1e1 0\none\ntwo\x1e2 3\n")?;
        assert_eq!(control.run("quick", Duration::from_secs(1))?, ("one\ntwo".to_owned(), 3));
        Ok(())
    }
}
