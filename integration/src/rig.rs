use std::time::Duration;

use crate::{Daemon, Expectation, FileSystem, Guest, Kind, Result, Scratch, Snapshot, verify};

/// A guest at work on disks that Frazil serves: the stage of nearly every test.
#[derive(Debug)]
pub struct Rig<'a> {
    /// Ends first: a guest without its disks only waits.
    pub guest: Guest,
    /// Serves the guest's disks.
    pub daemon: Daemon,
    scratch: &'a Scratch,
    disks: Vec<(&'a str, FileSystem)>,
}

impl<'a> Rig<'a> {
    /// Serves the disks, boots the guest, makes the file systems, starts the agent and the workload.
    ///
    /// The disks' ids are the guest's names for them: `vda`, `vdb` and so on.
    pub fn start(scratch: &'a Scratch, disks: &[(&'a str, FileSystem)]) -> Result<Self> {
        let mut rig = Self::start_without_agent(scratch, disks)?;
        rig.guest.start_agent()?;
        Ok(rig)
    }

    /// As [`Rig::start`], but with nobody at the other end of the agent's socket.
    pub fn start_without_agent(scratch: &'a Scratch, disks: &[(&'a str, FileSystem)]) -> Result<Self> {
        let ids: Vec<&str> = disks.iter().map(|&(id, _)| id).collect();
        let daemon = Daemon::start(scratch, "guest", &ids)?;
        let mut guest = daemon.attach(Guest::builder(scratch, "guest")).boot()?;
        for &(id, file_system) in disks {
            guest.make_and_mount(id, file_system)?;
        }
        guest.start_workload(&ids)?;
        Ok(Self { guest, daemon, scratch, disks: disks.to_vec() })
    }

    /// What a snapshot taken from now on must hold.
    pub fn expectation(&mut self) -> Result<Vec<Expectation>> {
        Expectation::of(&mut self.guest, &self.disks)
    }

    /// Proves a snapshot; gives the disks' verdicts.
    pub fn verify(&self, snapshot: &Snapshot, expected: &[Expectation]) -> Result<Vec<String>> {
        verify(self.scratch, &self.daemon, snapshot, expected)
    }

    /// Waits until each writer has written and synced anew: the guest is not frozen and its disks are served.
    pub fn wait_until_all_write(&mut self, limit: Duration) -> Result<()> {
        for &(disk, _) in &self.disks {
            for kind in Kind::ALL {
                self.guest.wait_for_progress(disk, kind, limit)?;
            }
        }
        Ok(())
    }

    /// Ends the guest and then the daemon, which must both succeed.
    pub fn finish(mut self) -> Result<()> {
        self.guest.shut_down()?;
        self.daemon.stop()
    }
}
