//! The commands: ask a daemon, or a state directory; print for people or for programs.

mod chain;
mod jobs;
mod marks;
mod print;
mod progress;
mod table;
mod top;
mod via;

use std::path::PathBuf;

use backup::{ServeRequest, SocketAddress};
use serde_json::{Value, json};
use snapshot::{CreateRequest, DeleteRequest, FreezePolicy, Grade, SnapshotRecord};

use crate::cli::{Daemon, Disk, Output, Snapshot, What};
use crate::failure::{Exit, Failure};
pub(crate) use chain::chain;
pub(crate) use jobs::job;
pub(crate) use marks::{changes, checkpoint};
use print::{print, show_or_json};
pub(crate) use top::top;
use via::{Connection, Export, Via};

/// `frazil status`.
pub(crate) fn status(daemon: &Daemon, output: Output) -> Result<(), Failure> {
    let status = Connection::open(daemon)?.ask("show the status", "query-frazil", json!({}))?;
    show_or_json(output, &status, table::status)
}

/// `frazil disk …`.
pub(crate) fn disk(command: Disk) -> Result<(), Failure> {
    let Disk::Resize { id, size, daemon } = command;
    let arguments = json!({ "device": id, "size": size });
    Connection::open(&daemon)?.ask(&format!("resize disk {id}"), "block_resize", arguments)?;
    print(&format!("resized disk {id} to {}\n", table::bytes(size)))
}

/// `frazil snapshot …`.
pub(crate) fn snapshot(command: Snapshot) -> Result<(), Failure> {
    match command {
        Snapshot::Create { what, daemon, output } => create(what, &daemon, output),
        Snapshot::Prepare { what, lease, daemon } => {
            let name = what.name.clone();
            let mut arguments = arguments(what)?;
            arguments["lease"] = json!(lease.as_millis() as u64);
            Connection::open(&daemon)?.ask(
                &format!("prepare snapshot {name}"),
                "snapshot-prepare",
                arguments,
            )?;
            let left = lease.as_secs();
            print(&format!("prepared {name}: the guest is held; release or abort it within {left} s\n"))
        }
        Snapshot::Release { name, daemon, output } => {
            let what = format!("release snapshot {name}");
            let record =
                Connection::open(&daemon)?.ask(&what, "snapshot-release", json!({ "name": name }))?;
            show_or_json(output, &record, table::snapshot)
        }
        Snapshot::Abort { name, daemon } => {
            let what = format!("abort snapshot {name}");
            Connection::open(&daemon)?.ask(&what, "snapshot-abort", json!({ "name": name }))?;
            print(&format!("aborted {name}: the guest goes on\n"))
        }
        Snapshot::List { place, output } => {
            let list = Via::open(&place)?.list()?;
            show_or_json(output, &list, |records: &Vec<_>| table::list(records))
        }
        Snapshot::Show { name, place, output } => {
            show_or_json(output, &Via::open(&place)?.show(&name)?, table::snapshot)
        }
        Snapshot::Delete { name, job, place } => {
            let mut via = Via::open(&place)?;
            let options = jobs::options(&via, &job);
            let id = via.delete(DeleteRequest { name: name.clone(), options })?;
            jobs::follow(&mut via, &id, &job, &format!("deleted {name}"))
        }
        Snapshot::Export { name, disk, format: Some(format), out: Some(out), place, .. } => {
            let out = absolute(out)?;
            Via::open(&place)?.export(&Export { name: &name, disk: &disk, format, target: &out })?;
            print(&format!("exported disk {disk} of {name} to {}\n", out.display()))
        }
        Snapshot::Export { name, disk, nbd, writable, since, place, .. } => {
            let addr = address(nbd.unwrap_or_default())?;
            Via::open(&place)?.serve(ServeRequest { name, disk, addr, writable, since })
        }
        Snapshot::Revert { name, discard_newer, place } => {
            Via::open(&place)?.revert(&name, discard_newer)?;
            print(&format!("reverted to {name}\n"))
        }
    }
}

fn create(what: What, daemon: &Daemon, output: Output) -> Result<(), Failure> {
    let (name, policy) = (what.name.clone(), what.freeze);
    let doing = format!("create snapshot {name}");
    let value = Connection::open(daemon)?.ask(&doing, "snapshot-create", arguments(what)?)?;
    show_or_json(output, &value, table::snapshot)?;
    let record: SnapshotRecord = print::decode(&doing, &value)?;
    if policy == Some(FreezePolicy::Require) && record.grade == Grade::Crash {
        let cause = format!("it was taken, but with grade `crash`: {}", record.reason);
        return Err(Failure::new(Exit::CrashGrade, doing, cause)
            .hint(format!("keep it as it is, or `frazil snapshot delete {name}` and try again")));
    }
    Ok(())
}

fn arguments(what: What) -> Result<Value, Failure> {
    let request = CreateRequest { name: what.name, disks: what.disks, freeze: what.freeze };
    serde_json::to_value(request).map_err(|error| Failure::new(Exit::Failed, "write the request", error))
}

/// A path has a slash in it, a socket of the daemon's begins with `fd:`; anything else is a host and a port.
fn address(text: String) -> Result<SocketAddress, Failure> {
    match text.rsplit_once(':') {
        Some(("fd", name)) => Ok(SocketAddress::Fd { str: name.to_owned() }),
        Some((host, port)) if !text.contains('/') => {
            let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
            Ok(SocketAddress::Inet { host, port: port.to_owned() })
        }
        _ => Ok(SocketAddress::Unix { path: absolute(PathBuf::from(text))? }),
    }
}

/// The daemon has another working directory.
fn absolute(path: PathBuf) -> Result<PathBuf, Failure> {
    std::path::absolute(&path)
        .map_err(|error| Failure::new(Exit::Failed, format!("find {}", path.display()), error))
}
