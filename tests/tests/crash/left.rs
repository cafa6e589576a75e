//! What a loss of power left: opened and judged, by QEMU and by us.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block::testing::{FaultStorage, MemStorage};
use block::{Disk, Layer, RawDisk, Stack, Storage, read_disk, write_disk};
use qcow2::{Image, Journal, Mode, Parts};
use serde_json::json;

/// Bytes of tables that may be kept in memory: few, so that they come and go.
pub(crate) const CACHE: u64 = 64 << 10;

/// One image's file after a loss of power.
pub(crate) struct Left {
    pub(crate) number: u32,
    pub(crate) raw: bool,
    pub(crate) bytes: MemStorage,
}

/// `qemu-img check` of images, each judged once.
#[derive(Default)]
pub(crate) struct Judge {
    known: HashMap<u64, Option<String>>,
}

impl Judge {
    /// What is wrong with the image, leaks aside.
    fn verdict(&mut self, folder: &Path, bytes: &[u8]) -> Option<String> {
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        self.known.entry(hasher.finish()).or_insert_with(|| check(folder, bytes)).clone()
    }
}

/// `qemu-img check` ends with 0 if all is well and with 3 if clusters leaked.
fn check(folder: &Path, bytes: &[u8]) -> Option<String> {
    let path = folder.join("left.qcow2");
    std::fs::write(&path, bytes).unwrap();
    // By itself: what it is based on need not be there under that name.
    let alone = json!({ "driver": "qcow2", "file": { "driver": "file", "filename": path }, "backing": null });
    let checked = Command::new("qemu-img").args(["check", &format!("json:{alone}")]).output().unwrap();
    match checked.status.code() {
        Some(0 | 3) => None,
        _ => Some(format!("{checked:?}")),
    }
}

/// The contents of a chain, and of the layers that are asked for as well: what each shows with all that is beneath it.
///
/// The top is opened for writing as the daemon would on another boot, and written to.
pub(crate) fn inspect(
    judge: &mut Judge,
    folder: &Path,
    chain: Vec<Left>,
    shown: &[u32],
) -> Result<(Vec<u8>, Vec<Vec<u8>>), String> {
    for image in chain.iter().filter(|image| !image.raw) {
        if let Some(wrong) = judge.verdict(folder, &image.bytes.bytes()) {
            return Err(format!("image {}: {wrong}", image.number));
        }
    }
    let mut beneath: Vec<Arc<dyn Layer>> = Vec::new();
    let mut contents = HashMap::new();
    let count = chain.len();
    for (index, image) in chain.into_iter().enumerate() {
        let number = image.number;
        if index + 1 == count {
            let top = open_top(image, &beneath).map_err(|error| format!("the top: {error}"))?;
            let bytes = read_all(&*top)?;
            write_on(&*top).map_err(|error| format!("write on: {error}"))?;
            let others = shown.iter().map(|number| contents.remove(number).unwrap_or_else(|| bytes.clone()));
            let others = others.collect();
            return Ok((bytes, others));
        }
        beneath.push(open_layer(image).map_err(|error| format!("image {number}: {error}"))?);
        if shown.contains(&number) {
            contents.insert(number, read_all(&Stack::new(beneath.clone(), CACHE))?);
        }
    }
    Err("the manifest names no image".to_owned())
}

fn open_layer(image: Left) -> block::Result<Arc<dyn Layer>> {
    let storage: Arc<dyn Storage> = Arc::new(image.bytes);
    match image.raw {
        true => Ok(Arc::new(RawDisk::new(storage, true)?)),
        false => Ok(Arc::new(Image::open(parts(storage, None), Mode::ReadOnly)?)),
    }
}

fn open_top(image: Left, beneath: &[Arc<dyn Layer>]) -> block::Result<Arc<dyn Disk>> {
    let storage: Arc<dyn Storage> = Arc::new(image.bytes);
    if image.raw {
        return Ok(Arc::new(RawDisk::new(storage, false)?));
    }
    let memory = || Arc::new(FaultStorage::new(MemStorage::default()));
    let journal = Journal::open(memory(), memory(), "the next boot")?;
    let backing = (!beneath.is_empty()).then(|| Arc::new(Stack::new(beneath.to_vec(), CACHE)));
    Ok(Arc::new(Image::open(parts(storage, backing), Mode::Writable(journal))?))
}

/// An image over these layers.
pub(crate) fn parts(storage: Arc<dyn Storage>, backing: Option<Arc<Stack>>) -> Parts {
    let backing = backing.map(|stack| stack as Arc<dyn Disk>);
    Parts { storage, data_file: None, backing, cache_bytes: CACHE }
}

fn read_all(disk: &dyn Disk) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; disk.capacity() as usize];
    read_disk(disk, 0, &mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

fn write_on(disk: &dyn Disk) -> block::Result<()> {
    write_disk(disk, 70_000, &[1; 9000])?;
    disk.flush().run()
}
