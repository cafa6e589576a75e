//! What the guest says, made fit for our own messages.

/// The longest quotation, in characters.
const QUOTE_MAX: usize = 240;

/// How many of a list are named before the rest is only counted.
const LIST_MAX: usize = 5;

/// `said` without control characters (a guest must not write to the operator's terminal) and no longer than a line or so.
pub(crate) fn quote(said: &str) -> String {
    let mut quoted: String =
        said.chars().take(QUOTE_MAX).map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect();
    if said.chars().nth(QUOTE_MAX).is_some() {
        quoted.push('…');
    }
    quoted
}

/// `a, b and 3 more`.
pub(crate) fn list<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    let more = names.len().saturating_sub(LIST_MAX);
    let named: Vec<String> = names.take(LIST_MAX).map(quote).collect();
    let named = named.join(", ");
    if more == 0 { named } else { format!("{named} and {more} more") }
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

    #[test]
    fn a_long_list_is_counted() {
        assert_eq!(list(["a", "b"].into_iter()), "a, b");
        assert_eq!(list(["a", "b", "c", "d", "e", "f", "g"].into_iter()), "a, b, c, d, e and 2 more");
    }
}
