use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::{BOOT, Guest};
use crate::process::tail;
use crate::{Result, eventually};

/// For the guest to see what was plugged in or to let go of it, on a busy machine.
const PLUG: Duration = Duration::from_secs(60);

/// What a guest's machine is like, as far as it matters to a back-end.
#[derive(Clone, Debug)]
pub struct Hardware {
    /// Queues of each disk that a back-end serves; [`Guest::QUEUES`] at most.
    pub queues: u16,
    /// Entries of each of their rings.
    pub queue_size: u16,
    /// MiB of memory. The host spends only what the guest touches.
    pub memory_mib: u32,
    /// MiB of memory that may be plugged in later.
    pub more_memory_mib: u32,
    /// Whether QEMU goes on when the guest resets, instead of ending.
    pub resets: bool,
}

impl Default for Hardware {
    /// Room for some hundreds of MiB of dirty page cache; QEMU's own size of rings.
    fn default() -> Self {
        Self { queues: Guest::QUEUES, queue_size: 128, memory_mib: 1024, more_memory_mib: 0, resets: false }
    }
}

impl Hardware {
    /// The value of `-m`.
    pub(super) fn memory(&self) -> String {
        let Self { memory_mib, more_memory_mib, .. } = self;
        match more_memory_mib {
            0 => format!("{memory_mib}M"),
            more => format!("{memory_mib}M,slots=2,maxmem={}M", memory_mib + more),
        }
    }

    /// What of `-device vhost-user-blk-pci` is about its rings.
    pub(super) fn rings(&self) -> String {
        format!("num-queues={},queue-size={}", self.queues, self.queue_size)
    }
}

impl Guest {
    /// Resets the machine, as its button does: what the guest had not written is lost.
    pub fn reset(&mut self) -> Result<()> {
        self.monitor()?.execute("system_reset", json!({}))?;
        self.wait_for_boot()
    }

    /// Has the guest restart itself; the disks are unmounted.
    pub fn reboot(&mut self) -> Result<()> {
        // The shell that it was told to is gone before it could answer.
        self.run("(sleep 0.2; reboot -f) >/dev/null 2>&1 </dev/null &")?;
        self.wait_for_boot()
    }

    fn wait_for_boot(&mut self) -> Result<()> {
        self.control.wait_until_ready(BOOT).map_err(|error| error.with("console", &tail(&self.console)))
    }

    /// `kill -9` of QEMU.
    pub fn kill(&mut self) -> Result<()> {
        self.qemu.kill()
    }

    /// Plugs in so much memory, and waits until the guest uses it.
    pub fn plug_memory(&mut self, mib: u32) -> Result<()> {
        let before = self.memory_kib()?;
        let mut monitor = self.monitor()?;
        let size = u64::from(mib) << 20;
        let backend = json!({"qom-type": "memory-backend-memfd", "id": "more", "size": size, "share": true});
        monitor.execute("object-add", backend)?;
        monitor.execute("device_add", json!({"driver": "pc-dimm", "id": "dimm", "memdev": "more"}))?;
        eventually("the guest to use its new memory", PLUG, || {
            // `movable` is what hosts plug in, to take it out again one day.
            self.run("for state in /sys/devices/system/memory/memory*/state; do grep -q offline $state && echo online_movable >$state; done; true")?;
            Ok((self.memory_kib()? >= before + size / 1024 * 9 / 10).then_some(()))
        })
    }

    /// The guest's memory, as it counts it.
    fn memory_kib(&mut self) -> Result<u64> {
        let text = self.run("grep MemTotal /proc/meminfo | tr -dc 0-9")?;
        Ok(text.trim().parse().unwrap_or(0))
    }

    /// Takes the driver of a disk away and gives it back: the driver's own, or that of its place on the bus.
    pub fn rebind(&mut self, disk: &str, driver: Driver) -> Result<()> {
        let (device, folder) = match driver {
            Driver::Disk => ("device", "/sys/bus/virtio/drivers/virtio_blk"),
            Driver::Bus => ("device/..", "/sys/bus/pci/drivers/virtio-pci"),
        };
        let device = self.run(&format!("basename $(readlink -f /sys/block/{disk}/{device})"))?;
        let device = Path::new(device.trim()).display().to_string();
        self.run(&format!("echo {device} >{folder}/unbind && [ ! -e /sys/block/{disk} ]"))?;
        self.run(&format!("echo {device} >{folder}/bind && until [ -b /dev/{disk} ]; do sleep 0.05; done"))
            .map(drop)
    }
}

/// Which driver of a disk's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Driver {
    /// `virtio_blk`.
    Disk,
    /// `virtio-pci`.
    Bus,
}
