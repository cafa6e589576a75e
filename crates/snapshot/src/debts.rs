//! The *thaw owed* record: one small file, there while a guest may be frozen.

use std::path::PathBuf;

use block::{Context, Result};

use crate::cut::Debts;

/// The record as a file of the state directory.
#[derive(Debug)]
pub(crate) struct DebtFile(pub(crate) PathBuf);

impl Debts for DebtFile {
    fn is_recorded(&self) -> Result<bool> {
        self.0.try_exists().context(|| format!("look for {}", self.0.display()))
    }

    fn record(&self, snapshot: &str) -> Result<()> {
        let mut text = serde_json::json!({ "snapshot": snapshot }).to_string();
        text.push('\n');
        hostio::replace_file(&self.0, text.as_bytes())
    }

    fn clear(&self) -> Result<()> {
        hostio::remove_file(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_debt_outlives_who_recorded_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("thaw-owed.json");
        let debt = DebtFile(path.clone());
        assert!(!debt.is_recorded().unwrap());
        debt.record("nightly").unwrap();
        drop(debt);
        let debt = DebtFile(path);
        assert!(debt.is_recorded().unwrap());
        debt.clear().unwrap();
        debt.clear().unwrap();
        assert!(!debt.is_recorded().unwrap());
    }
}
