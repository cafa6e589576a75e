use std::path::Path;

use block::WriteErrors;
use hostio::Cache;
use snapshot::{FreezeOwner, FreezePolicy, ImageFormat};

use super::*;

const LEAST: &str = "id=vda,path=/img,format=raw,socket=/s";

#[test]
fn the_least_disk_has_defaults_for_the_rest() {
    let disk = parse_disk(LEAST).unwrap();
    let expected = DiskConfig {
        id: "vda".to_owned(),
        path: "/img".into(),
        format: ImageFormat::Raw,
        socket: "/s".into(),
        queues: 1,
        serial: "vda".to_owned(),
        readonly: false,
        cache: Cache::Writeback,
        metadata_cache: 64 << 20,
        werror: WriteErrors::Enospc,
        max_overlays: None,
    };
    assert_eq!(disk, expected);
}

#[test]
fn every_key_of_a_disk_is_taken_in_any_order() {
    let disk = parse_disk(
        "max-overlays=30,werror=stop,cache=none,metadata-cache=3G,readonly=on,serial=S 1,queues=4,socket=s,format=qcow2,\
         path=p,id=vdb",
    )
    .unwrap();
    let expected = DiskConfig {
        id: "vdb".to_owned(),
        path: "p".into(),
        format: ImageFormat::Qcow2,
        socket: "s".into(),
        queues: 4,
        serial: "S 1".to_owned(),
        readonly: true,
        cache: Cache::None,
        metadata_cache: 3 << 30,
        werror: WriteErrors::Stop,
        max_overlays: Some(30),
    };
    assert_eq!(disk, expected);
}

#[test]
fn doubled_commas_are_commas_and_a_value_may_hold_an_equals_sign() {
    let path = |text: &str| parse_disk(text).unwrap().path;
    assert_eq!(path("id=a,path=/x,,y,format=raw,socket=/s"), Path::new("/x,y"));
    assert_eq!(path("id=a,path=,,,,,format=raw,socket=/s"), Path::new(",,"), "an odd comma ends the value");
    assert_eq!(path("id=a,path=/x=y,format=raw,socket=/s"), Path::new("/x=y"));
}

#[test]
fn a_mistake_in_a_disk_names_the_key_and_the_way_out() {
    let table = [
        ("path=/img,format=raw,socket=/s", "key `id` is missing; add id=vda"),
        ("id=vda,format=raw,socket=/s", "key `path` is missing; add path=FILE"),
        ("id=vda,path=/img,socket=/s", "key `format` is missing; add format=raw|qcow2"),
        ("id=vda,path=/img,format=raw", "key `socket` is missing; add socket=SOCKET"),
        ("id=vda,path=/img,format=vmdk,socket=/s", "key `format` can not be `vmdk`; it is one of raw, qcow2"),
        ("", "`` has no value; write KEY=VALUE, and a comma inside a value as two (`,,`)"),
        ("id=,path=/img", "key `id` has an empty value; give it one or leave the key out"),
    ];
    for (text, message) in table {
        assert_eq!(parse_disk(text).unwrap_err().to_string(), message, "{text}");
    }
    let added = [
        ("readonly", "`readonly` has no value; write KEY=VALUE, and a comma inside a value as two (`,,`)"),
        ("readonly=yes", "key `readonly` can not be `yes`; it is one of on, off"),
        ("queues=0", "key `queues` can not be `0`; it is a number from 1 to 64"),
        ("queues=65", "key `queues` can not be `65`; it is a number from 1 to 64"),
        ("werror=ignore", "key `werror` can not be `ignore`; it is one of report, enospc, stop"),
        ("cache=unsafe", "key `cache` can not be `unsafe`; it is one of writeback, none"),
        (
            "metadata-cache=64",
            "key `metadata-cache` can not be `64`; it is a size from 1M to 64G, as 4096K, 64M or 1G",
        ),
        (
            "metadata-cache=99999999999999999999G",
            "key `metadata-cache` can not be `99999999999999999999G`; it is a size from 1M to 64G, as 4096K, 64M or 1G",
        ),
        ("id=vdb", "key `id` is given twice; give it once"),
        (
            "size=1G",
            "unknown key `size`; the keys are id, path, format, socket, queues, serial, readonly, cache, metadata-cache, \
             werror, max-overlays",
        ),
        (
            "serial=123456789012345678901",
            "key `serial` can not be `123456789012345678901`; a guest sees at most 20 printable ASCII characters",
        ),
    ];
    for (more, message) in added {
        assert_eq!(parse_disk(&format!("{LEAST},{more}")).unwrap_err().to_string(), message, "{more}");
    }
}

#[test]
fn an_id_can_be_part_of_a_file_name() {
    for id in ["../x", ".x", "-x", "a b", "ä", &"x".repeat(65)] {
        let text = format!("id={id},path=/img,format=raw,socket=/s");
        assert_eq!(parse_disk(&text), Err(Mistake::BadId { value: id.to_owned() }));
    }
    let longest = parse_disk(&format!("id={},path=/i,format=raw,socket=/s", "x".repeat(64))).unwrap();
    assert_eq!(longest.serial.len(), 20, "a serial that was not given fits GET_ID");
}

const FILE: &str = r#"
state = "state"
control = "/run/frazil/vm1.sock"
agent = "agent.sock"
freeze-owner = "external"
freeze = "never"
pre-sync = "off"
allow-folders = ["/srv/templates", "more"]
target-folders = ["out"]
tls-folders = ["pki"]
sandbox = "landlock"
metrics = "unix:metrics.sock"
users = [0, 64055]

[[disk]]
id = "vda"
path = "a,b.img"
format = "raw"
socket = "vda.sock"
queues = 2
readonly = true

[[disk]]
id = "vdb"
path = "/dev/vg/b"
format = "raw"
socket = "/run/vdb.sock"
cache = "none"
"#;

#[test]
fn a_file_says_the_same_as_flags_and_its_paths_start_from_its_folder() {
    let config = read(FILE).unwrap().based_on(Path::new("/etc/frazil")).unwrap();
    config.check().unwrap();
    assert_eq!(config.state, Path::new("/etc/frazil/state"));
    assert_eq!(config.control, Path::new("/run/frazil/vm1.sock"));
    assert_eq!(config.agent.as_deref(), Some(Path::new("/etc/frazil/agent.sock")));
    assert_eq!(config.freeze_owner, FreezeOwner::External);
    assert_eq!(config.freeze, FreezePolicy::Never);
    assert!(!config.pre_sync);
    assert_eq!(config.allow_folders, ["/srv/templates", "/etc/frazil/more"].map(PathBuf::from));
    assert_eq!(config.target_folders, [PathBuf::from("/etc/frazil/out")]);
    assert_eq!(config.tls_folders, [PathBuf::from("/etc/frazil/pki")]);
    assert_eq!((config.sandbox, config.users), (SandboxMode::Landlock, vec![0, 64055]));
    assert_eq!(config.metrics, Some(MetricsAddress::Unix("/etc/frazil/metrics.sock".into())));
    let flags = [
        "id=vda,path=/etc/frazil/a,,b.img,format=raw,socket=/etc/frazil/vda.sock,queues=2,readonly=on",
        "id=vdb,path=/dev/vg/b,format=raw,socket=/run/vdb.sock,cache=none",
    ];
    assert_eq!(config.disks, flags.map(|text| parse_disk(text).unwrap()));
}

#[test]
fn a_mistake_in_a_file_names_the_key_and_the_way_out() {
    let table = [
        (
            "control = \"c\"\n[[disk]]\nid=\"a\"\npath=\"p\"\nformat=\"raw\"\nsocket=\"s\"",
            "key `state` is missing",
        ),
        ("state = \"s\"\ncontrol = \"c\"", "no disk to serve; add a [[disk]] table"),
        (
            "disk = 3",
            "key `disk` has a value of the wrong kind (integer); write a [[disk]] table for each disk",
        ),
        (
            "disks = []",
            "unknown key `disks`; the keys are state, control, agent, freeze-owner, freeze, pre-sync, allow-folders, \
             target-folders, tls-folders, sandbox, metrics, users, disk",
        ),
        ("freeze = [1]\n[[disk]]", "[[disk]] number 1: key `id` is missing; add id=vda"),
        (
            "[[disk]]\nid = \"vdx\"\nsize = 1",
            "[[disk]] number 1 (id vdx): unknown key `size`; the keys are id, ",
        ),
        (
            "disk = []\nallow-folders = \"/srv\"",
            "key `allow-folders` has a value of the wrong kind (string); write a list of strings",
        ),
        (
            "disk = []\nallow-folders = [1]",
            "key `allow-folders` has a value of the wrong kind (integer); write a list of strings",
        ),
        ("state = ", "TOML parse error at line 1"),
    ];
    for (text, start) in table {
        let message = read(text).unwrap_err().to_string();
        assert!(message.starts_with(start), "{text}\ngave {message}");
    }
    let message = read(&FILE.replace("\"never\"", "\"maybe\"")).unwrap_err().to_string();
    assert_eq!(message, "key `freeze` can not be `maybe`; it is one of require, prefer, never");
    let message = read(&FILE.replace("[0, 64055]", "[-1]")).unwrap_err().to_string();
    assert_eq!(
        message,
        "key `users` has a value of the wrong kind (integer); write a list of user ids, as [0, 107]"
    );
    let message = read(&FILE.replace("\"state\"", "1.5")).unwrap_err().to_string();
    assert_eq!(message, "key `state` has a value of the wrong kind (float); write a string");
}

fn with_disks(disks: &[&str]) -> Config {
    let mut config = read(FILE).unwrap();
    config.disks = disks.iter().map(|text| parse_disk(text).unwrap()).collect();
    config
}

#[test]
fn disks_that_would_get_in_each_others_way_are_refused() {
    let message = |disks: &[&str]| with_disks(disks).check().unwrap_err().to_string();
    assert_eq!(
        message(&["id=a,path=/a,format=raw,socket=/s1", "id=a,path=/b,format=raw,socket=/s2"]),
        "two disks have id=a; each needs its own"
    );
    assert_eq!(
        message(&["id=a,path=/a,format=raw,socket=/s", "id=b,path=/b,format=raw,socket=/s"]),
        "/s is given to socket of disk a and to socket of disk b; each needs its own"
    );
    assert_eq!(
        message(&["id=a,path=/a,format=raw,socket=/s1,readonly=on", "id=b,path=/a,format=raw,socket=/s2"]),
        "/a is given to path of disk a and to path of disk b; each needs its own"
    );
    with_disks(&[
        "id=a,path=/a,format=raw,socket=/s1,readonly=on",
        "id=b,path=/a,format=raw,socket=/s2,readonly=on",
    ])
    .check()
    .unwrap();
}

#[test]
fn a_socket_path_that_the_kernel_can_not_bind_is_refused() {
    let long = format!("/{}", "x".repeat(107));
    let config = with_disks(&[&format!("id=a,path=/a,format=raw,socket={long}")]);
    assert_eq!(config.check(), Err(Mistake::LongSocket { key: "socket".to_owned(), len: 108 }));
}

#[test]
fn a_policy_that_can_never_be_met_is_refused() {
    let mut config = with_disks(&[LEAST]);
    config.freeze = FreezePolicy::Require;
    config.check().unwrap();
    config.freeze_owner = FreezeOwner::None;
    assert_eq!(config.check(), Err(Mistake::RequireWithoutOwner));
    config.freeze_owner = FreezeOwner::Frazil;
    config.check().unwrap();
    config.agent = None;
    assert_eq!(config.check(), Err(Mistake::RequireWithoutAgent));
}

#[test]
fn metrics_are_at_a_socket_or_at_a_host_and_port() {
    assert_eq!(parse_metrics("unix:/run/m").unwrap(), MetricsAddress::Unix("/run/m".into()));
    for address in ["127.0.0.1:9430", "[::1]:0", "localhost:80"] {
        assert_eq!(parse_metrics(address).unwrap(), MetricsAddress::Tcp(address.to_owned()));
    }
    for wrong in ["", "unix:", ":80", "localhost", "localhost:", "localhost:99999", "/run/m"] {
        let mistake = parse_metrics(wrong).unwrap_err();
        assert!(mistake.to_string().contains("unix:PATH or HOST:PORT"), "{wrong}: {mistake}");
    }
}
