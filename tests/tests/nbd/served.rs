//! Exports served in this process, and programs that use them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use block::testing::MemStorage;
use block::{ByteRange, DirtyBitmap, Disk, Layer, RawDisk, Stack, Storage};
use hostio::{Cache, HostFile, Open};
use nbd::{Address, BitmapContext, Config, Export, Server};
use qcow2::{CreateOptions, Image, Journal, Mode, Parts};

pub(crate) const MIB: u64 = 1 << 20;
/// Bytes of the disks here.
pub(crate) const SIZE: u64 = 24 * MIB;

/// Runs a program; it must succeed. Returns what it printed.
pub(crate) fn run(command: &mut Command) -> String {
    let output = attempt(command);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed\n{text}{error}");
    text
}

/// Runs a program, whatever comes of it; one that hangs is ended.
pub(crate) fn attempt(command: &mut Command) -> Output {
    let mut timed = Command::new("timeout");
    timed.arg("60").arg(command.get_program()).args(command.get_args());
    // The distribution's Python has the distribution's libnbd.
    timed.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    timed.output().unwrap_or_else(|error| panic!("{command:?}: {error}; `make deps` installs what is needed"))
}

/// A server of one export, which has the empty name.
pub(crate) struct Served {
    _server: Server,
    socket: PathBuf,
    folder: tempfile::TempDir,
}

impl Served {
    pub(crate) fn new(export: Export) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("nbd");
        let server = Server::new(Config::default());
        server.listen(Address::Unix(socket.clone())).unwrap();
        server.add_export(export).unwrap();
        Self { _server: server, socket, folder }
    }

    /// How the programs name it.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The whole export, read by `nbdcopy`.
    pub(crate) fn copied(&self) -> Vec<u8> {
        let copy = self.path("copied");
        run(Command::new("nbdcopy").arg(self.uri()).arg(&copy));
        std::fs::read(copy).unwrap()
    }
}

/// A kind of export, and what it holds.
pub(crate) struct Content {
    pub(crate) kind: &'static str,
    pub(crate) export: Export,
    pub(crate) bytes: Vec<u8>,
}

fn open(path: &Path) -> Arc<HostFile> {
    Arc::new(HostFile::open(path, Open { writable: false, cache: Cache::Writeback }).unwrap())
}

fn image(path: &Path) -> Arc<dyn Layer> {
    Arc::new(Image::open(Parts::new(open(path), None), Mode::ReadOnly).unwrap())
}

fn qemu_img(folder: &Path, arguments: &str) {
    run(Command::new("sh").arg("-c").arg(format!("cd {} && qemu-img {arguments}", folder.display())));
}

fn qemu_io(folder: &Path, file: &str, commands: &[&str]) {
    let commands: String = commands.iter().map(|command| format!(" -c '{command}'")).collect();
    let script = format!("cd {} && qemu-io{commands} {file}", folder.display());
    run(Command::new("sh").arg("-c").arg(script));
}

/// A sparse raw file, `base.raw`, with data in two places.
fn base(folder: &Path) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    for (from, len) in [(MIB, 3 * MIB), (20 * MIB + 4096, 12_288)] {
        for (at, byte) in bytes[from as usize..(from + len) as usize].iter_mut().enumerate() {
            *byte = (at / 5 + at / 4096 + 1) as u8;
        }
    }
    std::fs::write(folder.join("dense"), &bytes).unwrap();
    qemu_img(folder, "convert -f raw -O raw dense base.raw");
    bytes
}

/// One export of each kind that there is: a raw file, compressed clusters, and a chain of three images.
pub(crate) fn contents(folder: &Path) -> Vec<Content> {
    let mut bytes = base(folder);
    let raw: Arc<dyn Layer> = Arc::new(RawDisk::new(open(&folder.join("base.raw")), true).unwrap());
    let mut all = vec![content("raw", vec![Arc::clone(&raw)], bytes.clone())];
    qemu_img(folder, "convert -c -f raw -O qcow2 base.raw packed.qcow2");
    all.push(content("compressed", vec![image(&folder.join("packed.qcow2"))], bytes.clone()));
    for (name, backing) in [("one.qcow2", "base.raw -F raw"), ("two.qcow2", "one.qcow2 -F qcow2")] {
        qemu_img(folder, &format!("create -q -f qcow2 -b {backing} {name}"));
    }
    qemu_io(folder, "one.qcow2", &["write -P 0x11 2M 64k", "write -z 3M 1M", "write -P 0x12 10M 128k"]);
    qemu_io(folder, "two.qcow2", &["write -P 0x21 10M 64k", "write -P 0x22 23M 1M"]);
    for (from, len, fill) in [
        (2 * MIB, 65_536, 0x11),
        (3 * MIB, MIB, 0),
        (10 * MIB, 131_072, 0x12),
        (10 * MIB, 65_536, 0x21),
        (23 * MIB, MIB, 0x22),
    ] {
        bytes[from as usize..(from + len) as usize].fill(fill);
    }
    let layers = vec![raw, image(&folder.join("one.qcow2")), image(&folder.join("two.qcow2"))];
    all.push(content("chain", layers, bytes));
    all
}

fn content(kind: &'static str, layers: Vec<Arc<dyn Layer>>, bytes: Vec<u8>) -> Content {
    let disk: Arc<dyn Disk> = Arc::new(Stack::new(layers.clone(), 0));
    let bitmap = Arc::new(DirtyBitmap::new(SIZE, 16).unwrap());
    bitmap.mark(ByteRange { offset: 2 * MIB, len: 65_536 });
    bitmap.mark(ByteRange { offset: 23 * MIB, len: MIB });
    let export = Export::new("", disk)
        .description(kind)
        .layers(layers, true)
        .context(Arc::new(BitmapContext::new("changed", bitmap)));
    Content { kind, export, bytes }
}

/// A writable overlay over the chain, as throw-away overlays are made.
pub(crate) fn overlay(folder: &Path) -> Content {
    let chain = contents(folder).remove(2);
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::new(0));
    qcow2::create(&*storage, &CreateOptions::overlay(SIZE, None)).unwrap();
    let memory = || -> Arc<dyn Storage> { Arc::new(MemStorage::new(0)) };
    let journal = Journal::create(memory(), memory(), "boot").unwrap();
    let layers = ["one.qcow2", "two.qcow2"].map(|name| image(&folder.join(name)));
    let raw: Arc<dyn Layer> = Arc::new(RawDisk::new(open(&folder.join("base.raw")), true).unwrap());
    let mut layers: Vec<_> = std::iter::once(raw).chain(layers).collect();
    let below: Arc<dyn Disk> = Arc::new(Stack::new(layers.clone(), 0));
    let top = Arc::new(Image::open(Parts::new(storage, Some(below)), Mode::Writable(journal)).unwrap());
    layers.push(Arc::clone(&top) as _);
    let export = Export::new("", top).layers(layers, true).writable();
    Content { kind: "overlay", export, bytes: chain.bytes }
}
