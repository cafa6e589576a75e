//! The harness itself: a guest boots, takes commands, and has an agent.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use frazil_integration::{Context, FileSystem, Guest, Kind, Result, Scratch};

const SIZE: u64 = 384 << 20;

#[test]
fn a_guest_makes_each_file_system_and_writes_to_it() -> Result<()> {
    Scratch::with("file-systems", |scratch| {
        let systems = [FileSystem::Ext4, FileSystem::Xfs, FileSystem::Btrfs, FileSystem::Vfat];
        let disks = ["vda", "vdb", "vdc", "vdd"];
        let mut builder = Guest::builder(scratch, "guest");
        for disk in disks {
            builder = builder.image_disk(scratch.sparse_file(disk, SIZE)?, "raw");
        }
        let mut guest = builder.boot()?;
        for (disk, system) in disks.into_iter().zip(systems) {
            guest.make_and_mount(disk, system)?;
        }
        guest.start_workload(&disks)?;
        for disk in disks {
            for kind in Kind::ALL {
                guest.wait_for_progress(disk, kind, Duration::from_secs(30))?;
            }
        }
        guest.shut_down()
    })
}

#[test]
fn the_agent_answers_through_its_socket() -> Result<()> {
    Scratch::with("agent", |scratch| {
        let mut guest = Guest::builder(scratch, "guest").boot()?;
        guest.start_agent()?;
        let agent = UnixStream::connect(guest.agent())?;
        agent.set_read_timeout(Some(Duration::from_secs(30)))?;
        writeln!(&agent, r#"{{"execute":"guest-ping"}}"#)?;
        let mut answer = String::new();
        BufReader::new(&agent).read_line(&mut answer).context("the agent's answer")?;
        assert_eq!(answer.trim(), r#"{"return": {}}"#);
        guest.shut_down()
    })
}

#[test]
fn a_command_that_fails_says_how() -> Result<()> {
    Scratch::with("commands", |scratch| {
        let mut guest = Guest::builder(scratch, "guest").boot()?;
        assert_eq!(guest.run("echo one; echo two")?, "one\ntwo\n");
        assert_eq!(guest.try_run("echo no; exit 7", Duration::from_secs(10))?, ("no\n".to_owned(), 7));
        assert!(guest.run_for("sleep 3", Duration::from_millis(100)).is_err());
        assert_eq!(guest.run("echo later")?, "later\n");
        guest.shut_down()
    })
}
