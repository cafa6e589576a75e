use std::time::Duration;

use crate::verify::check_files;
use crate::{
    Context, Daemon, Expectation, FileSystem, Guest, Hardware, Kind, Result, Scratch, Snapshot, verify,
};

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
        Self::start_on(scratch, disks, &[], Hardware::default())
    }

    /// As [`Rig::start_without_agent`], with more disks that are left bare, and on another machine.
    pub fn start_on(
        scratch: &'a Scratch,
        disks: &[(&'a str, FileSystem)],
        bare: &[&str],
        hardware: Hardware,
    ) -> Result<Self> {
        let ids: Vec<&str> = disks.iter().map(|&(id, _)| id).collect();
        let daemon = Daemon::start(scratch, "guest", &[&ids, bare].concat())?;
        let mut guest = daemon.attach(Guest::builder(scratch, "guest")).hardware(hardware).boot()?;
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

    /// Kills the guest's QEMU, and boots another one on the same disks.
    pub fn replace_guest(&mut self, hardware: Hardware) -> Result<()> {
        self.guest.kill()?;
        self.guest = self.daemon.attach(Guest::builder(self.scratch, "guest")).hardware(hardware).boot()?;
        Ok(())
    }

    /// Moves the guest to a new QEMU while it runs, and ends the old one.
    pub fn move_guest(&mut self, name: &str) -> Result<()> {
        let (meeting, agent) =
            (self.scratch.path(&format!("{name}.meeting")), Guest::agent_socket(self.scratch, name));
        let next = self.daemon.attach(Guest::builder(self.scratch, name)).incoming(&meeting).boot()?;
        self.guest.move_to(&meeting)?;
        self.guest.kill()?;
        self.guest = next;
        // To where the daemon looks for it.
        let known = Guest::agent_socket(self.scratch, "guest");
        std::fs::rename(&agent, known).context("the agent's socket")
    }

    /// Ends the writers, and unmounts the disks; gives what they must hold from now on.
    pub fn pause(&mut self) -> Result<Vec<Expectation>> {
        self.guest
            .run("killall guest-workload; while pidof guest-workload >/dev/null; do sleep 0.05; done")?;
        let expected = self.expectation()?;
        for &(disk, _) in &self.disks {
            self.guest.run(&format!("umount /mnt/{disk}"))?;
        }
        Ok(expected)
    }

    /// Proves that disks that are not mounted hold what they must.
    pub fn check<'b>(&mut self, expected: impl IntoIterator<Item = &'b Expectation>) -> Result<()> {
        expected
            .into_iter()
            .try_for_each(|expected| check_files(&mut self.guest, &expected.disk, expected, false))
    }

    /// Sets a guest to work that has its disks not mounted, once it was proved that they hold what they must. The
    /// writers begin anew; the agent is not started.
    pub fn resume(&mut self, expected: &[Expectation]) -> Result<()> {
        self.check(expected)?;
        for &(disk, file_system) in &self.disks {
            self.guest.mount(disk, file_system, "rw")?;
        }
        let ids: Vec<&str> = self.disks.iter().map(|&(id, _)| id).collect();
        self.guest.start_workload(&ids)
    }

    /// Ends the guest and then the daemon, which must both succeed.
    pub fn finish(mut self) -> Result<()> {
        self.guest.shut_down()?;
        self.daemon.stop()
    }
}
