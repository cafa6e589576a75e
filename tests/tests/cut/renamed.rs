//! What images call the ones beneath them.

use std::path::Path;

use frazil_tests::{Driver, Request};
use serde_json::{Value, json};

use crate::images::{check_sound, qemu_img, same};
use crate::served::{Served, Wanted};

const MIB: u64 = 1 << 20;

/// The backing file as QEMU's tools see it, which look by themselves.
fn beneath(image: &Path) -> String {
    let output = qemu_img(&["info", "-U", "--output=json", image.to_str().unwrap()]);
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    info["backing-filename"].as_str().unwrap().to_owned()
}

#[test]
fn an_image_is_told_another_name_for_the_one_beneath_and_for_nothing_else() {
    let wanted = Wanted { format: "raw", cache: "writeback", disks: 1, queues: 1, bytes: MIB };
    let mut served = Served::start(wanted);
    for name in ["a", "b"] {
        let mut driver = Driver::connect(&served.sockets[0], 1, 1, 4096).unwrap();
        driver.queues[0].fill(0, &[name.as_bytes()[0]; 4096]);
        assert_eq!(driver.queues[0].ask(Request::Write(0)), 0);
        served.ask("snapshot-create", json!({ "name": name }));
    }
    let layers: Vec<_> = served.layers("vd0").into_iter().map(|(path, _)| path).collect();
    let call =
        |node: &str, name: &str| json!({ "device": "vd0", "image-node-name": node, "backing-file": name });
    // A sealed layer, and the active one.
    for (node, image, below) in [("vd0.1", &layers[1], &layers[0]), ("vd0.2", &layers[2], &layers[1])] {
        let name = below.file_name().unwrap().to_str().unwrap();
        assert_eq!(beneath(image), name);
        for new in [below.to_str().unwrap(), &format!("./{name}")] {
            served.ask("change-backing-file", call(node, new));
            assert_eq!(beneath(image), new);
        }
        for wrong in [layers[2].to_str().unwrap(), "nowhere", &format!("file:{name}"), ""] {
            let refused = served.refusal("change-backing-file", call(node, wrong));
            assert!(refused.contains("is not what is beneath"), "{refused}");
        }
        assert_eq!(beneath(image), format!("./{name}"));
    }
    assert!(served.refusal("change-backing-file", call("vd0.0", "x")).contains("qemu-img rebase -u"));
    assert!(served.refusal("change-backing-file", call("vd0.7", "x")).contains("no layer"));
    served.kill();
    served.restart();
    let (now, before) = (served.export_file("b", "vd0"), served.export_file("a", "vd0"));
    served.stop();
    same(&now, &layers[2], "qcow2");
    same(&before, &layers[0], "raw");
    layers[1..].iter().for_each(|image| check_sound(image));
}
