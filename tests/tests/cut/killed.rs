//! `kill -9` under load. The guest lives on, as one does whose front-end keeps a record of what is in flight: every request
//! is answered once, without an error, and whatever was acknowledged is there, flushed or not.
//!
//! Some kills come while snapshots are taken, others while the guest is frozen for one, snapshots are deleted, layers are
//! merged, dirty bitmaps come and go, a backup runs. After each the guest is thawed. `KILLS` in the environment says how many each test takes; `make kills` gives it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use control::client::{Client, ClientError};
use serde_json::{Value, json};

use crate::agent::FakeAgent;
use crate::guest::Guest;
use crate::images::{check_sound, same};
use crate::ledger::{Clock, Cut, Ledger, prove};
use crate::load::Mix;
use crate::served::{Served, Wanted};

const DISKS: usize = 2;
const QUEUES: usize = 2;
const PLACES: usize = 64;

/// What each test takes, if it is not told.
const KILLS: usize = 17;

/// Snapshots that are kept to the end; older ones are deleted in the midst of kills.
const KEPT: usize = 8;

/// The guest is served again within it, on a slow machine too.
const SOON: Duration = Duration::from_secs(5);

/// And within this, mostly.
const QUICKLY: Duration = Duration::from_secs(1);

/// The latest moment of a kill, from the first command on.
const LATEST: Duration = Duration::from_millis(120);

/// What is under way when the daemon is killed. Each is done again and again until it is gone.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Nothing,
    Snapshots,
    Freezes,
    Deletes,
    Commits,
    Streams,
    Bitmaps,
    Backup,
}

const DEEDS: [Deed; 8] = [
    Deed::Snapshots,
    Deed::Commits,
    Deed::Freezes,
    Deed::Deletes,
    Deed::Streams,
    Deed::Bitmaps,
    Deed::Backup,
    Deed::Nothing,
];

/// What was asked for: the cuts, and how many commands were carried out. The last one may be missing: its answer is.
#[derive(Default)]
struct Done {
    cuts: Vec<Cut>,
    commands: usize,
}

struct Drill {
    served: Served,
    clock: Arc<Clock>,
    agent: FakeAgent,
    guests: Vec<Guest>,
    /// The snapshots that there are, oldest first.
    cuts: Vec<Cut>,
    /// Snapshots that were asked to be deleted: some are gone, some will be.
    condemned: BTreeSet<String>,
    restarts: Vec<Duration>,
    /// Kills that left the guest frozen.
    frozen: usize,
    size: usize,
}

impl Drill {
    fn start(format: &'static str, cache: &'static str, size: usize, mix: Mix) -> Self {
        let bytes = (size * PLACES * QUEUES) as u64;
        let mut served = Served::start(Wanted { format, cache, disks: DISKS, queues: QUEUES, bytes });
        let socket = served.path("agent");
        let agent = FakeAgent::start(&socket);
        served.restart_with(&["--agent", socket.to_str().unwrap()]);
        let clock = Arc::new(Clock::new());
        let ledgers = || (0..QUEUES).map(|queue| Ledger::new(size, queue, QUEUES, PLACES)).collect();
        let start = |socket| Guest::start(socket, ledgers(), mix, &clock);
        let guests = served.sockets.iter().map(|socket| start(socket)).collect();
        let cuts = vec![served.snapshot("first", &clock)];
        let (condemned, restarts) = (BTreeSet::new(), Vec::new());
        Self { served, clock, agent, guests, cuts, condemned, restarts, frozen: 0, size }
    }

    /// Has something under way, and kills the daemon in its midst.
    fn kill(&mut self, kill: usize, deed: Deed) -> usize {
        let targets = self.targets(kill, deed);
        let (mut client, clock) = (self.served.qmp(), Arc::clone(&self.clock));
        let doer = thread::spawn(move || {
            let mut done = Done::default();
            while deed.once(&mut client, &clock, kill, &targets, &mut done) {
                done.commands += 1;
                thread::sleep(Duration::from_millis(3));
            }
            done
        });
        // A multiplier that has no factor in common with the modulus: each moment comes once, in no order.
        thread::sleep(LATEST * (kill as u32 * 37 % 101 + 1) / 101);
        if matches!(deed, Deed::Freezes) {
            self.agent.wait_until(true, Instant::now() + SOON);
        }
        self.served.kill();
        self.frozen += usize::from(self.agent.is_frozen());
        let done = doer.join().unwrap();
        // At once each second time: what was killed may still hold the images then.
        if kill.is_multiple_of(2) {
            self.check_images();
        }
        let begin = Instant::now();
        self.served.restart();
        self.wait_for_guests(begin);
        self.wait_for_thaw(begin + SOON);
        self.check_names(done.cuts);
        done.commands
    }

    /// The guest is thawed by itself, and the daemon knows that it is.
    fn wait_for_thaw(&self, deadline: Instant) {
        self.agent.wait_until(false, deadline);
        while self.served.path("state/thaw-owed.json").exists() {
            assert!(Instant::now() < deadline, "a thaw is owed, and the guest is thawed");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The newest images are sound but for what leaked.
    fn check_images(&self) {
        let layers =
            self.served.ids().into_iter().flat_map(|id| self.served.layers(&id).into_iter().rev().take(3));
        layers.filter(|(_, format)| format == "qcow2").for_each(|(path, _)| check_sound(&path));
    }

    /// Names for what the deed deals with: snapshots to be deleted, files to be written.
    fn targets(&mut self, kill: usize, deed: Deed) -> Vec<String> {
        match deed {
            Deed::Deletes => {
                let old = self.cuts.len().saturating_sub(KEPT);
                let names: Vec<_> = self.cuts.drain(..old).map(|cut| cut.name).collect();
                self.condemned.extend(names.iter().cloned());
                names
            }
            Deed::Backup => {
                let file = self.served.path(&format!("backup{kill}.raw"));
                std::fs::File::create(&file).unwrap().set_len((self.size * PLACES * QUEUES) as u64).unwrap();
                vec![file.to_str().unwrap().to_owned()]
            }
            Deed::Commits | Deed::Streams => {
                // Two layers that hold no snapshot: what a snapshot leaves that is gone, and the active one.
                let name = format!("spare{kill}");
                self.served.ask("snapshot-create", json!({ "name": name }));
                self.served.ask("snapshot-delete", json!({ "name": name }));
                self.wait_for_jobs();
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn wait_for_guests(&mut self, begin: Instant) {
        let kills = self.restarts.len() + 1;
        let back = |guest: &Guest| loop {
            if let Some(back) = guest.back().get(kills - 1) {
                return back.duration_since(begin);
            }
            assert!(begin.elapsed() < SOON, "a guest is not served again");
            thread::sleep(Duration::from_millis(1));
        };
        let slowest = self.guests.iter().map(back).max().unwrap();
        self.restarts.push(slowest);
    }

    /// All snapshots that there must be are there, and no others than may be.
    fn check_names(&mut self, asked: Vec<Cut>) {
        let found: BTreeSet<_> = self.served.names().into_iter().collect();
        let certain = asked.len().saturating_sub(1);
        for (number, cut) in asked.into_iter().enumerate() {
            let listed = found.contains(&cut.name);
            assert!(listed || number >= certain, "{cut:?} was answered and is not there: {found:?}");
            self.cuts.extend(listed.then_some(cut));
        }
        for cut in &self.cuts {
            assert!(found.contains(&cut.name), "{cut:?} is gone: {found:?}");
        }
        let known =
            |name: &&String| self.condemned.contains(*name) || self.cuts.iter().any(|cut| cut.name == **name);
        assert_eq!(found.iter().find(|name| !known(name)), None, "nobody asked for it");
    }

    /// Ends the guests, proves each snapshot; after a clean end the images are whole, but for what leaked in a kill, and
    /// read as the disks did.
    fn finish(mut self) {
        self.wait_for_jobs();
        let mut ledgers: Vec<_> = self.guests.drain(..).map(Guest::finish).collect();
        let disks: Vec<_> = (0..DISKS).map(|disk| self.served.read(disk)).collect();
        for (image, ledgers) in disks.iter().zip(&mut ledgers) {
            ledgers.iter_mut().for_each(|ledger| ledger.settle(image, self.clock.now()));
        }
        for cut in &self.cuts {
            let images = self.served.export_all(&cut.name).into_iter();
            let disks: Vec<_> =
                images.zip(&ledgers).map(|(image, all)| (image, all.iter().collect())).collect();
            prove(cut, &disks);
        }
        self.report();
        self.served.stop();
        for (disk, id) in self.served.ids().iter().enumerate() {
            let layers = self.served.layers(id);
            let (top, format) = layers.last().unwrap();
            check_sound(top);
            let raw = self.served.path("last.raw");
            std::fs::write(&raw, &disks[disk]).unwrap();
            same(&raw, top, format);
        }
    }

    /// What was under way goes on by itself.
    fn wait_for_jobs(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.served.ask("query-jobs", json!({})) != json!([]) {
            assert!(Instant::now() < deadline, "jobs do not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn report(&self) {
        let mut restarts = self.restarts.clone();
        restarts.sort();
        assert!(restarts[restarts.len() / 2] < QUICKLY, "{restarts:?}");
        let log = std::fs::read_to_string(self.served.path("log")).unwrap();
        let again = log.lines().filter(|line| line.contains("are submitted again"));
        let again: usize =
            again.filter_map(|line| line.split("requests=").nth(1)?.trim().parse::<usize>().ok()).sum();
        println!(
            "{} kills, {} of them with the guest frozen; {again} requests submitted again; served again after {:?} \
             (median), {:?} (longest)",
            restarts.len(),
            self.frozen,
            restarts[restarts.len() / 2],
            restarts[restarts.len() - 1],
        );
        assert!(again > 0, "nothing was in flight at any kill");
        assert!(self.frozen > 0, "the guest was frozen at no kill");
    }
}

impl Deed {
    /// Does it once; `false` when the daemon is gone.
    fn once(
        self,
        client: &mut Client,
        clock: &Clock,
        kill: usize,
        targets: &[String],
        done: &mut Done,
    ) -> bool {
        let number = done.commands;
        let mut ask = |command: &str, arguments: Value| client.execute(command, arguments, |_, _| {}).is_ok();
        match self {
            Self::Nothing => false,
            Self::Snapshots | Self::Freezes => {
                let freezes = matches!(self, Self::Freezes);
                let (name, at) = (format!("k{kill}n{number}"), clock.now());
                let freeze = if freezes { "require" } else { "never" };
                let taken = ask("snapshot-create", json!({ "name": name, "freeze": freeze }));
                // Killed before the answer: the cut was at any time until now, if it was.
                done.cuts.push(Cut { name, asked: at, answered: clock.now() });
                taken && (freezes || number < KEPT)
            }
            Self::Deletes => {
                targets.get(number).is_some_and(|name| ask("snapshot-delete", json!({ "name": name })))
            }
            Self::Commits | Self::Streams => merges(client, matches!(self, Self::Commits)).is_ok(),
            Self::Bitmaps => {
                let bitmap =
                    json!({ "node": "vd0", "name": format!("k{kill}n{number}"), "persistent": true });
                ask("block-dirty-bitmap-add", bitmap.clone())
                    && (number.is_multiple_of(3)
                        || ask("block-dirty-bitmap-remove", json!({ "node": "vd0", "name": bitmap["name"] })))
            }
            Self::Backup => {
                let name = format!("target{number}");
                let file = json!({ "driver": "file", "filename": targets[0] });
                let target = json!({ "driver": "raw", "node-name": name, "file": file });
                let backup = json!({ "device": "vd0", "target": name, "sync": "full", "job-id": "backup", "speed": 65536 });
                number == 0 && ask("blockdev-add", target) && ask("blockdev-backup", backup)
            }
        }
    }
}

/// Merges what of disk `vd1` holds no snapshot, the active layer too, into the lowest or the highest of it, to the end.
fn merges(client: &mut Client, down: bool) -> Result<(), ClientError> {
    let mut ask = |command: &str, arguments| client.execute(command, arguments, |_, _| {});
    let nodes = ask("query-named-block-nodes", json!({}))?;
    // The newest first.
    let names = nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap().to_owned());
    let names: Vec<_> = names.filter(|name| name.starts_with("vd1.")).collect();
    let job = json!({ "device": "vd1", "job-id": "merge" });
    let with = |more: Value| {
        let words = job.as_object().unwrap().clone().into_iter().chain(more.as_object().unwrap().clone());
        Value::Object(words.collect())
    };
    match down {
        true => ask("block-commit", with(json!({ "base-node": names[1], "auto-complete": true })))?,
        false => ask("block-stream", with(json!({ "base-node": names[2] })))?,
    };
    while ask("query-jobs", json!({}))? != json!([]) {
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Kills the daemon again and again.
fn drill(format: &'static str, cache: &'static str, size: usize, mix: Mix) {
    let kills = std::env::var("KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(KILLS);
    let mut drill = Drill::start(format, cache, size, mix);
    let mut done = [0; DEEDS.len()];
    for kill in 0..kills {
        let number = kill % DEEDS.len();
        done[number] += drill.kill(kill, DEEDS[number]);
    }
    println!("commands carried out: {:?}", DEEDS.iter().zip(done).collect::<Vec<_>>());
    drill.finish();
}

#[test]
fn blocks_with_discards_on_a_raw_base_are_all_there() {
    drill("raw", "writeback", 4096, Mix::Discards);
}

#[test]
fn sectors_with_zeroes_on_a_qcow2_base_past_the_page_cache_are_all_there() {
    drill("qcow2", "none", 512, Mix::Zeroes);
}

#[test]
fn sectors_on_a_qcow2_base_are_all_there() {
    drill("qcow2", "writeback", 512, Mix::Stamps);
}
