use super::message::{HEADER, MAX_FDS, MAX_PAYLOAD};
use super::*;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;

use rustix::event::{EventfdFlags, eventfd};

/// A request that is kept, one that is answered.
const KEPT: u32 = 21;
const ANSWERED: u32 = 31;

fn pass(message: Message) -> io::Result<Verdict> {
    Ok(Verdict::Forward(message))
}

/// One that is never readable.
fn never() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

fn header(request: u32, size: u32) -> Vec<u8> {
    [request, VERSION, size].map(u32::to_ne_bytes).concat()
}

#[test]
fn messages_pass_whole_with_their_descriptors_or_are_answered() {
    let (mut front, outer) = UnixStream::pair().unwrap();
    let (mut framework, inner) = UnixStream::pair().unwrap();
    let (channel, theirs) = UnixStream::pair().unwrap();
    let relay = thread::spawn(move || {
        let mut kept = Vec::new();
        let inspect = |message: Message| match message.request() {
            KEPT => {
                kept.push(message.fds[0].try_clone().unwrap());
                pass(message)
            }
            ANSWERED => Ok(Verdict::Answer(Some(message.answer(b"mine", Vec::new())))),
            _ => pass(message),
        };
        run(&outer, &inner, never().as_fd(), inspect).map(|()| kept)
    });
    // In pieces, and two at once.
    let message = [header(5, 600), vec![7; 600]].concat();
    message.chunks(100).for_each(|piece| front.write_all(piece).unwrap());
    let set = Message { bytes: header(KEPT, 0), fds: vec![theirs.into()] };
    set.send(front.as_fd()).unwrap();
    let first = receive(framework.as_fd()).unwrap().unwrap();
    assert_eq!((first.bytes, first.fds.len()), (message, 0));
    let second = receive(framework.as_fd()).unwrap().unwrap();
    assert_eq!((second.request(), second.fds.len()), (KEPT, 1));
    framework.write_all(&header(1, 0)).unwrap();
    let mut answer = [0; HEADER];
    front.read_exact(&mut answer).unwrap();
    assert_eq!(answer.to_vec(), header(1, 0));
    front.write_all(&header(ANSWERED, 0)).unwrap();
    let answer = receive(front.as_fd()).unwrap().unwrap();
    assert_eq!((answer.request(), answer.payload()), (ANSWERED, b"mine".as_slice()));
    drop(framework);
    let kept = relay.join().unwrap().unwrap();
    assert_eq!(kept.len(), 1);
    tell_config_change(&kept[0]).unwrap();
    let told = receive(channel.as_fd()).unwrap().unwrap();
    assert_eq!(told.bytes, header(CONFIG_CHANGE, 0));
    while tell_config_change(&kept[0]).is_ok() {}
    let full = tell_config_change(&kept[0]).unwrap_err();
    assert_eq!(full.kind(), io::ErrorKind::WouldBlock, "one that does not read would hold us up");
}

#[test]
fn descriptors_are_counted_over_all_pieces_of_a_message() {
    let (front, outer) = UnixStream::pair().unwrap();
    let (_framework, inner) = UnixStream::pair().unwrap();
    let message = header(5, 8);
    for byte in message.chunks(1).take(2) {
        let fds = (0..MAX_FDS - 1).map(|_| front.as_fd().try_clone_to_owned().unwrap()).collect();
        Message { bytes: byte.to_vec(), fds }.send(front.as_fd()).unwrap();
    }
    let ended = run(&outer, &inner, never().as_fd(), pass).unwrap_err();
    assert_eq!(ended.to_string(), "a message with too many descriptors");
}

#[test]
fn what_is_no_message_ends_the_session() {
    for (bytes, why) in [
        (header(5, MAX_PAYLOAD as u32 + 1), "a message of 4097 bytes"),
        (header(5, 8)[..5].to_vec(), "unexpected end of file"),
        (header(5, 8), "unexpected end of file"),
    ] {
        let (mut front, outer) = UnixStream::pair().unwrap();
        let (_framework, inner) = UnixStream::pair().unwrap();
        front.write_all(&bytes).unwrap();
        drop(front);
        assert_eq!(run(&outer, &inner, never().as_fd(), pass).unwrap_err().to_string(), why);
    }
}

#[test]
fn memory_that_is_gone_ends_the_session() {
    let (_front, outer) = UnixStream::pair().unwrap();
    let (_framework, inner) = UnixStream::pair().unwrap();
    let gone = eventfd(1, EventfdFlags::CLOEXEC).unwrap();
    let ended = run(&outer, &inner, gone.as_fd(), pass).unwrap_err();
    assert_eq!(ended.to_string(), "memory that the front-end gave is gone");
}

/// A front-end that asked and never read had the framework wait for the relay, and the relay for the framework: the end of
/// the daemon could not free them.
#[test]
fn a_front_end_that_does_not_read_holds_up_nobody_once_it_is_gone() {
    let (front, outer) = UnixStream::pair().unwrap();
    let (framework, inner) = UnixStream::pair().unwrap();
    let shut = outer.try_clone().unwrap();
    let relay = thread::spawn(move || run(&outer, &inner, never().as_fd(), pass));
    // A framework that answers each question with as much as a message holds.
    let answers = thread::spawn(move || {
        while let Ok(Some(question)) = receive(framework.as_fd()) {
            if question.answer(&[0; MAX_PAYLOAD], Vec::new()).send(framework.as_fd()).is_err() {
                break;
            }
        }
    });
    front.set_nonblocking(true).unwrap();
    let question = [header(24, 4096), vec![0; 4096]].concat();
    let mut last = std::time::Instant::now();
    while last.elapsed().as_millis() < 100 {
        if (&front).write(&question).is_ok() {
            last = std::time::Instant::now();
        }
    }
    shut.shutdown(std::net::Shutdown::Both).unwrap();
    drop(relay.join().unwrap());
    answers.join().unwrap();
}
