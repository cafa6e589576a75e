//! A Python environment with the client library that people drive QEMU's QMP with.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The release that the tests are written for.
const PACKAGE: &str = "qemu.qmp==0.0.6";

/// The environment's folder of programs. It is made once in `place`, a folder that stays, and kept for the next run.
pub fn python_programs(place: &Path) -> PathBuf {
    let folder = place.join("qmp-venv");
    // One test process makes it, the others wait.
    let lock = std::fs::File::create(folder.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    let stamp = folder.join(PACKAGE);
    if !stamp.exists() {
        let missing = "install python3 with its venv module (Debian: apt-get install python3-venv)";
        run_tool(Command::new("python3").args(["-m", "venv"]).arg(&folder), missing);
        let missing = "the package index cannot be reached";
        run_tool(Command::new(folder.join("bin/pip")).args(["install", "--quiet", PACKAGE]), missing);
        std::fs::write(stamp, "").unwrap();
    }
    folder.join("bin")
}

/// Runs a program, which must succeed; `advice` is what to do if it does not.
pub fn run_tool(command: &mut Command, advice: &str) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; {advice}"));
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?} failed; {advice}\n{text}");
    output
}
