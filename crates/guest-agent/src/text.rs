//! What the guest says, made fit for our own messages.

/// The longest quotation, in characters.
const QUOTE_MAX: usize = 240;

/// `said` without control characters (a guest must not write to the operator's terminal) and no longer than a line or so.
pub(crate) fn quote(said: &str) -> String {
    let mut quoted: String =
        said.chars().take(QUOTE_MAX).map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect();
    if said.chars().nth(QUOTE_MAX).is_some() {
        quoted.push('…');
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(quote("a\x1b[2J\nb"), "a\u{FFFD}[2J\u{FFFD}b");
    }

    #[test]
    fn a_long_quotation_is_cut() {
        let quoted = quote(&"é".repeat(10_000));
        assert_eq!(quoted.chars().count(), QUOTE_MAX + 1);
        assert!(quoted.ends_with('…'));
    }
}
