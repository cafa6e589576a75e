//! Guest agents of ill will, with a real daemon: the snapshot is taken all the same and says why it is of grade `crash`, the
//! disks are served meanwhile, and afterwards the daemon has what it had: descriptors, threads, memory, an idle processor.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use frazil_tests::{Driver, ProcessTime, Request, kilobytes};
use serde_json::{Value, json};

use crate::served::{Served, Wanted};

const WANTED: Wanted = Wanted { format: "raw", cache: "writeback", disks: 2, queues: 1, bytes: 1 << 20 };

/// Whoever asks something else is answered within it.
const SOON: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(30);

/// What an agent without bounds says.
const ENDLESS: usize = 1 << 30;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Manner {
    Honest,
    /// 1 GiB without a newline, as soon as somebody connects.
    Floods,
    /// 1 GiB without a newline, as the answer to the first question.
    AnswersWithoutEnd,
    /// One answer after the other, to a single question.
    AnswersAgainAndAgain,
    /// What others had asked, and not what is asked.
    AnswersOthers,
    HangsUp,
    Silent,
    /// Counts that can not be, of freezes and thaws.
    Lies,
    /// Says that it is frozen, however often it is thawed, and that this was many file systems.
    StaysFrozen,
}

/// An agent whose manners change, from one question to the next.
struct Rogue(Arc<Mutex<Manner>>);

impl Rogue {
    fn start(socket: &Path) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let rogue = Self(Arc::new(Mutex::new(Manner::Honest)));
        let manner = Arc::clone(&rogue.0);
        thread::spawn(move || {
            listener.incoming().for_each(|client| meet(client.unwrap(), &manner));
        });
        rogue
    }

    fn behave(&self, manner: Manner) {
        *self.0.lock().unwrap() = manner;
    }
}

/// Whether all of it, and so the client, went.
fn say(client: &mut UnixStream, bytes: &[u8]) -> bool {
    client.write_all(bytes).is_ok()
}

fn flood(client: &mut UnixStream) {
    let piece = [b'y'; 64 << 10];
    let _ = (0..ENDLESS / piece.len()).all(|_| say(client, &piece));
}

/// A conversation, until the client goes.
fn meet(mut client: UnixStream, manner: &Mutex<Manner>) {
    if *manner.lock().unwrap() == Manner::Floods {
        return flood(&mut client);
    }
    let mut lines = BufReader::new(client.try_clone().unwrap());
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        let request: Value = serde_json::from_slice(line.strip_prefix(&[0xff]).unwrap_or(&line)).unwrap();
        let command = request["execute"].as_str().unwrap();
        let id = &request["arguments"]["id"];
        let now = *manner.lock().unwrap();
        let goes_on = match (command, now) {
            (_, Manner::Silent) => true,
            ("guest-sync-delimited", Manner::AnswersOthers) => {
                let others = [json!({ "return": id.as_i64().unwrap() - 1 }), json!({ "return": "frozen" })];
                others
                    .iter()
                    .all(|reply| say(&mut client, &[b"\xff", format!("{reply}\n").as_bytes()].concat()))
            }
            ("guest-sync-delimited", _) => {
                say(&mut client, &[0xff])
                    && say(&mut client, format!("{}\n", json!({ "return": id })).as_bytes())
            }
            (_, Manner::AnswersWithoutEnd) => return flood(&mut client),
            (_, Manner::AnswersAgainAndAgain) => {
                let many = "{\"return\": {}}\n".repeat(4096);
                (0..ENDLESS / many.len()).all(|_| say(&mut client, many.as_bytes()))
            }
            (_, Manner::HangsUp) => {
                say(&mut client, b"{\"return\"");
                return;
            }
            (command, now) => say(&mut client, format!("{}\n", reply(command, now)).as_bytes()),
        };
        if !goes_on {
            return;
        }
        line.clear();
    }
}

fn reply(command: &str, manner: Manner) -> Value {
    let value = match (command, manner) {
        ("guest-info", _) => json!({ "version": "10.0.2", "supported_commands": [] }),
        ("guest-get-fsinfo", _) => json!([{ "name": "vda", "mountpoint": "/", "type": "ext4", "disk": [] }]),
        ("guest-fsfreeze-freeze", Manner::Lies) => json!(u32::MAX),
        ("guest-fsfreeze-thaw", Manner::Lies) => json!(-1),
        ("guest-fsfreeze-thaw", Manner::StaysFrozen) => json!(i64::MAX),
        ("guest-fsfreeze-status", Manner::Lies | Manner::StaysFrozen) => json!("frozen"),
        ("guest-fsfreeze-freeze" | "guest-fsfreeze-thaw", _) => json!(1),
        ("guest-fsfreeze-status", _) => json!("thawed"),
        _ => json!({}),
    };
    json!({ "return": value })
}

/// Waits until no thaw is owed, and nothing is left of the snapshot.
fn calm_down(served: &Served, name: &str) {
    let deadline = Instant::now() + PATIENCE;
    let wait = |what: &str, is_over: &dyn Fn() -> bool| {
        while !is_over() {
            assert!(Instant::now() < deadline, "{what}");
            thread::sleep(Duration::from_millis(20));
        }
    };
    wait("a thaw is still owed", &|| served.ask("query-frazil", json!({}))["thaw-owed"] == false);
    served.ask("snapshot-delete", json!({ "name": name }));
    wait("a job does not end", &|| served.ask("query-jobs", json!({})) == json!([]));
}

/// Both disks are written to all the while: how long the slowest answer took.
fn while_served<T>(served: &Served, work: impl FnOnce() -> T) -> (T, Duration) {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let writes = |socket| {
            let stop = &stop;
            move || {
                let mut driver = Driver::connect(socket, 1, 1, 4096).unwrap();
                let mut longest = Duration::ZERO;
                while !stop.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    assert_eq!(driver.queues[0].ask(Request::Write(0)), 0);
                    longest = longest.max(begun.elapsed());
                    thread::sleep(Duration::from_millis(5));
                }
                longest
            }
        };
        let writers: Vec<_> = served.sockets.iter().map(|socket| scope.spawn(writes(socket))).collect();
        let done = work();
        stop.store(true, Ordering::Relaxed);
        (done, writers.into_iter().map(|writer| writer.join().unwrap()).max().unwrap())
    })
}

fn snapshot(served: &Served, name: &str) -> Value {
    let asked = Instant::now();
    let (mut client, arguments) = (served.qmp(), json!({ "name": name, "freeze": "prefer" }));
    let taking = thread::spawn(move || client.execute("snapshot-create", arguments, |_, _| {}).unwrap());
    while !taking.is_finished() {
        let asked = Instant::now();
        served.ask("query-status", json!({}));
        assert!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
        thread::sleep(Duration::from_millis(20));
    }
    assert!(asked.elapsed() < PATIENCE, "{:?}", asked.elapsed());
    taking.join().unwrap()
}

#[test]
fn an_agent_of_ill_will_costs_its_own_snapshots_their_grade_and_nobody_anything() {
    let mut served = Served::start(WANTED);
    let socket = served.path("agent");
    let rogue = Rogue::start(&socket);
    served.restart_with(&["--agent", socket.to_str().unwrap()]);
    // What is made once has been.
    for name in ["first", "second"] {
        let (taken, _) = while_served(&served, || snapshot(&served, name));
        assert_eq!(taken["grade"], "filesystem", "{taken}");
        calm_down(&served, name);
    }
    let (held, memory) = (served.held(), served.memory());
    for manner in [
        Manner::Floods,
        Manner::AnswersWithoutEnd,
        Manner::AnswersAgainAndAgain,
        Manner::AnswersOthers,
        Manner::HangsUp,
        Manner::Silent,
        Manner::Lies,
        Manner::StaysFrozen,
    ] {
        rogue.behave(manner);
        let name = format!("{manner:?}");
        let (taken, longest) = while_served(&served, || snapshot(&served, &name));
        assert_eq!(taken["grade"], "crash", "{manner:?}: {taken}");
        println!("{manner:?}: {}; the slowest request took {longest:?}", taken["reason"]);
        assert!(longest < SOON, "{manner:?}: {longest:?}");
        rogue.behave(Manner::Honest);
        calm_down(&served, &name);
        served.lets_go(held);
    }
    let peak = kilobytes(served.pid(), "VmHWM").unwrap();
    assert!(peak < memory + (32 << 10), "{peak} of {memory}");
    let before = ProcessTime::of(served.pid()).unwrap();
    thread::sleep(Duration::from_secs(1));
    let used = ProcessTime::of(served.pid()).unwrap().since(before);
    assert!(used < Duration::from_millis(100), "{used:?} of a second, with nothing to do");
    let (taken, _) = while_served(&served, || snapshot(&served, "last"));
    assert_eq!(taken["grade"], "filesystem", "{taken}");
}
