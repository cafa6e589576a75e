//! A guest whose disk grows under it.

use std::time::Duration;

use frazil_integration::{Daemon, FileSystem, Kind, Result, Rig, Scratch, eventually};

const SECTOR: u64 = 512;

/// The guest sees the new size while it runs, without a scan or a restart, and uses the new end.
#[test]
fn a_running_guest_sees_its_disk_grow() -> Result<()> {
    Scratch::with("grown", |scratch| {
        let mut rig = Rig::start(scratch, &[("vda", FileSystem::Ext4)])?;
        let sectors = |rig: &mut Rig<'_>| -> Result<u64> {
            let text = rig.guest.run("cat /sys/block/vda/size")?;
            Ok(text.trim().parse().unwrap_or(0))
        };
        assert_eq!(sectors(&mut rig)?, Daemon::DISK_BYTES / SECTOR);
        let size = Daemon::DISK_BYTES + (64 << 20);
        rig.daemon.command(&["disk", "resize", "vda", &size.to_string()])?;
        eventually("the guest to see the new size", Duration::from_secs(20), || {
            Ok((sectors(&mut rig)? == size / SECTOR).then_some(()))
        })?;
        // The last block, past the guest's own cache, beside the file system that is at work in front of it.
        let last = size / 4096 - 1;
        rig.guest.run(&format!(
            "printf frazil | dd of=/dev/vda bs=4096 seek={last} conv=sync oflag=direct 2>/dev/null && sync"
        ))?;
        let found = rig.guest.run(&format!(
            "dd if=/dev/vda bs=4096 skip={last} count=1 iflag=direct 2>/dev/null | head -c 6"
        ))?;
        assert_eq!(found, "frazil");
        for kind in Kind::ALL {
            rig.guest.wait_for_progress("vda", kind, Duration::from_secs(30))?;
        }
        rig.finish()
    })
}
