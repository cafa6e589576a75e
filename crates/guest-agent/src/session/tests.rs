mod thaws;

use std::sync::mpsc;

use serde_json::json;

use super::*;
use crate::coverage::coverage;
use crate::fake::{Fake, Peer, script, within};

/// More than scheduling on a busy machine can cost; much less than a hang.
const SLACK: Duration = Duration::from_millis(1500);

fn connect(fake: &Fake) -> Session {
    Agent::new(fake.path()).connect(within(5000)).unwrap()
}

fn ext4() -> Vec<FileSystem> {
    vec![FileSystem { name: "vda".into(), mountpoint: "/".into(), kind: "ext4".into(), disk: Vec::new() }]
}

fn plain() -> Coverage {
    coverage(&AgentInfo::default(), &ext4(), None)
}

fn ok(value: impl serde::Serialize) -> serde_json::Value {
    json!({ "return": value })
}

fn refusal() -> serde_json::Value {
    json!({ "error": { "class": "CommandNotFound", "desc": "Command has been disabled" } })
}

/// Plays `play` after the sync, asks for a ping by a deadline of 300 ms, and sees that this ended in time.
fn ping_against(play: impl FnOnce(&mut Peer) + Send + 'static) -> AgentError {
    let fake = Fake::new(vec![script(move |peer| {
        peer.sync();
        peer.request();
        play(peer);
    })]);
    let mut session = connect(&fake);
    let start = Instant::now();
    let error = session.ping(within(300)).unwrap_err();
    assert!(start.elapsed() < Duration::from_millis(300) + SLACK, "took {:?}", start.elapsed());
    drop(session);
    fake.join();
    error
}

#[test]
fn a_conversation_uses_one_connection() {
    let fake = Fake::new(vec![script(|peer| {
        peer.serve(|command, _| match command {
            "guest-ping" => json!({ "return": {} }),
            "guest-info" => ok(json!({ "version": "7.2.22", "supported_commands": [
                { "name": "guest-ping", "enabled": true, "success-response": true },
                { "name": "guest-exec", "enabled": false, "success-response": true } ] })),
            "guest-get-fsinfo" => ok(json!([{ "name": "vda1", "mountpoint": "/", "type": "ext4", "used-bytes": 1, "disk": [
                { "serial": "A1", "bus-type": "a-bus-of-the-future", "bus": 0, "unit": 0, "target": 0, "dev": "/dev/vda1",
                  "pci-controller": { "bus": 0, "slot": 3, "domain": 0, "function": 0 } }] }])),
            "guest-fsfreeze-freeze" => ok(1),
            "guest-fsfreeze-thaw" => ok(1),
            "guest-fsfreeze-status" => ok("thawed"),
            other => panic!("{other}"),
        });
    })]);
    let mut session = connect(&fake);
    session.ping(within(5000)).unwrap();
    let info = session.info(within(5000)).unwrap();
    assert_eq!(info.version, "7.2.22");
    assert!(info.offers("guest-ping") && !info.offers("guest-exec") && !info.offers("guest-none"));
    let mounts = session.file_systems(within(5000)).unwrap();
    assert_eq!(mounts[0].disk[0].serial.as_deref(), Some("A1"));
    let coverage = coverage(&info, &mounts, None);
    assert_eq!(session.freeze(&coverage, within(5000)).unwrap(), 1);
    assert_eq!(session.thaw(within(5000)).unwrap(), Thawed { count: 1, complaint: None });
    drop(session);
    fake.join();
}

#[test]
fn a_socket_that_appears_later_is_found_then() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qga.sock");
    let agent = Agent::new(&path);
    let error = agent.connect(within(1000)).err().unwrap();
    assert!(matches!(error, AgentError::Absent { .. }), "{error}");
    assert!(error.to_string().contains("is QEMU running with"), "{error}");

    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    drop(listener);
    let refused = agent.connect(within(1000)).err().unwrap();
    assert!(matches!(refused, AgentError::Absent { .. }), "a stale socket file: {refused}");

    let fake = Fake::new(vec![script(|peer| peer.serve(|_, _| json!({ "return": {} })))]);
    std::fs::remove_file(&path).unwrap();
    std::fs::rename(fake.path(), &path).unwrap();
    agent.connect(within(5000)).unwrap().ping(within(5000)).unwrap();
    fake.join();
}

#[test]
fn a_path_too_long_for_a_socket_is_an_error() {
    let error = Agent::new("/".to_owned() + &"x".repeat(300)).connect(within(100)).err().unwrap();
    assert!(matches!(error, AgentError::Absent { .. }));
}

#[test]
fn qemu_without_an_agent_is_told_apart_from_no_qemu() {
    let fake = Fake::new(vec![script(Peer::hold)]);
    let start = Instant::now();
    let error = Agent::new(fake.path()).connect(within(200)).err().unwrap();
    assert!(start.elapsed() < Duration::from_millis(200) + SLACK);
    assert!(matches!(error, AgentError::Silent { discarded: 0, .. }), "{error}");
    assert!(error.to_string().contains("is qemu-guest-agent running in the guest"));
    fake.join();
}

#[test]
fn a_listener_that_never_accepts_does_not_hold_us() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qga.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    // Fill the queue as other clients would; the kernel then makes a blocking connect sleep.
    let mut waiting = Vec::new();
    while waiting.len() < 8192 {
        match dial_now(&path) {
            Some(socket) => waiting.push(socket),
            None => break,
        }
    }
    let start = Instant::now();
    let error = Agent::new(&path).connect(within(200)).err().unwrap();
    assert!(matches!(error, AgentError::Absent { .. } | AgentError::Silent { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_millis(200) + SLACK);
}

fn dial_now(path: &Path) -> Option<rustix::fd::OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
    connect(&socket, &SocketAddrUnix::new(path).unwrap()).ok().map(|()| socket)
}

#[test]
fn garbage_and_replies_to_others_before_the_sync_are_discarded() {
    let fake = Fake::new(vec![script(|peer| {
        let request = peer.request().unwrap();
        let id = request["arguments"]["id"].as_i64().unwrap();
        peer.say(&vec![b'{'; 200_000]);
        peer.say(b"\n{\"return\": 3}\n");
        peer.say(format!("{{\"return\": {id}}}\n").as_bytes()); // without the delimiter it is not the answer
        peer.say(b"\xFF");
        peer.answer(&json!(id - 1));
        peer.say(b"\xFF{\"return\": -1}\n\xFF{\"return\": [\n\xFF\xFF");
        peer.say(&vec![b'x'; 100_000]);
        // What a struct could be read from as well.
        peer.say(b"\n\xFF");
        peer.say(format!("[{id}]\n").as_bytes());
        peer.say(b"\n\xFF{\"error\":{\"class\":\"GenericError\",\"desc\":\"JSON parse error\"}}\n");
        peer.say(format!("\n{{\"return\": {id}}}\n").as_bytes());
        peer.say(b"\xFF");
        peer.answer(&json!(id));
        assert_eq!(peer.request().unwrap()["execute"], "guest-ping");
        peer.answer(&json!({}));
    })]);
    connect(&fake).ping(within(5000)).unwrap();
    fake.join();
}

#[test]
fn a_flood_instead_of_a_sync_ends_at_the_deadline() {
    let fake = Fake::new(vec![script(|peer| while peer.say(&[b'y'; 65536]) {})]);
    let start = Instant::now();
    let error = Agent::new(fake.path()).connect(within(300)).err().unwrap();
    assert!(start.elapsed() < Duration::from_millis(300) + SLACK);
    assert!(matches!(error, AgentError::Silent { discarded: 1.., .. }), "{error}");
    fake.join();
}

#[test]
fn a_reply_without_end_is_cut_off() {
    let fake = Fake::new(vec![script(|peer| {
        peer.sync();
        peer.request();
        let mut sent = 0_u64;
        while sent < 1 << 30 && peer.say(&[b'z'; 65536]) {
            sent += 65536;
        }
        assert!(sent < 64 << 20, "the client went on reading: {sent}");
    })]);
    let error = connect(&fake).ping(within(30_000)).unwrap_err();
    assert!(matches!(error, AgentError::Protocol { .. }), "{error}");
    fake.join();
}

#[test]
fn a_dribble_of_single_bytes_does_not_move_the_deadline() {
    let error = ping_against(|peer| {
        while peer.say(b" ") {
            thread::sleep(Duration::from_millis(5));
        }
    });
    assert!(matches!(error, AgentError::Timeout { command: "guest-ping" }), "{error}");
}

#[test]
fn a_disconnect_in_the_middle_of_a_reply_is_an_error() {
    let error = ping_against(|peer| {
        peer.say(b"{\"return\": ");
    });
    assert!(matches!(error, AgentError::Io { .. }), "{error}");
}

#[test]
fn replies_that_are_no_replies_are_refused() {
    let deep = "[".repeat(100_000) + "\n";
    for nonsense in [
        "\n",
        "}{\n",
        "[]\n",
        "[{}, null]\n",
        "{}\n",
        "null\n",
        "\u{0}\n",
        "{\"return\": 7\n",
        "{\"error\": 5}\n",
        &deep,
    ] {
        let nonsense = nonsense.to_owned();
        let shown = nonsense.clone();
        let error = ping_against(move |peer| {
            peer.say(nonsense.as_bytes());
        });
        assert!(matches!(error, AgentError::Protocol { .. }), "{shown:.40}: {error}");
    }
}

#[test]
fn an_error_reply_carries_class_and_words_and_keeps_the_connection() {
    let fake = Fake::new(vec![script(|peer| {
        let mut first = true;
        peer.serve(move |_, _| {
            if std::mem::take(&mut first) {
                json!({ "error": { "class": "AClassOfTheFuture", "desc": "no\u{1b}[31m" } })
            } else {
                json!({ "return": {} })
            }
        });
    })]);
    let mut session = connect(&fake);
    match session.ping(within(5000)) {
        Err(AgentError::Refused { command, class, desc }) => {
            assert_eq!((command, class.as_str()), ("guest-ping", "AClassOfTheFuture"));
            assert!(desc.starts_with("no") && !desc.contains('\u{1b}'));
        }
        other => panic!("{other:?}"),
    }
    session.ping(within(5000)).unwrap();
    drop(session);
    fake.join();
}

#[test]
fn a_late_reply_is_never_taken_for_the_next_ones() {
    let fake = Fake::new(vec![
        script(|peer| {
            peer.sync();
            peer.request();
            peer.hold();
        }),
        script(|peer| {
            let request = peer.request().unwrap();
            peer.say(b"{\"return\": {\"version\": \"late\", \"supported_commands\": []}}\n");
            peer.say(b"\xFF");
            peer.answer(&request["arguments"]["id"]);
            peer.serve(|_, _| ok(json!({ "version": "right", "supported_commands": [] })));
        }),
    ]);
    let mut session = connect(&fake);
    assert!(matches!(session.info(within(100)), Err(AgentError::Timeout { .. })));
    assert_eq!(session.info(within(5000)).unwrap().version, "right");
    drop(session);
    fake.join();
}

#[test]
fn an_agent_that_speaks_out_of_turn_is_synchronized_anew() {
    let (spoken, wait) = mpsc::channel();
    let fake = Fake::new(vec![
        script(move |peer| {
            peer.sync();
            peer.say(b"{\"return\": {\"version\": \"unasked\", \"supported_commands\": []}}\n");
            spoken.send(()).unwrap();
            peer.hold();
        }),
        script(|peer| peer.serve(|_, _| ok(json!({ "version": "asked", "supported_commands": [] })))),
    ]);
    let mut session = connect(&fake);
    wait.recv().unwrap();
    assert_eq!(session.info(within(5000)).unwrap().version, "asked");
    drop(session);
    fake.join();
}

#[test]
fn a_full_socket_does_not_hold_a_writer_past_the_deadline() {
    let fake = Fake::new(vec![script(|peer| {
        peer.sync();
        thread::sleep(Duration::from_millis(400)); // reads nothing
        peer.hold();
    })]);
    let mut session = connect(&fake);
    let info = AgentInfo::new("", ["guest-fsfreeze-freeze-list"]);
    let mounts: Vec<FileSystem> = (0..2000)
        .map(|i| FileSystem {
            name: i.to_string(),
            mountpoint: format!("/{i}{}", "m".repeat(1000)),
            kind: "xfs".into(),
            disk: Vec::new(),
        })
        .collect();
    let start = Instant::now();
    let error = session.freeze(&coverage(&info, &mounts, None), within(200)).unwrap_err();
    assert!(matches!(error, AgentError::Timeout { .. }) && error.in_doubt(), "{error}");
    assert!(start.elapsed() < Duration::from_millis(200) + SLACK);
    session.link = None;
    drop(session);
    drop(fake);
}
