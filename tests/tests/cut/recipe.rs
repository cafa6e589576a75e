//! Random images, made by `qemu-img` and `qemu-io` with all their options.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::images::qemu_img;
use block::testing::Random;

/// How an image is made: options of `qemu-img create`, what is beneath, and commands of `qemu-io`.
#[derive(Debug)]
pub(crate) struct Recipe {
    bytes: u64,
    options: Vec<String>,
    has_data_file: bool,
    backing: Option<Backing>,
    /// Each a round of `qemu-io` commands; an internal snapshot is taken after all but the last.
    rounds: Vec<Vec<String>>,
}

#[derive(Debug)]
enum Backing {
    Raw { bytes: u64 },
    Qcow2(Box<Recipe>),
}

/// What the options of an image allow.
struct Kind {
    cluster: u64,
    v2: bool,
    extended: bool,
    refcount_bits: u64,
    data_file: bool,
    data_file_raw: bool,
}

impl Kind {
    fn random(random: &mut Random) -> Self {
        let cluster = 1 << random.pick(&[9, 10, 12, 14, 16, 16, 17, 18, 21]);
        let v2 = random.one_in(4);
        let extended = !v2 && cluster >= 1 << 14 && random.one_in(2);
        let data_file = !v2 && random.one_in(5);
        let data_file_raw = data_file && random.one_in(2);
        let refcount_bits = if v2 { 16 } else { random.pick(&[1, 2, 4, 8, 16, 16, 32, 64]) };
        Self { cluster, v2, extended, refcount_bits, data_file, data_file_raw }
    }

    fn options(&self, random: &mut Random, has_backing: bool) -> Vec<String> {
        let compat = if self.v2 { "0.10" } else { "1.1" };
        let mut options = vec![format!("compat={compat}"), format!("cluster_size={}", self.cluster)];
        if !self.v2 {
            options.push(format!("refcount_bits={}", self.refcount_bits));
            options.push(format!("lazy_refcounts={}", random.pick(&["on", "off"])));
            options.push(format!("compression_type={}", random.pick(&["zlib", "zstd"])));
        }
        if self.extended {
            options.push("extended_l2=on".to_owned());
        }
        if self.data_file_raw {
            options.push("data_file_raw=on".to_owned());
        }
        if !has_backing {
            options.push(format!(
                "preallocation={}",
                random.pick(&["off", "off", "metadata", "falloc", "full"])
            ));
        }
        options
    }
}

impl Recipe {
    pub(crate) fn random(seed: u64) -> Self {
        Self::below(&mut Random(seed), 2)
    }

    /// With at most `depth` images beneath it.
    fn below(random: &mut Random, depth: u32) -> Self {
        let kind = Kind::random(random);
        let bytes = (2048 + random.below(8192)) * 512;
        let backing = match random.below(3) {
            _ if kind.data_file_raw || depth == 0 => None,
            0 => None,
            1 => Some(Backing::Raw { bytes: (1024 + random.below(8192)) * 512 }),
            _ => Some(Backing::Qcow2(Box::new(Self::below(random, depth - 1)))),
        };
        let options = kind.options(random, backing.is_some());
        // A refcount of one bit knows no second owner; with a data file snapshots are refused.
        let may_have_snapshots = kind.refcount_bits > 2 && !kind.data_file;
        let rounds = if may_have_snapshots && random.one_in(2) { 2 + random.below(2) } else { 1 };
        let rounds = (0..rounds).map(|_| commands(random, &kind, bytes)).collect();
        Self { bytes, options, has_data_file: kind.data_file, backing, rounds }
    }

    /// Makes the image, and all beneath it, in `folder`.
    pub(crate) fn make(&self, folder: &Path) -> PathBuf {
        self.make_as(folder, "image")
    }

    fn make_as(&self, folder: &Path, name: &str) -> PathBuf {
        let path = folder.join(format!("{name}.qcow2"));
        let mut options = self.options.clone();
        if self.has_data_file {
            options.push(format!("data_file={}", folder.join(format!("{name}.data")).display()));
        }
        let (options, bytes) = (options.join(","), self.bytes.to_string());
        let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        let backing = self.backing.as_ref().map(|backing| backing.make(folder, name));
        if let Some((path, format)) = &backing {
            create.extend(["-b", path.to_str().unwrap(), "-F", format]);
        }
        create.extend([path.to_str().unwrap(), &bytes]);
        let made = qemu_img(&create);
        assert!(made.status.success(), "{create:?}: {made:?}");
        for (round, commands) in self.rounds.iter().enumerate() {
            if round > 0 {
                let taken = qemu_img(&["snapshot", "-c", &format!("s{round}"), path.to_str().unwrap()]);
                assert!(taken.status.success(), "{taken:?}");
            }
            qemu_io("qcow2", &path, commands);
        }
        path
    }

    /// The names of its internal snapshots.
    pub(crate) fn snapshots(&self) -> impl Iterator<Item = String> {
        (1..self.rounds.len()).map(|round| format!("s{round}"))
    }
}

impl Backing {
    fn make(&self, folder: &Path, above: &str) -> (PathBuf, &'static str) {
        let name = format!("{above}-base");
        match self {
            Self::Qcow2(recipe) => (recipe.make_as(folder, &name), "qcow2"),
            Self::Raw { bytes } => {
                let path = folder.join(format!("{name}.raw"));
                let pattern: Vec<u8> = (0..*bytes).map(|at| (at / 512 % 251) as u8 + 1).collect();
                std::fs::write(&path, pattern).unwrap();
                (path, "raw")
            }
        }
    }
}

fn commands(random: &mut Random, kind: &Kind, bytes: u64) -> Vec<String> {
    (0..4 + random.below(12)).map(|_| command(random, kind, bytes)).collect()
}

fn command(random: &mut Random, kind: &Kind, bytes: u64) -> String {
    let first = random.below(bytes / 512);
    let count = (1 + random.below(600)).min(bytes / 512 - first);
    let (offset, len) = (first * 512, count * 512);
    let byte = random.number() as u8;
    match random.below(8) {
        0 => format!("write -z {offset} {len}"),
        1 => format!("write -z -u {offset} {len}"),
        2 => format!("discard {offset} {len}"),
        // QEMU 10 itself makes a corrupt image of clusters of 512 bytes that are compressed, shared and written again.
        3 | 4 if !kind.data_file && kind.cluster > 512 && bytes >= kind.cluster => {
            let at = random.below(bytes / kind.cluster) * kind.cluster;
            format!("write -c -P {byte} {at} {}", kind.cluster)
        }
        _ => format!("write -P {byte} {offset} {len}"),
    }
}

/// Runs commands of `qemu-io`; one that QEMU itself refuses (a second compressed write) changes nothing.
fn qemu_io(format: &str, path: &Path, commands: &[String]) {
    let mut command = Command::new("qemu-io");
    command.args(["-d", "unmap", "-f", format]);
    for one in commands {
        command.args(["-c", one]);
    }
    let done = command.arg(path).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(!said.contains("can't open"), "{command:?}: {said}");
}
