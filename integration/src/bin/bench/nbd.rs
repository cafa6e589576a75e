//! Random reads over NBD of a disk over long chains, by fio, against qemu-storage-daemon over the same files.

use std::path::Path;
use std::process::Command;

use comfy_table::Table;
use frazil_integration::{Context, Error, Result, Scratch};
use serde_json::{Value, json};

use crate::chains::{DISK_BYTES, Kind};
use crate::server::Server;
use crate::{Tables, median, say, table};

/// Runs of each, in turns.
const ROUNDS: usize = 5;
const DEPTHS: [usize; 2] = [1, 16];
const KIND: Kind = Kind { blocks: 128, chains: &[(1, ""), (100, ""), (500, "")], peers: &[1, 100] };

pub(crate) fn measure(folder: &Path) -> Result<Tables> {
    Scratch::with_in(folder, "nbd", |scratch| {
        let base = scratch.path("base.raw");
        std::fs::write(&base, vec![0xa5; DISK_BYTES as usize]).context(base.display())?;
        let images = KIND.make_images(scratch, &base)?;
        let mut rows = Rows { table: header(), figures: Vec::new() };
        for &(layers, _) in KIND.chains {
            let chain = images.get(..=layers).unwrap_or_default();
            let top = chain.last().ok_or_else(|| Error::new("a chain that was not made"))?;
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for round in 0..ROUNDS {
                // Not both at once: they exclude each other from the files.
                let name = |server: &str| format!("{server}-{layers}-{round}");
                ours.extend(rates(&mut Server::frazil(scratch, &name("ours"), top)?)?);
                if KIND.peers.contains(&layers) {
                    theirs.extend(rates(&mut Server::peer(scratch, &name("theirs"), chain)?)?);
                }
            }
            for depth in DEPTHS {
                rows.add(layers, depth, &ours, &theirs);
            }
        }
        Ok((rows.table, json!({ "rows": rows.figures })))
    })
}

/// What one run of fio found.
struct Rate {
    depth: usize,
    iops: f64,
    p99_us: f64,
}

/// One run at each depth. The server has read all of the disk before.
fn rates(server: &mut Server) -> Result<Vec<Rate>> {
    let mut found = Vec::new();
    server.export(|uri| {
        let copied = Command::new("nbdcopy").args([uri, "null:"]).status().context("nbdcopy")?;
        if !copied.success() {
            return Err(Error::new(format!("nbdcopy: {copied}")));
        }
        for depth in DEPTHS {
            found.push(random_reads(uri, depth)?);
        }
        Ok(())
    })?;
    Ok(found)
}

fn random_reads(uri: &str, depth: usize) -> Result<Rate> {
    let mut fio = Command::new("fio");
    fio.args(["--name=reads", "--ioengine=nbd", "--rw=randread", "--bs=4k", "--time_based", "--runtime=1"]);
    fio.args([format!("--uri={uri}"), format!("--iodepth={depth}"), format!("--size={DISK_BYTES}")]);
    let output = fio.args(["--randseed=7", "--output-format=json"]).output().context("fio")?;
    if !output.status.success() {
        return Err(Error::new(format!("fio: {}", String::from_utf8_lossy(&output.stderr))));
    }
    // Notes may come before it.
    let begin = output.stdout.iter().position(|byte| *byte == b'{').unwrap_or(0);
    let told: Value = serde_json::from_slice(output.stdout.get(begin..).unwrap_or_default())?;
    let number = |at: &str| {
        let number = told.pointer(&format!("/jobs/0/read/{at}")).and_then(Value::as_f64);
        number.ok_or_else(|| Error::new(format!("fio does not tell {at}")))
    };
    Ok(Rate { depth, iops: number("iops")?, p99_us: number("clat_ns/percentile/99.000000")? / 1e3 })
}

fn header() -> Table {
    table(["OVERLAYS", "IN FLIGHT", "FRAZIL /s", "P99 µs", "QEMU-STORAGE-DAEMON /s", "P99 µs", "RATIO"])
}

struct Rows {
    table: Table,
    figures: Vec<Value>,
}

impl Rows {
    fn add(&mut self, layers: usize, depth: usize, ours: &[Rate], theirs: &[Rate]) {
        let of = |rates: &[Rate], figure: fn(&Rate) -> f64| {
            median(rates.iter().filter(|rate| rate.depth == depth).map(figure))
        };
        let iops = [of(ours, |rate| rate.iops), of(theirs, |rate| rate.iops)];
        let p99 = [of(ours, |rate| rate.p99_us), of(theirs, |rate| rate.p99_us)];
        let ratio = iops[0] / iops[1];
        let told = |figure: f64| if figure.is_nan() { "-".to_owned() } else { format!("{figure:.0}") };
        let [ours, theirs] = iops.map(told);
        let [our_p99, their_p99] = p99.map(told);
        let ratio_told = if ratio.is_nan() { "-".to_owned() } else { format!("{ratio:.2}") };
        say(&format!("NBD, {layers} overlays, {depth} in flight: {ours}/s, theirs {theirs}/s"));
        self.table.add_row([
            layers.to_string(),
            depth.to_string(),
            ours,
            our_p99,
            theirs,
            their_p99,
            ratio_told,
        ]);
        self.figures.push(json!({ "overlays": layers, "in-flight": depth, "iops": iops, "p99-us": p99 }));
    }
}
