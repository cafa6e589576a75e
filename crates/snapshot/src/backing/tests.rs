use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use block::{Disk, read_disk};
use qcow2::CreateOptions;
use tempfile::TempDir;

use super::*;

const SIZE: u64 = 1 << 20;

struct Bench(TempDir);

impl Bench {
    /// Two folders, `images` and `elsewhere`.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["images", "elsewhere"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn raw(&self, name: &str, byte: u8) {
        std::fs::write(self.path(name), vec![byte; SIZE as usize]).unwrap();
    }

    /// An image that names `backing`, empty.
    fn qcow2(&self, name: &str, backing: &str, format: &str) {
        let path = self.path(name);
        let _ = std::fs::remove_file(&path);
        let file = HostFile::create(&path, Cache::Writeback).unwrap();
        let options = CreateOptions::overlay(SIZE, Some((backing.to_owned(), format.to_owned())));
        qcow2::create(&file, &options).unwrap();
    }

    fn open(&self, base: &str, allowed: &[&str]) -> Result<Vec<Arc<dyn Layer>>> {
        let path = self.path(base);
        let file = HostFile::open(&path, Open { writable: false, cache: Cache::Writeback })?;
        let allowed: Vec<_> = allowed.iter().map(|name| self.path(name)).collect();
        let how = Open { writable: false, cache: Cache::Writeback };
        open_named(&path, &file, &AllowedFolders::new(&allowed)?, how).map(|named| named.layers)
    }

    /// The first byte of what is beneath the base.
    fn byte(&self, base: &str, allowed: &[&str]) -> u8 {
        let stack = Stack::new(self.open(base, allowed).unwrap(), 1 << 20);
        assert_eq!(stack.capacity(), SIZE);
        let mut byte = [0];
        read_disk(&stack, 0, &mut byte).unwrap();
        byte[0]
    }

    /// Why the base is refused, which is found out at once.
    fn refusal(&self, base: &str, allowed: &[&str]) -> Error {
        let begun = Instant::now();
        let error = self.open(base, allowed).err().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(1));
        assert!(error.to_string().contains(" file '"), "whose it is is not told: {error}");
        error
    }
}

#[test]
fn a_chain_is_found_below_the_folder_of_each_image() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("images/old")).unwrap();
    bench.raw("images/old/a.raw", 7);
    bench.qcow2("images/old/b.qcow2", "a.raw", "raw");
    bench.qcow2("images/c.qcow2", "old/b.qcow2", "qcow2");
    bench.qcow2("images/d.qcow2", bench.path("images/c.qcow2").to_str().unwrap(), "qcow2");
    assert_eq!(bench.open("images/d.qcow2", &[]).unwrap().len(), 3);
    assert_eq!(bench.byte("images/d.qcow2", &[]), 7);
    // With a colon after a slash it is a plain name.
    std::fs::rename(bench.path("images/old/a.raw"), bench.path("images/old/a:1")).unwrap();
    bench.qcow2("images/old/b.qcow2", "./a:1", "raw");
    assert_eq!(bench.byte("images/d.qcow2", &[]), 7);
}

#[test]
fn what_lies_elsewhere_is_refused_unless_its_folder_is_allowed() {
    let bench = Bench::new();
    bench.raw("elsewhere/a.raw", 7);
    symlink(bench.path("elsewhere/a.raw"), bench.path("images/link.raw")).unwrap();
    symlink(bench.path("elsewhere"), bench.path("images/folder")).unwrap();
    // The name of one begins as that of the other, and it is another folder all the same.
    std::fs::create_dir(bench.path("elsewhere2")).unwrap();
    bench.raw("elsewhere2/a.raw", 8);
    let absolute = bench.path("elsewhere/a.raw");
    for name in ["../elsewhere/a.raw", absolute.to_str().unwrap(), "link.raw", "folder/a.raw"] {
        bench.qcow2("images/base.qcow2", name, "raw");
        let error = bench.refusal("images/base.qcow2", &[]);
        assert!(error.to_string().contains("allow-folder"), "{name}: {error}");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        bench.refusal("images/base.qcow2", &["images"]);
        bench.refusal("images/base.qcow2", &["elsewhere2"]);
        assert_eq!(bench.byte("images/base.qcow2", &["images", "elsewhere"]), 7, "{name}");
        assert_eq!(bench.byte("images/base.qcow2", &["images/folder"]), 7, "an allowed link is followed");
        assert_eq!(bench.byte("images/base.qcow2", &["elsewhere/a.raw"]), 7, "a single file can be allowed");
    }
    // What the operator allows takes the place of the image's own folder.
    bench.raw("images/b.raw", 9);
    bench.qcow2("images/base.qcow2", "b.raw", "raw");
    bench.refusal("images/base.qcow2", &["elsewhere"]);
    assert_eq!(AllowedFolders::new(&[bench.path("none")]).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn an_image_beneath_is_judged_by_its_own_folder_and_not_by_that_of_a_link() {
    let bench = Bench::new();
    bench.raw("elsewhere/a.raw", 7);
    bench.qcow2("elsewhere/b.qcow2", "a.raw", "raw");
    symlink(bench.path("elsewhere/b.qcow2"), bench.path("images/b.qcow2")).unwrap();
    bench.qcow2("images/base.qcow2", "b.qcow2", "qcow2");
    assert_eq!(bench.byte("images/base.qcow2", &["elsewhere"]), 7);
}

#[test]
fn names_that_are_no_files_are_refused() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("images/folder")).unwrap();
    let mknod = |name, kind, device| {
        rustix::fs::mknodat(rustix::fs::CWD, bench.path(name), kind, 0o600.into(), device)
    };
    mknod("images/fifo", rustix::fs::FileType::Fifo, 0).unwrap();
    std::os::unix::net::UnixListener::bind(bench.path("images/socket")).unwrap();
    let table = [
        ("json:{\"driver\":\"null-co\"}", "protocol"),
        ("nbd://localhost/x", "protocol"),
        ("file:a.raw", "protocol"),
        ("fifo", "a FIFO"),
        ("folder", "a directory"),
        ("socket", "neither a regular file"),
        ("missing", "No such file"),
    ];
    for (name, why) in table {
        bench.qcow2("images/base.qcow2", name, "raw");
        let error = bench.refusal("images/base.qcow2", &[]);
        assert!(error.to_string().contains(why) && error.to_string().contains(name), "{name}: {error}");
    }
    bench.qcow2("images/base.qcow2", "/dev/zero", "raw");
    let folders = AllowedFolders::new(&["/dev".into()]).unwrap();
    let error = folders.find(&bench.path("images/base.qcow2"), "/dev/zero").err().unwrap();
    assert!(error.to_string().contains("character device"), "{error}");
}

#[test]
#[ignore = "needs root, to make a device node"]
fn a_block_device_has_to_be_allowed_by_name() {
    let bench = Bench::new();
    let node = bench.path("images/device");
    // The first loop device, which is never opened here.
    let number = rustix::fs::makedev(7, 0);
    rustix::fs::mknodat(rustix::fs::CWD, &node, rustix::fs::FileType::BlockDevice, 0o600.into(), number)
        .unwrap();
    let by = bench.path("images/base.qcow2");
    let error = AllowedFolders::default().find(&by, "device").err().unwrap();
    assert!(error.to_string().contains("block device"), "{error}");
    AllowedFolders::new(&[bench.path("images")]).unwrap().find(&by, "device").unwrap();
}

#[test]
fn the_format_has_to_be_stated() {
    assert!(format_of(Some("vmdk")).err().unwrap().to_string().contains("'vmdk'"));
    assert!(format_of(None).err().unwrap().to_string().contains("qemu-img rebase"));
}

#[test]
fn a_loop_is_found_by_whatever_name_it_is_closed() {
    let bench = Bench::new();
    bench.qcow2("images/a.qcow2", "c.qcow2", "qcow2");
    bench.qcow2("images/b.qcow2", "a.qcow2", "qcow2");
    symlink("b.qcow2", bench.path("images/c.qcow2")).unwrap();
    let error = bench.refusal("images/b.qcow2", &[]);
    assert!(error.to_string().contains("a loop"), "{error}");
    bench.qcow2("images/self.qcow2", "../images/self.qcow2", "qcow2");
    assert!(bench.refusal("images/self.qcow2", &[]).to_string().contains("a loop"));
}

fn qemu_img(words: &[&str]) {
    let status = std::process::Command::new("qemu-img").args(words).status();
    assert!(status.expect("qemu-img is needed: run `make deps`").success(), "{words:?}");
}

#[test]
fn data_files_are_judged_as_backing_files_are() {
    let bench = Bench::new();
    let (image, data) = (bench.path("images/base.qcow2"), bench.path("elsewhere/data.raw"));
    let options = format!("data_file={}", data.display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, image.to_str().unwrap(), "1M"]);
    let named = |allowed: &[PathBuf], writable| {
        let how = Open { writable, cache: Cache::Writeback };
        let file = HostFile::open(&image, how)?;
        open_named(&image, &file, &AllowedFolders::new(allowed)?, how).map(|named| named.data_file.is_some())
    };
    let error = named(&[], false).unwrap_err();
    assert!(error.to_string().contains(": its data file '"), "{error}");
    let both = [bench.path("images"), bench.path("elsewhere")];
    assert!(named(&both, false).unwrap());
    assert!(named(&both, true).unwrap());
    // Beneath another image it is opened as well, and read.
    bench.qcow2("images/top.qcow2", "base.qcow2", "qcow2");
    assert_eq!(bench.byte("images/top.qcow2", &["images", "elsewhere"]), 0);
    // Two images can not have their data in one file.
    let path = bench.path("images/other.qcow2");
    let beneath = format!(
        "data_file={},data_file_raw=off,backing_file={},backing_fmt=qcow2",
        data.display(),
        image.display()
    );
    std::fs::rename(&data, bench.path("elsewhere/kept")).unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &beneath, path.to_str().unwrap(), "1M"]);
    let error = bench.refusal("images/other.qcow2", &["images", "elsewhere"]);
    assert!(error.to_string().contains("a loop"), "{error}");
}
