use std::sync::Weak;

use block::{blocking, read_disk, write_disk};
use hostio::HostFile;
use tempfile::TempDir;

use super::*;
use crate::backing::AllowedFolders;
use crate::model::ImageFormat;
use crate::store::Store;

const SIZE: u64 = 8 << 20;
const HOW: Opening = Opening::OFFLINE;

struct Bench {
    _folder: TempDir,
    store: Store,
    chain: Chain,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base.raw");
        HostFile::create(&base, Cache::Writeback).unwrap();
        std::fs::File::options().write(true).open(&base).unwrap().set_len(SIZE).unwrap();
        let store = Store::open(&folder.path().join("state"), AllowedFolders::default()).unwrap();
        store.declare("vda", &base, ImageFormat::Raw, HOW, false).unwrap();
        let layers = store.open_layers("vda", 1, HOW, Some(0)).unwrap();
        let chain = Chain::new("vda", false, WriteErrors::default(), layers).unwrap();
        Self { _folder: folder, store, chain }
    }

    /// What a cut does to a chain.
    fn cut(&self) {
        self.pivot();
        crate::group::seal(&self.store, &self.chain).unwrap();
    }

    /// The same without its seal.
    fn pivot(&self) {
        let (base, top) = {
            let layers = self.chain.layers();
            (Arc::clone(&layers[0]), Arc::clone(layers.last().unwrap()))
        };
        let overlay = self.store.create_overlay("vda", &base, &top, HOW).unwrap();
        let push = |manifest: &mut crate::manifest::Manifest| {
            manifest.push_layer("vda", &top.entry, &overlay.entry);
            Ok(())
        };
        self.store.update(push).unwrap();
        self.chain.pivot(overlay).unwrap();
    }

    fn stamp(&self, offset: u64, byte: u8) {
        write_disk(&self.chain, offset, &[byte; 4096]).unwrap();
    }

    fn bytes(&self) -> Vec<u8> {
        bytes(&self.chain)
    }
}

fn bytes(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.capacity() as usize];
    read_disk(disk, 0, &mut bytes).unwrap();
    bytes
}

#[test]
fn each_snapshot_of_a_long_chain_reads_as_the_disk_did() {
    let bench = Bench::new();
    let mut held = Vec::new();
    for round in 0..40_u64 {
        bench.stamp(round % 7 * 65536, round as u8 + 1);
        bench.stamp(round * 131_072 + 4096, round as u8 + 1);
        // Half of the cuts find the map filled, half of them do not.
        if round % 2 == 0 {
            bench.bytes();
        }
        held.push(bench.bytes());
        bench.cut();
    }
    assert!(bench.bytes() == *held.last().unwrap());
    let layers = bench.chain.layers().clone();
    for (layer, held) in layers.iter().zip(&held) {
        assert!(bytes(&*bench.chain.view(layer, HOW)) == *held, "{:?}", layer.entry);
    }
    // And the same if the chain is opened anew, all at once.
    drop(layers);
    bench.chain.flush().run().unwrap();
    bench.chain.detach();
    let layers = bench.store.open_layers("vda", 41, HOW, None).unwrap();
    for (layer, held) in layers.iter().zip(&held) {
        assert!(bytes(&layer.view(0)) == *held, "{:?}", layer.entry);
        assert!(bytes(&*layer.disk()) == *held, "an old view, by way of the map of all: {:?}", layer.entry);
    }
}

#[test]
fn a_chain_takes_over_other_layers_and_lets_go_of_the_old_ones() {
    let bench = Bench::new();
    bench.stamp(0, 1);
    bench.cut();
    bench.stamp(4096, 2);
    bench.cut();
    // Nothing is written into this one, so that the chain reads the same without it.
    bench.cut();
    bench.stamp(8192, 3);
    bench.cut();
    bench.stamp(65536, 4);
    let before = bench.bytes();
    let gone: Weak<Layer> = Arc::downgrade(&bench.chain.layers()[2]);
    let file = bench.chain.layers()[2].entry.path.clone();
    let mut layers = bench.chain.layers().clone();
    layers.remove(2);
    bench.chain.relayer(layers, HOW);

    assert!(bench.bytes() == before);
    assert!(gone.upgrade().is_none());
    // Nobody has it open, so its lock is free.
    HostFile::open(&file, hostio::Open { writable: true, cache: Cache::Writeback }).unwrap();
    bench.stamp(0, 5);
    bench.cut();
    let after = bench.bytes();
    assert!(after[4096..] == before[4096..] && after[..4096] == [5; 4096]);
}

/// A map names where the bytes are; room that a job gave back keeps them until the next job takes it.
#[test]
fn the_map_of_who_reads_a_snapshot_begins_anew_before_room_is_used_again() {
    use crate::layer::{Access, JOB_TABLE_BYTES};
    const CLUSTER: u64 = 128 << 10;
    let bench = Bench::new();
    bench.cut();
    write_disk(&bench.chain, 0, &[1; CLUSTER as usize]).unwrap();
    bench.cut();
    let layer = Arc::clone(&bench.chain.layers()[1]);
    let view = bench.chain.view(&layer, HOW);
    assert!(Arc::ptr_eq(&view, &bench.chain.view(&layer, HOW)), "all who read it share a map");
    let before = bytes(&*view);
    let job = |work: &dyn Fn(&dyn Disk)| {
        layer
            .begin_writing("vda", JOB_TABLE_BYTES, Access::Job { journals: bench.store.journals() })
            .unwrap();
        work(&*layer.disk());
        layer.seal();
        layer.flush().unwrap();
        bench.store.layer_sealed("vda", &layer).unwrap();
    };
    // The same bytes at another place.
    job(&|disk| {
        blocking(|waker| disk.discard(ByteRange { offset: 0, len: CLUSTER }, waker)).unwrap();
        write_disk(disk, 0, &[1; CLUSTER as usize]).unwrap();
    });
    let layers = bench.chain.layers().clone();
    bench.chain.relayer(layers, HOW);
    job(&|disk| {
        (1..8).for_each(|cluster| write_disk(disk, cluster * CLUSTER, &[2; CLUSTER as usize]).unwrap());
    });
    assert!(bytes(&*view)[..CLUSTER as usize] == before[..CLUSTER as usize]);
}

#[test]
fn a_chain_of_200_layers_is_made_opened_and_dropped() {
    let bench = Bench::new();
    hostio::raise_open_files().unwrap();
    for round in 0..200_u64 {
        bench.stamp(round % 2048 * 4096, round as u8);
        bench.cut();
    }
    let read = bench.bytes();
    assert!((0..200).all(|round| read[round * 4096] == round as u8));
    bench.chain.detach();
    let layers = bench.store.open_layers("vda", 201, HOW, None).unwrap();
    bench.chain.attach(layers).unwrap();
    assert!(bench.bytes() == read);
}

/// The seal of a cut and that of a job met: the second one took away the journal of the layer and its lock when a job had
/// begun to write to it.
#[test]
fn who_waits_to_seal_a_layer_finds_it_sealed_and_leaves_it_alone() {
    use crate::layer::{Access, JOB_TABLE_BYTES};
    let bench = Bench::new();
    bench.cut();
    bench.stamp(0, 1);
    bench.pivot();
    let layer = bench.chain.sealing().unwrap();
    let turn = bench.chain.turn_to_seal();
    std::thread::scope(|scope| {
        let second = scope.spawn(|| crate::group::seal(&bench.store, &bench.chain));
        // Time enough for it to do what it does without its turn.
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(bench.chain.sealing().is_some(), "it did not wait for its turn");
        layer.flush().unwrap();
        bench.store.layer_sealed("vda", &layer).unwrap();
        layer.settle("vda");
        bench.chain.sealed(&layer);
        let access = Access::Job { journals: bench.store.journals() };
        layer.begin_writing("vda", JOB_TABLE_BYTES, access).unwrap();
        write_disk(&*layer.disk(), 65536, &[2; 4096]).unwrap();
        drop(turn);
        second.join().unwrap().unwrap();
    });
    assert!(bench.store.file("journal/vda-000001.a").exists(), "the job's journal is gone");
    let reader = hostio::Open { writable: false, cache: Cache::Writeback };
    assert!(HostFile::open(&layer.entry.path, reader).is_err(), "others may read what a job writes");
}
