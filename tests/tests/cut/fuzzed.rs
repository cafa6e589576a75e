//! Control clients of ill will, one for each command: what they say is made from the schema that the daemon shows.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::served::{Served, Wanted};

const WANTED: Wanted = Wanted { format: "qcow2", cache: "writeback", disks: 2, queues: 1, bytes: 1 << 20 };

/// Calls in the long run.
const CALLS: u32 = 5000;

/// How long a call is waited for; then its client goes, in the middle of it.
const WAIT: Duration = Duration::from_millis(150);

/// A client that asks for nothing unusual is answered within it, whatever the others do.
const SOON: Duration = Duration::from_secs(1);

/// Numbers that are the same in each run (xorshift64*).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % sides
    }

    fn one_of<T: Clone>(&mut self, values: &[T]) -> T {
        values[self.roll(values.len())].clone()
    }
}

/// What `query-qmp-schema` shows, by name.
struct Shown(BTreeMap<String, Value>);

impl Shown {
    fn of(served: &Served) -> Self {
        let entries = served.ask("query-qmp-schema", json!({}));
        let named = |entry: &Value| (entry["name"].as_str().unwrap().to_owned(), entry.clone());
        Self(entries.as_array().unwrap().iter().map(named).collect())
    }

    /// The commands, but for the one that ends the daemon.
    fn commands(&self) -> Vec<String> {
        let is_command = |entry: &&Value| entry["meta-type"] == "command" && entry["name"] != "quit";
        self.0.values().filter(is_command).map(|entry| entry["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Arguments for a command, of the right shape.
    fn arguments(&self, command: &str, dice: &mut Dice, words: &[String]) -> Value {
        self.value(self.0[command]["arg-type"].as_str().unwrap(), dice, words, 0)
    }

    fn value(&self, of: &str, dice: &mut Dice, words: &[String], depth: usize) -> Value {
        let entry = &self.0[of];
        match entry["meta-type"].as_str().unwrap() {
            "object" => self.object(entry, dice, words, depth),
            "array" => {
                let count = if depth > 4 { 0 } else { dice.roll(3) };
                let of = entry["element-type"].as_str().unwrap();
                (0..count).map(|_| self.value(of, dice, words, depth + 1)).collect()
            }
            "enum" => dice.one_of(entry["values"].as_array().unwrap()),
            "alternate" => {
                let of = dice.one_of(entry["members"].as_array().unwrap());
                self.value(of["type"].as_str().unwrap(), dice, words, depth + 1)
            }
            _ => match entry["json-type"].as_str().unwrap() {
                "string" => json!(dice.one_of(words)),
                "boolean" => json!(dice.roll(2) == 0),
                "int" => {
                    dice.one_of(&[0, 1, -1, 3, 4096, 65536, 1 << 20, 2 << 20, i64::MIN, i64::MAX]).into()
                }
                "null" => Value::Null,
                _ => json!({}),
            },
        }
    }

    fn object(&self, entry: &Value, dice: &mut Dice, words: &[String], depth: usize) -> Value {
        let mut made = Map::new();
        for member in entry["members"].as_array().unwrap() {
            let is_optional = member.get("default").is_some();
            if is_optional && (depth > 4 || dice.roll(3) > 0) {
                continue;
            }
            let of = member["type"].as_str().unwrap();
            let value = self.value(of, dice, words, depth + 1);
            made.insert(member["name"].as_str().unwrap().to_owned(), value);
        }
        if let Some(tag) = entry.get("tag").and_then(Value::as_str) {
            let case = made[tag].clone();
            let variant =
                entry["variants"].as_array().unwrap().iter().find(|variant| variant["case"] == case);
            if let Some(variant) = variant {
                let more = self.value(variant["type"].as_str().unwrap(), dice, words, depth + 1);
                made.extend(more.as_object().unwrap().clone());
            }
        }
        made.into()
    }
}

/// The same arguments with something wrong.
fn spoiled(mut arguments: Value, dice: &mut Dice) -> Value {
    let members = arguments.as_object_mut().unwrap();
    let odd =
        [json!(null), json!([]), json!({}), json!(-1.5), json!("\u{0}"), json!([[[[{}]]]]), json!(true)];
    let names: Vec<_> = members.keys().cloned().collect();
    match dice.roll(3) {
        0 if !names.is_empty() => drop(members.remove(&dice.one_of(&names))),
        1 if !names.is_empty() => drop(members.insert(dice.one_of(&names), dice.one_of(&odd))),
        _ => drop(members.insert("no-such-thing".to_owned(), dice.one_of(&odd))),
    }
    arguments
}

/// A client that has negotiated, and waits for nothing long.
fn connect(served: &Served) -> UnixStream {
    let mut stream = UnixStream::connect(served.path("control")).unwrap();
    stream.set_read_timeout(Some(WAIT)).unwrap();
    say(&mut stream, br#"{"execute": "qmp_capabilities"}"#);
    stream
}

/// How a call went.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Heard {
    Done,
    Refused,
    /// No reply, or not yet: the client is of no use any more.
    Nothing,
}

/// Sends bytes, and reads as long as anything comes that is no reply.
fn say(stream: &mut UnixStream, bytes: &[u8]) -> Heard {
    if stream.write_all(bytes).is_err() {
        return Heard::Nothing;
    }
    let mut heard = Vec::new();
    let mut piece = [0; 64 << 10];
    loop {
        match stream.read(&mut piece) {
            Ok(0) | Err(_) => return Heard::Nothing,
            Ok(count) => heard.extend_from_slice(&piece[..count]),
        }
        let reply = |line: &[u8]| {
            let value: Value = serde_json::from_slice(line).ok()?;
            match (value.get("return"), value.get("error")) {
                (Some(_), _) => Some(Heard::Done),
                (_, Some(_)) => Some(Heard::Refused),
                _ => None,
            }
        };
        if heard.ends_with(b"\n")
            && let Some(reply) = heard.split(|byte| *byte == b'\n').find_map(reply)
        {
            return reply;
        }
    }
}

/// That others are served.
fn is_answered_soon(served: &Served) {
    let asked = Instant::now();
    served.ask("query-status", json!({}));
    assert!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
}

/// Names that mean something here, and some that mean nothing or too much.
fn words(served: &Served) -> Vec<String> {
    let mut words: Vec<_> =
        ["", "vd0", "vd1", "vd0.0", "a", "b", "one", "drive", "..", "/", "x y", "\u{1F9CA}", "%n%s"]
            .map(str::to_owned)
            .into();
    words.push("n".repeat(3000));
    words.extend(
        ["out", "vd0.qcow2", "state/manifest.json"].map(|name| served.path(name).display().to_string()),
    );
    words
}

/// What makes no sense is refused, and costs nothing: not a descriptor, not a thread.
#[test]
fn arguments_that_are_wrong_cost_nothing_whatever_the_command() {
    let served = Served::start(WANTED);
    let (shown, words, mut dice) = (Shown::of(&served), words(&served), Dice(0xf1a2));
    let mut client = connect(&served);
    let (before, kilobytes) = (served.held(), served.memory());
    for command in shown.commands() {
        for _ in 0..20 {
            let mut arguments = spoiled(shown.arguments(&command, &mut dice, &words), &mut dice);
            arguments["no-such-thing"] = json!({});
            let call = json!({ "execute": command, "arguments": arguments });
            assert_eq!(say(&mut client, call.to_string().as_bytes()), Heard::Refused, "{call}");
        }
    }
    let deep = [b"{\"execute\":".as_slice(), &[b'['; 200]].concat();
    let long = [b"{\"execute\":\"".as_slice(), &[b'a'; 100_000]].concat();
    for nonsense in [b"\xff\xfe\x00".as_slice(), b"}", b"{\"execute\": 3}", b"[1]", &deep, &long] {
        say(&mut connect(&served), nonsense);
        is_answered_soon(&served);
    }
    served.lets_go(before);
    assert!(served.memory() < kilobytes + (32 << 10), "{} of {kilobytes}", served.memory());
}

/// Calls that may make sense, at random, from clients that leave in the middle: disks come and go under names, exports,
/// nodes, jobs. Others are answered, and the daemon ends well and comes back.
#[test]
fn a_storm_of_commands_leaves_the_daemon_sound() {
    let mut served = Served::start(WANTED);
    let (shown, words, mut dice) = (Shown::of(&served), words(&served), Dice(0x5eed));
    let (commands, kilobytes) = (shown.commands(), served.memory());
    let (mut client, mut done) = (connect(&served), 0);
    for call in 0..CALLS {
        let command = dice.one_of(&commands);
        let mut arguments = shown.arguments(&command, &mut dice, &words);
        if dice.roll(5) == 0 {
            arguments = spoiled(arguments, &mut dice);
        }
        let words = json!({ "execute": command, "arguments": arguments }).to_string();
        match say(&mut client, words.as_bytes()) {
            Heard::Done => done += 1,
            Heard::Refused => {}
            Heard::Nothing => client = connect(&served),
        }
        if call % 25 == 0 {
            is_answered_soon(&served);
        }
    }
    assert!(served.memory() < kilobytes + (128 << 10), "{} of {kilobytes}", served.memory());
    assert!(done > CALLS / 10, "only {done} calls made sense");
    drop(client);
    served.stop();
    served.restart();
    is_answered_soon(&served);
}
