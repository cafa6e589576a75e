//! A device that gives errors. It needs root, to mount a tmpfs and for a loop device.

use std::path::PathBuf;
use std::process::Command;

use crate::faults::{BYTES, text};

/// A device of which the second half gives errors: its bytes are in a file system that has no room for them. Gone when this is
/// dropped.
pub(crate) struct Broken {
    room: PathBuf,
    pub(crate) device: PathBuf,
}

impl Broken {
    pub(crate) fn new(room: PathBuf) -> Self {
        std::fs::create_dir(&room).unwrap();
        let size = format!("size={}", BYTES / 2);
        run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", text(&room)]);
        // What was mounted goes even if there is no device.
        let mut broken = Self { room, device: PathBuf::new() };
        let file = broken.beneath();
        std::fs::File::create(&file).unwrap().set_len(BYTES).unwrap();
        broken.device = run("losetup", &["--find", "--show", text(&file)]).into();
        broken
    }

    /// The file that has its bytes.
    fn beneath(&self) -> PathBuf {
        self.room.join("beneath")
    }

    /// Makes room: it gives no errors any more.
    pub(crate) fn mend(&self) {
        run("mount", &["-o", &format!("remount,size={}", 2 * BYTES), text(&self.room)]);
    }

    /// What came to the device, whatever its page cache shows.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.beneath()).unwrap()
    }
}

fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().unwrap();
    assert!(output.status.success(), "are you root? {program}: {output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

impl Drop for Broken {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).output();
        let _ = Command::new("umount").arg("--lazy").arg(&self.room).output();
    }
}
