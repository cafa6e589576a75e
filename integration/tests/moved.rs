//! A guest at work is moved from one QEMU to another, and on to a third, on disks that one daemon serves all the while.

use std::time::Duration;

use frazil_integration::{Context, FileSystem, Guest, Result, Rig, Scratch, eventually};

const DISKS: [(&str, FileSystem); 2] = [("vda", FileSystem::Ext4), ("vdb", FileSystem::Xfs)];
/// For every writer to have written and synced anew, on a busy machine.
const RECOVERY: Duration = Duration::from_secs(60);

/// How often the reader has found what it read so far; an error once it has not.
fn looks(guest: &mut Guest) -> Result<u64> {
    let text = guest.run("cat /run/reader.log /run/reader 2>/dev/null || true")?;
    match text.split_whitespace().next() {
        None => Ok(0),
        Some(word) => word.parse().context(format!("the reader: {text}")),
    }
}

/// Waits until what is in the reader's memory now, and more after it, has been looked at.
fn wait_for_looks(guest: &mut Guest) -> Result<()> {
    let before = looks(guest)?;
    eventually("the reader to go on", RECOVERY, || Ok((looks(guest)? > before + 2).then_some(())))
}

/// What the disk puts into the guest's memory while it moves must arrive: a page that was not logged would be old at the
/// other end. So a program of the guest's reads into memory that nobody else writes to, and looks at it a while later.
#[test]
fn a_guest_at_work_is_moved_with_all_that_it_has() -> Result<()> {
    Scratch::with("moved", |scratch| {
        let mut rig = Rig::start(scratch, &DISKS)?;
        rig.wait_until_all_write(RECOVERY)?;
        rig.guest.run(
            "setsid guest-workload read /mnt/vda/parts /run/reader </dev/null >/run/reader.log 2>&1 &",
        )?;
        wait_for_looks(&mut rig.guest)?;

        for name in ["second", "third"] {
            rig.move_guest(name)?;
            wait_for_looks(&mut rig.guest)?;
            rig.wait_until_all_write(RECOVERY)?;
        }
        let synced = rig.expectation()?;
        let snapshot = rig.daemon.snapshot("moved", "require")?;
        assert_eq!(snapshot.grade, "filesystem", "{}", snapshot.reason);
        rig.verify(&snapshot, &synced)?;

        println!("looked {} times", looks(&mut rig.guest)?);
        let errors =
            rig.guest.run("dmesg | grep -iE 'i/o error|remount|shutting down filesystem' || true")?;
        assert_eq!(errors, "", "the guest has seen errors");
        let synced = rig.pause()?;
        rig.resume(&synced)?;
        rig.finish()
    })
}
