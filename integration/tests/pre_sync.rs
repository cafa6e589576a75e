//! What a guest has to write out is written before it is frozen, not while.

use frazil_integration::{FileSystem, Result, Rig, Scratch};

// Measured in the guest, a freeze with 300 MB of dirty memory holds writers for up to 1.3 s.
#[test]
fn dirty_memory_is_written_before_the_freeze() -> Result<()> {
    Scratch::with("pre-sync", |scratch| {
        let mut rig = Rig::start(scratch, &[("vda", FileSystem::Ext4)])?;
        // Else the guest begins to write by itself.
        rig.guest.run("echo 90 >/proc/sys/vm/dirty_ratio; echo 80 >/proc/sys/vm/dirty_background_ratio")?;
        rig.guest.run("guest-workload dirty /mnt/vda/much 200")?;
        let snapshot = rig.daemon.snapshot("one", "require")?;
        let time = |step: &str| snapshot.timing.get(step).copied().unwrap_or(f64::NAN);
        assert!(time("pre-sync") > 2.0 * time("freeze"), "{:?}", snapshot.timing);
        rig.finish()
    })
}
