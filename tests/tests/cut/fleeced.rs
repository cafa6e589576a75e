//! A disk read as it was while its guest writes on, by a program that does so with QEMU (`tests/python/fleece_client.py`): over
//! NBD, through an image that has the disk beneath it.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::backups::{Program, succeeds, text};
use crate::ledger::{Clock, Ledger, prove};
use crate::load::{Load, Mix};
use crate::served::{Served, Wanted};

const QUEUES: usize = 2;
const SIZE: usize = 4096;
const PLACES: usize = 512;
const BYTES: u64 = (SIZE * PLACES * QUEUES) as u64;

/// The guest writes for so long before and between.
const WHILE: Duration = Duration::from_millis(50);

/// The guest's writers, with the ledgers of what they did before.
fn write(served: &Served, ledgers: Vec<Ledger>, clock: &Arc<Clock>) -> Load {
    let load = Load::connect(&served.sockets, vec![ledgers], Mix::Zeroes, clock);
    thread::sleep(WHILE);
    load
}

fn drill(way: &str) {
    let mut served =
        Served::start(Wanted { format: "qcow2", cache: "writeback", disks: 1, queues: QUEUES, bytes: BYTES });
    let clock = Arc::new(Clock::new());
    let ledgers = (0..QUEUES).map(|queue| Ledger::new(SIZE, queue, QUEUES, PLACES)).collect();
    let load = write(&served, ledgers, &clock);
    let [fleece, socket, first, second] =
        ["fleece.qcow2", "nbd", "first", "second"].map(|name| served.path(name));
    let (control, words) = (served.path("control"), [way, "vd0"]);
    let mut program = Program::start("fleece_client.py", |command| {
        command.arg(control).args(words).args([&fleece, &socket, &first, &second]);
    });
    let cut = program.take(&clock);
    program.hear("copied");
    program.hear("copied");
    let ledgers = load.finish().remove(0);
    let copy = std::fs::read(&first).unwrap();
    assert!(copy == std::fs::read(&second).unwrap(), "the guest's writes are seen");
    prove(&cut, &[(copy.clone(), ledgers.iter().collect())]);
    program.tell();
    program.hear("done");
    assert!(program.ends_well());

    // What the guest has overwritten is in the image, and nothing else: over the disk it shows the instant.
    succeeds(&["check", "-q", text(&fleece)]);
    let (disk, shown) = (served.path("disk"), served.path("shown"));
    std::fs::write(&disk, served.read(0)).unwrap();
    assert!(served.read(0) != copy, "the guest has written nothing");
    succeeds(&["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", text(&disk), text(&fleece)]);
    succeeds(&["convert", "-f", "qcow2", "-O", "raw", text(&fleece), text(&shown)]);
    assert_eq!(std::fs::read(shown).unwrap() == copy, way == "job", "a filter copies nothing, a job does");
    served.stop();
}

#[test]
fn an_image_over_a_disk_to_which_a_job_goes_shows_the_disk_as_it_was() {
    drill("job");
}

#[test]
fn the_fleecing_image_of_a_filter_shows_the_disk_as_it_was() {
    drill("filter");
}
