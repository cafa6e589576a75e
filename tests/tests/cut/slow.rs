//! A file system on a slow disk: data, tables, journals and syncs alike wait their turn.
//!
//! ```text
//!   mounted ext4 ─▶ loop device ─▶ a file in FUSE ─▶ qemu-storage-daemon, throttled ─▶ a file in memory
//! ```
//! No control groups, device mapper or kernel module is needed for it, only root and FUSE.

use std::path::PathBuf;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const PATIENCE: Duration = Duration::from_secs(20);

/// It is unmounted when this is dropped; whoever has files open there must be gone.
pub(crate) struct SlowDisk {
    storage: Child,
    device: String,
    folder: tempfile::TempDir,
}

impl SlowDisk {
    /// Of `bytes`, taking so many operations a second; what is under way with others' counts with them.
    pub(crate) fn new(bytes: u64, operations: u32) -> Self {
        let folder = crate::full::in_memory();
        let path = |name: &str| folder.path().join(name);
        let (beneath, file, mount) = (path("beneath"), path("file"), path("mount"));
        std::fs::File::create(&beneath).unwrap().set_len(bytes).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&beneath));
        std::fs::write(&file, "").unwrap();
        std::fs::create_dir(&mount).unwrap();
        let limits = format!("throttle-group,id=slow,x-iops-total={operations}");
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--object", &limits]);
        command.args(["--blockdev", &format!("driver=file,node-name=file,filename={}", beneath.display())]);
        command.args(["--blockdev", "driver=throttle,node-name=slow,file=file,throttle-group=slow"]);
        let export = format!("fuse,id=fuse,node-name=slow,writable=on,mountpoint={}", file.display());
        let storage = command.args(["--export", &export]).spawn().unwrap();
        let mut slow = Self { storage, device: String::new(), folder };
        let deadline = Instant::now() + PATIENCE;
        while file.metadata().unwrap().len() != bytes {
            assert_eq!(slow.storage.try_wait().unwrap(), None, "qemu-storage-daemon has ended");
            assert!(Instant::now() < deadline, "there is no file in FUSE");
            thread::sleep(Duration::from_millis(10));
        }
        // Past the page cache, or a sync would wait for what that has gathered: minutes.
        let made =
            Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(&file).output().unwrap();
        slow.device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
        run(Command::new("mount").arg(&slow.device).arg(&mount));
        slow
    }

    /// A path on it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.mount().join(name)
    }

    fn mount(&self) -> PathBuf {
        self.folder.path().join("mount")
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // In this order, each waits for the one before. Killed, the storage daemon would leave its own mount.
        let _ = Command::new("umount").arg(self.mount()).status();
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
        let _ = kill_process(Pid::from_child(&self.storage), Signal::TERM);
        let _ = self.storage.wait();
    }
}

fn run(command: &mut Command) {
    let status = command.status();
    assert!(status.as_ref().is_ok_and(|status| status.success()), "{command:?}: {status:?}");
}
