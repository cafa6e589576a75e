//! Why the agent could not be had, and what to do about it.

use std::io;
use std::path::PathBuf;

/// A failure of one call. Whatever it was, the next call starts from a fresh, synchronized connection if it must.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// Nothing listens at the socket. Nothing was sent.
    #[error(
        "no agent at {path}: {source}; is QEMU running with `-chardev socket,path={path},server=on,wait=off,id=qga0 \
         -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0`?",
        path = path.display()
    )]
    Absent {
        /// The socket.
        path: PathBuf,
        /// What connecting said.
        source: io::Error,
    },
    /// QEMU took the connection, but the agent did not answer the sync. No command was sent.
    ///
    /// QEMU accepts with or without an agent in the guest, and keeps a second client waiting unanswered.
    #[error(
        "no agent answers behind {path} ({discarded} bytes of other talk discarded): is qemu-guest-agent running in the \
         guest, the guest not paused, and no other client (libvirt) on this socket?",
        path = path.display()
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// Bytes that came and were not the answer.
        discarded: u64,
    },
    /// The agent is there but did not answer in time. The command may still take effect.
    #[error(
        "the agent did not answer {command} in time; the guest may be overloaded, or stuck in a freeze hook"
    )]
    Timeout {
        /// The command.
        command: &'static str,
    },
    /// The agent answered with an error.
    #[error("the agent refused {command}: {desc} ({class})")]
    Refused {
        /// The command.
        command: &'static str,
        /// QAPI error class, as `GenericError` or `CommandNotFound` (blocked in the guest, or not known there).
        class: String,
        /// The agent's words, cut and without control characters.
        desc: String,
    },
    /// What came is not an answer to what was asked. The command may have taken effect.
    #[error("the agent broke the protocol in {command}: {detail}; is something else talking on its channel?")]
    Protocol {
        /// The command.
        command: &'static str,
        /// How.
        detail: String,
    },
    /// The connection broke. The command may have taken effect.
    #[error("the connection to the agent was lost in {command}: {source}; did QEMU stop?")]
    Io {
        /// The command.
        command: &'static str,
        /// What the socket said.
        source: io::Error,
    },
}

impl AgentError {
    /// Whether the command may have taken effect in the guest, or may yet.
    pub fn in_doubt(&self) -> bool {
        match self {
            Self::Absent { .. } | Self::Silent { .. } | Self::Refused { .. } => false,
            Self::Timeout { .. } | Self::Protocol { .. } | Self::Io { .. } => true,
        }
    }
}
