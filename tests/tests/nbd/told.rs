//! What clients are told of exports: sizes, names, and what is where.

use std::process::Command;

use serde_json::{Value, json};

use super::served::{MIB, SIZE, Served, contents, run};

fn nbdinfo(served: &Served, argument: &str) -> Value {
    serde_json::from_str(&run(Command::new("nbdinfo").args(["--json", argument]).arg(served.uri()))).unwrap()
}

/// The map of a context: offset, length and type of each run.
fn map(served: &Served, context: &str) -> Vec<(u64, u64, u64)> {
    let number = |run: &Value, key: &str| run[key].as_u64().unwrap();
    let found = nbdinfo(served, &format!("--map={context}"));
    let run = |run: &Value| (number(run, "offset"), number(run, "length"), number(run, "type"));
    found.as_array().unwrap().iter().map(run).collect()
}

#[test]
fn nbdinfo_shows_what_was_offered() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::new(contents(folder.path()).remove(2).export);
    let found = nbdinfo(&served, "--list");
    let export = &found["exports"][0];
    for (key, value) in [
        ("export-name", json!("")),
        ("description", json!("chain")),
        ("export-size", json!(SIZE)),
        ("is_read_only", json!(true)),
        ("can_multi_conn", json!(true)),
        ("can_df", json!(true)),
        ("can_cache", json!(true)),
        ("can_trim", json!(false)),
        ("block_size_minimum", json!(1)),
        ("block_size_preferred", json!(4096)),
        ("block_size_maximum", json!(32 * MIB)),
        ("contexts", json!(["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:changed"])),
    ] {
        assert_eq!(export[key], value, "{key} in {export}");
    }
}

#[test]
fn the_map_of_a_chain_is_where_its_bytes_are() {
    const HOLE: u64 = 3;
    let folder = tempfile::tempdir().unwrap();
    let served = Served::new(contents(folder.path()).remove(2).export);
    let k = 1024;
    let allocation = map(&served, "base:allocation");
    // qemu-img never makes the first block of a raw file a hole.
    let data = |(offset, _, kind): &&(u64, u64, u64)| *kind == 0 && *offset > 0 && *offset < 20 * MIB;
    let found: Vec<_> = allocation.iter().filter(data).map(|(offset, len, _)| (*offset, *len)).collect();
    assert_eq!(found, [(MIB, 2 * MIB), (10 * MIB, 128 * k)]);
    assert!(allocation.contains(&(3 * MIB, 7 * MIB, HOLE)), "{allocation:?}");
    let depth = map(&served, "qemu:allocation-depth");
    for run in [(2 * MIB, 64 * k, 2), (3 * MIB, MIB, 2), (10 * MIB, 64 * k, 1), (23 * MIB, MIB, 1)] {
        assert!(depth.contains(&run), "{run:?} in {depth:?}");
    }
    assert_eq!(depth[0], (0, 2 * MIB, 3), "a raw base holds all of its bytes");
    let changed = map(&served, "qemu:dirty-bitmap:changed");
    let dirty: Vec<_> = changed.into_iter().filter(|run| run.2 == 1).collect();
    assert_eq!(dirty, [(2 * MIB, 64 * k, 1), (23 * MIB, MIB, 1)]);
}

/// QEMU speaks extended headers, libnbd here does not yet.
#[test]
fn qemu_img_sees_the_same_map_and_bitmap() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::new(contents(folder.path()).remove(2).export);
    let qemu_map = |options: String| -> Vec<Value> {
        let text = run(Command::new("qemu-img").args(["map", "--output=json", "--image-opts", &options]));
        serde_json::from_str(&text).unwrap()
    };
    let place = format!("driver=nbd,server.type=unix,server.path={}", served.path("nbd").display());
    let runs = qemu_map(place.clone());
    let data: Vec<_> = runs
        .iter()
        .filter(|run| run["data"] == json!(true))
        .map(|run| run["start"].as_u64().unwrap())
        .collect();
    assert_eq!(data[..3], [0, MIB, 10 * MIB]);
    assert!(runs.iter().any(|run| run["start"] == json!(3 * MIB) && run["length"] == json!(7 * MIB)));
    // QEMU shows a bitmap as holes: what is dirty "has no data".
    let runs = qemu_map(format!("{place},x-dirty-bitmap=qemu:dirty-bitmap:changed"));
    let dirty: Vec<_> = runs
        .iter()
        .filter(|run| run["data"] == json!(false))
        .map(|run| run["start"].as_u64().unwrap())
        .collect();
    assert_eq!(dirty, [2 * MIB, 23 * MIB]);
}

/// Requests that no copying program makes, with the library's own checks switched off.
#[test]
fn nbdsh_finds_replies_to_be_as_they_must() {
    let folder = tempfile::tempdir().unwrap();
    let content = contents(folder.path()).remove(2);
    let served = Served::new(content.export);
    let script = r#"
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.set_pread_initialize(True)
h.connect_uri(uri)
chunks = []
def seen(buf, offset, status, error):
    chunks.append((offset, len(buf), status))
    return 0
# Zeroes and what the file has not are holes, unless the reply may not be in pieces. qemu-img keeps the first block.
data = h.pread_structured(4 << 20, 0, seen)
for offset, length, status in chunks:
    assert (status == nbd.READ_HOLE) == (4096 <= offset < 1 << 20 or offset >= 3 << 20), chunks
assert sum(length for _, length, _ in chunks) == 4 << 20, chunks
chunks.clear()
assert h.pread_structured(4 << 20, 0, seen, nbd.CMD_FLAG_DF) == data
assert [c[:2] for c in chunks] == [(0, 4 << 20)], chunks
assert h.pread(1, (2 << 20) + 1) == b"\x11"
h.cache(1 << 20, 0)
h.flush()
def fails(call, errno):
    try:
        call()
    except nbd.Error as error:
        assert error.errno == errno, error
    else:
        raise AssertionError("it did not fail")
fails(lambda: h.pwrite(b"x" * 512, 0), "EPERM")
fails(lambda: h.zero(512, 0), "EPERM")
fails(lambda: h.trim(512, 0), "EPERM")
fails(lambda: h.pread(512, h.get_size()), "EINVAL")
fails(lambda: h.pread(512, 0, 0x100), "EINVAL")
fails(lambda: h.pread((32 << 20) + 1, 0), "EINVAL")
extents = []
h.block_status(24 << 20, 0, lambda context, offset, entries, error: extents.append(entries) or 0,
               nbd.CMD_FLAG_REQ_ONE)
assert extents == [[4096, 0]], extents
h.shutdown()
"#;
    let script = format!("uri = '{}'\n{script}", served.uri());
    run(Command::new("/usr/bin/python3")
        .args(["-m", "nbd", "-n", "-c"])
        .arg(format!("h = nbd.NBD()\n{script}")));
}
