use super::*;
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

/// Tells a test that it is the child to be confined, and to which folder.
const CHILD: &str = "FRAZIL_TEST_SANDBOX";

/// Runs the test of this name again, in a process of its own, which confines itself; nobody else's threads are in it.
fn alone(name: &str, folder: &Path) -> Output {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", &format!("sandbox::tests::{name}"), "--nocapture", "--test-threads=1"]);
    child.env(CHILD, folder).output().unwrap()
}

/// The folder, if this is the child.
fn is_child() -> Option<PathBuf> {
    std::env::var_os(CHILD).map(PathBuf::from)
}

fn confine_to(folder: &Path) -> Confined {
    let reach = Reach { own: vec![folder.to_owned()], ..Reach::default() };
    let confined = confine(&Sandbox { reach: Some(reach), filter: true }).unwrap();
    assert!(matches!(confined.landlock, Held::Full | Held::Partial), "{confined:?}");
    assert_eq!(confined.seccomp, Held::Full);
    confined
}

#[test]
fn a_confined_process_works_in_its_folders_and_nowhere_else() {
    let Some(folder) = is_child() else {
        let folder = tempfile::tempdir().unwrap();
        let output = alone("a_confined_process_works_in_its_folders_and_nowhere_else", folder.path());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    };
    let outside = tempfile::tempdir().unwrap();
    let (listener, secret) = (TcpListener::bind("127.0.0.1:0").unwrap(), outside.path().join("secret"));
    fs::write(&secret, "secret").unwrap();
    confine_to(&folder);
    // In its folder: files, sockets, rings, threads.
    fs::write(folder.join("a"), "data").unwrap();
    fs::rename(folder.join("a"), folder.join("b")).unwrap();
    assert_eq!(fs::read(folder.join("b")).unwrap(), b"data");
    fs::remove_file(folder.join("b")).unwrap();
    let socket = UnixListener::bind(folder.join("socket")).unwrap();
    UnixStream::connect(folder.join("socket")).unwrap();
    drop(socket);
    crate::Ring::new(8).unwrap();
    std::thread::spawn(|| assert!(File::open("/etc/passwd").is_err())).join().unwrap();
    // Elsewhere: nothing.
    let refused =
        |result: io::Result<()>| assert_eq!(result.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    refused(fs::read(&secret).map(drop));
    refused(fs::write(outside.path().join("new"), "data"));
    refused(fs::remove_file(&secret));
    refused(fs::write(folder.join("..").join("escaped"), "data"));
    std::os::unix::fs::symlink(&secret, folder.join("link")).unwrap_err();
    refused(TcpStream::connect(listener.local_addr().unwrap()).map(drop));
    let status = fs::read_to_string("/proc/self/status");
    assert!(status.is_err(), "nothing in /proc is its business");
    let open = |path: &Path| {
        let how = crate::Open { writable: false, cache: crate::Cache::Writeback };
        crate::HostFile::open(path, how).unwrap_err().to_string()
    };
    let told = open(&secret);
    assert!(told.contains(secret.to_str().unwrap()) && told.contains("--target-folder"), "{told}");
    let plain = open(&folder.join("absent"));
    assert!(!plain.contains("sandbox"), "{plain}");
}

#[test]
fn what_is_only_to_be_read_can_not_be_written() {
    let Some(folder) = is_child() else {
        let folder = tempfile::tempdir().unwrap();
        let output = alone("what_is_only_to_be_read_can_not_be_written", folder.path());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    };
    let outside = tempfile::tempdir().unwrap();
    let key = outside.path().join("key");
    fs::write(&key, "key").unwrap();
    let reach = Reach { own: vec![folder], readable: vec![outside.path().to_owned()], ..Reach::default() };
    confine(&Sandbox { reach: Some(reach), filter: false }).unwrap();
    assert_eq!(fs::read(&key).unwrap(), b"key");
    assert!(fs::write(&key, "other").is_err() && fs::remove_file(&key).is_err());
    assert!(fs::write(outside.path().join("new"), "new").is_err());
}

#[test]
fn what_an_older_landlock_leaves_open_is_said() {
    let all = left_open(ABI::V2);
    assert_eq!(all.len(), CLOSED_SINCE.len());
    let words = left_open(ABI::V5);
    assert!(words.len() == 1 && words[0].contains("signals"), "{words:?}");
    assert!(left_open(NEWEST).is_empty());
}

/// A kernel that has neither Landlock nor seccomp is played by a filter.
#[test]
fn what_the_kernel_lacks_is_said_and_the_rest_is_in_force() {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
    let Some(folder) = is_child() else {
        let folder = tempfile::tempdir().unwrap();
        let output = alone("what_the_kernel_lacks_is_said_and_the_rest_is_in_force", folder.path());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    };
    let lacking = [libc::SYS_landlock_create_ruleset, libc::SYS_seccomp].map(|call| (call, Vec::new()));
    let refused = SeccompAction::Errno(libc::ENOSYS as u32);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(lacking.into(), SeccompAction::Allow, refused, arch).unwrap();
    apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
    let reach = Reach { own: vec![folder], ..Reach::default() };
    let confined = confine(&Sandbox { reach: Some(reach), filter: true }).unwrap();
    assert_eq!((confined.landlock, confined.seccomp), (Held::Unavailable, Held::Unavailable));
    assert_eq!(confined.complaints[0], "Landlock is not available: the kernel does not have it");
    assert!(confined.complaints[1].starts_with("seccomp is not available: "), "{confined:?}");
    assert_eq!(confined.complaints.len(), 2);
    assert_eq!(rustix::process::dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
    assert_eq!(rustix::process::getrlimit(Resource::Core).maximum, Some(0));
}

#[test]
fn a_confined_process_that_would_run_a_program_ends() {
    let Some(folder) = is_child() else {
        let folder = tempfile::tempdir().unwrap();
        let output = alone("a_confined_process_that_would_run_a_program_ends", folder.path());
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{output:?}");
        return;
    };
    // By exec alone: a process of its own it could not even make.
    confine_to(&folder);
    use std::os::unix::process::CommandExt;
    let error = Command::new("/bin/true").exec();
    panic!("it lives: {error}");
}

#[test]
fn a_confined_process_makes_threads_and_no_processes() {
    let Some(folder) = is_child() else {
        let folder = tempfile::tempdir().unwrap();
        let output = alone("a_confined_process_makes_threads_and_no_processes", folder.path());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    };
    confine_to(&folder);
    std::thread::spawn(|| {}).join().unwrap();
    let refused = Command::new("/bin/true").spawn().unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied, "{refused}");
}
