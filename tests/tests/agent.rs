//! The client against the real `qemu-ga`, running here, on the host.
//!
//! **It must never be able to freeze this machine**: a host whose file systems are frozen hangs. So the agent is started
//! with all such commands blocked, that is checked before anything else, and no test sends a freeze at all.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use guest_agent::{Agent, AgentError, AgentInfo, FileSystem, FreezeStatus, Session, SyncMeans, coverage};

const DANGEROUS: [&str; 12] = [
    "guest-fsfreeze-freeze",
    "guest-fsfreeze-freeze-list",
    "guest-fsfreeze-thaw",
    "guest-shutdown",
    "guest-suspend-disk",
    "guest-suspend-ram",
    "guest-suspend-hybrid",
    "guest-set-time",
    "guest-set-user-password",
    "guest-set-vcpus",
    "guest-set-memory-blocks",
    "guest-file-open",
];

struct RealAgent {
    child: Child,
    socket: PathBuf,
    _folder: tempfile::TempDir,
}

impl RealAgent {
    /// Starts an agent that offers neither what is dangerous nor `also_blocked`, and checks that.
    fn start(also_blocked: &[&str]) -> (Self, Session, AgentInfo) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qga.sock");
        let blocked: Vec<&str> = DANGEROUS.iter().chain(also_blocked).copied().collect();
        let child = Command::new("qemu-ga")
            .args(["-m", "unix-listen", "-p"])
            .arg(&socket)
            .arg("-f")
            .arg(folder.path().join("qga.pid"))
            .arg("-t")
            .arg(folder.path())
            .arg(format!("--block-rpcs={}", blocked.join(",")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-ga does not start; `make deps` installs it (Debian package qemu-guest-agent)");
        let agent = Self { child, socket, _folder: folder };
        let mut session = agent.connect();
        let info = session.info(soon()).unwrap();
        for command in blocked {
            assert!(!info.offers(command), "{command} is not blocked: stopping before it does harm");
        }
        (agent, session, info)
    }

    fn connect(&self) -> Session {
        let deadline = soon();
        loop {
            match Agent::new(&self.socket).connect(deadline) {
                Ok(session) => return session,
                Err(AgentError::Absent { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}

impl Drop for RealAgent {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn mounted_at(path: &Path) -> FileSystem {
    FileSystem {
        name: "vda".to_owned(),
        mountpoint: path.to_str().unwrap().to_owned(),
        kind: "ext4".to_owned(),
        disk: Vec::new(),
    }
}

#[test]
fn the_real_agent_answers_on_one_connection_and_on_the_next() {
    let (agent, mut session, info) = RealAgent::start(&["guest-exec"]);
    assert!(info.offers("guest-ping") && info.offers("guest-get-fsinfo"));
    assert!(info.version.starts_with(|first: char| first.is_ascii_digit()), "{}", info.version);
    session.ping(soon()).unwrap();
    assert_eq!(session.status(soon()).unwrap(), FreezeStatus::Thawed);
    let mounts = session.file_systems(soon()).unwrap();
    assert!(
        mounts.iter().all(|mount| mount.mountpoint.starts_with('/') && !mount.kind.is_empty()),
        "{mounts:?}"
    );
    drop(session);
    let mut second = agent.connect();
    second.ping(soon()).unwrap();
}

#[test]
fn a_command_blocked_in_the_guest_is_a_refusal_in_the_agents_words() {
    let (_agent, mut session, info) = RealAgent::start(&["guest-exec"]);
    let folder = tempfile::tempdir().unwrap();
    let coverage = coverage(&info, &[mounted_at(folder.path())], None);

    // Asked as if it were on offer, so that the refusal is the agent's own.
    let offered = AgentInfo::new("", ["guest-exec", "guest-exec-status"]);
    let asked = session.pre_sync(&offered, &coverage, soon());
    assert_eq!((asked.means, asked.passes), (None, 0));
    let shortfall = asked.shortfall.unwrap();
    assert!(shortfall.contains("guest-exec") && shortfall.contains("CommandNotFound"), "{shortfall}");

    let not_asked = session.pre_sync(&info, &coverage, soon());
    assert!(not_asked.shortfall.unwrap().contains("blocked"));

    // A thaw that is refused while nothing is frozen: the guest runs, and we are told why the count is not known.
    let thawed = session.thaw(soon()).unwrap();
    assert_eq!(thawed.count, 0);
    assert!(thawed.complaint.unwrap().contains("guest-fsfreeze-thaw"));
    session.ping(soon()).unwrap();
}

#[test]
fn the_real_agent_syncs_the_named_file_system() {
    let (_agent, mut session, info) = RealAgent::start(&[]);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("dirty"), vec![1; 1 << 20]).unwrap();
    let coverage = coverage(&info, &[mounted_at(folder.path())], None);
    let report = session.pre_sync(&info, &coverage, Instant::now() + Duration::from_secs(120));
    assert_eq!((report.means, report.shortfall), (Some(SyncMeans::FileSystems), None));
    assert!(report.passes >= 1);
}

#[test]
fn an_agent_that_has_gone_is_absent_to_the_next_call() {
    let (mut agent, mut session, _) = RealAgent::start(&["guest-exec"]);
    agent.child.kill().unwrap();
    agent.child.wait().unwrap();
    let error = session.ping(soon()).unwrap_err();
    assert!(matches!(error, AgentError::Absent { .. }), "{error}");
}

#[test]
fn a_real_agent_that_wakes_up_late_is_synchronized_anew() {
    let (agent, mut session, info) = RealAgent::start(&["guest-exec"]);
    let signal = |name: &str| {
        let pid = agent.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    };
    signal("-STOP");
    let error = session.ping(Instant::now() + Duration::from_millis(200)).unwrap_err();
    assert!(matches!(error, AgentError::Timeout { command: "guest-ping" }), "{error}");
    signal("-CONT");
    assert_eq!(session.info(soon()).unwrap(), info);
}
