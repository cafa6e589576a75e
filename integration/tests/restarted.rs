//! The daemon ends in one way or another, and comes back under a guest at work: the guest sees a pause and no error.

use std::thread;
use std::time::{Duration, Instant};

use frazil_integration::{FileSystem, Result, Rig, Scratch};

const DISKS: [(&str, FileSystem); 2] = [("vda", FileSystem::Ext4), ("vdb", FileSystem::Xfs)];
/// For every writer to have written and synced anew, on a busy machine.
const RECOVERY: Duration = Duration::from_secs(60);

/// Ends the daemon and starts it again so often; tells how long it took until every writer had synced anew.
fn rounds(rig: &mut Rig<'_>, count: u64, planned: bool) -> Result<()> {
    let mut pauses = Vec::new();
    for round in 0..count {
        // At a moment of its own each time.
        thread::sleep(Duration::from_millis(50 + round * 137 % 400));
        let begin = Instant::now();
        if planned {
            rig.daemon.stop()?
        } else {
            rig.daemon.kill()?
        }
        rig.daemon.restart()?;
        rig.wait_until_all_write(RECOVERY)?;
        pauses.push(begin.elapsed());
    }
    pauses.sort();
    println!("planned: {planned}, {count} restarts, all writers at work after {pauses:?}");
    let errors = rig.guest.run("dmesg | grep -iE 'i/o error|remount|shutting down filesystem' || true")?;
    assert_eq!(errors, "", "the guest has seen errors");
    Ok(())
}

#[test]
fn a_guest_at_work_sees_a_pause_and_no_error() -> Result<()> {
    Scratch::with("restarted", |scratch| {
        let mut rig = Rig::start(scratch, &DISKS)?;
        rig.wait_until_all_write(RECOVERY)?;
        rounds(&mut rig, 10, false)?;
        rounds(&mut rig, 4, true)?;
        let expected = rig.expectation()?;
        let snapshot = rig.daemon.snapshot("after", "require")?;
        assert_eq!(snapshot.grade, "filesystem", "{}", snapshot.reason);
        rig.verify(&snapshot, &expected)?;
        rig.finish()
    })
}
