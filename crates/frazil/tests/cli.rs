//! The program itself, against the real control server with a service that only pretends.

#![allow(clippy::unwrap_used, reason = "to clippy, the helpers of tests are no tests")]

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use control::Server;
use control::testing::Fake;
use serde_json::{Value, json};

fn frazil(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_frazil"))
        .args(arguments)
        .env_remove("FRAZIL_CONTROL")
        .env_remove("FRAZIL_LOG")
        .env_remove("RUST_LOG")
        .output()
        .unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// A daemon's control socket in a folder of its own.
struct Pretender {
    folder: tempfile::TempDir,
    service: Arc<Fake>,
    _server: Server,
}

impl Pretender {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let service = Arc::new(Fake::new());
        let listener = hostio::Listener::bind(&folder.path().join("control.sock")).unwrap();
        let server = Server::start(listener, Arc::clone(&service) as _, service.announcer().clone()).unwrap();
        Self { folder, service, _server: server }
    }

    fn socket(&self) -> String {
        self.folder.path().join("control.sock").display().to_string()
    }

    fn run(&self, arguments: &[&str]) -> Output {
        frazil(&[arguments, &["--control", &self.socket()]].concat())
    }

    /// Runs a command that must succeed, and gives its standard output.
    fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!((code(&output), stderr(&output)), (0, ""), "{arguments:?}");
        stdout(&output).to_owned()
    }
}

#[test]
fn a_snapshot_lives_from_create_to_delete() {
    let daemon = Pretender::start();
    let text = daemon.succeed(&["snapshot", "create", "monday", "--disks", "vda,vdb", "--freeze", "require"]);
    assert!(text.starts_with("name       monday\n"), "{text}");
    assert!(daemon.succeed(&["snapshot", "list"]).contains("monday  1970-01-01T00:00:00Z  filesystem"));
    assert!(daemon.succeed(&["snapshot", "show", "monday"]).contains("needs_recovery is not set"));
    assert_eq!(daemon.succeed(&["snapshot", "revert", "monday"]), "reverted to monday\n");
    assert_eq!(daemon.succeed(&["snapshot", "delete", "monday"]), "deleted monday\n");
    assert_eq!(daemon.succeed(&["snapshot", "list"]), "no snapshots\n");
}

#[test]
fn json_is_one_value_on_standard_output_and_nothing_else() {
    let daemon = Pretender::start();
    let created: Value =
        serde_json::from_str(&daemon.succeed(&["snapshot", "create", "monday", "--json"])).unwrap();
    assert_eq!(created["name"], "monday");
    assert_eq!(created["grade"], "filesystem");
    assert!(created["reason"].is_string());
    assert_eq!(created["timing"]["freeze"], 20.0);
    assert_eq!(created["disks"], json!([{ "id": "vda", "path": "/images/base.raw", "format": "raw" }]));

    let listed: Value = serde_json::from_str(&daemon.succeed(&["snapshot", "list", "--json"])).unwrap();
    assert_eq!(listed, json!([created]));
    let mut shown: Value =
        serde_json::from_str(&daemon.succeed(&["snapshot", "show", "monday", "--json"])).unwrap();
    assert_eq!(shown["probe"][0]["volumes"][0]["verdict"], "clean");
    shown.as_object_mut().unwrap().remove("probe");
    assert_eq!(shown, created);
    let status: Value = serde_json::from_str(&daemon.succeed(&["status", "--json"])).unwrap();
    assert_eq!(status["disks"][0]["id"], "vda");
}

#[test]
fn an_export_shows_no_bar_where_nobody_watches() {
    let daemon = Pretender::start();
    daemon.succeed(&["snapshot", "create", "monday"]);
    let export = ["snapshot", "export", "monday", "--disk", "vda", "--format", "raw", "/out.raw"];
    assert_eq!(daemon.succeed(&export), "exported disk vda of monday to /out.raw\n");
}

#[test]
fn two_phases_hold_the_cut_for_as_long_as_the_lease_says() {
    let daemon = Pretender::start();
    let text = daemon.succeed(&["snapshot", "prepare", "monday", "--lease", "30"]);
    assert_eq!(text, "prepared monday: the guest is held; release or abort it within 30 s\n");
    assert_eq!(daemon.service.lease(), Some(Duration::from_secs(30)));
    assert!(daemon.succeed(&["snapshot", "release", "monday"]).starts_with("name       monday\n"));
    daemon.succeed(&["snapshot", "prepare", "tuesday"]);
    assert_eq!(daemon.succeed(&["snapshot", "abort", "tuesday"]), "aborted tuesday: the guest goes on\n");
}

#[test]
fn what_the_daemon_refuses_ends_in_1_with_its_reason() {
    let daemon = Pretender::start();
    let output = daemon.run(&["snapshot", "show", "sunday"]);
    assert_eq!(code(&output), 1);
    assert_eq!(
        stderr(&output),
        "frazil: show snapshot sunday: no snapshot is named sunday\n\
         hint: `frazil snapshot list` and `frazil status` show what there is\n"
    );
    assert_eq!(stdout(&output), "");
}

#[test]
fn a_daemon_that_is_not_there_ends_in_3() {
    let output = frazil(&["snapshot", "list", "--control", "/nonexistent"]);
    assert_eq!(code(&output), 3);
    assert_eq!(
        stderr(&output),
        "frazil: connect to /nonexistent: No such file or directory (os error 2)\n\
         hint: is `frazil serve` running with this --control?\n\
         hint: if the daemon is not meant to run, ask its directory with --state\n"
    );
}

/// A daemon that answers one command with `reply`, or goes away where it should.
fn answer_once(socket: &Path, reply: Option<Value>) -> std::thread::JoinHandle<()> {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut requests = stream.try_clone().unwrap();
        writeln!(stream, "{}", json!({ "QMP": { "version": {}, "capabilities": [] } })).unwrap();
        for answer in [Some(json!({})), reply] {
            // The client sends no newline: its command ends with the brace that closes the first.
            let mut depth = 0;
            loop {
                let mut byte = [0];
                requests.read_exact(&mut byte).unwrap();
                depth += i32::from(byte == *b"{") - i32::from(byte == *b"}");
                if depth == 0 {
                    break;
                }
            }
            let Some(answer) = answer else { return };
            writeln!(stream, "{}", json!({ "return": answer })).unwrap();
        }
    })
}

#[test]
fn a_daemon_that_goes_away_before_it_answers_ends_in_3() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let daemon = answer_once(&socket, None);
    let output = frazil(&["snapshot", "create", "monday", "--control", socket.to_str().unwrap()]);
    daemon.join().unwrap();
    assert_eq!(code(&output), 3);
    assert!(stderr(&output).contains("what became of it is not known"), "{}", stderr(&output));
}

#[test]
fn a_grade_that_is_less_than_required_ends_in_4_and_guest_text_can_not_drive_the_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let record = json!({
        "name": "monday", "time": "2026-11-22T08:00:00Z", "grade": "crash",
        "reason": "the agent said \u{1b}[2Jnothing", "sealed": true, "disks": [],
        "timing": { "prepare": 1.0, "gate": 1.0, "drain": 1.0, "pivot": 1.0, "open": 1.0, "seal": 1.0,
                    "gate-closed": 1.0, "longest-wait": 1.0 },
    });
    for (policy, expected) in [("require", 4), ("prefer", 0)] {
        let daemon = answer_once(&socket, Some(record.clone()));
        let control = socket.to_str().unwrap();
        let output = frazil(&["snapshot", "create", "monday", "--freeze", policy, "--control", control]);
        daemon.join().unwrap();
        std::fs::remove_file(&socket).unwrap();
        assert_eq!(code(&output), expected, "{policy}: {}", stderr(&output));
        assert!(
            stdout(&output).contains("the agent said \u{fffd}[2Jnothing"),
            "the record is printed all the same"
        );
        assert!(!stderr(&output).contains('\u{1b}'));
    }
}

#[test]
fn the_control_socket_may_come_from_the_environment_and_the_flag_wins() {
    let daemon = Pretender::start();
    let run = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_frazil"))
            .args(arguments)
            .env("FRAZIL_CONTROL", daemon.socket())
            .output()
            .unwrap()
    };
    assert_eq!(code(&run(&["snapshot", "list"])), 0);
    assert_eq!(code(&run(&["snapshot", "list", "--control", "/nonexistent"])), 3);
}

#[test]
fn a_bad_command_line_or_file_ends_in_2_and_names_the_mistake() {
    let disk = "id=vda,path=/img,format=raw,socket=/s,colour=red";
    let output = frazil(&["serve", "--state", "/st", "--control", "/c", "--disk", disk]);
    assert_eq!(code(&output), 2);
    assert!(stderr(&output).contains("unknown key `colour`; the keys are id, path"), "{}", stderr(&output));

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    std::fs::write(&file, "state = \"st\"\ncontrol = \"c\"\ncolour = \"red\"").unwrap();
    let output = frazil(&["serve", "--config", file.to_str().unwrap()]);
    assert_eq!(code(&output), 2);
    let expected = format!(
        "frazil: read {}: unknown key `colour`; the keys are state, control, agent, freeze-owner, freeze, pre-sync, \
         allow-folders, target-folders, tls-folders, sandbox, metrics, users, disk\n\
         hint: `frazil serve --help` lists the words and their values\n",
        file.display()
    );
    assert_eq!(stderr(&output), expected);

    let same = "id=vda,path=/img,format=raw,socket=/c";
    let output = frazil(&["serve", "--state", "/st", "--control", "/c", "--disk", same]);
    assert_eq!(code(&output), 2);
    assert!(
        stderr(&output).contains("/c is given to control and to socket of disk vda"),
        "{}",
        stderr(&output)
    );
    assert_eq!(code(&frazil(&["serve", "--config", "/nonexistent.toml"])), 2);
}

#[test]
fn a_daemon_that_can_not_start_ends_in_1_and_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(at("raw.img"), [0; 4096]).unwrap();
    let serve = |image: &str, format: &str| {
        let disk = format!("id=vda,path={},format={format},socket={}", at(image), at("vda.sock"));
        frazil(&["serve", "--state", &at("state"), "--control", &at("control.sock"), "--disk", &disk])
    };
    for (image, format, hint) in [
        ("none.img", "raw", "\nhint: images and the folders of sockets must be there"),
        ("raw.img", "qcow2", "wrong magic number\nhint: is format= right?"),
    ] {
        let output = serve(image, format);
        assert_eq!(code(&output), 1, "{image}");
        assert!(stderr(&output).contains(hint), "{}", stderr(&output));
    }
}

#[test]
fn help_tells_the_exit_codes_and_shells_can_complete() {
    let help = frazil(&["--help"]);
    assert_eq!(code(&help), 0);
    assert!(stdout(&help).contains("3  the daemon can not be reached"));
    let script = frazil(&["completions", "bash"]);
    assert!(
        stdout(&script).contains("frazil__subcmd__snapshot") || stdout(&script).contains("frazil__snapshot")
    );
    assert!(stdout(&script).contains("--freeze-owner"));
}
