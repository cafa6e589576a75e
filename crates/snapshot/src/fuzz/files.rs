//! The files of a state directory, as the next start may find them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use block::testing::Input;
use block::{ByteRange, ErrorKind};
use serde_json::Value;

use crate::backing::AllowedFolders;
use crate::cut::Debts;
use crate::debts::DebtFile;
use crate::jobs;
use crate::manifest::{DiskEntry, Manifest, Unsealed};
use crate::marks::{Boundary, read_bits};
use crate::model::Timing;
use crate::store::Store;

/// A folder that goes away, in memory where there is such a place.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let shared = Path::new("/dev/shm");
        let root = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = root.join(format!("frazil-fuzz-{}-{number}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A manifest is refused as damaged, and then nothing is touched; or whatever it says can be asked about, is written as it
/// was read, and opens a second time as it did the first. A debt is one whatever its file holds.
pub fn state(data: &[u8]) {
    let parsed = Manifest::parse(data);
    if let Ok(manifest) = &parsed {
        let said: Value = serde_json::from_slice(data).unwrap();
        assert!(said["version"] == 1 && said["disks"].as_object().unwrap().values().all(is_possible));
        let written = serde_json::to_vec(manifest).unwrap();
        assert_eq!(untimed(&Manifest::parse(&written).unwrap()), untimed(manifest));
        ask(manifest);
    }
    // Images that are not needed are removed at the start, wherever they are: not here.
    if parsed.as_ref().is_ok_and(|manifest| !manifest.unused.is_empty()) {
        return;
    }
    let folder = Folder::new();
    let path = folder.0.join("manifest.json");
    fs::write(&path, data).unwrap();
    fs::write(folder.0.join("thaw-owed.json"), data).unwrap();
    assert!(DebtFile(folder.0.join("thaw-owed.json")).is_recorded().unwrap());
    let open = || Store::open(&folder.0, AllowedFolders::default());
    match open() {
        Ok(store) => {
            let settled = store.manifest().clone();
            let known = parsed.unwrap();
            assert_eq!(settled.disks.keys().collect::<Vec<_>>(), known.disks.keys().collect::<Vec<_>>());
            // What was not sealed was written in another boot, if in any.
            let kept = known.snapshots.iter().filter(|one| one.sealed || known.boot_id == settled.boot_id);
            assert!(settled.pending.is_none() && settled.snapshots.iter().eq(kept));
            assert_eq!(settled.boot_id, hostio::boot_id().unwrap());
            let bitmaps = settled.disks.values().flat_map(|disk| &disk.marks.bitmaps);
            assert!(bitmaps.into_iter().all(|bitmap| bitmap.persistent));
            drop(store);
            assert_eq!(untimed(&open().unwrap().manifest()), untimed(&settled));
        }
        Err(error) => {
            assert_eq!((error.kind(), parsed.is_err()), (ErrorKind::Corrupt, true), "{error}");
            assert!(fs::read(&path).unwrap() == data, "what is damaged was written over");
        }
    }
}

/// Whether a disk's numbers are such as can come about: layers one above the other, each merged into the next below it at the
/// most, and nothing of an instant that is yet to come.
fn is_possible(disk: &Value) -> bool {
    let next = disk["next"].as_u64().unwrap();
    let layers = disk["layers"].as_array().unwrap();
    let numbers: Vec<_> = layers.iter().map(|layer| layer["number"].as_u64().unwrap()).collect();
    let merged =
        |layer: &Value, number| layer["merged"].as_u64().is_none_or(|to| (number..next).contains(&to));
    let list = |name: &str| disk["marks"]["history"][name].as_array().cloned().unwrap_or_default();
    let span = |of: &Value, from: &str, to: &str| of[from].as_u64().unwrap()..of[to].as_u64().unwrap();
    let folded = list("folded").iter().all(|of| {
        let span = span(of, "from", "to");
        !span.is_empty() && span.end <= next
    });
    let reverts = list("reverts").iter().all(|of| {
        let span = span(of, "to", "at");
        span.start <= span.end && span.end < next
    });
    numbers.is_sorted_by(|low, high| low < high)
        && numbers.last().is_some_and(|last| *last < next)
        && layers.iter().zip(&numbers).all(|(layer, number)| merged(layer, *number))
        && folded
        && reverts
}

/// Without the times that steps took: their last digit may be another one when it is read again.
fn untimed(manifest: &Manifest) -> Manifest {
    let mut manifest = manifest.clone();
    manifest.snapshots.iter_mut().for_each(|snapshot| snapshot.timing = Timing::default());
    manifest
}

/// All that a daemon asks about at its start, and when a job goes on.
fn ask(manifest: &Manifest) {
    let mut changed = manifest.clone();
    for (id, disk) in &manifest.disks {
        let (points, numbers) = (manifest.points(id), disk.numbers());
        let _ = (disk.given(), jobs::tidy(manifest, id), manifest.snapshots_from(id, 1));
        for layer in &disk.layers {
            let _ = manifest.must_not_go_on(id, layer);
            assert!(layer.boundary() > layer.number);
        }
        ask_history(disk, &numbers, &points);
        for snapshot in &manifest.snapshots {
            let _ = (manifest.layer_of(&snapshot.name, id), manifest.intact(&snapshot.name));
        }
        let last = disk.layers.last().unwrap();
        let _ = changed.mark_sealed(&[Unsealed { disk: id, from: Some(last.number), failed: Vec::new() }]);
        if let [low, high, ..] = &disk.layers[..] {
            changed.merge_down(id, high, low);
            changed.remove_layer(id, high);
        }
    }
    for job in &manifest.jobs {
        let _ = (jobs::plan(manifest, &job.task), jobs::replan(manifest, &job.moves, &job.task));
    }
    changed.prune_marks();
    let numbers = |manifest: &Manifest| manifest.bits_files();
    assert!(numbers(&changed).is_subset(&numbers(manifest)));
}

fn ask_history(disk: &DiskEntry, numbers: &[u32], points: &BTreeSet<Boundary>) {
    let history = &disk.marks.history;
    let some: Vec<_> = points.iter().copied().take(4).chain([0, u32::MAX]).collect();
    for from in &some {
        for to in &some {
            let cover = history.between(numbers, *from, *to);
            assert!(cover.layers.iter().all(|number| numbers.contains(number)));
            assert!(from != to || (cover.layers.is_empty() && cover.bits.is_empty()));
        }
    }
    for pair in numbers.windows(2) {
        let _ = history.pieces_of_merge(pair, numbers, points);
    }
    let _ = history.pieces(numbers, numbers, points);
}

/// A file of changes is what was written, by a plain reading of its format, or is refused.
pub fn bits(data: &[u8]) {
    let mut input = Input(data);
    let (mode, mut bytes) = (input.byte(), input.0.to_vec());
    if mode % 2 == 1 {
        // Sealed: else none would ever be looked into.
        bytes.extend(crc32fast::hash(&bytes).to_be_bytes());
    }
    let folder = Folder::new();
    let path = folder.0.join("0.bits");
    fs::write(&path, &bytes).unwrap();
    let plain = plain(&bytes);
    match read_bits(&path) {
        Ok(found) => {
            let (capacity, granularity, granules) = plain.expect("the model refuses what is accepted");
            assert_eq!((found.capacity(), found.granularity_bits()), (capacity, granularity));
            let is_marked = |granule: u64| {
                let range = ByteRange { offset: granule << granularity, len: 1 };
                found.next_dirty(range).is_some()
            };
            let count = capacity.div_ceil(1 << granularity);
            assert!((0..count).filter(|granule| is_marked(*granule)).eq(granules));
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(plain.is_none(), "the model accepts what is refused: {error}");
        }
    }
}

/// Bytes of the disk, log2 of those of a granule, and the granules that are marked.
fn plain(bytes: &[u8]) -> Option<(u64, u32, Vec<u64>)> {
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    let (header, map) = body.split_at_checked(24)?;
    let capacity = u64::from_be_bytes(header[8..16].try_into().unwrap());
    let granularity = u32::from_be_bytes(header[16..20].try_into().unwrap());
    let known = header.starts_with(b"FRAZILM1") && (9..=31).contains(&granularity);
    let granules = known.then(|| capacity.div_ceil(1 << granularity))?;
    let sound = map.len() as u64 == granules.div_ceil(8) && crc32fast::hash(body) == u32::from_be_bytes(*crc);
    let marked = |granule: &u64| map[(granule / 8) as usize] >> (granule % 8) & 1 == 1;
    sound.then(|| (capacity, granularity, (0..granules).filter(marked).collect()))
}
