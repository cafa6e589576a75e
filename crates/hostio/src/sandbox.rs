//! Keeping the process from what it has no business with, before it looks at anything that a stranger made.
//!
//! ```text
//!   confine ─▶ no core dumps, not traceable, no new privileges
//!           ─▶ Landlock: only these folders, no outgoing TCP, no signals to others
//!           ─▶ seccomp:  only the system calls of a disk server ([`filter`])
//! ```
//!
//! # Invariants
//! - Called while the process has one thread: threads that are made later inherit all of it.
//! - It can not be undone, and no step waits for another: where the kernel lacks one, the others are taken.
//! - What is open already stays open. So is what io_uring does: its operations pass by seccomp, but not by Landlock.

mod filter;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use block::Error;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use serde::{Deserialize, Serialize};

/// The newest Landlock whose restrictions are asked for (Linux 6.12). An older kernel enforces what it knows.
const NEWEST: ABI = ABI::V6;

/// What older versions of Landlock leave open, by the version that closes it.
const CLOSED_SINCE: &[(ABI, &str)] = &[
    (ABI::V3, "shortening files that may only be read (Linux 6.2)"),
    (ABI::V4, "outgoing TCP (Linux 6.7)"),
    (ABI::V5, "calls to devices that are open already (Linux 6.10)"),
    (ABI::V6, "signals to other processes (Linux 6.12)"),
];

/// Where Landlock lets this process work, once it is in force.
static REACHED: OnceLock<Vec<PathBuf>> = OnceLock::new();

/// What the C library reads to find the address of a name.
const NAME_SERVICE: &[&str] =
    &["/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/resolv.conf", "/etc/gai.conf"];

/// What the process itself reads of the kernel.
const KERNEL: &[&str] = &[
    "/proc/sys/kernel/random/boot_id",
    // The C library, for its memory.
    "/proc/sys/vm/overcommit_memory",
    "/sys/devices/system/cpu/online",
];

/// What may be done below folders of the process's own: all but to run programs and to make devices, pipes and links.
fn own_rights() -> BitFlags<AccessFs> {
    AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::ReadDir
        | AccessFs::RemoveDir
        | AccessFs::RemoveFile
        | AccessFs::MakeDir
        | AccessFs::MakeReg
        | AccessFs::MakeSock
        | AccessFs::Refer
        | AccessFs::Truncate
        | AccessFs::IoctlDev
}

/// What may be done with files that are there: to read, write and shorten them, and a device's own calls.
fn file_rights() -> BitFlags<AccessFs> {
    AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev
}

/// The part of the file system that a process needs. What is not there is left out.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Reach {
    /// Folders, or single files, where it reads, writes, makes and removes.
    pub own: Vec<PathBuf>,
    /// Folders, or single files, where it opens what is there.
    pub existing: Vec<PathBuf>,
    /// Folders, or single files, where it only reads.
    pub readable: Vec<PathBuf>,
}

impl Reach {
    fn all(&self) -> impl Iterator<Item = &PathBuf> {
        self.own.iter().chain(&self.existing).chain(&self.readable)
    }
}

/// What to keep the process to.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// By Landlock.
    pub reach: Option<Reach>,
    /// Whether to filter system calls.
    pub filter: bool,
}

/// How far a restriction is in force.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Held {
    /// Nobody asked for it.
    #[default]
    Off,
    /// All of it.
    Full,
    /// As much as this kernel knows.
    Partial,
    /// None of it: the kernel does not have it, or does not let us.
    Unavailable,
}

/// What came of a [`Sandbox`].
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Confined {
    /// Landlock.
    pub landlock: Held,
    /// seccomp.
    pub seccomp: Held,
    /// What a Landlock that is [`Held::Partial`] leaves open, for people.
    #[serde(default)]
    pub missing: Vec<String>,
    /// Why something is unavailable.
    #[serde(skip)]
    pub complaints: Vec<String>,
}

/// Gives up what `sandbox` does not name, for good.
pub fn confine(sandbox: &Sandbox) -> io::Result<Confined> {
    // A core has the guest's memory in it. A process that is not dumpable can not be traced by its own user either.
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    rustix::thread::set_no_new_privs(true)?;
    let mut complaints = Vec::new();
    let mut unavailable = |part: &str, why: String| {
        complaints.push(format!("{part} is not available: {why}"));
        Held::Unavailable
    };
    let (landlock, missing) = match sandbox.reach.as_ref().map(restrict) {
        None => (Held::Off, Vec::new()),
        Some(Ok((Held::Unavailable, _))) => {
            (unavailable("Landlock", "the kernel does not have it".to_owned()), Vec::new())
        }
        Some(Ok(restricted)) => restricted,
        Some(Err(error)) => (unavailable("Landlock", error.to_string()), Vec::new()),
    };
    let seccomp = match sandbox.filter.then(filter::install) {
        None => Held::Off,
        Some(Ok(())) => Held::Full,
        Some(Err(error)) => unavailable("seccomp", error.to_string()),
    };
    Ok(Confined { landlock, seccomp, missing, complaints })
}

/// What a host's error about `path` is to be told as: where it is the sandbox that refuses, which the kernel does not say, with
/// the way to have it allowed.
pub fn explain(path: &Path, error: io::Error) -> Error {
    let is_refusal = error.kind() == io::ErrorKind::PermissionDenied;
    match REACHED.get() {
        Some(reached) if is_refusal && !is_below(path, reached) => Error::from(error).context(
            "the daemon's sandbox does not reach it: name its folder, when it is started, in target-folders \
             (--target-folder), or in allow-folders (--allow-folder) for what images name",
        ),
        _ => error.into(),
    }
}

/// Whether a file that is there, or the folder of one that is not, is at or below one of these.
fn is_below(path: &Path, folders: &[PathBuf]) -> bool {
    let found = path.canonicalize().or_else(|_| path.parent().unwrap_or(Path::new("/")).canonicalize());
    found.is_ok_and(|found| folders.iter().any(|folder| found.starts_with(folder)))
}

/// What a Landlock of this version leaves open of what is asked for.
fn left_open(version: ABI) -> Vec<String> {
    let open = CLOSED_SINCE.iter().filter(|(since, _)| version < *since);
    open.map(|(_, what)| (*what).to_owned()).collect()
}

/// How far it is in force, and what it leaves open.
fn restrict(reach: &Reach) -> Result<(Held, Vec<String>), RulesetError> {
    let rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        // To listen is what NBD servers do; to call others is not.
        .handle_access(AccessNet::ConnectTcp)?
        .scope(Scope::Signal)?
        .create()?;
    let kernel = KERNEL.iter().chain(NAME_SERVICE).map(Path::new);
    let mut rules = allow(rules, reach.own.iter().map(PathBuf::as_path), own_rights())?;
    rules = allow(rules, reach.existing.iter().map(PathBuf::as_path), file_rights() | AccessFs::ReadDir)?;
    let readable = reach.readable.iter().map(PathBuf::as_path);
    rules = allow(rules, readable, AccessFs::ReadFile | AccessFs::ReadDir)?;
    rules = allow(rules, kernel, AccessFs::ReadFile.into())?;
    let status = rules.restrict_self()?;
    let held = match status.ruleset {
        RulesetStatus::FullyEnforced => Held::Full,
        RulesetStatus::PartiallyEnforced => Held::Partial,
        RulesetStatus::NotEnforced => return Ok((Held::Unavailable, Vec::new())),
    };
    let _ =
        REACHED.set(reach.all().map(|path| path.canonicalize().unwrap_or_else(|_| path.clone())).collect());
    let missing = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } if held == Held::Partial => left_open(effective_abi),
        _ => Vec::new(),
    };
    Ok((held, missing))
}

/// Lets `rights` be used at or below each of these paths that is there.
fn allow<'a>(
    mut rules: RulesetCreated,
    paths: impl Iterator<Item = &'a Path>,
    rights: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    for path in paths {
        let Ok(fd) = PathFd::new(path) else { continue };
        // Rights that only a folder can have are refused for a file.
        let rights = if path.is_dir() { rights } else { rights & file_rights() };
        rules = rules.add_rule(PathBeneath::new(fd, rights))?;
    }
    Ok(rules)
}

#[cfg(test)]
mod tests;
