//! Who is asked: a running daemon by its socket, or a state directory whose daemon does not run.

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use backup::{ServeRequest, Serving};
use block::ErrorKind;
use control::Service;
use control::client::{Client, ClientError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use snapshot::{CommitRequest, DeleteRequest, ImageFormat, JobInfo, JobVerb, StreamRequest};

use super::jobs;
use super::print::decode;
use super::print::print;
use super::progress::Progress;
use crate::cli::{Daemon, Place};
use crate::config::Word;
use crate::failure::{Exit, Failure};
use crate::serve;

/// A connection to a daemon, negotiated.
pub(super) struct Connection {
    client: Client,
    socket: PathBuf,
    /// How jobs ended, by their ids: such an event may come before the answer to the command that began the job.
    ended: BTreeMap<String, Ended>,
}

/// How a job ended; why it did not succeed.
pub(super) type Ended = Result<(), String>;

impl Connection {
    /// Connects to the socket that was given, or to the one where a daemon usually is.
    pub(super) fn open(daemon: &Daemon) -> Result<Self, Failure> {
        let socket = daemon.control.clone().unwrap_or_else(usual_socket);
        match Client::connect(&socket) {
            Ok(client) => Ok(Self { client, socket, ended: BTreeMap::new() }),
            Err(error) => {
                let hint = match &error {
                    ClientError::Io(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                        "a daemon's socket is for its own user and root: run this as one of them"
                    }
                    ClientError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        "it is ending, or has too many clients: try again"
                    }
                    _ => "is `frazil serve` running with this --control?",
                };
                Err(unreachable(&format!("connect to {}", socket.display()), &error).hint(hint))
            }
        }
    }

    /// Runs one command; `what` is what it does, for the user who reads that it failed.
    pub(super) fn ask(&mut self, what: &str, command: &str, arguments: Value) -> Result<Value, Failure> {
        self.ask_watching(what, command, arguments, &mut |_, _| {})
    }

    fn ask_watching(
        &mut self,
        what: &str,
        command: &str,
        arguments: Value,
        on_event: &mut dyn FnMut(&str, &Value),
    ) -> Result<Value, Failure> {
        let ended = &mut self.ended;
        let on_event = |name: &str, data: &Value| {
            if let (Some(id), Some(end)) = (data["device"].as_str(), end_of_job(name, data)) {
                ended.insert(id.to_owned(), end);
            }
            on_event(name, data);
        };
        self.client.execute(command, arguments, on_event).map_err(|error| match error {
            ClientError::Command { class, desc } => {
                // QEMU has no class of its own for nodes that are not there.
                let unknown = class == "DeviceNotFound" || desc.starts_with("Cannot find ");
                let failure = Failure::new(Exit::Failed, what, desc);
                match class.as_str() {
                    _ if unknown => failure.hint("`frazil snapshot list` and `frazil status` show what there is"),
                    "CommandNotFound" => failure.hint("the daemon is of another version: restart it"),
                    _ => failure,
                }
            }
            lost => unreachable(what, &lost).hint(format!(
                "what became of it is not known: when the daemon is back, `frazil snapshot list --control {}`",
                self.socket.display()
            )),
        })
    }
}

/// What an event says of how a job ended, if it does.
fn end_of_job(event: &str, data: &Value) -> Option<Ended> {
    match event {
        "BLOCK_JOB_COMPLETED" => Some(data["error"].as_str().map_or(Ok(()), |error| Err(error.to_owned()))),
        "BLOCK_JOB_CANCELLED" => Some(Err("it was cancelled".to_owned())),
        _ => None,
    }
}

fn unreachable(what: &str, error: &ClientError) -> Failure {
    Failure::new(Exit::Unreachable, what, error)
}

/// `$FRAZIL_CONTROL`; else where the file hierarchy has sockets of root, and of other users.
fn usual_socket() -> PathBuf {
    if let Some(given) = std::env::var_os("FRAZIL_CONTROL") {
        return given.into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(folder) if !rustix::process::geteuid().is_root() => Path::new(&folder).join("frazil.sock"),
        _ => "/run/frazil/control.sock".into(),
    }
}

/// What `snapshot-delete` answers.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Begun {
    job_id: String,
}

/// What to export, and where to.
pub(super) struct Export<'a> {
    pub(super) name: &'a str,
    pub(super) disk: &'a str,
    pub(super) format: ImageFormat,
    /// An absolute path.
    pub(super) target: &'a Path,
}

/// The commands that need no guest, asked of whoever is there. Both answer the same.
pub(super) enum Via {
    Control(Connection),
    State(Box<dyn Service>),
}

impl Via {
    pub(super) fn open(place: &Place) -> Result<Self, Failure> {
        let Some(state) = &place.state else {
            return Connection::open(&place.daemon).map(Self::Control).map_err(|failure| {
                failure.hint("if the daemon is not meant to run, ask its directory with --state")
            });
        };
        let service =
            serve::offline(state, &place.allow_folders).map_err(|error| not_opened(state, &error))?;
        Ok(Self::State(service))
    }

    pub(super) fn list(&mut self) -> Result<Value, Failure> {
        let what = "list the snapshots";
        match self {
            Self::Control(connection) => connection.ask(what, "query-snapshots", json!({})),
            Self::State(service) => to_value(what, &service.list()),
        }
    }

    /// The record, with what the probe says as one more member, `probe`.
    pub(super) fn show(&mut self, name: &str) -> Result<Value, Failure> {
        let what = format!("show snapshot {name}");
        let (mut shown, probe) = match self {
            Self::Control(connection) => {
                let mut both =
                    connection.ask(&what, "query-snapshot", json!({ "name": name, "probe": true }))?;
                (both["snapshot"].take(), both["probe"].take())
            }
            Self::State(service) => {
                let record = service.show(name).map_err(|error| of_state(&what, &error))?;
                let probe = service.probe(name).map_err(|error| of_state(&what, &error))?;
                (to_value(&what, &record)?, to_value(&what, &probe)?)
            }
        };
        if let Some(members) = shown.as_object_mut() {
            members.insert("probe".to_owned(), probe);
        }
        Ok(shown)
    }

    /// Begins to delete a snapshot; the job's id.
    pub(super) fn delete(&mut self, request: DeleteRequest) -> Result<String, Failure> {
        let what = format!("delete snapshot {}", request.name);
        match self {
            Self::Control(connection) => {
                let begun = connection.ask(&what, "snapshot-delete", to_value(&what, &request)?)?;
                decode::<Begun>(&what, &begun).map(|begun| begun.job_id)
            }
            Self::State(service) => service.delete(request).map_err(|error| of_state(&what, &error)),
        }
    }

    /// Begins to merge layers down; the job's id.
    pub(super) fn commit(&mut self, mut request: CommitRequest) -> Result<String, Failure> {
        let what = format!("commit layers of disk {}", request.device);
        match self {
            Self::Control(connection) => {
                let id = request.options.job_id.get_or_insert_with(|| request.device.clone()).clone();
                connection.ask(&what, "block-commit", to_value(&what, &request)?).map(|_| id)
            }
            Self::State(service) => service.commit(request).map_err(|error| of_state(&what, &error)),
        }
    }

    /// Begins to pull layers up; the job's id.
    pub(super) fn stream(&mut self, mut request: StreamRequest) -> Result<String, Failure> {
        let what = format!("stream into {}", request.device);
        match self {
            Self::Control(connection) => {
                let id = request.options.job_id.get_or_insert_with(|| request.device.clone()).clone();
                connection.ask(&what, "block-stream", to_value(&what, &request)?).map(|_| id)
            }
            Self::State(service) => service.stream(request).map_err(|error| of_state(&what, &error)),
        }
    }

    /// The jobs.
    pub(super) fn jobs(&mut self) -> Result<Vec<JobInfo>, Failure> {
        match self {
            Self::Control(connection) => {
                jobs::decode_list(&connection.ask("list the jobs", "query-jobs", json!({}))?)
            }
            Self::State(service) => Ok(service.jobs()),
        }
    }

    /// How this job ended, if a daemon has told since this was last asked.
    pub(super) fn take_end(&mut self, id: &str) -> Option<Ended> {
        match self {
            Self::Control(connection) => connection.ended.remove(id),
            Self::State(_) => None,
        }
    }

    /// Takes a job that has concluded from the list.
    pub(super) fn dismiss(&mut self, id: &str) -> Result<(), Failure> {
        let what = format!("dismiss job {id}");
        match self {
            Self::Control(connection) => connection.ask(&what, "job-dismiss", json!({ "id": id })).map(drop),
            Self::State(service) => {
                service.ask_job(id, JobVerb::Dismiss).map_err(|error| of_state(&what, &error))
            }
        }
    }

    pub(super) fn revert(&mut self, name: &str, discard_newer: bool) -> Result<(), Failure> {
        let what = format!("revert to snapshot {name}");
        match self {
            Self::Control(connection) => {
                let arguments = json!({ "name": name, "discard-newer": discard_newer });
                connection.ask(&what, "snapshot-revert", arguments).map(drop)
            }
            Self::State(service) => {
                service.revert(name, discard_newer).map_err(|error| of_state(&what, &error))
            }
        }
    }

    /// Serves a snapshot until this process is ended.
    pub(super) fn serve(&mut self, request: ServeRequest) -> Result<(), Failure> {
        let what = format!("serve disk {} of snapshot {}", request.disk, request.name);
        match self {
            Self::Control(connection) => {
                let arguments = to_value(&what, &request)?;
                let mut on_event = |event: &str, data: &Value| {
                    if event == "FRAZIL_EXPORT_READY" {
                        tell_ready(data["address"].as_str().unwrap_or_default());
                    }
                };
                connection.ask_watching(&what, "snapshot-serve", arguments, &mut on_event).map(drop)
            }
            Self::State(service) => {
                let tell = |serving: Serving| {
                    if let Serving::Ready(address) = serving {
                        tell_ready(&address);
                    }
                    ControlFlow::Continue(())
                };
                service.serve(&request, &tell).map_err(|error| of_state(&what, &error))
            }
        }
    }

    pub(super) fn export(&mut self, export: &Export<'_>) -> Result<(), Failure> {
        let Export { name, disk, format, target } = *export;
        let what = format!("export disk {disk} of snapshot {name}");
        let progress = Progress::new(disk);
        match self {
            Self::Control(connection) => {
                let arguments =
                    json!({ "name": name, "disk": disk, "target": target, "format": format.word() });
                let mut on_event = |event: &str, data: &Value| {
                    if event != "FRAZIL_EXPORT_PROGRESS" {
                        return;
                    }
                    if let (Some(done), Some(total)) = (data["offset"].as_u64(), data["len"].as_u64()) {
                        progress.report(done, total);
                    }
                };
                connection.ask_watching(&what, "snapshot-export", arguments, &mut on_event).map(drop)
            }
            Self::State(service) => service
                .export(name, disk, target, format, &|done, total| {
                    progress.report(done, total);
                    ControlFlow::Continue(())
                })
                .map_err(|error| of_state(&what, &error)),
        }
    }
}

/// Where clients connect, as a URI that they take.
fn tell_ready(address: &str) {
    let uri = match address.contains('/') {
        true => format!("nbd+unix:///?socket={address}"),
        false => format!("nbd://{address}/"),
    };
    // A reader that went away does not end what is being served.
    let _ = print(&format!("{uri}\n"));
}

pub(super) fn to_value(what: &str, answer: &impl Serialize) -> Result<Value, Failure> {
    serde_json::to_value(answer).map_err(|error| Failure::new(Exit::Failed, what, error))
}

fn not_opened(state: &Path, error: &block::Error) -> Failure {
    let failure = Failure::new(Exit::Failed, format!("open the state directory {}", state.display()), error);
    match error.kind() {
        ErrorKind::NotFound => failure.hint("give the --state that `frazil serve` has"),
        _ => failure,
    }
}

pub(super) fn of_state(what: &str, error: &block::Error) -> Failure {
    let failure = Failure::new(Exit::Failed, what, error);
    match error.kind() {
        ErrorKind::NotFound => {
            failure.hint("`frazil snapshot list` with the same --state shows what there is")
        }
        _ => failure,
    }
}
