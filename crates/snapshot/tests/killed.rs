//! Jobs whose process is killed at a certain place, most of which no real kill would hit: what it leaves is put together from
//! what was there before and after.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step of a test ends it")]

mod bench;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use block::read_disk;
use serde_json::{Value, json};
use snapshot::{CommitRequest, JobOptions, JobStatus, JobVerb, Manager, StreamRequest};

use bench::{Bench, SIZE, chain, check, delete, finish, snapshot, stamp};

/// The files of a folder and of all in it, as a kill leaves them.
type Files = BTreeMap<PathBuf, Vec<u8>>;

fn save(folder: &Path) -> Files {
    let mut files = Files::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(save(&path)),
            false => drop(files.insert(path.clone(), std::fs::read(&path).unwrap())),
        }
    }
    files
}

/// Puts the files there, and no other ones.
fn restore(folder: &Path, files: &Files) {
    save(folder).keys().for_each(|path| std::fs::remove_file(path).unwrap());
    files.iter().for_each(|(path, bytes)| std::fs::write(path, bytes).unwrap());
}

fn content(manager: &Manager) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    read_disk(&**chain(manager, "vda"), 0, &mut bytes).unwrap();
    bytes
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Commit,
    Stream,
}

impl Way {
    /// Merges all above the lowest layer, the active one as well; the job's id.
    fn begin(self, manager: &Manager) -> String {
        let nodes = manager.disks().remove(0).layers;
        let (device, options) =
            ("vda".to_owned(), JobOptions { speed: 65536, auto_dismiss: false, ..JobOptions::default() });
        match self {
            Self::Commit => {
                let base_node = Some(nodes[1].node_name.clone());
                manager
                    .commit(CommitRequest {
                        device,
                        base_node,
                        options,
                        auto_complete: true,
                        ..CommitRequest::default()
                    })
                    .unwrap()
            }
            Self::Stream => {
                let base_node = Some(nodes[0].node_name.clone());
                manager
                    .stream(StreamRequest { device, base_node, options, ..StreamRequest::default() })
                    .unwrap()
            }
        }
    }
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What a job was killed over: the files at several of its places.
struct Story {
    bench: Bench,
    disk: Vec<u8>,
    snapshot: Vec<u8>,
    /// It waits for a cut that is held: nothing is written.
    begun: Files,
    /// Some is copied.
    midway: Files,
    /// It is over.
    over: Files,
}

impl Story {
    fn tell(way: Way) -> Self {
        let bench = Bench::new(&["vda"]);
        let manager = bench.open();
        chain(&manager, "vda").set_connected(true);
        stamp(&manager, "vda", 0, 1);
        snapshot(&manager, "kept");
        (0..8).for_each(|place| stamp(&manager, "vda", (place << 20) + 4096, 2));
        snapshot(&manager, "gone");
        (0..8).for_each(|place| stamp(&manager, "vda", (place << 20) + 8192, 3));
        delete(&manager, "gone").unwrap();
        (0..8).for_each(|place| stamp(&manager, "vda", (place << 20) + 65536, 4));
        assert_eq!(manager.disks()[0].layers.len(), 3);

        manager.prepare(bench::request("held"), Duration::from_secs(20)).unwrap();
        let id = way.begin(&manager);
        let job = || manager.jobs().into_iter().find(|job| job.id == id).unwrap();
        wait_for("it does not begin", || job().status == JobStatus::Running);
        let begun = save(bench.folder.path());
        manager.abort("held").unwrap();

        wait_for("it copies nothing", || job().current_progress > 0);
        manager.ask_job(&id, JobVerb::Pause).unwrap();
        wait_for("it does not pause", || job().status == JobStatus::Paused);
        assert!(job().current_progress < job().total_progress, "{:?}", job());
        // In the new active layer, so that it is not empty.
        stamp(&manager, "vda", 7 << 20, 5);
        let midway = save(bench.folder.path());
        let disk = content(&manager);
        manager.set_job_speed(&id, 0).unwrap();
        manager.ask_job(&id, JobVerb::Resume).unwrap();
        finish(&manager, &id).unwrap();
        let (over, snapshot) = (save(bench.folder.path()), bench.export(&manager, "kept", "vda"));
        assert!(content(&manager) == disk);
        drop(manager);
        Self { bench, disk, snapshot, begun, midway, over }
    }

    fn manifest(&self) -> PathBuf {
        self.bench.path("state/manifest.json")
    }

    /// The end, with the images that left the chain still there.
    fn with_all_images(&self) -> Files {
        let is_image = |path: &Path| path.parent() == Some(self.bench.folder.path());
        let mut files = self.over.clone();
        for (path, bytes) in self.midway.iter().filter(|(path, _)| is_image(path)) {
            files.entry(path.clone()).or_insert_with(|| bytes.clone());
        }
        assert_eq!(files.len(), self.over.len() + 1, "one image left the chain");
        files
    }

    /// The headers say what the manifest does not.
    fn at_the_switch(&self) -> Files {
        let mut files = self.with_all_images();
        files.insert(self.manifest(), self.midway[&self.manifest()].clone());
        files
    }

    /// The manifest is written, and the image is still there that it does not name.
    fn after_the_switch(&self) -> Files {
        let [before, mut after] = [&self.midway, &self.over]
            .map(|files| serde_json::from_slice::<Value>(&files[&self.manifest()]).unwrap());
        let layers = |manifest: &Value| manifest["disks"]["vda"]["layers"].as_array().unwrap().clone();
        let left = layers(&after);
        let is_gone = |layer: &&Value| !left.iter().any(|other| other["number"] == layer["number"]);
        let gone = layers(&before).iter().find(is_gone).unwrap().clone();
        after["unused"] = json!([{ "disk": "vda", "layer": gone }]);
        let mut files = self.with_all_images();
        files.insert(self.manifest(), after.to_string().into_bytes());
        files
    }

    /// The next run ends it, and all reads as it did.
    fn go_on(&self, place: &str, files: &Files, disk: &[u8]) {
        restore(self.bench.folder.path(), files);
        let manager = self.bench.open();
        chain(&manager, "vda").set_connected(true);
        assert!(content(&manager) == *disk, "{place}: the disk has changed");
        for job in manager.jobs().iter().filter(|job| job.status != JobStatus::Concluded) {
            // It is as slow as it was, and may have ended meanwhile.
            let _ =
                manager.set_job_speed(&job.id, 0).and_then(|()| manager.ask_job(&job.id, JobVerb::Resume));
            finish(&manager, &job.id).unwrap_or_else(|error| panic!("{place}: {error}"));
        }
        assert!(content(&manager) == *disk, "{place}: the disk has changed in the end");
        assert!(
            self.bench.export(&manager, "kept", "vda") == self.snapshot,
            "{place}: the snapshot has changed"
        );
        let layers = manager.disks().remove(0).layers;
        assert!(layers.len() <= 4, "{place}: {layers:?}");
        stamp(&manager, "vda", 12288, 9);
        manager.shut_down().unwrap();
        let named: BTreeSet<_> = layers.iter().map(|layer| layer.path.clone()).collect();
        let found = std::fs::read_dir(self.bench.folder.path()).unwrap().map(|entry| entry.unwrap().path());
        let found: BTreeSet<_> = found.filter(|path| path.is_file()).collect();
        assert_eq!(found, named, "{place}");
        drop(manager);
        named
            .iter()
            .filter(|path| path.extension().is_some_and(|end| end == "qcow2"))
            .for_each(|path| check(path));
        assert_eq!(bench::byte(&self.bench.open(), "vda", 12288), 9, "{place}");
    }
}

fn story(way: Way) {
    let story = Story::tell(way);
    let mut before = story.disk.clone();
    before[7 << 20..][..4096].fill(0);
    story.go_on("it had just begun", &story.begun, &before);
    story.go_on("in the midst", &story.midway, &story.disk);
    story.go_on("at the switch", &story.at_the_switch(), &story.disk);
    story.go_on("after the switch", &story.after_the_switch(), &story.disk);
    story.go_on("at the end", &story.over, &story.disk);
}

#[test]
fn a_commit_that_is_killed_anywhere_goes_on() {
    story(Way::Commit);
}

#[test]
fn a_stream_that_is_killed_anywhere_goes_on() {
    story(Way::Stream);
}
