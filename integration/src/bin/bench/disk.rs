//! Reads and writes of 4 KiB past the page cache (`cache=none`), on the disk of this machine, against
//! qemu-storage-daemon on the same file.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use frazil_integration::{Context, Daemon, Error, Result, Scratch};
use frazil_tests::Load;
use serde_json::json;

use crate::Tables;
use crate::hits::{Rows, header};
use crate::peer::{Image, Peer, Settings};

/// Runs of each, in turns.
const ROUNDS: usize = 5;
const RUN: Duration = Duration::from_secs(1);
const BYTES: u64 = 1 << 30;

pub(crate) fn measure(_memory: &Path) -> Result<Tables> {
    // Where this program was built there is room, and a disk.
    let program = std::env::current_exe()?;
    let folder = program.parent().ok_or_else(|| Error::new("this program is nowhere"))?;
    Scratch::with_in(folder, "disk", |scratch| {
        let (raw, socket) = (scratch.path("direct.raw"), scratch.path("direct.sock"));
        fill(&raw)?;
        let disk = format!("id=vda,path={},format=raw,cache=none,socket={}", raw.display(), socket.display());
        let daemon = Daemon::start_with(scratch, "none", &[], &["--freeze", "never", "--disk", &disk])?;
        let peers = [(true, "an iothread"), (false, "no iothread")];
        let mut rows = Rows { table: header(), figures: Vec::new() };
        for (iothread, what) in peers {
            let peer = Peer::start(scratch, Settings::direct(iothread), &raw, &Image::Raw)?;
            for depth in [1, 32] {
                for (write, name) in [(false, "randread"), (true, "randwrite")] {
                    let load = Load { write, block: 4096, depth };
                    let mut pairs = Vec::new();
                    for _ in 0..ROUNDS {
                        let ours = load.random(&socket, Some(daemon.id()), timer()).context("frazil")?;
                        pairs.push((ours, peer.run(load, timer())?));
                    }
                    rows.add(&format!("O_DIRECT {name}, theirs with {what}"), load, &pairs);
                }
            }
        }
        Ok((rows.table, json!({ "rows": rows.figures })))
    })
}

fn timer() -> impl FnMut() -> bool {
    let end = Instant::now() + RUN;
    move || Instant::now() < end
}

/// Bytes that are on the disk, so that a read is one.
fn fill(raw: &Path) -> Result<()> {
    let mut file = File::create(raw).context(raw.display())?;
    let chunk = vec![0xa5; 1 << 20];
    (0..BYTES >> 20).try_for_each(|_| file.write_all(&chunk)).context(raw.display())?;
    file.sync_all().context(raw.display())
}
