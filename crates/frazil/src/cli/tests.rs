use clap::CommandFactory;
use clap::error::ErrorKind;

use super::*;

const DISK: &str = "id=vda,path=/img,format=raw,socket=/s";

fn parse(line: &[&str]) -> Result<Command, clap::Error> {
    Cli::try_parse_from([&["frazil"], line].concat()).map(|cli| cli.command)
}

#[test]
fn the_words_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn serve_takes_flags_or_a_file_but_not_both() {
    let flags = ["serve", "--state", "/st", "--control", "/c", "--disk", DISK];
    let Command::Serve(serve) = parse(&flags).unwrap() else { panic!() };
    assert_eq!(serve.flags.disks.len(), 1);
    assert_eq!(serve.flags.freeze, FreezePolicy::Prefer);
    assert_eq!(serve.flags.freeze_owner, FreezeOwner::Frazil);
    assert!(serve.flags.pre_sync);

    let folders = [&flags[..], &["--allow-folder", "/a", "--allow-folder", "b"]].concat();
    let Command::Serve(serve) = parse(&folders).unwrap() else { panic!() };
    assert_eq!(serve.flags.allow_folders, ["/a", "b"].map(PathBuf::from));

    let Command::Serve(serve) = parse(&["serve", "--config", "/f.toml"]).unwrap() else { panic!() };
    assert_eq!(serve.config, Some("/f.toml".into()));

    for more in [
        ["--state", "/s"],
        ["--disk", DISK],
        ["--freeze", "never"],
        ["--pre-sync", "off"],
        ["--allow-folder", "/a"],
        ["--target-folder", "/a"],
        ["--sandbox", "off"],
        ["--metrics", "unix:/m"],
        ["--user", "0"],
    ] {
        let line = [&["serve", "--config", "/f.toml"], &more[..]].concat();
        assert_eq!(parse(&line).unwrap_err().kind(), ErrorKind::ArgumentConflict, "{more:?}");
    }
    let nothing = parse(&["serve"]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::MissingRequiredArgument);
}

#[test]
fn sizes_are_bytes_or_have_a_unit() {
    for (text, expected) in [("512", 512), ("4K", 4096), ("3M", 3 << 20), ("20G", 20 << 30), ("1T", 1 << 40)]
    {
        let line = ["disk", "resize", "vda", text];
        let Command::Disk(Disk::Resize { id, size, .. }) = parse(&line).unwrap() else { panic!() };
        assert_eq!((id.as_str(), size), ("vda", expected));
    }
    for wrong in ["", "G", "1.5G", "1 G", "99999999T"] {
        assert_eq!(
            parse(&["disk", "resize", "vda", wrong]).unwrap_err().kind(),
            ErrorKind::ValueValidation,
            "{wrong}"
        );
    }
}

#[test]
fn a_bad_disk_is_told_with_its_mistake() {
    let line = ["serve", "--state", "/st", "--control", "/c", "--disk", "id=vda,pth=/img"];
    let message = parse(&line).unwrap_err().to_string();
    assert!(message.contains("unknown key `pth`; the keys are id, path, format"), "{message}");
}

#[test]
fn create_takes_the_words_that_others_script_against() {
    let line = "snapshot create monday --control /c --disks vda,vdb --freeze require --json";
    let command = parse(&line.split(' ').collect::<Vec<_>>()).unwrap();
    let Command::Snapshot(Snapshot::Create { what, daemon, output }) = command else { panic!() };
    assert_eq!(what.name, "monday");
    assert_eq!(what.disks, Some(vec!["vda".to_owned(), "vdb".to_owned()]));
    assert_eq!(what.freeze, Some(FreezePolicy::Require));
    assert_eq!(daemon.control, Some("/c".into()));
    assert!(output.json);
}

#[test]
fn export_asks_a_daemon_or_a_state_directory_but_not_both() {
    let export = |more: &[&str]| {
        parse(
            &[&["snapshot", "export", "monday", "--disk", "vda", "--format", "qcow2", "/out"], more].concat(),
        )
    };
    export(&["--control", "/c"]).unwrap();
    export(&["--state", "/st"]).unwrap();
    let both = export(&["--state", "/st", "--control", "/c"]).unwrap_err();
    assert_eq!(both.kind(), ErrorKind::ArgumentConflict);
}

#[test]
fn a_lease_ends() {
    for lease in ["0", "31", "-1", "soon"] {
        assert!(parse(&["snapshot", "prepare", "x", "--lease", lease]).is_err(), "{lease}");
    }
    let command = parse(&["snapshot", "prepare", "x", "--lease", "30"]).unwrap();
    let Command::Snapshot(Snapshot::Prepare { lease, .. }) = command else { panic!() };
    assert_eq!(lease, Duration::from_secs(30));
}
