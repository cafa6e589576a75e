//! The guest, its daemon, and copies of its disks that are kept up to date by increments.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use block::testing::Random;
use frazil_integration::{
    Context, Error, FileSystem, Result, Rig, Scratch, Snapshot, check_images, eventually, pull_all,
    pull_changes,
};
use serde_json::{Value, json};

use crate::health::Health;
use crate::tally::Tally;

const DISKS: [(&str, FileSystem); 2] = [("vda", FileSystem::Ext4), ("vdb", FileSystem::Xfs)];
/// Snapshots that are kept; older ones are deleted.
const KEPT: usize = 5;
/// Of a snapshot, before the agent counts as lost.
const TRIES: u32 = 3;
/// The guest must write again within this after whatever happened.
const RECOVERY: Duration = Duration::from_secs(60);
/// A kill comes within this after its round has begun.
const KILL_WITHIN_MS: u64 = 12_000;

/// A guest, its daemon, and the copies of its disks that increments keep up to date.
pub(crate) struct World<'a> {
    scratch: &'a Scratch,
    rig: Rig<'a>,
    next: u64,
    /// The newest snapshot, which the copies hold.
    copied: String,
}

impl<'a> World<'a> {
    /// The guest writes, and a first copy of each disk is made.
    pub(crate) fn start(scratch: &'a Scratch) -> Result<Self> {
        let rig = Rig::start(scratch, &DISKS)?;
        let mut world = Self { scratch, rig, next: 0, copied: String::new() };
        let first = world.name();
        world.rig.daemon.snapshot(&first, "require")?;
        for (disk, _) in DISKS {
            let served = world.rig.daemon.serve(&first, disk, None)?;
            pull_all(&served.uri, &world.copy_of(disk))?;
            let bitmap = json!({"node": disk, "name": "soak", "persistent": true});
            world.ask("block-dirty-bitmap-add", bitmap)?;
        }
        world.rig.daemon.command(&["checkpoint", "create", "soak"])?;
        world.copied = first;
        Ok(world)
    }

    fn name(&mut self) -> String {
        self.next += 1;
        format!("s{:06}", self.next)
    }

    fn copy_of(&self, disk: &str) -> PathBuf {
        self.scratch.path(&format!("{disk}.copy"))
    }

    fn ask(&self, command: &str, arguments: Value) -> Result<Value> {
        self.rig.daemon.monitor()?.execute(command, arguments)
    }

    /// A snapshot with a freeze. On a host that is overloaded the agent may answer too late, and it is refused, as asked.
    fn snapshot(&mut self, tally: &mut Tally) -> Result<Snapshot> {
        let mut tries = 0;
        let snapshot = loop {
            let name = self.name();
            tries += 1;
            match self.rig.daemon.snapshot(&name, "require") {
                Err(error) if tries == TRIES => return Err(error),
                Err(error) => {
                    eprintln!("soak: {name} was refused: {error}");
                    tally.refused += 1;
                }
                Ok(snapshot) => break snapshot,
            }
        };
        if snapshot.grade != "filesystem" {
            let Snapshot { name, grade, reason, .. } = snapshot;
            return Err(Error::new(format!("{name} has grade {grade}: {reason}")));
        }
        tally.snapshots += 1;
        tally.frozen.extend(snapshot.timing.get("frozen"));
        Ok(snapshot)
    }

    /// All that a round does.
    pub(crate) fn round(&mut self, tally: &mut Tally) -> Result<()> {
        let name = self.snapshot(tally)?.name;
        self.pull(&name, tally)?;
        self.change_marks()?;
        self.delete_old(tally)
    }

    /// Brings the copies up to a snapshot, which must then be what an export of it is.
    fn pull(&mut self, name: &str, tally: &mut Tally) -> Result<()> {
        for (disk, _) in DISKS {
            let copy = self.copy_of(disk);
            let served = self.rig.daemon.serve(name, disk, Some(&self.copied))?;
            tally.pulled += pull_changes(&served.uri, &self.copied, &copy)?;
            tally.increments += 1;
            drop(served);
            let export = self.rig.daemon.export(name, disk)?;
            let same = Command::new("cmp").arg(&copy).arg(&export).status().context("cmp")?;
            if !same.success() {
                return Err(Error::new(format!("{disk}'s copy by increments is not what {name} holds")));
            }
            fs::remove_file(&export).context(export.display())?;
        }
        name.clone_into(&mut self.copied);
        Ok(())
    }

    fn change_marks(&self) -> Result<()> {
        for (disk, _) in DISKS {
            let bitmaps = self.ask("query-block", json!({}))?;
            let is_lost = bitmaps.to_string().contains("\"inconsistent\":true");
            if is_lost || !bitmaps.to_string().contains("\"name\":\"soak\"") {
                return Err(Error::new(format!("{disk}'s bitmap is lost: {bitmaps}")));
            }
            self.ask("block-dirty-bitmap-clear", json!({"node": disk, "name": "soak"}))?;
            self.rig.daemon.command(&["changes", "--disk", disk, "--from", "soak", "--json"])?;
        }
        self.rig.daemon.command(&["checkpoint", "delete", "soak"])?;
        self.rig.daemon.command(&["checkpoint", "create", "soak"]).map(drop)
    }

    fn names(&self) -> Result<Vec<String>> {
        self.listed("snapshot")
    }

    /// The names of all snapshots or checkpoints, the oldest first.
    fn listed(&self, what: &str) -> Result<Vec<String>> {
        let list: Vec<Value> = serde_json::from_str(&self.rig.daemon.command(&[what, "list", "--json"])?)?;
        Ok(list.iter().filter_map(|one| one["name"].as_str().map(str::to_owned)).collect())
    }

    fn delete_old(&self, tally: &mut Tally) -> Result<()> {
        let names = self.names()?;
        for name in names.iter().rev().skip(KEPT).filter(|name| **name != self.copied) {
            // One whose deletion a killed daemon had begun goes on by itself.
            let deleted = self.rig.daemon.command(&["snapshot", "delete", name]);
            if self.names()?.contains(name) {
                deleted?;
            }
            tally.deletes += 1;
        }
        Ok(())
    }

    /// The daemon is killed at a random moment while a round is under way, and started again.
    pub(crate) fn round_with_a_kill(&mut self, tally: &mut Tally, dice: &mut Random) -> Result<()> {
        let moment = Duration::from_millis(dice.below(KILL_WITHIN_MS));
        let name = self.name();
        let process = i32::try_from(self.rig.daemon.id()).ok().and_then(rustix::process::Pid::from_raw);
        let process = process.ok_or_else(|| Error::new("process id out of range"))?;
        let killed = thread::scope(|scope| {
            let killer = scope.spawn(|| {
                thread::sleep(moment);
                rustix::process::kill_process(process, rustix::process::Signal::KILL)
            });
            // Each step fails from the kill on.
            let daemon = &self.rig.daemon;
            if daemon.snapshot(&name, "require").is_ok() {
                let names = self.names().unwrap_or_default();
                for old in names.iter().rev().skip(KEPT - 1).filter(|old| **old != self.copied) {
                    let _ = daemon.command(&["snapshot", "delete", old]);
                }
                let _ = self.change_marks();
                let _ = daemon.export(&name, "vda").map(fs::remove_file);
            }
            killer.join()
        });
        killed.map_err(|_| Error::new("the killer panicked"))?.context("kill")?;
        self.rig.daemon.kill()?;
        self.come_back(tally)?;
        match self.names()?.contains(&name) {
            true => {
                tally.snapshots += 1;
                self.pull(&name, tally)
            }
            false => {
                tally.unfinished += 1;
                Ok(())
            }
        }
    }

    fn come_back(&mut self, tally: &mut Tally) -> Result<()> {
        let start = Instant::now();
        self.rig.daemon.restart()?;
        tally.restarts.push(start.elapsed());
        self.rig.wait_until_all_write(RECOVERY)?;
        tally.back.push(start.elapsed());
        // A kill between the deletion of the old one and the making of the new one leaves none.
        if self.listed("checkpoint")?.is_empty() {
            self.rig.daemon.command(&["checkpoint", "create", "soak"])?;
        }
        Ok(())
    }

    /// Waits until no job is under way, and has a look at the daemon then.
    pub(crate) fn rest(&mut self) -> Result<Health> {
        self.rig.wait_until_all_write(RECOVERY)?;
        eventually("the end of all jobs", Duration::from_secs(120), || {
            Ok((self.ask("query-jobs", json!({}))? == json!([])).then_some(()))
        })?;
        let layers = self.ask("query-named-block-nodes", json!({}))?;
        let of = |disk: &str| {
            let is_its =
                |node: &&Value| node["node-name"].as_str().is_some_and(|name| name.starts_with(disk));
            layers.as_array().map_or(0, |nodes| nodes.iter().filter(is_its).count() as u64)
        };
        let most = DISKS.iter().map(|(disk, _)| of(disk)).max().unwrap_or(0);
        Health::of(self.rig.daemon.id(), most)
    }

    /// A second guest boots with a snapshot and finds all that was synced before; `qemu-img` finds nothing wrong.
    pub(crate) fn prove(&mut self, tally: &mut Tally) -> Result<()> {
        let expected = self.rig.expectation()?;
        let snapshot = self.snapshot(tally)?;
        self.rig.verify(&snapshot, &expected)?;
        check_images(&snapshot)?;
        tally.proofs += 1;
        Ok(())
    }

    /// Ends the guest and the daemon, well.
    pub(crate) fn finish(self) -> Result<()> {
        self.rig.finish()
    }
}
