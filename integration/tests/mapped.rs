//! Stores to a mapped file pass no system call; the freeze must hold them all the same.

use std::thread;
use std::time::Duration;

use frazil_integration::{FileSystem, Kind, Result, Rig, Scratch};

const HELD: Duration = Duration::from_secs(2);

fn a_mapped_writer_waits_while_frozen(file_system: FileSystem) -> Result<()> {
    Scratch::with("mapped", |scratch| {
        let mut rig = Rig::start(scratch, &[("vda", file_system)])?;
        let before = rig.guest.clock()?;
        let expected = rig.expectation()?;
        rig.daemon.prepare("one", 30)?;
        let held = rig.guest.progress("vda", Kind::Mapped)?;
        thread::sleep(HELD);
        assert_eq!(rig.guest.progress("vda", Kind::Mapped)?, held);
        let snapshot = rig.daemon.release("one")?;
        assert_eq!(snapshot.grade, "filesystem", "{}", snapshot.reason);
        rig.wait_until_all_write(Duration::from_secs(20))?;
        let gap = rig.guest.longest_gap("vda", Kind::Mapped, before)?;
        assert!(gap >= HELD, "a store took {gap:?} at most");
        rig.verify(&snapshot, &expected)?;
        rig.finish()
    })
}

#[test]
fn a_mapped_writer_waits_while_ext4_is_frozen() -> Result<()> {
    a_mapped_writer_waits_while_frozen(FileSystem::Ext4)
}

#[test]
fn a_mapped_writer_waits_while_xfs_is_frozen() -> Result<()> {
    a_mapped_writer_waits_while_frozen(FileSystem::Xfs)
}

#[test]
fn a_mapped_writer_waits_while_btrfs_is_frozen() -> Result<()> {
    a_mapped_writer_waits_while_frozen(FileSystem::Btrfs)
}
