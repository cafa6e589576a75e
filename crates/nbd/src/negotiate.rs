//! The negotiation: from the greeting to the choice of an export ("Fixed newstyle negotiation").
//!
//! A [`Negotiator`] works on any stream, and answers each option before it reads the next. It allocates what one option's
//! data takes, which is bounded, and ends with the stream's own errors, among them the handshake's deadline.

use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;

use crate::context::MetaContext;
use crate::export::{Exports, Offered};
use crate::proto::handshake::{
    ClientFlags, InfoRequest, MetaRequest, OptionHeader, PADDING, Reply, export_name, greeting, info, option,
    push_reply,
};
use crate::proto::reply::{Style, transmission};

/// The longest data of an option that is looked at, in bytes: a name and many queries. Of more it is told that it is too
/// big, and what comes is dropped.
const MAX_DATA: u32 = 64 * 1024;

/// The most that a client may write in one request, and that a reply carries: what the specification lets every client
/// expect ("Block size constraints").
pub(crate) const MAX_PAYLOAD: u32 = 32 << 20;

/// Any range can be asked for.
const MIN_BLOCK: u32 = 1;
/// From this on nothing is read, changed and written: the subclusters of our overlays, and the host's pages.
const PREFERRED_BLOCK: u32 = 4096;

/// Whether the connection is under TLS ("Server-side requirements": NOTLS and FORCEDTLS).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Tls {
    /// The server has none.
    None,
    /// It must begin before anything else.
    Required,
    /// It has begun.
    Active,
}

/// What came of it.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The client was told to begin TLS; call [`Negotiator::run`] again under it.
    StartTls,
    /// The client has chosen: all that follows are requests.
    Chosen(Chosen),
    /// It has ended, in the way of the protocol.
    End,
}

/// What the client has chosen.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) export: Arc<Offered>,
    pub(crate) style: Style,
    /// Their ids are their places in this list.
    pub(crate) contexts: Vec<Arc<dyn MetaContext>>,
    /// Of the export, as the client was told.
    pub(crate) size: u64,
    /// It has been told all; else this is still to be sent, once nothing can go wrong any more.
    pub(crate) farewell: Vec<u8>,
}

/// A negotiation under way.
#[derive(Debug)]
pub(crate) struct Negotiator<'a> {
    exports: &'a Exports,
    tls: Tls,
    flags: Option<ClientFlags>,
    style: Style,
    selected: Option<Selected>,
    reply: Vec<u8>,
}

/// Metadata contexts, and of which export they were selected.
#[derive(Debug)]
struct Selected {
    export: Arc<Offered>,
    contexts: Vec<Arc<dyn MetaContext>>,
}

/// What follows an option.
enum Next {
    Option,
    Outcome(Outcome),
}

impl<'a> Negotiator<'a> {
    pub(crate) fn new(exports: &'a Exports, tls: Tls) -> Self {
        Self { exports, tls, flags: None, style: Style::Simple, selected: None, reply: Vec::new() }
    }

    /// Talks until something comes of it. After [`Outcome::StartTls`] it is called once more.
    pub(crate) fn run(&mut self, stream: &mut (impl Read + Write)) -> io::Result<Outcome> {
        if self.flags.is_none() {
            stream.write_all(&greeting())?;
            let mut flags = [0; 4];
            stream.read_exact(&mut flags)?;
            self.flags =
                Some(ClientFlags::decode(flags).ok_or_else(|| violation("flags that were not offered"))?);
        }
        loop {
            let mut header = [0; OptionHeader::LEN];
            stream.read_exact(&mut header)?;
            let header =
                OptionHeader::decode(&header).ok_or_else(|| violation("no option where one must be"))?;
            let data = read_data(stream, header.len)?;
            self.reply.clear();
            let next = match &data {
                Some(data) => self.answer(header.option, data)?,
                None => self.say(header.option, Reply::TooBig),
            };
            stream.write_all(&self.reply)?;
            if let Next::Outcome(outcome) = next {
                return Ok(outcome);
            }
        }
    }

    fn answer(&mut self, option: u32, data: &[u8]) -> io::Result<Next> {
        if self.tls == Tls::Required && !matches!(option, option::STARTTLS | option::ABORT) {
            if option == option::EXPORT_NAME {
                return Err(violation("a client wants no TLS"));
            }
            return Ok(self.say(option, Reply::TlsRequired));
        }
        Ok(match option {
            option::EXPORT_NAME => return self.choose_by_name(data),
            option::ABORT => {
                self.say(option, Reply::Ack);
                Next::Outcome(Outcome::End)
            }
            option::INFO | option::GO => self.inform(option, data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_contexts(option, data),
            // The others have no data.
            option::STARTTLS | option::LIST | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS
                if !data.is_empty() =>
            {
                self.say(option, Reply::Invalid)
            }
            option::STARTTLS => self.start_tls(),
            option::LIST => self.list(),
            option::STRUCTURED_REPLY if self.style == Style::Extended => {
                self.say(option, Reply::ExtendedRequired)
            }
            option::STRUCTURED_REPLY => {
                self.style = Style::Structured;
                self.say(option, Reply::Ack)
            }
            option::EXTENDED_HEADERS => {
                self.style = Style::Extended;
                self.say(option, Reply::Ack)
            }
            _ => self.say(option, Reply::Unsupported),
        })
    }

    fn say(&mut self, option: u32, reply: Reply) -> Next {
        push_reply(&mut self.reply, option, reply, &[]);
        Next::Option
    }

    fn start_tls(&mut self) -> Next {
        match self.tls {
            Tls::None => self.say(option::STARTTLS, Reply::Policy),
            Tls::Active => self.say(option::STARTTLS, Reply::Invalid),
            Tls::Required => {
                // What was agreed on in plain text counts no more; with TLS required, nothing was.
                self.tls = Tls::Active;
                self.say(option::STARTTLS, Reply::Ack);
                Next::Outcome(Outcome::StartTls)
            }
        }
    }

    fn list(&mut self) -> Next {
        for (name, description) in self.exports.names() {
            let len = (name.len() as u32).to_be_bytes();
            let payload = [&len[..], name.as_bytes(), description.as_bytes()];
            push_reply(&mut self.reply, option::LIST, Reply::Server, &payload);
        }
        self.say(option::LIST, Reply::Ack)
    }

    fn inform(&mut self, option: u32, data: &[u8]) -> Next {
        let Some(request) = InfoRequest::decode(data) else { return self.say(option, Reply::Invalid) };
        let Some(export) = self.exports.find(request.name) else { return self.say(option, Reply::Unknown) };
        let size = export.disk().capacity();
        let mut told = |kind: u16, payload: &[&[u8]]| {
            let kind = kind.to_be_bytes();
            let payload = [&[&kind[..]], payload].concat();
            push_reply(&mut self.reply, option, Reply::Info, &payload);
        };
        let flags = transmission_flags(&export, self.style);
        told(info::EXPORT, &[&size.to_be_bytes(), &flags.to_be_bytes()]);
        if request.wants.contains(&info::NAME) {
            told(info::NAME, &[export.name().as_bytes()]);
        }
        if request.wants.contains(&info::DESCRIPTION) && !export.description().is_empty() {
            told(info::DESCRIPTION, &[export.description().as_bytes()]);
        }
        if request.wants.contains(&info::BLOCK_SIZE) {
            let sizes = [MIN_BLOCK, PREFERRED_BLOCK, MAX_PAYLOAD].map(u32::to_be_bytes);
            told(info::BLOCK_SIZE, &[&sizes.concat()]);
        }
        if option == option::INFO {
            return self.say(option, Reply::Ack);
        }
        let mut farewell = Vec::new();
        push_reply(&mut farewell, option, Reply::Ack, &[]);
        Next::Outcome(self.chosen(export, size, farewell))
    }

    /// Errors can not be told in reply to this option, only by hanging up ("Option types").
    fn choose_by_name(&mut self, data: &[u8]) -> io::Result<Next> {
        if self.style == Style::Extended {
            return Err(violation("the old way to choose an export, with extended headers"));
        }
        let name = export_name(data).ok_or_else(|| violation("an export's name that is no string"))?;
        let export = self.exports.find(name).ok_or_else(|| violation("an export that there is not"))?;
        let size = export.disk().capacity();
        let mut farewell = size.to_be_bytes().to_vec();
        farewell.extend(transmission_flags(&export, self.style).to_be_bytes());
        if !self.flags.is_some_and(|flags| flags.no_zeroes) {
            farewell.extend([0; PADDING]);
        }
        Ok(Next::Outcome(self.chosen(export, size, farewell)))
    }

    fn chosen(&mut self, export: Arc<Offered>, size: u64, farewell: Vec<u8>) -> Outcome {
        // Contexts of another export select nothing here.
        let selected = self.selected.take().filter(|selected| Arc::ptr_eq(&selected.export, &export));
        let contexts = selected.map(|selected| selected.contexts).unwrap_or_default();
        Outcome::Chosen(Chosen { export, style: self.style, contexts, size, farewell })
    }

    fn meta_contexts(&mut self, option: u32, data: &[u8]) -> Next {
        let setting = option == option::SET_META_CONTEXT;
        if setting {
            self.selected = None;
        }
        if self.style == Style::Simple {
            return self.say(option, Reply::Invalid);
        }
        let Some(request) = MetaRequest::decode(data) else { return self.say(option, Reply::Invalid) };
        let Some(export) = self.exports.find(request.name) else { return self.say(option, Reply::Unknown) };
        let all = !setting && request.queries.is_empty();
        let wanted = |context: &&Arc<dyn MetaContext>| {
            all || request.queries.iter().any(|query| matches(context.name(), query, !setting))
        };
        let found: Vec<_> = export.contexts().iter().filter(wanted).cloned().collect();
        for (id, context) in found.iter().enumerate() {
            // In a list they have no ids.
            let id = if setting { id as u32 } else { 0 };
            let payload = [&id.to_be_bytes()[..], context.name().as_bytes()];
            push_reply(&mut self.reply, option, Reply::MetaContext, &payload);
        }
        if setting {
            self.selected = Some(Selected { export, contexts: found });
        }
        self.say(option, Reply::Ack)
    }
}

/// Whether a query finds a context: by its name, or, in a list, by a namespace or QEMU's `qemu:dirty-bitmap:`, alone.
fn matches(name: &str, query: &str, listing: bool) -> bool {
    let is_wildcard = matches!(query, "base:" | "qemu:" | "qemu:dirty-bitmap:");
    name == query || (listing && is_wildcard && name.starts_with(query))
}

fn transmission_flags(export: &Offered, style: Style) -> u16 {
    let always = transmission::HAS_FLAGS
        | transmission::SEND_FLUSH
        | transmission::SEND_FUA
        | transmission::CAN_MULTI_CONN
        | transmission::SEND_CACHE;
    let writes = match export.writable() {
        true => transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES,
        false => transmission::READ_ONLY,
    };
    let df = if style == Style::Simple { 0 } else { transmission::SEND_DF };
    always | writes | df
}

/// The data of an option; `None`, and it is gone, if it is too long to look at.
fn read_data(stream: &mut impl Read, len: u32) -> io::Result<Option<Vec<u8>>> {
    if len <= MAX_DATA {
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        return Ok(Some(data));
    }
    match io::copy(&mut stream.take(u64::from(len)), &mut io::sink())? {
        dropped if dropped == u64::from(len) => Ok(None),
        _ => Err(ErrorKind::UnexpectedEof.into()),
    }
}

fn violation(story: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, story)
}

#[cfg(test)]
mod tests;
