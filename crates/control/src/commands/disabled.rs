//! Commands of QEMU's that Frazil has not, though a backup program may ask for them: why, and what to do instead. They are in
//! no list of commands, and are answered as QEMU answers commands that have been disabled.

use serde_json::Value;

use super::Arguments;
use crate::error::CommandError;

const SNAPSHOT: &str = "overlays lie in the state directory and are Frazil's own: use snapshot-create, which cuts all disks at once";

const MIRROR: &str =
    "a disk can not be moved to another image while it is served: copy it with blockdev-backup";

const DISABLED: &[(&str, &str)] = &[
    ("blockdev-snapshot", SNAPSHOT),
    ("blockdev-snapshot-sync", SNAPSHOT),
    ("blockdev-snapshot-internal-sync", "there are no internal snapshots: use snapshot-create"),
    ("blockdev-snapshot-delete-internal-sync", "there are no internal snapshots: use snapshot-delete"),
    ("blockdev-mirror", MIRROR),
    ("drive-mirror", MIRROR),
    ("blockdev-reopen", "nodes stay as they were opened: use blockdev-del and blockdev-add"),
    ("system_powerdown", "Frazil serves disks and has no machine: ask the guest's QEMU"),
    ("system_reset", "Frazil serves disks and has no machine: ask the guest's QEMU"),
];

/// The refusal of a command that is disabled, or of a transaction with such an action.
pub(super) fn refusal(name: &str, arguments: &Arguments) -> Option<CommandError> {
    let story = |name: &str| DISABLED.iter().find(|(known, _)| *known == name).map(|(_, story)| *story);
    if let Some(story) = story(name) {
        return Some(CommandError::command_not_found(format!("Command {name} has been disabled: {story}")));
    }
    let actions = arguments.get("actions").filter(|_| name == "transaction").and_then(Value::as_array)?;
    let mut kinds = actions.iter().filter_map(|action| action.get("type").and_then(Value::as_str));
    let refused = kinds.find_map(|kind| Some((kind, story(kind)?)))?;
    Some(CommandError::generic(format!("Action {} has been disabled: {}", refused.0, refused.1)))
}
