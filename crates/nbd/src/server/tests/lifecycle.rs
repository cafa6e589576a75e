//! Exports and servers come and go.

use super::*;
use crate::testing::{answer, request};

/// An export that counts how often it was gone.
fn told(storage: Arc<dyn Storage>) -> (Export, Arc<AtomicUsize>) {
    let gone = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&gone);
    let disk = Arc::new(RawDisk::new(storage, false).unwrap());
    let tell = move || {
        counter.fetch_add(1, Ordering::SeqCst);
    };
    (Export::new("vda", disk).description("text").on_gone(tell), gone)
}

fn read(offset: u64) -> Ask {
    Ask { command: command::READ, offset, len: 4096, ..Ask::default() }
}

/// A client whose one request, a read, waits for a disk that is slow; with a count of how often its export was gone.
fn one_waits(cookie: u64) -> (Rig, Client<UnixStream>, Arc<Slow>, Arc<AtomicUsize>) {
    let storage = Slow::new();
    let (export, gone) = told(Arc::clone(&storage) as _);
    let rig = Rig::with(Config::default(), export);
    let mut client = rig.client(Style::Structured);
    client.send(cookie, read(0), &[]);
    eventually(|| storage.waiting.load(Ordering::SeqCst) == 1);
    (rig, client, storage, gone)
}

#[test]
fn an_export_in_use_is_removed_only_by_force_and_is_gone_with_its_last_request() {
    let (rig, mut client, storage, gone) = one_waits(1);
    let (name, description) = ("vda".to_owned(), "text".to_owned());
    assert_eq!(rig.server.exports(), [ExportStatus { name, description, writable: false, clients: 1 }]);
    assert_eq!(rig.server.remove_export("vda", Removal::Safe).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(rig.server.remove_export("vdb", Removal::Hard).unwrap_err().kind(), ErrorKind::NotFound);
    rig.server.remove_export("vda", Removal::Hard).unwrap();
    assert_eq!(rig.server.exports(), []);
    assert!(answer(&mut client.stream, |_| 0).is_none(), "it was cut off");
    assert_eq!(gone.load(Ordering::SeqCst), 0, "a request is still in flight");
    // The name is free at once.
    rig.server.add_export(told(memory()).0).unwrap();
    assert_eq!(rig.client(Style::Simple).error(0, command::READ, 0, 512), 0);
    storage.let_go();
    eventually(|| gone.load(Ordering::SeqCst) == 1);
    rig.server.remove_export("vda", Removal::Hard).unwrap();
    rig.settle();
    assert_eq!(gone.load(Ordering::SeqCst), 1);
}

#[test]
fn an_export_that_nobody_uses_is_gone_at_once() {
    let (export, gone) = told(memory());
    let rig = Rig::with(Config::default(), export);
    drop(rig.client(Style::Simple));
    rig.settle();
    rig.server.remove_export("vda", Removal::Safe).unwrap();
    assert_eq!(gone.load(Ordering::SeqCst), 1);
    let mut client = rig.greet();
    assert_eq!(client.verdict(7, &info_data("vda", &[])), Some((1 << 31) + 6));
}

#[test]
fn names_are_given_once_and_must_be_sayable() {
    let rig = Rig::with(Config::default(), told(memory()).0);
    let (second, gone) = told(memory());
    assert_eq!(rig.server.add_export(second).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(gone.load(Ordering::SeqCst), 1, "what is not added is gone");
    let disk = || -> Arc<dyn Disk> { Arc::new(RawDisk::new(memory(), true).unwrap()) };
    let bitmap = || {
        let bitmap = Arc::new(block::DirtyBitmap::new(1 << 20, 16).unwrap());
        Arc::new(crate::BitmapContext::new("b", bitmap))
    };
    for export in [
        Export::new("x".repeat(5000), disk()),
        Export::new("a\0b", disk()),
        Export::new("a", disk()).description("\0"),
        Export::new("a", disk()).context(bitmap()).context(bitmap()),
    ] {
        assert_eq!(rig.server.add_export(export).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    rig.server.add_export(Export::new("", disk()).context(bitmap())).unwrap();
    rig.greet().go(Style::Simple, "");
}

#[test]
fn replies_come_in_the_order_in_which_requests_are_done() {
    for style in STYLES {
        let storage = Slow::new();
        let rig = Rig::new(Config::default(), Arc::clone(&storage) as _);
        let mut client = rig.client(style);
        let both = [0, 4096].map(|offset| request(style, offset, read(offset)));
        client.stream.write_all(&both.concat()).unwrap();
        assert_eq!(answer(&mut client.stream, |_| 4096).unwrap().cookie, 4096);
        storage.let_go();
        assert_eq!(answer(&mut client.stream, |_| 4096).unwrap().cookie, 0);
        drop(client);
        rig.settle();
    }
}

#[test]
fn at_the_end_requests_in_flight_are_answered_and_all_is_let_go() {
    let (rig, mut client, storage, gone) = one_waits(9);
    let _silent = rig.greet();
    let reader = thread::spawn(move || answer(&mut client.stream, |_| 0));
    thread::scope(|scope| {
        scope.spawn(|| rig.server.shutdown(Duration::from_secs(10)));
        eventually(|| UnixStream::connect(&rig.path).is_err());
        storage.let_go();
    });
    let reply = reader.join().unwrap().unwrap();
    assert_eq!((reply.cookie, reply.error), (9, 0));
    assert_eq!((rig.server.clients(), gone.load(Ordering::SeqCst)), (0, 1));
    assert!(!rig.path.exists());
}

#[test]
fn a_disk_that_hangs_does_not_hold_up_the_end() {
    let (rig, mut client, storage, gone) = one_waits(1);
    let begin = Instant::now();
    rig.server.shutdown(Duration::ZERO);
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert!(answer(&mut client.stream, |_| 0).is_none(), "it was cut off");
    assert_eq!((rig.server.exports(), gone.load(Ordering::SeqCst)), (Vec::new(), 0));
    storage.let_go();
    eventually(|| gone.load(Ordering::SeqCst) == 1);
}

#[test]
fn a_client_that_does_not_go_does_not_hold_up_the_end() {
    let rig = Rig::new(Config::default(), memory());
    let mut deaf = rig.client(Style::Structured);
    for cookie in 0..4 {
        deaf.send(cookie, Ask { len: SIZE as u64, ..read(0) }, &[]);
    }
    let begin = Instant::now();
    rig.server.shutdown(Duration::from_millis(100));
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert_eq!(rig.server.clients(), 0);
}

#[test]
fn a_socket_that_was_passed_on_is_listened_at_and_left_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("passed");
    let passed = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let rig = Rig::new(Config::default(), memory());
    rig.server.listen(Address::Inherited(passed.try_clone().unwrap().into())).unwrap();
    let mut client = Client::greet(UnixStream::connect(&path).unwrap(), 3);
    client.go(Style::Structured, "vda");
    assert_eq!(client.error(0, command::READ, 0, 512), 0);
    rig.server.shutdown(Duration::ZERO);
    UnixStream::connect(&path).unwrap();
    let file: OwnedFd = std::fs::File::open("/proc/self/exe").unwrap().into();
    let (connected, _) = UnixStream::pair().unwrap();
    for wrong in [file, connected.into()] {
        let server = Server::new(Config::default());
        assert!(server.listen(Address::Inherited(wrong)).is_err());
    }
}
