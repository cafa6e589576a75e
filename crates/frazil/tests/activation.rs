//! Sockets that systemd opens before the daemon runs.

#![allow(clippy::unwrap_used, reason = "to clippy, the helpers of tests are no tests")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A program, ended with SIGTERM and, if it stays, killed when it is dropped.
struct Program(Child);

impl Program {
    fn end(&mut self) {
        let id = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `systemd-socket-activate` opens both sockets and becomes the daemon when somebody connects.
fn activate(folder: &Path) -> Program {
    let path = |name: &str| folder.join(name).display().to_string();
    let disk = format!("id=vda,path={},format=raw,socket={}", path("vda.raw"), path("vda.sock"));
    let mut command = Command::new("systemd-socket-activate");
    command.args(["--fdname=control:nbd", "-l", &path("control"), "-l", &path("nbd")]);
    command.arg(env!("CARGO_BIN_EXE_frazil")).args(["serve", "--freeze-owner", "none", "--freeze", "never"]);
    command.args(["--state", &path("state"), "--control", &path("control"), "--disk", &disk]);
    let log = std::fs::File::create(folder.join("log")).unwrap();
    let child = command.stdin(Stdio::null()).stderr(log).spawn();
    let program = Program(child.expect("systemd-socket-activate is needed: it is part of systemd"));
    let deadline = Instant::now() + Duration::from_secs(20);
    while !folder.join("nbd").exists() {
        assert!(Instant::now() < deadline, "it does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    program
}

/// A client of QMP, which waits for the daemon if need be.
fn client(control: &Path) -> BufReader<UnixStream> {
    let stream = UnixStream::connect(control).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut client = BufReader::new(stream);
    let mut greeting = String::new();
    client.read_line(&mut greeting).unwrap();
    assert!(greeting.contains("QMP"), "{greeting}");
    execute(&mut client, r#"{"execute": "qmp_capabilities"}"#).unwrap();
    client
}

fn execute(client: &mut BufReader<UnixStream>, command: &str) -> Result<String, String> {
    writeln!(client.get_mut(), "{command}").unwrap();
    loop {
        let mut line = String::new();
        client.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the daemon has hung up");
        if line.contains(r#""error""#) {
            return Err(line);
        }
        if line.contains(r#""return""#) {
            return Ok(line);
        }
    }
}

fn start(socket: &str) -> String {
    format!(
        r#"{{"execute": "nbd-server-start", "arguments": {{"addr": {{"type": "fd", "data": {{"str": "{socket}"}}}}}}}}"#
    )
}

#[test]
fn sockets_of_systemd_are_used_by_their_names_and_stay() {
    let folder = tempfile::tempdir().unwrap();
    let (folder, control, nbd) = (folder.path(), folder.path().join("control"), folder.path().join("nbd"));
    std::fs::File::create(folder.join("vda.raw")).unwrap().set_len(1 << 20).unwrap();
    let mut daemon = activate(folder);
    let mut client = client(&control);
    let refused = execute(&mut client, &start("other")).unwrap_err();
    assert!(refused.contains("no socket 'other'"), "{refused}");
    let export =
        r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "vda"}}"#;
    // More than once: what the server let go of listens on.
    for _ in 0..2 {
        execute(&mut client, &start("nbd")).unwrap();
        execute(&mut client, export).unwrap();
        let uri = format!("nbd+unix:///vda?socket={}", nbd.display());
        let told = Command::new("nbdinfo").args(["--size", &uri]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&told.stdout).trim(), "1048576");
        execute(&mut client, r#"{"execute": "nbd-server-stop"}"#).unwrap();
        assert!(UnixStream::connect(&nbd).is_ok(), "who comes too early is turned away");
    }
    drop(client);
    daemon.end();
    assert!(control.exists() && nbd.exists(), "they are systemd's");
}
