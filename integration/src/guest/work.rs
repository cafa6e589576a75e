use std::time::Duration;

use super::Guest;
use crate::{Context, Error, Result, eventually};

/// Where the writers report to, in the guest's memory.
const REPORTS: &str = "/run/workload";

/// A file system that a guest can make and mount.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FileSystem {
    /// Linux's usual one, with a journal.
    Ext4,
    /// With a log that always needs replay after a freeze.
    Xfs,
    /// Copy on write, with a log tree.
    Btrfs,
    /// No journal; Linux does not freeze it.
    Vfat,
}

impl FileSystem {
    /// Its name, as `mount -t` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Vfat => "vfat",
        }
    }

    fn make(self) -> &'static str {
        match self {
            Self::Ext4 => "mkfs.ext4 -q -F",
            Self::Xfs => "mkfs.xfs -q -f",
            Self::Btrfs => "mkfs.btrfs -q -f",
            Self::Vfat => "mkfs.vfat",
        }
    }
}

/// How a writer of the workload writes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Through the page cache.
    Buffered,
    /// With O_DIRECT.
    Direct,
    /// By stores to a shared mapping.
    Mapped,
}

impl Kind {
    /// All kinds; the workload has a writer of each on each disk.
    pub const ALL: [Self; 3] = [Self::Buffered, Self::Direct, Self::Mapped];

    /// Its name, which is its file's too.
    pub fn name(self) -> &'static str {
        match self {
            Self::Buffered => "buffered",
            Self::Direct => "direct",
            Self::Mapped => "mapped",
        }
    }
}

/// How far a writer is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Progress {
    /// The last write that returned.
    pub written: u64,
    /// The last write that a sync has covered.
    pub acknowledged: u64,
}

impl Guest {
    /// Makes a file system on a disk (`vda`) and mounts it at `/mnt/vda`.
    pub fn make_and_mount(&mut self, disk: &str, file_system: FileSystem) -> Result<()> {
        self.run(&format!("{} /dev/{disk}", file_system.make()))?;
        self.mount(disk, file_system, "rw")
    }

    /// Mounts a disk at `/mnt/DISK`, with mount options such as `ro`.
    pub fn mount(&mut self, disk: &str, file_system: FileSystem, options: &str) -> Result<()> {
        let kind = file_system.name();
        self.run(&format!("mkdir -p /mnt/{disk} && mount -t {kind} -o {options} /dev/{disk} /mnt/{disk}"))
            .map(drop)
    }

    /// Starts the guest agent and waits until it listens.
    pub fn start_agent(&mut self) -> Result<()> {
        self.launch_agent("")
    }

    /// Starts the agent with a hook: `script` is run before a freeze and after a thaw, `$1` saying which.
    pub fn start_agent_with_hook(&mut self, script: &str) -> Result<()> {
        self.run(&format!("printf '#!/bin/sh\\n%s\\n' '{script}' >/run/hook && chmod +x /run/hook"))?;
        self.launch_agent("-F/run/hook")
    }

    fn launch_agent(&mut self, options: &str) -> Result<()> {
        const PORT: &str = "/dev/virtio-ports/org.qemu.guest_agent.0";
        self.run(&format!("qemu-ga -d -t /run -f /run/qemu-ga.pid -p {PORT} -l /run/qemu-ga.log {options}"))?;
        // It goes into the background before it opens its port, by more than a client's patience on a busy host.
        self.run(&format!(
            "until ls -l /proc/$(cat /run/qemu-ga.pid)/fd | grep -q $(readlink {PORT}); do sleep 0.1; done"
        ))
        .map(drop)
    }

    /// Kills the guest agent; what it froze stays frozen.
    pub fn kill_agent(&mut self) -> Result<()> {
        self.run("kill -9 $(cat /run/qemu-ga.pid) && rm -f /run/qemu-ga.pid").map(drop)
    }

    /// Starts the writers on mounted disks and waits until each has acknowledged writes.
    pub fn start_workload(&mut self, disks: &[&str]) -> Result<()> {
        let folders: Vec<String> = disks.iter().map(|disk| format!("/mnt/{disk}")).collect();
        let folders = folders.join(" ");
        self.run(&format!(
            "setsid guest-workload run {REPORTS} {folders} </dev/null >/run/workload.log 2>&1 &"
        ))?;
        for disk in disks {
            for kind in Kind::ALL {
                eventually(
                    &format!("first writes of {disk}'s {}", kind.name()),
                    Duration::from_secs(30),
                    || {
                        let started =
                            self.progress(disk, kind).ok().filter(|progress| progress.acknowledged > 0);
                        Ok(started)
                    },
                )?;
            }
        }
        Ok(())
    }

    /// How far a writer is; an error if the workload has failed.
    pub fn progress(&mut self, disk: &str, kind: Kind) -> Result<Progress> {
        let text = self.run(&format!("cat /run/workload.log {REPORTS}/{disk}-{}", kind.name()))?;
        let number = |word: Option<&str>| word.and_then(|word| word.parse().ok());
        let mut words = text.split_whitespace();
        match (number(words.next()), number(words.next())) {
            (Some(written), Some(acknowledged)) => Ok(Progress { written, acknowledged }),
            _ => Err(Error::new(format!("the workload: {text}"))),
        }
    }

    /// Waits until a writer has written and synced anew: proof that its file system is not frozen.
    pub fn wait_for_progress(&mut self, disk: &str, kind: Kind, limit: Duration) -> Result<()> {
        let before = self.progress(disk, kind)?;
        eventually(&format!("progress of {disk}'s {}", kind.name()), limit, || {
            let now = self.progress(disk, kind)?;
            Ok((now.acknowledged > before.written).then_some(()))
        })
    }

    /// The guest's monotonic clock.
    pub fn clock(&mut self) -> Result<Duration> {
        let text = self.run("cut -d ' ' -f 1 /proc/uptime")?;
        text.trim().parse().map(Duration::from_secs_f64).context("the guest's clock")
    }

    /// The longest step of a writer that ended after `since` on the guest's clock; those under 5 ms count as nothing.
    pub fn longest_gap(&mut self, disk: &str, kind: Kind, since: Duration) -> Result<Duration> {
        let text = self.run(&format!(
            "awk '$1 >= {} && $2 > m {{ m = $2 }} END {{ print m + 0 }}' {REPORTS}/{disk}-{}.gaps",
            since.as_micros(),
            kind.name()
        ))?;
        text.trim().parse().map(Duration::from_micros).context("a gap")
    }
}
