//! Where metrics are served: `unix:PATH` or `HOST:PORT`.

use std::path::PathBuf;

use super::Mistake;

/// Where scrapers connect.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum MetricsAddress {
    /// A Unix socket, mode 0600.
    Unix(PathBuf),
    /// A host and a port; port 0 takes a free one.
    Tcp(String),
}

/// Parses the value of `--metrics`.
pub(crate) fn parse(text: &str) -> Result<MetricsAddress, Mistake> {
    let wrong = || Mistake::NoSuchAddress { key: "metrics", value: text.to_owned() };
    if let Some(path) = text.strip_prefix("unix:") {
        return if path.is_empty() { Err(wrong()) } else { Ok(MetricsAddress::Unix(path.into())) };
    }
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
            Ok(MetricsAddress::Tcp(text.to_owned()))
        }
        _ => Err(wrong()),
    }
}
