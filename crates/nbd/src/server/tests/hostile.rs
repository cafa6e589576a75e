//! Clients that mean harm, or are broken: they lose their own connection, and nobody else is disturbed.

use super::*;
use crate::testing::{answer, option, request};
use std::io::Read;
use std::net::TcpStream;

/// Whether the server hangs up, in time, whatever it says before.
fn is_cut_off(stream: &mut impl Read) -> bool {
    let mut dropped = vec![0; 65536];
    loop {
        match stream.read(&mut dropped) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

#[test]
fn a_payload_that_is_too_long_ends_the_connection() {
    let rig = Rig::new(Config::default(), memory());
    for (style, flags, len) in [
        (Style::Simple, 0, (32 << 20) + 1),
        (Style::Structured, 0, u64::from(u32::MAX)),
        (Style::Extended, 1 << 5, (32 << 20) + 1),
        (Style::Extended, 1 << 5, u64::MAX),
    ] {
        let mut client = rig.client(style);
        let ask = Ask { flags, command: command::WRITE, offset: 0, len };
        assert_eq!(client.ask_with(ask, &[]).unwrap().error, 22);
        assert!(is_cut_off(&mut client.stream));
    }
    rig.settle();
}

#[test]
fn what_is_no_request_ends_the_connection() {
    let rig = Rig::new(Config::default(), memory());
    for style in STYLES {
        let wrong = if style == Style::Extended { Style::Simple } else { Style::Extended };
        for bytes in [vec![0; 64], vec![0xff; 64], request(wrong, 1, Ask::default()), option(3, &[0; 32])] {
            let mut client = rig.client(style);
            client.stream.write_all(&[&bytes[..], &[0; 8]].concat()).unwrap();
            assert!(is_cut_off(&mut client.stream), "{style:?} {bytes:?}");
        }
    }
    rig.settle();
}

#[test]
fn clients_that_leave_in_mid_sentence_leave_nothing_behind() {
    let rig = Rig::new(Config::default(), memory());
    let write = request(Style::Simple, 1, Ask { command: command::WRITE, len: 1 << 20, ..Ask::default() });
    let read = request(Style::Simple, 1, Ask { command: command::READ, len: 4 << 20, ..Ask::default() });
    for cut in [0, 1, 27, 28, 29, 1000, 600_000] {
        let bytes = [&write[..], &vec![7; 1 << 20]].concat();
        rig.client(Style::Simple).stream.write_all(&bytes[..cut]).unwrap();
        let mut client = rig.client(Style::Simple);
        client.stream.write_all(&read).unwrap();
        client.stream.read_exact(&mut vec![0; cut]).unwrap();
    }
    for cut in [0, 1, 17, 18, 22, 30, 38] {
        let mut stream = rig.connect();
        let said = [&3_u32.to_be_bytes()[..], &option(7, &info_data("vda", &[]))].concat();
        stream.read_exact(&mut vec![0; cut.min(18)]).unwrap();
        stream.write_all(&said[..cut.saturating_sub(18)]).unwrap();
    }
    rig.settle();
    assert_eq!(rig.client(Style::Structured).error(0, command::READ, 0, 512), 0);
}

#[test]
fn a_handshake_that_takes_too_long_is_ended_whether_the_client_is_silent_or_not() {
    let config = Config { handshake: Duration::from_millis(500), ..Config::default() };
    let rig = Rig::new(config, memory());
    let mut chosen = rig.client(Style::Structured);
    let mut silent = rig.connect();
    let mut half = rig.greet();
    half.stream.write_all(&option(7, &info_data("vda", &[]))[..20]).unwrap();
    let begin = Instant::now();
    let mut busy = rig.greet();
    while !busy.option(3, &[]).is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(10), "it may talk for ever");
    }
    assert!(begin.elapsed() >= Duration::from_millis(400));
    assert!(is_cut_off(&mut silent));
    assert!(is_cut_off(&mut half.stream));
    assert_eq!(chosen.error(0, command::READ, 0, 512), 0, "who has chosen may be silent");
}

#[test]
fn a_client_that_does_not_read_is_cut_off_and_others_are_served_meanwhile() {
    let config = Config { patience: Duration::from_millis(500), ..Config::default() };
    let rig = Rig::new(config, memory());
    let mut deaf = rig.client(Style::Structured);
    for cookie in 0..20 {
        deaf.send(cookie, Ask { command: command::READ, len: SIZE as u64, ..Ask::default() }, &[]);
    }
    let mut other = rig.client(Style::Structured);
    let mut served = 0;
    while rig.server.clients() == 2 {
        assert_eq!(other.error(0, command::READ, 0, 4096), 0);
        served += 1;
    }
    assert!(served > 10, "served {served} requests meanwhile");
    assert!(is_cut_off(&mut deaf.stream));
}

#[test]
fn a_flood_takes_no_more_threads_than_there_may_be_and_each_request_is_answered() {
    const COUNT: u64 = 5000;
    let storage = Slow::new();
    let rig = Rig::new(Config::default(), Arc::clone(&storage) as _);
    let mut client = rig.client(Style::Structured);
    let mut sender = client.stream.try_clone().unwrap();
    let ask = Ask { command: command::READ, len: 512, ..Ask::default() };
    let all: Vec<u8> = (0..COUNT).flat_map(|cookie| request(Style::Structured, cookie, ask)).collect();
    let flood = thread::spawn(move || sender.write_all(&all).unwrap());
    eventually(|| storage.waiting.load(Ordering::SeqCst) == 8);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(storage.waiting.load(Ordering::SeqCst), 8, "as many are in flight as there may be threads");
    assert_eq!(rig.server.shared.spare.left(), SPARE_THREADS - 7);
    storage.let_go();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..COUNT {
        let found = answer(&mut client.stream, |_| 512).unwrap();
        assert!(found.bytes(0, 512) == pattern(0, 512));
        assert!(seen.insert(found.cookie));
    }
    flood.join().unwrap();
    drop(client);
    rig.settle();
}

#[test]
fn one_client_more_than_there_may_be_is_turned_away() {
    let rig = Rig::new(Config { max_connections: 3, ..Config::default() }, memory());
    let mut clients: Vec<_> = (0..3).map(|_| rig.client(Style::Simple)).collect();
    for _ in 0..3 {
        assert!(is_cut_off(&mut rig.connect()));
    }
    for client in &mut clients {
        assert_eq!(client.error(0, command::READ, 0, 512), 0);
    }
    clients.pop();
    eventually(|| rig.server.clients() == 2);
    rig.client(Style::Simple);
}

/// A hundred silent clients kept all others out, for as long as they came again after each handshake's time.
#[test]
fn clients_that_never_choose_give_way_to_those_who_do() {
    let rig = Rig::new(Config { max_connections: 3, ..Config::default() }, memory());
    let mut chosen = rig.client(Style::Simple);
    let mut silent: Vec<_> = (0..2).map(|_| rig.greet()).collect();
    let mut next = rig.client(Style::Structured);
    assert!(is_cut_off(&mut silent[0].stream), "who came first goes first");
    let mut last = rig.client(Style::Structured);
    assert!(is_cut_off(&mut silent[1].stream));
    assert!(is_cut_off(&mut rig.connect()), "who has chosen stays");
    for client in [&mut chosen, &mut next, &mut last] {
        assert_eq!(client.error(0, command::READ, 0, 512), 0);
    }
}

#[test]
fn a_tcp_client_is_served_as_well() {
    let rig = Rig::new(Config::default(), memory());
    let address = rig.server.listen(Address::Tcp("127.0.0.1:0".to_owned())).unwrap().unwrap();
    assert_eq!(rig.server.addresses(), [address]);
    let mut client = Client::greet(TcpStream::connect(address).unwrap(), 3);
    client.go(Style::Extended, "vda");
    assert!(client.ask(0, command::READ, 4096, 4096).unwrap().bytes(4096, 4096) == pattern(4096, 4096));
    client.send(1, Ask { command: command::DISC, ..Ask::default() }, &[]);
    assert!(is_cut_off(&mut client.stream));
    rig.settle();
}
