//! Which file systems a freeze has to stop, and what its counts prove.
//!
//! # What qemu-ga does (Linux: `qga/commands-posix.c`, since 8.0 `qga/commands-linux.c`)
//!
//! - `guest-get-fsinfo` and the freeze walk the same list: each line of `/proc/self/mountinfo` with a device number whose
//!   major is not 0 (btrfs, whose major *is* 0, is let through by its source device). So tmpfs, overlay, NFS and **ZFS are
//!   in neither**, nor is what is mounted only in another mount namespace (inside a container).
//! - fsinfo has one entry a *mount*: bind mounts and btrfs subvolumes repeat the same `name`, that of the block device
//!   in sysfs (`vda1`, `dm-0`). Whether a mount is read-only is not told.
//! - The freeze opens each mount point, last mounted first, and calls `FIFREEZE`. It counts successes. `EBUSY` (frozen
//!   already: the second mount of one device, or somebody else's freeze) and `EOPNOTSUPP` (vfat, squashfs, iso9660, FUSE)
//!   are passed over without a word; any other error thaws all and fails. A freezable file system that is mounted
//!   read-only succeeds at once in the kernel (`freeze_super`), and counts.
//! - With `guest-fsfreeze-freeze-list` the same walk takes only the mount points listed.
//! - The thaw walks all mounts, calls `FITHAW` on each until it fails, and counts the mounts where it succeeded at least
//!   once: again one a frozen device.
//!
//! So with `D` distinct devices in the walk, `count == D` if and only if every one was frozen by this very call, and the
//! thaw gives `D` again if and only if nobody thawed one in between.
//!
//! # What grade `filesystem` can claim, then
//!
//! We list one mount point of each device, so the count is not blurred by read-only file systems that cannot be frozen
//! (and need not), nor by those on other disks. `count == listed` proves that everything listed was frozen. A writable
//! file system without freeze support (vfat, as on `/boot/efi`) makes the count short, and the grade `crash` names it.
//! An entry counts as on our disks unless it *certainly* is not; without disk information it is ours. What the agent
//! cannot see, the grade cannot speak of: ZFS, other mount namespaces, raw users of a device.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Deserialize;

use crate::session::AgentInfo;
use crate::text::quote;

/// A virtio-blk serial has at most so many bytes (virtio 1.2, 5.2.6); the guest sees no more of it.
const SERIAL_MAX: usize = 20;

/// Linux file systems that nobody can write to, and that have no freeze support because they need none.
const ALWAYS_READ_ONLY: [&str; 6] = ["squashfs", "iso9660", "erofs", "cramfs", "romfs", "efs"];

/// Linux file systems with freeze support; used only to guess who made a count short.
const FREEZABLE: [&str; 11] =
    ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "nilfs2", "reiserfs", "gfs2", "bcachefs"];

/// An entry of `guest-get-fsinfo`: one mount.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
pub struct FileSystem {
    /// The block device's name in sysfs; on Windows the volume's `\\?\Volume{…}\` path.
    pub name: String,
    /// Where it is mounted.
    pub mountpoint: String,
    /// `ext4`, `NTFS`, … as the guest calls it.
    #[serde(rename = "type")]
    pub kind: String,
    /// The disks it lies on, as far as the agent can tell; may be empty (loop devices, unknown buses).
    #[serde(default)]
    pub disk: Vec<DiskAddress>,
}

/// A disk, as the agent sees it.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
pub struct DiskAddress {
    /// The disk's serial, where the guest has udev and the disk a serial.
    #[serde(default)]
    pub serial: Option<String>,
    /// The disk's device node.
    #[serde(default)]
    pub dev: Option<String>,
}

/// A file system to freeze: one device, whatever the number of its mounts.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Target {
    /// The device's name.
    pub name: String,
    /// The mount point through which it is frozen.
    pub mountpoint: String,
    /// Its type.
    pub kind: String,
}

/// Which command freezes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Means {
    /// `guest-fsfreeze-freeze-list`, one mount point a target.
    List,
    /// `guest-fsfreeze-freeze`: all that the agent knows.
    All,
}

/// What has to be frozen. Made by [`coverage`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Coverage {
    targets: Vec<Target>,
    means: Means,
    windows: bool,
}

/// What to freeze, given all that is mounted. Ask for `mounts` just before the freeze: it is a race with `mount`.
///
/// `serials` are those of the disks to be cut, if every one has one; a mount is left out only if each disk it lies on
/// has a serial that is none of them. `None`: every mount may be on them.
pub fn coverage(info: &AgentInfo, mounts: &[FileSystem], serials: Option<&[String]>) -> Coverage {
    let windows = mounts.iter().any(|mount| mount.name.starts_with(r"\\?\Volume"));
    // VSS always takes all fixed volumes, and the list came late to the Windows agent.
    let means = if !windows && info.offers("guest-fsfreeze-freeze-list") { Means::List } else { Means::All };
    let serials: Option<BTreeSet<&str>> =
        serials.map(|serials| serials.iter().map(|serial| visible(serial)).collect());
    // A path mounted over leads to another file system than its first entry says.
    let mut uses: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for mount in mounts {
        uses.entry(&mount.mountpoint).or_default().insert(&mount.name);
    }
    let mut targets: BTreeMap<&str, &FileSystem> = BTreeMap::new();
    for mount in mounts {
        if !needs_freeze(mount, windows) || (means == Means::List && is_elsewhere(mount, serials.as_ref())) {
            continue;
        }
        let key = if mount.name.is_empty() { &mount.mountpoint } else { &mount.name };
        let hidden =
            |mount: &FileSystem| uses.get(mount.mountpoint.as_str()).is_some_and(|names| names.len() > 1);
        let chosen = targets.entry(key).or_insert(mount);
        if hidden(chosen) && !hidden(mount) {
            *chosen = mount;
        }
    }
    let targets = targets
        .into_values()
        .map(|mount| Target {
            name: mount.name.clone(),
            mountpoint: mount.mountpoint.clone(),
            kind: mount.kind.clone(),
        })
        .collect();
    Coverage { targets, means, windows }
}

/// As much of a serial as a virtio-blk disk shows.
fn visible(serial: &str) -> &str {
    serial.get(..SERIAL_MAX).unwrap_or(serial)
}

fn needs_freeze(mount: &FileSystem, windows: bool) -> bool {
    if windows {
        // The agent lists volumes, mounted or not. VSS takes NTFS and ReFS of both kinds; another type counts only where
        // it is mounted (the agent says `System Reserved` where it is not), and discs are read-only.
        return match mount.kind.as_str() {
            "NTFS" | "ReFS" | "CSVFS" => true,
            "" | "CDFS" | "UDF" => false,
            _ => mount.mountpoint != "System Reserved",
        };
    }
    let optical = mount.name.starts_with("sr");
    !optical && !ALWAYS_READ_ONLY.contains(&mount.kind.as_str())
}

/// Whether the mount is certainly on none of the disks with these serials.
fn is_elsewhere(mount: &FileSystem, serials: Option<&BTreeSet<&str>>) -> bool {
    let Some(serials) = serials else { return false };
    // The agent names one device of a btrfs; the others may be ours.
    if mount.disk.is_empty() || mount.kind == "btrfs" {
        return false;
    }
    // udev rewrites some characters of a serial, so only plain ones can tell two disks apart.
    let plain = |serial: &str| {
        !serial.is_empty() && serial.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    serials.iter().all(|serial| plain(serial))
        && mount.disk.iter().all(|disk| {
            disk.serial.as_deref().is_some_and(|serial| plain(serial) && !serials.contains(visible(serial)))
        })
}

impl Coverage {
    /// What is to be frozen.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Which command to use.
    pub fn means(&self) -> Means {
        self.means
    }

    /// One mount point of each target.
    pub fn mountpoints(&self) -> impl ExactSizeIterator<Item = &str> {
        self.targets.iter().map(|target| target.mountpoint.as_str())
    }

    /// Whether it is a Windows guest, whose VSS flushes by itself, and ends a freeze after 10 s.
    pub fn is_windows(&self) -> bool {
        self.windows
    }

    /// Those without known freeze support, which make the count short.
    pub fn unfreezable(&self) -> impl Iterator<Item = &Target> {
        let windows = self.windows;
        self.targets.iter().filter(move |target| {
            let kind = target.kind.as_str();
            if windows { !matches!(kind, "NTFS" | "ReFS" | "CSVFS") } else { !FREEZABLE.contains(&kind) }
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {})", quote(&self.mountpoint), quote(&self.kind), quote(&self.name))
    }
}

#[cfg(test)]
mod tests;
