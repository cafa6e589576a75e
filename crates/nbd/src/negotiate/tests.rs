use super::*;
use crate::context::BitmapContext;
use crate::export::{Export, Removal};
use crate::testing::{Client, info_data, meta_data, number};
use block::testing::MemStorage;
use block::{DirtyBitmap, Disk, RawDisk};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

fn exports() -> Arc<Exports> {
    let disk = |writable: bool| -> Arc<dyn Disk> {
        Arc::new(RawDisk::new(Arc::new(MemStorage::new(1 << 20)), !writable).unwrap())
    };
    let exports = Exports::default();
    let bitmap = || Arc::new(DirtyBitmap::new(1 << 20, 16).unwrap());
    let vda = Export::new("vda", disk(false))
        .description("the first")
        .context(Arc::new(BitmapContext::new("a", bitmap())))
        .context(Arc::new(BitmapContext::new("b", bitmap())));
    exports.add(vda).unwrap();
    exports.add(Export::new("vdb", disk(true)).writable()).unwrap();
    Arc::new(exports)
}

/// A client in conversation with a negotiator.
fn talk(exports: &Arc<Exports>, tls: Tls) -> (Client<UnixStream>, JoinHandle<io::Result<Outcome>>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let exports = Arc::clone(exports);
    let negotiation = std::thread::spawn(move || {
        let outcome = Negotiator::new(&exports, tls).run(&mut theirs)?;
        if let Outcome::Chosen(chosen) = &outcome {
            theirs.write_all(&chosen.farewell)?;
        }
        Ok(outcome)
    });
    (Client::greet(ours, 3), negotiation)
}

fn kinds(replies: &[(u32, Vec<u8>)]) -> Vec<u32> {
    replies.iter().map(|(kind, _)| *kind).collect()
}

const INVALID: u32 = Reply::Invalid as u32;
const UNKNOWN: u32 = Reply::Unknown as u32;
const TLS_REQUIRED: u32 = Reply::TlsRequired as u32;

#[test]
fn exports_are_listed_and_described() {
    let (mut client, _) = talk(&exports(), Tls::None);
    let list = client.option(option::LIST, &[]);
    assert_eq!(kinds(&list), [2, 2, 1]);
    assert_eq!(list[0].1, b"\0\0\0\x03vdathe first");
    assert_eq!(list[1].1, b"\0\0\0\x03vdb");
    let told = client.option(option::INFO, &info_data("vda", &[info::BLOCK_SIZE, 99, info::DESCRIPTION]));
    assert_eq!(kinds(&told), [3, 3, 3, 1]);
    // 1 MiB; flags: has flags, read-only, flush, FUA, multi-conn, cache.
    assert_eq!(told[0].1, [0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0b101, 0b0000_1111]);
    assert_eq!(told[1].1, b"\0\x02the first");
    assert_eq!(told[2].1, [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]);
}

#[test]
fn flags_tell_what_can_be_done() {
    let (mut client, _) = talk(&exports(), Tls::None);
    assert_eq!(client.verdict(option::STRUCTURED_REPLY, &[]), Some(1));
    let told = client.option(option::INFO, &info_data("vdb", &[]));
    // Trim, write zeroes and DF too, and not read-only.
    assert_eq!(told[0].1[10..], [0b101, 0b1110_1101]);
}

#[test]
fn what_makes_no_sense_is_answered_and_the_talk_goes_on() {
    let (mut client, negotiation) = talk(&exports(), Tls::None);
    for (code, data, verdict) in [
        (option::LIST, &b"x"[..], INVALID),
        (option::STRUCTURED_REPLY, b"x", INVALID),
        (option::EXTENDED_HEADERS, b"x", INVALID),
        (option::STARTTLS, b"", Reply::Policy as u32),
        (option::INFO, b"", INVALID),
        (option::GO, b"\xff\xff\xff\xffvda", INVALID),
        (option::GO, b"\0\0\0\x03vdz\0\0", UNKNOWN),
        (option::INFO, b"\0\0\0\x02\xff\xfe\0\0", INVALID),
        (option::SET_META_CONTEXT, b"\0\0\0\x03vda\0\0\0\0", INVALID),
        (4, b"", Reply::Unsupported as u32),
        (0, b"", Reply::Unsupported as u32),
        (u32::MAX, b"junk", Reply::Unsupported as u32),
        (option::INFO, &[0; 70_000], Reply::TooBig as u32),
        (option::ABORT, b"whatever", 1),
    ] {
        assert_eq!(client.verdict(code, data), Some(verdict), "{code} {:?}", &data[..data.len().min(16)]);
    }
    assert!(matches!(negotiation.join().unwrap(), Ok(Outcome::End)));
}

#[test]
fn without_magic_or_with_strange_flags_the_server_hangs_up() {
    let (mut client, negotiation) = talk(&exports(), Tls::None);
    client.stream.write_all(b"IHAVEOPX\0\0\0\x03\0\0\0\0").unwrap();
    assert_eq!(negotiation.join().unwrap().unwrap_err().kind(), ErrorKind::InvalidData);
    for flags in [0, 2, 7, u32::MAX] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let client = std::thread::spawn(move || Client::greet(ours, flags));
        let exports = exports();
        let error = Negotiator::new(&exports, Tls::None).run(&mut theirs).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        client.join().unwrap();
    }
}

#[test]
fn contexts_are_selected_by_name_and_listed_by_wildcards() {
    let (mut client, negotiation) = talk(&exports(), Tls::None);
    client.verdict(option::STRUCTURED_REPLY, &[]);
    let mut ask = |code, queries: &[&str]| -> Vec<(u64, String)> {
        let replies = client.option(code, &meta_data("vda", queries));
        assert_eq!(replies.last().unwrap().0, 1);
        let context = |(_, payload): &(u32, Vec<u8>)| {
            let mut rest = &payload[..];
            (number::<4>(&mut rest).unwrap(), String::from_utf8(rest.to_vec()).unwrap())
        };
        replies[..replies.len() - 1].iter().map(context).collect()
    };
    let all = ["base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"];
    let names = |found: Vec<(u64, String)>| found.into_iter().map(|(_, name)| name).collect::<Vec<_>>();
    let list = option::LIST_META_CONTEXT;
    assert_eq!(names(ask(list, &[])), all);
    assert_eq!(names(ask(list, &["qemu:"])), all[1..]);
    assert_eq!(names(ask(list, &["qemu:dirty-bitmap:"])), all[1..]);
    assert_eq!(names(ask(list, &["base:", "other:thing", "qemu:dirty-bitmap:b"])), [all[0], all[2]]);
    let set = option::SET_META_CONTEXT;
    assert_eq!(ask(set, &[]), []);
    assert_eq!(ask(set, &["base:", "qemu:", "qemu:dirty-bitmap:"]), []);
    let found = ask(set, &["qemu:dirty-bitmap:b", "qemu:dirty-bitmap:b", "base:allocation"]);
    assert_eq!(found, [(0, all[0].to_owned()), (1, all[2].to_owned())]);
    assert_eq!(client.verdict(option::GO, &info_data("vda", &[])), Some(1));
    let Ok(Outcome::Chosen(chosen)) = negotiation.join().unwrap() else { panic!("nothing was chosen") };
    let selected: Vec<_> = chosen.contexts.iter().map(|context| context.name()).collect();
    assert_eq!(selected, [all[0], all[2]]);
}

#[test]
fn contexts_of_another_export_and_those_before_a_failure_are_forgotten() {
    for spoil in [meta_data("vdb", &["base:allocation"]), b"junk".to_vec(), meta_data("vdz", &[])] {
        let (mut client, negotiation) = talk(&exports(), Tls::None);
        client.verdict(option::EXTENDED_HEADERS, &[]);
        client.verdict(option::SET_META_CONTEXT, &meta_data("vda", &["base:allocation"]));
        client.verdict(option::SET_META_CONTEXT, &spoil);
        assert_eq!(client.verdict(option::GO, &info_data("vda", &[])), Some(1));
        let Ok(Outcome::Chosen(chosen)) = negotiation.join().unwrap() else { panic!("nothing was chosen") };
        assert!(chosen.contexts.is_empty());
    }
}

#[test]
fn an_export_that_took_the_name_meanwhile_has_none_of_the_old_contexts() {
    let exports = exports();
    let (mut client, negotiation) = talk(&exports, Tls::None);
    client.verdict(option::STRUCTURED_REPLY, &[]);
    client.verdict(option::SET_META_CONTEXT, &meta_data("vda", &["base:allocation"]));
    exports.remove("vda", Removal::Safe).unwrap();
    let disk = RawDisk::new(Arc::new(MemStorage::new(4096)), true).unwrap();
    exports.add(Export::new("vda", Arc::new(disk))).unwrap();
    assert_eq!(client.verdict(option::GO, &info_data("vda", &[])), Some(1));
    let Ok(Outcome::Chosen(chosen)) = negotiation.join().unwrap() else { panic!("nothing was chosen") };
    assert!(chosen.contexts.is_empty());
    assert_eq!(chosen.size, 4096);
}

#[test]
fn extended_headers_win_over_structured_replies() {
    let (mut client, _) = talk(&exports(), Tls::None);
    assert_eq!(client.verdict(option::STRUCTURED_REPLY, &[]), Some(1));
    assert_eq!(client.verdict(option::EXTENDED_HEADERS, &[]), Some(1));
    assert_eq!(client.verdict(option::STRUCTURED_REPLY, &[]), Some(Reply::ExtendedRequired as u32));
    assert_eq!(client.verdict(option::EXPORT_NAME, b"vda"), None, "it must hang up");
}

#[test]
fn the_old_way_to_choose_is_answered_with_size_flags_and_padding() {
    for (flags, padding) in [(3, 0), (1, 124)] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let exports = exports();
        let negotiation = std::thread::spawn(move || Negotiator::new(&exports, Tls::None).run(&mut theirs));
        let mut client = Client::greet(ours, flags);
        client.stream.write_all(&crate::testing::option(option::EXPORT_NAME, b"vda")).unwrap();
        let Ok(Outcome::Chosen(chosen)) = negotiation.join().unwrap() else { panic!("nothing was chosen") };
        assert_eq!(chosen.farewell[..10], [0, 0, 0, 0, 0, 16, 0, 0, 0b101, 0b0000_1111]);
        assert_eq!(chosen.farewell.len(), 10 + padding);
        assert_eq!(chosen.style, Style::Simple);
    }
    let (mut client, negotiation) = talk(&exports(), Tls::None);
    assert_eq!(client.verdict(option::EXPORT_NAME, b"vdz"), None);
    assert!(negotiation.join().unwrap().is_err());
}

#[test]
fn where_tls_is_required_nothing_is_told_before_it() {
    let (mut client, negotiation) = talk(&exports(), Tls::Required);
    for (code, data) in [
        (option::LIST, vec![]),
        (option::INFO, info_data("vda", &[])),
        (option::GO, info_data("vda", &[])),
        (option::GO, b"junk".to_vec()),
        (option::STRUCTURED_REPLY, vec![]),
        (option::LIST_META_CONTEXT, meta_data("vda", &[])),
        (99, vec![]),
    ] {
        assert_eq!(client.option(code, &data), [(TLS_REQUIRED, vec![])], "{code}");
    }
    assert_eq!(client.verdict(option::STARTTLS, b"x"), Some(INVALID));
    assert_eq!(client.verdict(option::STARTTLS, &[]), Some(1));
    assert!(matches!(negotiation.join().unwrap(), Ok(Outcome::StartTls)));
    let (mut client, _) = talk(&exports(), Tls::Required);
    assert_eq!(client.verdict(option::EXPORT_NAME, b"vda"), None, "it must hang up");
    let (mut client, _) = talk(&exports(), Tls::Required);
    assert_eq!(client.verdict(option::ABORT, &[]), Some(1));
}

#[test]
fn tls_begins_once() {
    let (mut client, _) = talk(&exports(), Tls::Active);
    assert_eq!(client.verdict(option::STARTTLS, &[]), Some(INVALID));
    assert_eq!(client.verdict(option::LIST, &[]), Some(1));
}
