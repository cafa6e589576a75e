//! Each file system, frozen by the agent, is clean in a snapshot, and its files are as at one instant.

use std::time::Duration;

use frazil_integration::{FileSystem, Result, Rig, Scratch, check_images};

fn a_frozen_file_system_is_clean(file_system: FileSystem) -> Result<()> {
    Scratch::with(file_system.name(), |scratch| {
        let mut rig = Rig::start(scratch, &[("vda", file_system)])?;
        let expected = rig.expectation()?;
        let snapshot = rig.daemon.snapshot("one", "require")?;
        assert_eq!(snapshot.grade, "filesystem", "{}", snapshot.reason);
        rig.wait_until_all_write(Duration::from_secs(20))?;
        rig.verify(&snapshot, &expected)?;
        check_images(&snapshot)?;
        rig.finish()
    })
}

#[test]
fn ext4_is_clean_in_a_snapshot() -> Result<()> {
    a_frozen_file_system_is_clean(FileSystem::Ext4)
}

#[test]
fn xfs_is_clean_in_a_snapshot() -> Result<()> {
    a_frozen_file_system_is_clean(FileSystem::Xfs)
}

#[test]
fn btrfs_is_clean_in_a_snapshot() -> Result<()> {
    a_frozen_file_system_is_clean(FileSystem::Btrfs)
}

// Linux does not freeze vfat, and the agent says nothing of it: only the count tells.
#[test]
fn vfat_is_not_frozen_so_the_snapshot_says_crash_and_why() -> Result<()> {
    Scratch::with("vfat", |scratch| {
        let mut rig = Rig::start(scratch, &[("vda", FileSystem::Vfat)])?;
        let expected = rig.expectation()?;
        let snapshot = rig.daemon.snapshot("one", "prefer")?;
        assert_eq!(snapshot.grade, "crash", "{}", snapshot.reason);
        assert!(snapshot.reason.contains("/mnt/vda"), "{}", snapshot.reason);
        rig.verify(&snapshot, &expected)?;
        assert!(rig.daemon.snapshot("two", "require").is_err());
        rig.wait_until_all_write(Duration::from_secs(20))?;
        rig.finish()
    })
}
