//! Running the real tools.

use std::process::{Command, Stdio};

/// Which Debian package has a tool; all that these tests run is here.
const PACKAGES: &[(&str, &str)] = &[
    ("mke2fs", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("dumpe2fs", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("xfs_repair", "xfsprogs"),
    ("xfs_logprint", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("btrfs", "btrfs-progs"),
    ("mkfs.vfat", "dosfstools"),
    ("fsck.vfat", "dosfstools"),
    ("mkntfs", "ntfs-3g"),
    ("ntfsfix", "ntfs-3g"),
    ("ntfs-3g.probe", "ntfs-3g"),
    ("makefs", "makefs"),
    ("sfdisk", "fdisk"),
    ("mkswap", "util-linux"),
    ("blkid", "util-linux"),
    ("fsfreeze", "util-linux"),
    ("mount", "mount"),
    ("umount", "mount"),
    ("losetup", "mount"),
    ("pvcreate", "lvm2"),
];

/// What a tool said.
pub(crate) struct Said {
    /// Its exit status, -1 if a signal ended it.
    pub(crate) status: i32,
    /// Both of its outputs.
    pub(crate) text: String,
}

impl Said {
    /// The rest of the line that begins with `key`, without blanks around it.
    pub(crate) fn field(&self, key: &str) -> String {
        let line = self.text.lines().find_map(|line| line.trim_start().strip_prefix(key));
        line.unwrap_or_else(|| panic!("no {key} in: {}", self.text)).trim().to_owned()
    }
}

/// Runs a tool and waits; a tool that is not installed fails the test, and the message names its package.
pub(crate) fn ask(tool: &str, args: &[&str]) -> Said {
    let package = PACKAGES.iter().find(|(name, _)| *name == tool).map(|(_, package)| *package);
    let package = package.unwrap_or_else(|| panic!("add {tool} to PACKAGES"));
    // Debian keeps most of them where a user's path does not lead.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output =
        Command::new(tool).args(args).env("PATH", path).env("LC_ALL", "C").stdin(Stdio::null()).output();
    let output = output
        .unwrap_or_else(|error| panic!("can not run {tool} ({error}): install the Debian package {package}"));
    let text = [output.stdout, output.stderr].concat();
    Said { status: output.status.code().unwrap_or(-1), text: String::from_utf8_lossy(&text).into_owned() }
}

/// Runs a tool that has to succeed.
pub(crate) fn run(tool: &str, args: &[&str]) -> Said {
    let said = ask(tool, args);
    assert_eq!(said.status, 0, "{tool} {args:?}: {}", said.text);
    said
}
