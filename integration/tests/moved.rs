//! A guest at work is moved from one QEMU to another, and on to a third, on disks that one daemon serves all the while.

use std::time::Duration;

use frazil_integration::{FileSystem, Result, Rig, Scratch};

const DISKS: [(&str, FileSystem); 2] = [("vda", FileSystem::Ext4), ("vdb", FileSystem::Xfs)];
/// For every writer to have written and synced anew, on a busy machine.
const RECOVERY: Duration = Duration::from_secs(60);
/// For files to be read and summed up by an emulated guest.
const SLOW: Duration = Duration::from_secs(120);

/// Some of the guest's own programs.
const FILE: &str = "/mnt/vda/programs";

/// What the disk puts into the guest's memory while it moves must arrive: a page that was not logged would be old at the
/// other end. So a file is read again and again, each time from the disk.
#[test]
fn a_guest_at_work_is_moved_with_all_that_it_has() -> Result<()> {
    Scratch::with("moved", |scratch| {
        let mut rig = Rig::start(scratch, &DISKS)?;
        rig.wait_until_all_write(RECOVERY)?;
        rig.guest.run_for(&format!("cat /usr/sbin/* | head -c 4194304 >{FILE} && sync"), SLOW)?;
        let sum = rig.guest.run_for(&format!("md5sum <{FILE}"), SLOW)?;
        let read = format!(
            "while [ ! -e /run/enough ]; do echo 3 >/proc/sys/vm/drop_caches; md5sum <{FILE} >>/run/sums; done"
        );
        rig.guest.run(&format!("({read}; touch /run/done) >/dev/null 2>&1 </dev/null &"))?;

        for name in ["second", "third"] {
            rig.move_guest(name)?;
            rig.wait_until_all_write(RECOVERY)?;
        }
        let synced = rig.expectation()?;
        let snapshot = rig.daemon.snapshot("moved", "require")?;
        assert_eq!(snapshot.grade, "filesystem", "{}", snapshot.reason);
        rig.verify(&snapshot, &synced)?;

        rig.guest.run_for("touch /run/enough; until [ -e /run/done ]; do sleep 0.1; done", SLOW)?;
        let sums = rig.guest.run("sort -u /run/sums")?;
        assert_eq!(sums, sum, "what was read while the guest moved");
        println!("read {} times", rig.guest.run("wc -l </run/sums")?.trim());
        let errors =
            rig.guest.run("dmesg | grep -iE 'i/o error|remount|shutting down filesystem' || true")?;
        assert_eq!(errors, "", "the guest has seen errors");
        let synced = rig.pause()?;
        rig.resume(&synced)?;
        rig.finish()
    })
}
