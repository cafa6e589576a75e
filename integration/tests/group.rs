//! Several disks at one cut, and many cuts in a row.

use std::time::Duration;

use frazil_integration::{FileSystem, Result, Rig, Scratch, check_images};

const DISKS: [(&str, FileSystem); 2] = [("vda", FileSystem::Ext4), ("vdb", FileSystem::Xfs)];

#[test]
fn two_disks_are_clean_in_one_snapshot() -> Result<()> {
    Scratch::with("two-disks", |scratch| {
        let mut rig = Rig::start(scratch, &DISKS)?;
        let expected = rig.expectation()?;
        let snapshot = rig.daemon.snapshot("one", "require")?;
        assert_eq!(snapshot.grade, "filesystem", "{}", snapshot.reason);
        assert_eq!(snapshot.disks.iter().map(|disk| disk.id.as_str()).collect::<Vec<_>>(), ["vda", "vdb"]);
        rig.verify(&snapshot, &expected)?;
        rig.finish()
    })
}

// The journals are replayed by a second guest; nothing that was synced before the cut may be missing.
#[test]
fn two_disks_survive_a_cut_without_a_freeze() -> Result<()> {
    Scratch::with("no-freeze", |scratch| {
        let mut rig = Rig::start_without_agent(scratch, &DISKS)?;
        let expected = rig.expectation()?;
        let snapshot = rig.daemon.snapshot("one", "never")?;
        assert_eq!(snapshot.grade, "crash", "{}", snapshot.reason);
        rig.verify(&snapshot, &expected)?;
        rig.finish()
    })
}

#[test]
fn many_snapshots_in_a_row_under_load_are_all_good() -> Result<()> {
    const ROUNDS: usize = 20;
    Scratch::with("many", |scratch| {
        let mut rig = Rig::start(scratch, &DISKS)?;
        let mut taken = Vec::new();
        for round in 0..ROUNDS {
            let freeze = if round % 2 == 0 { "require" } else { "never" };
            let expected = rig.expectation()?;
            let snapshot = rig.daemon.snapshot(&format!("s{round}"), freeze)?;
            assert_eq!(snapshot.grade == "filesystem", freeze == "require", "{}", snapshot.reason);
            taken.push((snapshot, expected));
        }
        rig.wait_until_all_write(Duration::from_secs(20))?;
        for (snapshot, _) in &taken {
            check_images(snapshot)?;
        }
        // Looking at a snapshot costs a boot: the first, two neighbours in the middle and the last stand for all.
        for index in [0, ROUNDS / 2, ROUNDS / 2 + 1, ROUNDS - 1] {
            let (snapshot, expected) = &taken[index];
            rig.verify(snapshot, expected)?;
        }
        rig.finish()
    })
}
