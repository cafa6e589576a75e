use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::{Context, Error, Result, eventually};

/// A program that runs beside the test and ends with it.
///
/// It is killed by its process id on drop; should the test itself be killed, the kernel does it (the parent-death
/// signal belongs to the *thread* that spawned the program, so spawn from a thread that lives as long).
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `program`; its output goes to the file `log`.
    pub fn spawn<A: AsRef<OsStr>>(
        program: &Path,
        args: impl IntoIterator<Item = A>,
        log: PathBuf,
    ) -> Result<Self> {
        let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
        let output = File::options().create(true).append(true).open(&log).context(log.display())?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context(&name)?;
        Ok(Self { child, name, log })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        // `setpriv` becomes the program.
        self.child.id()
    }

    /// The last lines that the program wrote.
    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }

    /// An error if the program has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                Err(Error::new(format!("{} ended: {status}", self.name)).with(&self.name, &self.log_tail()))
            }
        }
    }

    /// Waits until the program ends by itself.
    pub fn wait_for_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("end of {}", self.name);
        eventually(&what, limit, || Ok(self.child.try_wait()?))
            .map_err(|error| error.with(&self.name, &tail(&self.log)))
    }

    /// Asks the program to end (SIGTERM).
    pub fn terminate(&self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| Error::new("process id out of range"))?;
        kill_process(pid, Signal::TERM).context(&self.name)
    }

    /// Stops the program as `kill -9` does, and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context(&self.name)?;
        self.child.wait().context(&self.name)?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The child has not been waited for elsewhere, so its id is still its own.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of a log, for an error message.
pub(crate) fn tail(log: &Path) -> String {
    const LINES: usize = 40;
    let text =
        std::fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// Runs a program to its end and gives its standard output; an error unless it exits with 0.
pub(crate) fn output_of(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.stdin(Stdio::null()).output().context(command.get_program().to_string_lossy())?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let all = [output.stdout, output.stderr].concat();
    Err(Error::new(format!("{command:?}: {}", output.status)).with("output", &String::from_utf8_lossy(&all)))
}
