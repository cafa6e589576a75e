use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};
use snapshot::{ShutdownCause, Step};
use tempfile::TempDir;

use super::*;
use crate::client::{Client, ClientError};
use crate::outbox::LIMIT;
use crate::testing::Fake;

const PATIENCE: Duration = Duration::from_secs(20);

/// A server of a fake.
struct Rig {
    server: Server,
    service: Arc<Fake>,
    folder: TempDir,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let service = Arc::new(Fake::new());
        let server = Server::start(
            hostio::Listener::bind(&folder.path().join("qmp")).unwrap(),
            Arc::clone(&service) as _,
            service.announcer().clone(),
        )
        .unwrap();
        Self { server, service, folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    /// Tells of a stall of so many milliseconds.
    fn stall(&self, milliseconds: u32) {
        let milliseconds = f64::from(milliseconds);
        self.service.announcer().tell(&Event::Stall { name: "a".into(), step: Step::Drain, milliseconds });
    }

    /// A connection that has been greeted.
    fn raw(&self) -> Raw {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut raw = Raw(BufReader::new(stream));
        assert!(raw.line().unwrap().get("QMP").is_some());
        raw
    }

    /// One that has negotiated, too.
    fn negotiated(&self) -> Raw {
        let mut raw = self.raw();
        assert_eq!(raw.ask(b"{'execute':'qmp_capabilities'}"), json!({"return": {}}));
        raw
    }

    /// Waits until so many are connected.
    fn wait_for_clients(&self, count: usize) {
        let clients = &self.server.announcer.clients;
        let wait =
            clients.left.wait_timeout_while(clients.lock(), PATIENCE, |sessions| sessions.len() > count);
        let (sessions, timeout) = wait.unwrap();
        assert!(!timeout.timed_out(), "{} clients are left", sessions.len());
    }
}

/// A client that says anything.
struct Raw(BufReader<UnixStream>);

impl Raw {
    fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    /// The next message, `None` at the end.
    fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => None,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
            Ok(_) => {
                assert!(line.ends_with("\r\n"), "{line:?}");
                Some(serde_json::from_str(&line).unwrap())
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// The next message that is no event.
    fn reply(&mut self) -> Option<Value> {
        std::iter::from_fn(|| self.line()).find(|message| message.get("event").is_none())
    }

    fn ask(&mut self, bytes: &[u8]) -> Value {
        self.send(bytes);
        self.reply().unwrap()
    }
}

fn sealed(name: &str) -> Event {
    Event::Sealed { name: name.to_owned() }
}

fn create(name: &str) -> Vec<u8> {
    json!({"execute": "snapshot-create", "arguments": {"name": name}}).to_string().into_bytes()
}

#[test]
fn the_greeting_offers_no_capability() {
    let rig = Rig::new();
    let mut greeting = String::new();
    BufReader::new(UnixStream::connect(rig.path()).unwrap()).read_line(&mut greeting).unwrap();
    let greeting: Value = serde_json::from_str(&greeting).unwrap();
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));
    assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64());
}

#[test]
fn several_commands_in_one_packet_and_one_in_many() {
    let rig = Rig::new();
    let mut client = rig.raw();
    client.send(
        b"{'execute':'qmp_capabilities','id':1}{'execute':'query-name','id':[2]}\n{'execute':'no','id':null}",
    );
    assert_eq!(client.line().unwrap(), json!({"return": {}, "id": 1}));
    assert_eq!(client.line().unwrap(), json!({"return": {}, "id": [2]}));
    let last = client.line().unwrap();
    assert_eq!(
        last["error"],
        json!({"class": "CommandNotFound", "desc": "The command no has not been found"})
    );
    assert_eq!(last.get("id"), Some(&Value::Null));
    for byte in b"{\"execute\": \"query-name\", \"id\": \"slowly\"}" {
        client.send(&[*byte]);
    }
    assert_eq!(client.line().unwrap()["id"], "slowly");
}

#[test]
fn a_half_closed_client_is_answered_to_the_end() {
    let rig = Rig::new();
    let mut client = rig.raw();
    client.send(b"{'execute':'qmp_capabilities'}{'execute':'query-version'}");
    client.0.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.line().unwrap(), json!({"return": {}}));
    assert!(client.line().unwrap()["return"]["package"].is_string());
    assert_eq!(client.line(), None);
    rig.wait_for_clients(0);
}

#[test]
fn events_go_to_all_who_have_negotiated_and_to_nobody_else() {
    let rig = Rig::new();
    let mut early = rig.raw();
    let mut listeners = [rig.negotiated(), rig.negotiated()];
    rig.service.announcer().tell(&sealed("one"));
    for listener in &mut listeners {
        let event = listener.line().unwrap();
        assert_eq!(
            (&event["event"], &event["data"]),
            (&json!("FRAZIL_SNAPSHOT_SEALED"), &json!({"name": "one"}))
        );
        assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_700_000_000);
        assert!(event["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);
    }
    assert_eq!(early.ask(b"{'execute':'qmp_capabilities'}"), json!({"return": {}}));
    rig.service.announcer().tell(&sealed("two"));
    assert_eq!(early.line().unwrap()["data"]["name"], "two");
}

#[test]
fn a_slow_command_holds_up_only_the_client_that_asked() {
    let rig = Rig::new();
    let (mut slow, mut other) = (rig.negotiated(), rig.negotiated());
    slow.send(&create("slow"));
    slow.send(b"{'execute':'query-name','id':'after'}");
    rig.service.wait_for_slow(1);
    assert_eq!(other.ask(b"{'execute':'query-name','id':7}")["id"], 7);
    rig.service.go_on();
    assert_eq!(slow.reply().unwrap()["return"]["name"], "slow");
    assert_eq!(slow.reply().unwrap()["id"], "after");
}

#[test]
fn a_client_that_leaves_in_mid_command_has_no_influence_on_it() {
    let rig = Rig::new();
    let mut leaving = rig.negotiated();
    leaving.send(&create("slow"));
    rig.service.wait_for_slow(1);
    drop(leaving);
    rig.service.go_on();
    rig.wait_for_clients(0);
    assert_eq!(rig.service.names(), ["slow"]);
    drop(rig.raw());
    let mut half = rig.raw();
    half.send(b"{'execute': 'quer");
    drop(half);
    rig.wait_for_clients(0);
}

#[test]
fn a_client_that_does_not_read_is_cut_off_and_the_others_miss_nothing() {
    let rig = Rig::new();
    let (mut deaf, mut listener) = (rig.negotiated(), rig.negotiated());
    let name = "x".repeat(LIMIT / 16);
    // Far more than the kernel's buffer and the outbox take.
    let count = 64;
    let heard = thread::scope(|scope| {
        let heard = scope.spawn(|| (0..count).filter(|_| listener.line().is_some()).count());
        for _ in 0..count {
            rig.service.announcer().tell(&sealed(&name));
            // The listener is to keep up on a busy machine.
            thread::sleep(Duration::from_millis(5));
        }
        heard.join().unwrap()
    });
    assert_eq!(heard, count);
    rig.wait_for_clients(1);
    let mut rest = Vec::new();
    // Whether the cut shows as an end or as an error is up to the kernel.
    let _ = deaf.0.read_to_end(&mut rest);
    assert!(rest.len() < count * name.len());
}

#[test]
fn a_flood_of_commands_without_a_reader_stops_at_a_bound() {
    let rig = Rig::new();
    let mut flood = rig.negotiated();
    flood.0.get_ref().set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let commands = b"{'execute':'query-block'}".repeat(1000);
    let mut sent = 0;
    // The server stops reading, so sending has to stop as well.
    while let Ok(count) = flood.0.get_mut().write(&commands) {
        sent += count;
        assert!(sent < 64 << 20, "the server reads without an end");
    }
    assert_eq!(rig.negotiated().ask(b"{'execute':'query-name'}"), json!({"return": {}}));
}

#[test]
fn too_long_or_too_deep_a_command_is_refused_and_the_connection_closed() {
    let rig = Rig::new();
    for (input, desc) in [
        (vec![b'['; 1000], "JSON nesting depth limit exceeded"),
        ([b"{'execute':'".to_vec(), vec![b'a'; 10 << 20]].concat(), "JSON token size limit exceeded"),
    ] {
        let mut client = rig.negotiated();
        let writer = client.0.get_ref().try_clone().unwrap();
        // It fails in the middle, as the server closes.
        let writing = thread::spawn(move || drop((&writer).write_all(&input)));
        assert_eq!(client.line().unwrap()["error"], json!({"class": "GenericError", "desc": desc}));
        assert_eq!(client.line(), None);
        writing.join().unwrap();
    }
    assert_eq!(rig.negotiated().ask(b"{'execute':'query-name'}"), json!({"return": {}}));
}

#[test]
fn one_client_too_many_is_turned_away_and_a_place_that_is_given_up_is_free() {
    let rig = Rig::new();
    let mut clients: Vec<Raw> = (0..MAX_CLIENTS).map(|_| rig.raw()).collect();
    let mut extra = Raw(BufReader::new(UnixStream::connect(rig.path()).unwrap()));
    assert_eq!(extra.line(), None);
    clients.pop();
    rig.wait_for_clients(MAX_CLIENTS - 1);
    drop(rig.raw());
    for client in &mut clients {
        assert_eq!(client.ask(b"{'execute':'qmp_capabilities'}"), json!({"return": {}}));
    }
}

#[test]
fn garbage_and_mutated_commands_end_at_most_their_own_connection() {
    let rig = Rig::new();
    let mut random = 0x2545_F491_4F6C_DD1D_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let commands = [
        &b"{\"execute\":\"qmp_capabilities\"}"[..],
        b"{'execute':'snapshot-create','arguments':{'name':'a','disks':['vda'],'freeze':'never'},'id':{}}",
        b"{'execute':'snapshot-export','arguments':{'name':'a','disk':'vda','target':'/x','format':'raw'}}",
        b"{\"execute\":\"query-snapshot\",\"arguments\":{\"name\":\"a\",\"probe\":true}}",
    ];
    for _ in 0..150 {
        let mut client = rig.raw();
        client.send(b"{'execute':'qmp_capabilities'}");
        let mut input = Vec::new();
        for _ in 0..8 {
            let mut command = commands[next() as usize % commands.len()].to_vec();
            for _ in 0..next() % 4 {
                let at = next() as usize % command.len();
                command[at] = next() as u8;
            }
            input.extend(command);
        }
        client.send(&input);
        client.0.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
        // Every line is a well-formed message.
        while let Some(message) = client.line() {
            assert!(["return", "error", "event"].iter().any(|member| message.get(member).is_some()));
        }
    }
    rig.wait_for_clients(0);
    assert_eq!(rig.negotiated().ask(b"{'execute':'query-name'}"), json!({"return": {}}));
}

#[test]
fn many_clients_at_once_are_all_served() {
    let rig = Rig::new();
    thread::scope(|scope| {
        for number in 0..32 {
            let path = rig.path();
            scope.spawn(move || {
                let mut client = Client::connect(&path).unwrap();
                let name = format!("s{number}");
                let made = client.execute("snapshot-create", json!({"name": name}), |_, _| {}).unwrap();
                assert_eq!(made["name"], *name);
                client.execute("query-snapshot", json!({"name": name}), |_, _| {}).unwrap();
                client.execute("snapshot-delete", json!({"name": name}), |_, _| {}).unwrap();
            });
        }
    });
    assert!(rig.service.names().is_empty());
}

#[test]
fn a_panic_in_a_command_is_its_clients_alone() {
    let rig = Rig::new();
    let mut unlucky = rig.negotiated();
    unlucky.send(&create("panic"));
    assert_eq!(unlucky.line(), None);
    rig.wait_for_clients(0);
    assert_eq!(rig.negotiated().ask(b"{'execute':'query-name'}"), json!({"return": {}}));
}

#[test]
fn stopping_answers_what_runs_and_takes_the_socket_away() {
    let mut rig = Rig::new();
    let (mut busy, mut idle) = (rig.negotiated(), rig.negotiated());
    busy.send(&create("slow"));
    rig.service.wait_for_slow(1);
    // The second is held back.
    [1, 2].iter().for_each(|stall| rig.stall(*stall));
    thread::scope(|scope| {
        let service = Arc::clone(&rig.service);
        scope.spawn(move || {
            for stall in [1.0, 2.0] {
                assert_eq!(idle.line().unwrap()["data"]["milliseconds"], stall);
            }
            let told = idle.line().unwrap();
            assert_eq!(
                (&told["event"], &told["data"]["reason"]),
                (&json!("SHUTDOWN"), &json!("host-signal"))
            );
            assert_eq!(idle.line(), None);
            service.go_on();
        });
        let last = Event::Shutdown { guest: false, reason: ShutdownCause::HostSignal };
        rig.server.stop(Some(&last), PATIENCE);
    });
    assert!(!rig.path().exists());
    assert_eq!(busy.reply().unwrap()["return"]["name"], "slow");
    assert_eq!(busy.reply(), None);
}

#[test]
fn stopping_does_not_wait_longer_than_it_is_told() {
    let mut rig = Rig::new();
    let mut busy = rig.negotiated();
    busy.send(&create("slow"));
    rig.service.wait_for_slow(1);
    rig.server.stop(None, Duration::from_millis(50));
    assert_eq!(busy.line(), None);
    rig.service.go_on();
    rig.wait_for_clients(0);
}

#[test]
fn quit_is_answered() {
    let rig = Rig::new();
    assert_eq!(rig.negotiated().ask(b"{'execute':'quit'}"), json!({"return": {}}));
    assert!(rig.service.has_quit());
}

#[test]
fn stalls_are_told_once_a_second() {
    let rig = Rig::new();
    let mut client = rig.negotiated();
    (1..=100).for_each(|count| rig.stall(count));
    let began = Instant::now();
    let told = [client.line().unwrap(), client.line().unwrap()];
    assert_eq!(told.map(|event| event["data"]["milliseconds"].clone()), [json!(1.0), json!(100.0)]);
    assert!(began.elapsed() > Duration::from_millis(500));
}

#[test]
fn the_client_gives_results_errors_and_events() {
    let rig = Rig::new();
    let mut client = Client::connect(&rig.path()).unwrap();
    let mut events = Vec::new();
    let record = client
        .execute("snapshot-create", json!({"name": "a"}), |name, _| events.push(name.to_owned()))
        .unwrap();
    assert_eq!(record["grade"], "filesystem");
    assert_eq!(events, ["FRAZIL_SNAPSHOT_CREATED"], "an event comes before the answer to its cause");
    let export = json!({"name": "a", "disk": "vda", "target": "/x", "format": "raw"});
    let mut offsets = Vec::new();
    client.execute("snapshot-export", export, |_, data| offsets.push(data["offset"].clone())).unwrap();
    assert_eq!(offsets.first(), Some(&json!(0)), "a bar begins to be drawn at once");
    let error = client.execute("snapshot-delete", json!({"name": "x"}), |_, _| {}).unwrap_err();
    let ClientError::Command { class, desc } = error else { panic!("{error}") };
    assert_eq!((class.as_str(), desc.as_str()), ("DeviceNotFound", "no snapshot is named x"));
    drop(rig);
    let error = client.execute("query-name", json!({}), |_, _| {}).unwrap_err();
    assert!(matches!(error, ClientError::Io(_)), "{error}");
}
