//! A guest at work is moved from one QEMU to another, and on to a third, on disks that one daemon serves all the while.

use std::time::Duration;

use frazil_integration::{FileSystem, Result, Rig, Scratch};

const DISKS: [(&str, FileSystem); 2] = [("vda", FileSystem::Ext4), ("vdb", FileSystem::Xfs)];
/// For every writer to have written and synced anew, on a busy machine.
const RECOVERY: Duration = Duration::from_secs(60);
/// For files to be read and summed up by an emulated guest.
const SLOW: Duration = Duration::from_secs(120);

/// Two files of the guest's own programs. They take turns in the same memory.
const FILES: [&str; 2] = ["/mnt/vda/first", "/mnt/vda/last"];

/// What the disk puts into the guest's memory while it moves must arrive: a page that was not logged would be old at the
/// other end. So files are read again and again from the disk, and then once more from memory.
#[test]
fn a_guest_at_work_is_moved_with_all_that_it_has() -> Result<()> {
    Scratch::with("moved", |scratch| {
        let mut rig = Rig::start(scratch, &DISKS)?;
        rig.wait_until_all_write(RECOVERY)?;
        let [first, last] = FILES;
        let mut sums = Vec::new();
        for (what, file) in [("cat /usr/sbin/* | head -c 4194304", first), ("cat /bin/busybox", last)] {
            let make = format!("{what} >{file} && sync && md5sum <{file}");
            sums.push(rig.guest.run_for(&make, SLOW)?);
        }
        sums.sort();
        let sum = "md5sum <$file >>/run/sums";
        let read =
            format!("for file in {first} {last}; do echo 3 >/proc/sys/vm/drop_caches; {sum}; {sum}; done");
        let reader = format!("while [ ! -e /run/enough ]; do {read}; done; touch /run/done");
        rig.guest.run(&format!("({reader}) >/dev/null 2>&1 </dev/null &"))?;

        for name in ["second", "third"] {
            rig.move_guest(name)?;
            rig.wait_until_all_write(RECOVERY)?;
        }
        let synced = rig.expectation()?;
        let snapshot = rig.daemon.snapshot("moved", "require")?;
        assert_eq!(snapshot.grade, "filesystem", "{}", snapshot.reason);
        rig.verify(&snapshot, &synced)?;

        rig.guest.run_for("touch /run/enough; until [ -e /run/done ]; do sleep 0.1; done", SLOW)?;
        let found = rig.guest.run("sort -u /run/sums")?;
        assert_eq!(found, sums.concat(), "what was read while the guest moved");
        println!("read {} times", rig.guest.run("wc -l </run/sums")?.trim());
        let errors =
            rig.guest.run("dmesg | grep -iE 'i/o error|remount|shutting down filesystem' || true")?;
        assert_eq!(errors, "", "the guest has seen errors");
        let synced = rig.pause()?;
        rig.resume(&synced)?;
        rig.finish()
    })
}
