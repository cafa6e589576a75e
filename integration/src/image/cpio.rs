use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;

/// Writes an initramfs: a cpio archive in the "newc" form (Linux, `early-userspace/buffer-format.rst`).
pub(super) struct Archive<W> {
    out: W,
    written: u64,
    inode: u32,
    directories: BTreeSet<PathBuf>,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0, directories: BTreeSet::new() }
    }

    /// Adds a file under an absolute path, and before it the folders on the way there.
    pub(super) fn file(&mut self, path: &Path, permissions: u32, content: &[u8]) -> io::Result<()> {
        let mut folder = PathBuf::new();
        for component in path.parent().unwrap_or(Path::new("")).components() {
            let Component::Normal(name) = component else { continue };
            folder.push(name);
            if self.directories.insert(folder.clone()) {
                self.entry(&folder, DIRECTORY, &[])?;
            }
        }
        self.entry(path.strip_prefix("/").unwrap_or(path), REGULAR | permissions, content)
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.entry(Path::new("TRAILER!!!"), 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let name = name.as_os_str().as_encoded_bytes();
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        // Inode, mode, owner, group, links, time, size, device (major, minor), node (major, minor), name, checksum.
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.put(b"070701")?;
        for field in fields {
            self.put(format!("{field:08x}").as_bytes())?;
        }
        self.put(name)?;
        self.put(&[0])?;
        self.pad()?;
        self.put(content)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    /// Name and content each end on a multiple of four bytes.
    fn pad(&mut self) -> io::Result<()> {
        let missing = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 3][..missing as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_before_their_files_and_only_once() -> io::Result<()> {
        let mut archive = Archive::new(Vec::new());
        archive.file(Path::new("/usr/bin/one"), 0o755, b"12345")?;
        archive.file(Path::new("/usr/bin/two"), 0o755, b"")?;
        let bytes = archive.finish()?;
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let places: Vec<_> =
            ["usr\0", "usr/bin\0", "usr/bin/one\0", "12345", "usr/bin/two\0", "TRAILER!!!\0"]
                .map(|name| text.find(name))
                .into();
        assert!(places.iter().all(Option::is_some), "{places:?}");
        assert!(places.is_sorted(), "{places:?}");
        assert_eq!(text.matches("usr/bin\0").count(), 1);
        Ok(())
    }
}
