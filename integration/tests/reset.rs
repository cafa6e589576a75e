//! What befalls a front-end in a life: resets, reboots, drivers that go and come, memory that is plugged in, QEMU killed,
//! and the next machine with other rings. One daemon serves the disks all the while.

use std::time::Duration;

use frazil_integration::{
    Context, Driver, FileSystem, Guest, Hardware, Kind, Result, Rig, Scratch, Snapshot, eventually,
};

const DISKS: [(&str, FileSystem); 2] = [("vda", FileSystem::Ext4), ("vdb", FileSystem::Xfs)];
/// A disk without a file system.
const BARE: &str = "vdc";
/// For every writer to have written and synced anew, on a busy machine.
const RECOVERY: Duration = Duration::from_secs(60);

/// For hundreds of MiB to be moved by an emulated guest.
const SLOW: Duration = Duration::from_secs(180);

/// Of the one request, as the guest's program has it.
const BUFFER_MIB: u32 = 32;
const MACHINE: Hardware =
    Hardware { queues: Guest::QUEUES, queue_size: 128, memory_mib: 512, more_memory_mib: 768, resets: true };

fn no_errors(guest: &mut Guest) -> Result<()> {
    let errors = guest.run("dmesg | grep -iE 'i/o error|remount|shutting down filesystem' || true")?;
    assert_eq!(errors, "", "the guest has seen errors");
    Ok(())
}

/// Descriptors and threads of the daemon.
fn takes(rig: &Rig<'_>) -> Result<(usize, usize)> {
    let count = |what| -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/{what}", rig.daemon.id())).context("the daemon")?.count())
    };
    Ok((count("fd")?, count("task")?))
}

/// The drivers of a disk go and come while the other disk is written to; what was synced is there each time.
fn drivers_go_and_come(rig: &mut Rig<'_>) -> Result<()> {
    let [(written, written_as), (disk, file_system)] = DISKS;
    let expected = rig.pause()?;
    rig.guest.mount(written, written_as, "rw")?;
    rig.guest.start_workload(&[written])?;
    for driver in [Driver::Disk, Driver::Bus, Driver::Disk] {
        rig.guest.rebind(disk, driver)?;
        rig.check(expected.iter().filter(|expectation| expectation.disk == disk))?;
        rig.guest.wait_for_progress(written, Kind::Direct, RECOVERY)?;
    }
    rig.guest.mount(disk, file_system, "rw")
}

/// KiB of the memory that was plugged in which the daemon has touched: what its mapping of that size has in its pages.
fn touched(rig: &Rig<'_>) -> Result<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", rig.daemon.id())).context("the daemon")?;
    let number = |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
    let mut lines = maps.lines();
    let (mut all, size) = (0, u64::from(MACHINE.more_memory_mib) << 10);
    while let Some(line) = lines.find(|line| line.starts_with("Size:")) {
        if number(line) == Some(size) {
            all += lines.find(|line| line.starts_with("Rss:")).and_then(number).unwrap_or(0);
        }
    }
    Ok(all)
}

/// Reads into memory that was plugged in, and writes from there, while the other disks are written to.
fn direct_io_in_new_memory(rig: &mut Rig<'_>) -> Result<()> {
    let of = format!("of=/dev/{BARE} oflag=direct");
    let fill = format!("dd {of} bs=1M count={BUFFER_MIB} iflag=fullblock 2>/dev/null");
    rig.guest.run_for(&format!("while cat /usr/sbin/*; do :; done 2>/dev/null | {fill}"), SLOW)?;
    let read = |block: u32| {
        format!("dd if=/dev/{BARE} iflag=direct bs={block}M count={} 2>/dev/null", BUFFER_MIB / block)
    };
    let sum = |guest: &mut Guest, block| guest.run_for(&format!("{} | md5sum", read(block)), SLOW);
    let before = sum(&mut rig.guest, 1)?;
    rig.guest.plug_memory(MACHINE.more_memory_mib)?;
    assert_eq!(sum(&mut rig.guest, BUFFER_MIB)?, before, "read into new memory");
    rig.guest.run_for(&format!("{} {of}", read(BUFFER_MIB)), SLOW)?;
    assert_eq!(sum(&mut rig.guest, 1)?, before, "written from new memory");
    let touched = touched(rig)?;
    assert!(touched >= u64::from(BUFFER_MIB) << 10, "only {touched} KiB of it were used");
    rig.wait_until_all_write(RECOVERY)
}

/// A snapshot of a guest at work, which is frozen for it.
fn snapshot(rig: &mut Rig<'_>, name: &str) -> Result<Snapshot> {
    let snapshot = rig.daemon.snapshot(name, "require")?;
    assert_eq!(snapshot.grade, "filesystem", "{}", snapshot.reason);
    Ok(snapshot)
}

#[test]
fn drivers_memory_and_machines_come_and_go_and_nothing_synced_is_lost() -> Result<()> {
    Scratch::with("reset", |scratch| {
        let mut rig = Rig::start_on(scratch, &DISKS, &[BARE], MACHINE)?;
        rig.guest.start_agent()?;
        snapshot(&mut rig, "before")?;
        drivers_go_and_come(&mut rig)?;
        let expected = rig.pause()?;
        rig.resume(&expected)?;
        direct_io_in_new_memory(&mut rig)?;
        no_errors(&mut rig.guest)?;

        println!("reset, with memory plugged in");
        let expected = rig.expectation()?;
        rig.guest.reset()?;
        rig.resume(&expected)?;
        no_errors(&mut rig.guest)?;

        println!("reboot");
        let expected = rig.pause()?;
        rig.guest.reboot()?;
        rig.resume(&expected)?;
        no_errors(&mut rig.guest)?;

        rig.guest.start_agent()?;
        let expected = rig.expectation()?;
        let after = snapshot(&mut rig, "after")?;
        rig.verify(&after, &expected)?;
        rig.finish()
    })
}

#[test]
fn qemu_is_killed_and_the_next_has_other_rings() -> Result<()> {
    Scratch::with("rings", |scratch| {
        let mut rig = Rig::start_on(scratch, &DISKS, &[BARE], MACHINE)?;
        rig.guest.start_agent()?;
        rig.wait_until_all_write(RECOVERY)?;
        snapshot(&mut rig, "before")?;
        let at_first = takes(&rig)?;
        for (queues, queue_size) in [(1, 1024), (2, 16), (2, 128)] {
            println!("QEMU killed; the next has {queues} queues of {queue_size}");
            let expected = rig.expectation()?;
            rig.replace_guest(Hardware { queues, queue_size, ..MACHINE })?;
            rig.resume(&expected)?;
            rig.wait_until_all_write(RECOVERY)?;
            no_errors(&mut rig.guest)?;
        }
        eventually("the daemon to take no more than at first", Duration::from_secs(20), || {
            let now = takes(&rig)?;
            // Some threads are the kernel's, for io_uring: they come and go.
            Ok((now.0 <= at_first.0 && now.1 <= at_first.1 + 4).then_some(()))
        })
        .inspect_err(|_| {
            eprintln!("descriptors and threads: {at_first:?} at first, {:?} now", takes(&rig));
        })?;

        rig.guest.start_agent()?;
        let expected = rig.expectation()?;
        let after = snapshot(&mut rig, "after")?;
        rig.verify(&after, &expected)?;
        rig.finish()
    })
}
