use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FlockOperation, flock};

use crate::process::output_of;
use crate::{Context, Error, Result};

mod cpio;
mod kernel;

/// Kernel modules beside those built in. File systems come when they are mounted.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "xfs",
    "btrfs",
    "vfat",
    "nls_cp437",
    "nls_ascii",
    "nls_utf8",
];

/// Programs of the host that the guest gets a copy of.
const TOOLS: &[&str] =
    &["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "mkfs.vfat", "e2fsck", "xfs_repair", "btrfs", "fsck.vfat"];

const SEE_DEPS: &str = "run `make deps`";

/// What a guest boots: a kernel and an initramfs with busybox, the agent, file system tools and the workload.
#[derive(Clone, Debug)]
pub struct Image {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
}

impl Image {
    /// The image, built anew if one of its parts has changed; tests that need it at once wait for each other.
    pub fn get() -> Result<Self> {
        let parts = Parts::find()?;
        let folder = program_folder()?.join("guest-image");
        fs::create_dir_all(&folder).context(folder.display())?;
        let lock = File::create(folder.join("lock")).context("guest image lock")?;
        flock(&lock, FlockOperation::LockExclusive).context("guest image lock")?;

        let image = Self { kernel: folder.join("vmlinux"), initramfs: folder.join("initramfs") };
        let (stamp, state) = (folder.join("stamp"), parts.state()?);
        if fs::read_to_string(&stamp).is_ok_and(|built| built == state) {
            return Ok(image);
        }
        let _ = fs::remove_file(&stamp);
        replace(&image.kernel, |path| Ok(fs::write(path, kernel::unpack(&parts.kernel)?)?))?;
        replace(&image.initramfs, |path| parts.write_initramfs(path))?;
        fs::write(&stamp, state).context(stamp.display())?;
        Ok(image)
    }
}

/// The folder of this build's programs: `frazil`, `guest-workload`, `demo`.
fn program_folder() -> Result<PathBuf> {
    let executable = std::env::current_exe().context("this program's path")?;
    let folder = executable.parent().unwrap_or(Path::new("."));
    // Test programs lie one deeper.
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    Ok(folder.to_path_buf())
}

/// A program of this build.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = program_folder()?.join(name);
    if path.is_file() {
        Ok(path)
    } else {
        Err(Error::new(format!("{} is not built: run `make test` or `cargo build`", path.display())))
    }
}

/// Where everything in the guest comes from: path in the guest, path here.
struct Parts {
    kernel: PathBuf,
    files: BTreeMap<PathBuf, PathBuf>,
}

impl Parts {
    fn find() -> Result<Self> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = here.join("../.cache/guest-root");
        let modules = only_entry(&root.join("lib/modules"))?;
        let release = modules.file_name().unwrap_or_default().to_os_string();

        let mut files = BTreeMap::new();
        files.insert("/init".into(), here.join("guest/init"));
        files.insert("/bin/busybox".into(), root.join("bin/busybox"));
        files.insert("/etc/mke2fs.conf".into(), "/etc/mke2fs.conf".into());
        let in_guest = Path::new("/lib/modules").join(&release);
        for name in
            ["modules.dep", "modules.alias"].map(PathBuf::from).into_iter().chain(needed_modules(&modules)?)
        {
            files.insert(in_guest.join(&name), modules.join(&name));
        }

        let mut programs = BTreeMap::new();
        programs.insert(PathBuf::from("/usr/sbin/qemu-ga"), root.join("usr/sbin/qemu-ga"));
        programs.insert("/usr/bin/guest-workload".into(), program("guest-workload")?);
        for name in TOOLS {
            programs.insert(Path::new("/usr/sbin").join(name), host_program(name)?);
        }
        for program in programs.values() {
            files.extend(libraries(program)?.into_iter().map(|library| (library.clone(), library)));
        }
        files.append(&mut programs);

        let kernel = root.join("boot").join(format!("vmlinuz-{}", release.to_string_lossy()));
        Ok(Self { kernel, files })
    }

    /// Changes when a part does.
    fn state(&self) -> Result<String> {
        let mut hasher = DefaultHasher::new();
        for (name, source) in &self.files {
            let metadata = fs::metadata(source).context(source.display())?;
            (name, source, metadata.len(), metadata.modified()?).hash(&mut hasher);
        }
        let kernel = fs::metadata(&self.kernel).context(self.kernel.display())?;
        (kernel.len(), kernel.modified()?).hash(&mut hasher);
        Ok(format!("{:016x}", hasher.finish()))
    }

    fn write_initramfs(&self, path: &Path) -> Result<()> {
        let mut archive = cpio::Archive::new(BufWriter::new(File::create(path)?));
        for (name, source) in &self.files {
            let content = fs::read(source).context(source.display())?;
            archive.file(name, 0o755, &content)?;
        }
        archive.finish()?;
        Ok(())
    }
}

/// The files of [`MODULES`] and of all they need, relative to the modules' folder.
fn needed_modules(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let text = fs::read_to_string(folder.join("modules.dep")).context(SEE_DEPS)?;
    let needs: BTreeMap<&str, &str> = text.lines().filter_map(|line| line.split_once(':')).collect();
    let wanted =
        |path: &str| Path::new(path).file_stem().is_some_and(|stem| MODULES.iter().any(|name| stem == *name));
    let mut open: Vec<&str> = needs.keys().copied().filter(|path| wanted(path)).collect();
    if open.len() != MODULES.len() {
        return Err(Error::new(format!("{}: has only {open:?} of {MODULES:?}", folder.display())));
    }
    let mut found = BTreeSet::new();
    while let Some(path) = open.pop() {
        if found.insert(PathBuf::from(path)) {
            open.extend(needs.get(path).into_iter().flat_map(|list| list.split_whitespace()));
        }
    }
    Ok(found)
}

/// The shared libraries that a program loads, and its loader.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let text = output_of(Command::new("ldd").arg(program))?;
    let text = String::from_utf8_lossy(&text);
    let library = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(text.lines().filter_map(library).collect())
}

fn host_program(name: &str) -> Result<PathBuf> {
    let folders = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
    let found = folders.iter().map(|folder| Path::new(folder).join(name)).find(|path| path.is_file());
    found.ok_or_else(|| Error::new(format!("no {name} here: {SEE_DEPS}")))
}

fn only_entry(folder: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(folder).context(format!("{}: {SEE_DEPS}", folder.display()))?;
    let entry = entries.next().ok_or_else(|| Error::new(format!("{} is empty", folder.display())))?;
    Ok(entry?.path())
}

/// Writes a file beside `path` and puts it there in one step: a guest that starts sees the old one or the new one.
fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let new = path.with_extension("new");
    write(&new)?;
    fs::rename(&new, path).context(path.display())
}
