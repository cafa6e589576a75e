//! Pull backups of a guest of two disks that its agent has frozen: others' programs read them over NBD, whole and then what
//! changed; what they have put together is what the cut was, and a second guest boots with it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use frazil_integration::{
    Context, Daemon, Expectation, FileSystem, Guest, Qmp, Result, Rig, Scratch, pull_all, pull_changes,
    verify_images,
};
use serde_json::{Value, json};

const DISKS: [(&str, FileSystem); 2] = [("vda", FileSystem::Ext4), ("vdb", FileSystem::Xfs)];
/// The first is a full one.
const ROUNDS: usize = 3;

fn backup_of(scratch: &Scratch, disk: &str) -> PathBuf {
    scratch.path(&format!("{disk}.backup"))
}

fn assert_same(one: &PathBuf, other: &PathBuf) -> Result<()> {
    let status = Command::new("cmp").arg(one).arg(other).status().context("cmp")?;
    assert!(status.success(), "{} is not as {}", one.display(), other.display());
    Ok(())
}

/// A second guest boots with the backups; what the first one's writers had synced is there, all of one instant.
fn assert_good(scratch: &Scratch, expected: &[Expectation]) -> Result<()> {
    let backups = DISKS.map(|(disk, _)| backup_of(scratch, disk));
    verify_images(scratch, "restored", true, expected, &backups).map(drop)
}

#[test]
fn snapshots_are_pulled_whole_and_then_what_changed_and_boot() -> Result<()> {
    Scratch::with("pulled", |scratch| {
        let mut rig = Rig::start(scratch, &DISKS)?;
        let mut expected = Vec::new();
        for round in 0..ROUNDS {
            rig.wait_until_all_write(Duration::from_secs(30))?;
            expected = rig.expectation()?;
            let (name, before) = (format!("s{round}"), format!("s{}", round.wrapping_sub(1)));
            let snapshot = rig.daemon.snapshot(&name, "require")?;
            assert_eq!(snapshot.grade, "filesystem", "{}", snapshot.reason);
            for (disk, _) in DISKS {
                let backup = backup_of(scratch, disk);
                if round == 0 {
                    let served = rig.daemon.serve(&name, disk, None)?;
                    pull_all(&served.uri, &backup)?;
                } else {
                    let served = rig.daemon.serve(&name, disk, Some(&before))?;
                    let bytes = pull_changes(&served.uri, &before, &backup)?;
                    assert!(bytes > 0 && bytes < Daemon::DISK_BYTES / 2, "{bytes} bytes of an increment");
                }
                let truth = rig.daemon.export(&name, disk)?;
                assert_same(&backup, &truth)?;
                fs::remove_file(&truth)?;
            }
            if round > 0 {
                rig.daemon.command(&["snapshot", "delete", &before])?;
            }
        }
        assert_good(scratch, &expected)?;
        rig.finish()
    })
}

/// A backup program that was written for QEMU: it freezes the guest by itself, and its bitmaps are QEMU's.
struct Program<'a> {
    scratch: &'a Scratch,
    qmp: Qmp,
}

impl Program<'_> {
    fn put_filters_on(&mut self) -> Result<()> {
        for (disk, _) in DISKS {
            let image = self.scratch.path(&format!("{disk}.fleece"));
            let size = Daemon::DISK_BYTES.to_string();
            let made =
                Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg(size).status();
            assert!(made.context("qemu-img")?.success());
            let fleece = json!({"driver": "qcow2", "node-name": format!("fleece-{disk}"),
                "file": {"driver": "file", "filename": image}});
            let filter = json!({"driver": "copy-before-write", "node-name": format!("cbw-{disk}"), "file": disk,
                "target": format!("fleece-{disk}")});
            let access = json!({"driver": "snapshot-access", "node-name": access_of(disk),
                "file": format!("cbw-{disk}")});
            for node in [fleece, filter, access] {
                self.qmp.execute("blockdev-add", node)?;
            }
        }
        Ok(())
    }

    /// Has the filters on all disks, and the bitmaps changed, while the guest is frozen.
    fn cut(&mut self, guest: &Guest, first: bool) -> Result<()> {
        let frozen = ask_agent(guest, "guest-fsfreeze-freeze")?;
        assert_eq!(frozen, json!(DISKS.len()), "file systems that are frozen");
        let mut actions = Vec::new();
        for (disk, _) in DISKS {
            let path = format!("/machine/peripheral/{disk}/virtio-backend");
            let put = json!({"path": path, "property": "drive", "value": format!("cbw-{disk}")});
            self.qmp.execute("qom-set", put)?;
            let bitmap = json!({"node": disk, "name": "nightly"});
            let theirs = json!({"node": access_of(disk), "name": "changed"});
            if first {
                let add = json!({"node": disk, "name": "nightly", "persistent": true});
                actions.push(json!({"type": "block-dirty-bitmap-add", "data": add}));
                continue;
            }
            let merge = json!({"node": access_of(disk), "target": "changed", "bitmaps": [bitmap]});
            actions.push(json!({"type": "block-dirty-bitmap-add", "data": theirs}));
            actions.push(json!({"type": "block-dirty-bitmap-merge", "data": merge}));
            actions.push(json!({"type": "block-dirty-bitmap-clear", "data": bitmap}));
        }
        self.qmp.execute("transaction", json!({"actions": actions}))?;
        assert_eq!(ask_agent(guest, "guest-fsfreeze-thaw")?, frozen);
        Ok(())
    }

    fn pull(&mut self, first: bool) -> Result<()> {
        let socket = self.scratch.path("nbd");
        let address = json!({"type": "unix", "data": {"path": socket}});
        self.qmp.execute("nbd-server-start", json!({"addr": address}))?;
        for (disk, _) in DISKS {
            let mut export = json!({"type": "nbd", "id": disk, "node-name": access_of(disk), "name": disk});
            if !first {
                export["bitmaps"] = json!(["changed"]);
            }
            self.qmp.execute("block-export-add", export)?;
            let uri = format!("nbd+unix:///{disk}?socket={}", socket.display());
            let backup = backup_of(self.scratch, disk);
            if first {
                pull_all(&uri, &backup)?;
            } else {
                let bytes = pull_changes(&uri, "changed", &backup)?;
                assert!(bytes > 0 && bytes < Daemon::DISK_BYTES / 2, "{bytes} bytes of an increment");
                let whole = self.scratch.path("whole");
                pull_all(&uri, &whole)?;
                assert_same(&backup, &whole)?;
                fs::remove_file(&whole)?;
            }
        }
        self.qmp.execute("nbd-server-stop", json!({}))?;
        Ok(())
    }

    fn take_filters_off(&mut self) -> Result<()> {
        for (disk, _) in DISKS {
            let path = format!("/machine/peripheral/{disk}/virtio-backend");
            self.qmp.execute("qom-set", json!({"path": path, "property": "drive", "value": disk}))?;
            for node in [access_of(disk), format!("cbw-{disk}"), format!("fleece-{disk}")] {
                self.qmp.execute("blockdev-del", json!({"node-name": node}))?;
            }
        }
        Ok(())
    }
}

fn access_of(disk: &str) -> String {
    format!("access-{disk}")
}

fn ask_agent(guest: &Guest, command: &str) -> Result<Value> {
    let agent = UnixStream::connect(guest.agent())?;
    agent.set_read_timeout(Some(Duration::from_secs(30)))?;
    writeln!(&agent, "{}", json!({"execute": command}))?;
    let mut answer = String::new();
    BufReader::new(&agent).read_line(&mut answer).context("the agent's answer")?;
    Ok(serde_json::from_str::<Value>(&answer)?["return"].take())
}

#[test]
fn a_program_that_knows_qemu_pulls_by_its_own_freeze_and_bitmaps_and_it_boots() -> Result<()> {
    Scratch::with("pulled-by-qmp", |scratch| {
        let mut rig = Rig::start(scratch, &DISKS)?;
        let mut program = Program { scratch, qmp: rig.daemon.monitor()? };
        let mut expected = Vec::new();
        for round in 0..ROUNDS {
            rig.wait_until_all_write(Duration::from_secs(30))?;
            expected = rig.expectation()?;
            program.put_filters_on()?;
            program.cut(&rig.guest, round == 0)?;
            program.pull(round == 0)?;
            program.take_filters_off()?;
        }
        assert_good(scratch, &expected)?;
        rig.finish()
    })
}
