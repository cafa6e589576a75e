use std::cell::RefCell;
use std::ops::ControlFlow;
use std::time::Duration;

use snapshot::CreateRequest;

use super::*;
use crate::error::ErrorClass;
use crate::message::parse_request;
use crate::testing::Fake;

/// Runs requests one after the other as one client, and returns what came of the last.
fn run_all(service: &Fake, negotiated: bool, requests: &[Value]) -> Outcome {
    let caller = Caller::alone(service);
    let mut negotiated = negotiated;
    let mut last = nothing();
    for request in requests {
        last =
            parse_request(request.clone()).1.and_then(|request| dispatch(&caller, &mut negotiated, request));
    }
    last
}

fn run_one(name: &str, arguments: Value) -> Outcome {
    let service = Fake::new();
    let first = json!({"execute": "snapshot-create", "arguments": {"name": "first"}});
    run_all(&service, true, &[first, json!({"execute": name, "arguments": arguments})])
}

fn failure(outcome: Outcome) -> (ErrorClass, String) {
    let error = outcome.unwrap_err();
    (error.class, error.desc)
}

#[test]
fn only_the_negotiation_works_before_the_negotiation() {
    let service = Fake::new();
    let expecting = (
        ErrorClass::CommandNotFound,
        "Expecting capabilities negotiation with 'qmp_capabilities'".to_owned(),
    );
    for name in ["query-version", "quit", "no-such-command"] {
        assert_eq!(failure(run_all(&service, false, &[json!({"execute": name})])), expecting);
    }
    assert!(!service.has_quit());
    let (class, _) = failure(run_all(&service, false, &[json!({})]));
    assert_eq!(class, ErrorClass::GenericError);
    let negotiate = json!({"execute": "qmp_capabilities", "arguments": {"enable": []}});
    assert_eq!(run_all(&service, false, std::slice::from_ref(&negotiate)), Ok(json!({})));
    let twice = run_all(&service, false, &[negotiate.clone(), negotiate.clone()]);
    let complete = "Capabilities negotiation is already complete, command ignored";
    assert_eq!(failure(twice), (ErrorClass::CommandNotFound, complete.to_owned()));
    assert!(run_all(&service, false, &[negotiate, json!({"execute": "query-version"})]).is_ok());
}

#[test]
fn a_capability_that_is_not_offered_is_refused_and_the_negotiation_goes_on() {
    let service = Fake::new();
    for (enable, desc) in [
        (json!(["oob"]), "Capability oob not available"),
        (json!(["x"]), "Parameter 'enable[0]' does not accept value 'x'"),
    ] {
        let negotiate = json!({"execute": "qmp_capabilities", "arguments": {"enable": enable}});
        let refused = run_all(&service, false, std::slice::from_ref(&negotiate));
        assert_eq!(failure(refused), (ErrorClass::GenericError, desc.to_owned()));
        let (class, _) = failure(run_all(&service, false, &[negotiate, json!({"execute": "query-name"})]));
        assert_eq!(class, ErrorClass::CommandNotFound);
    }
}

#[test]
fn failures_have_the_class_and_the_words_that_clients_expect() {
    use ErrorClass::{CommandNotFound, DeviceNotActive, DeviceNotFound, GenericError};
    for (name, arguments, class, desc) in [
        ("eject", json!({}), CommandNotFound, "The command eject has not been found"),
        ("snapshot-create", json!({}), GenericError, "Parameter 'name' is missing"),
        ("snapshot-create", json!({"name": "a", "foo": 1}), GenericError, "Parameter 'foo' is unexpected"),
        ("query-name", json!({"foo": 1}), GenericError, "Parameter 'foo' is unexpected"),
        ("snapshot-create", json!({"name": "first"}), GenericError, "a snapshot is already named first"),
        ("query-snapshot", json!({"name": "x"}), DeviceNotFound, "no snapshot is named x"),
        ("snapshot-delete", json!({"name": "x"}), DeviceNotFound, "no snapshot is named x"),
        ("snapshot-release", json!({"name": "x"}), DeviceNotFound, "no snapshot is named x"),
        ("job-finalize", json!({"id": "x"}), GenericError, "Job not found"),
        ("block-job-finalize", json!({"id": "x"}), DeviceNotActive, "Block job 'x' not found"),
        ("block-job-cancel", json!({"device": "x"}), DeviceNotActive, "Block job 'x' not found"),
        (
            "snapshot-export",
            json!({"name": "first", "disk": "vda", "target": "a.raw", "format": "raw"}),
            GenericError,
            "Parameter 'target' expects an absolute path",
        ),
        (
            "snapshot-export",
            json!({"name": "first", "disk": "vdz", "target": "/a.raw", "format": "raw"}),
            DeviceNotFound,
            "first has no disk vdz",
        ),
        (
            "snapshot-prepare",
            json!({"name": "a", "lease": -1}),
            GenericError,
            "Parameter 'lease' expects uint32",
        ),
    ] {
        assert_eq!(failure(run_one(name, arguments)), (class, desc.to_owned()));
    }
}

#[test]
fn a_prepared_snapshot_has_a_lease_and_is_released_or_aborted() {
    let service = Fake::new();
    let call = |name: &str, arguments: Value| {
        run_all(&service, true, &[json!({"execute": name, "arguments": arguments})])
    };
    call("snapshot-prepare", json!({"name": "a"})).unwrap();
    assert_eq!(service.lease(), Some(Duration::from_secs(5)));
    assert_eq!(call("query-frazil", json!({})).unwrap()["prepared"], "a");
    call("snapshot-abort", json!({"name": "a"})).unwrap();
    call("snapshot-prepare", json!({"name": "b", "lease": 1500, "disks": ["vdb"]})).unwrap();
    assert_eq!(service.lease(), Some(Duration::from_millis(1500)));
    assert_eq!(call("snapshot-release", json!({"name": "b"})).unwrap()["disks"][0]["id"], "vdb");
    assert_eq!(call("query-snapshots", json!({})).unwrap().as_array().unwrap().len(), 1);
}

#[test]
fn a_revert_discards_newer_snapshots_only_if_told_so() {
    let service = Fake::new();
    let request = |name: &str, arguments: Value| json!({"execute": name, "arguments": arguments});
    let create = |name: &str| request("snapshot-create", json!({"name": name}));
    run_all(&service, true, &[create("a"), create("b")]).unwrap();
    let (_, desc) = failure(run_all(&service, true, &[request("snapshot-revert", json!({"name": "a"}))]));
    assert_eq!(desc, "there are newer snapshots than a");
    let revert = request("snapshot-revert", json!({"name": "a", "discard-newer": true}));
    run_all(&service, true, &[revert]).unwrap();
    assert_eq!(service.list().len(), 1);
}

#[test]
fn an_export_tells_how_far_it_is() {
    let service = Fake::new();
    let seen = RefCell::new(Vec::new());
    let progress = |name: &str, data| {
        seen.borrow_mut().push((name.to_owned(), data));
        ControlFlow::Continue(())
    };
    let caller = Caller { progress: &progress, ..Caller::alone(&service) };
    service.create(CreateRequest { name: "a".into(), disks: None, freeze: None }).unwrap();
    let arguments = json!({"name": "a", "disk": "vda", "target": "/x", "format": "qcow2"});
    let (_, request) = parse_request(json!({"execute": "snapshot-export", "arguments": arguments}));
    dispatch(&caller, &mut true, request.unwrap()).unwrap();
    let last = json!({"name": "a", "disk": "vda", "offset": 100, "len": 100});
    assert_eq!(seen.borrow().last(), Some(&(EXPORT_PROGRESS.to_owned(), last)));
}

#[test]
fn the_disks_are_shown_as_qemu_shows_them() {
    let disks = run_one("query-block", json!({})).unwrap();
    let inserted = &disks[0]["inserted"];
    assert_eq!(disks[0]["device"], "vda");
    assert_eq!(disks[0]["qdev"], "/machine/peripheral/vda/virtio-backend");
    assert_eq!(inserted["node-name"], "vda", "it keeps its name, whatever its layers");
    assert_eq!(inserted["file"], "/images/vda.1.qcow2");
    assert_eq!(inserted["ro"], false);
    assert_eq!(inserted["backing_file_depth"], 0);
    assert_eq!(
        (&inserted["backing_file"], &inserted["image"]["backing-filename"]),
        (&json!(null), &json!(null))
    );
    assert_eq!(inserted["image"]["virtual-size"], 1 << 30);
    assert_eq!(inserted["cache"], json!({"writeback": true, "direct": true, "no-flush": false}));
    assert_eq!(inserted["dirty-bitmaps"][0]["name"], "b");
    let nodes = run_one("query-named-block-nodes", json!({"flat": true})).unwrap();
    assert_eq!(nodes[0], *inserted);
    assert_eq!(nodes[1]["image"]["backing-filename"], "/images/base.raw");
    assert_eq!(nodes[1]["backing_file_depth"], 1);
    assert_eq!(
        (&nodes[2]["node-name"], &nodes[2]["ro"], &nodes[2]["drv"]),
        (&json!("vda.0"), &json!(true), &json!("raw"))
    );
    assert_eq!((&nodes[3]["node-name"], &nodes[3]["drv"]), (&json!("target"), &json!("raw")));
    let status = run_one("query-status", json!({})).unwrap();
    assert_eq!((&status["running"], &status["status"]), (&json!(true), &json!("running")));
    assert_eq!(status["sandbox"], run_one("query-frazil", json!({})).unwrap()["sandbox"]);
}

#[test]
fn the_disks_are_paused_from_stop_to_cont() {
    let service = Fake::new();
    let status = |before: &str| {
        let commands = [json!({"execute": before}), json!({"execute": "query-status"})];
        let status = run_all(&service, true, &commands).unwrap();
        (status["running"] == true, status["status"].as_str().unwrap().to_owned())
    };
    assert_eq!(status("stop"), (false, "paused".to_owned()));
    assert_eq!(status("cont"), (true, "running".to_owned()));
}

#[test]
fn what_frazil_has_not_is_refused_with_what_to_do_instead_and_is_not_listed() {
    let (class, desc) =
        failure(run_one("blockdev-snapshot-sync", json!({"device": "vda", "snapshot-file": "/x"})));
    assert_eq!(class, ErrorClass::CommandNotFound);
    assert!(desc.starts_with("Command blockdev-snapshot-sync has been disabled: "), "{desc}");
    assert!(desc.contains("snapshot-create"), "{desc}");
    let action = json!({"type": "blockdev-snapshot-sync", "data": {"device": "vda", "snapshot-file": "/x"}});
    let (class, desc) = failure(run_one("transaction", json!({"actions": [action]})));
    assert_eq!(class, ErrorClass::GenericError);
    assert!(desc.contains("snapshot-create"), "{desc}");
    let listed = run_one("query-commands", json!({})).unwrap();
    assert!(!listed.as_array().unwrap().contains(&json!({"name": "blockdev-snapshot-sync"})));
    assert!(failure(run_one("system_powerdown", json!({}))).1.contains("no machine"));
}

#[test]
fn a_disk_is_resized_by_its_name_or_by_that_of_its_active_layer() {
    let size = 2_u64 << 30;
    for arguments in [
        json!({"device": "vda", "size": size}),
        json!({"node-name": "vda.1", "size": size}),
        json!({"node-name": "vda", "size": size}),
    ] {
        let service = Fake::new();
        run_all(&service, true, &[json!({"execute": "block_resize", "arguments": arguments})]).unwrap();
        assert_eq!(service.disks()[0].capacity, size);
    }
    let refused = |arguments| failure(run_one("block_resize", arguments));
    let both = refused(json!({"device": "vda", "node-name": "vda.1", "size": size}));
    assert_eq!(both.1, "Exactly one of 'device' and 'node-name' must be given");
    assert_eq!(refused(json!({"size": size})), both);
    assert_eq!(refused(json!({"device": "vdx", "size": size})).0, ErrorClass::GenericError);
    let missing = (ErrorClass::GenericError, "Cannot find device='' nor node-name='vda.7'".to_owned());
    assert_eq!(refused(json!({"node-name": "vda.7", "size": size})), missing);
    let frozen = refused(json!({"node-name": "vda.0", "size": size}));
    assert_eq!(
        frozen,
        (ErrorClass::GenericError, "node 'vda.0' is not the active layer of its disk".to_owned())
    );
    assert_eq!(refused(json!({"device": "vda", "size": -1})).0, ErrorClass::GenericError);
}

/// As deep as the stream lets through, on a thread's stack as a client has it.
#[test]
fn nodes_within_nodes_are_read_to_any_depth_that_arrives() {
    let mut node = json!({"driver": "file", "filename": "/x"});
    for _ in 3..crate::stream::MAX_DEPTH {
        node = json!({"driver": "raw", "file": node});
    }
    node["node-name"] = json!("top");
    let text = json!({"execute": "blockdev-add", "arguments": node}).to_string();
    let depth = text.bytes().filter(|byte| *byte == b'{').count();
    assert_eq!(depth, crate::stream::MAX_DEPTH - 1);
    let begun = std::time::Instant::now();
    assert_eq!(run_one("blockdev-add", node), Ok(json!({})));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}
