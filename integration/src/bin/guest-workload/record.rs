use crate::Result;

/// Bytes of a record, and of a page, so that each is written in one request.
pub(crate) const SIZE: usize = 4096;
/// Records in a file; record `n` lies in slot `n % SLOTS`.
pub(crate) const SLOTS: u64 = 64;

const MAGIC: u64 = u64::from_le_bytes(*b"frazilic");

/// Fills `block` with record `number`: every word depends on the number, so that no mixture of two passes for one.
pub(crate) fn fill(block: &mut [u8], number: u64) {
    for (index, word) in block.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&word_of(number, index).to_le_bytes());
    }
}

fn word_of(number: u64, index: usize) -> u64 {
    match index {
        0 => MAGIC,
        1 => number,
        _ => (number ^ (index as u64) << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15),
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word))
}

/// The number of the record in a slot; `None` if nothing was ever written there.
pub(crate) fn read(block: &[u8]) -> Result<Option<u64>> {
    if block.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    let number = words(block).nth(1).unwrap_or_default();
    let whole =
        block.len() == SIZE && words(block).enumerate().all(|(index, word)| word == word_of(number, index));
    if whole { Ok(Some(number)) } else { Err(format!("a torn or foreign record, perhaps {number}").into()) }
}

/// Proves a ring of records; gives the newest one's number.
///
/// `exact`: the slots hold exactly the last records up to some number, which is `acked` or later. Otherwise each slot
/// holds the last acknowledged record that belongs there, or a later one.
pub(crate) fn check_ring(content: &[u8], acked: u64, exact: bool) -> Result<u64> {
    let mut found = Vec::new();
    for (slot, block) in (0..).zip(content.chunks(SIZE)) {
        let number = read(block).map_err(|error| format!("slot {slot}: {error}"))?;
        if number.is_some_and(|number| number % SLOTS != slot) {
            return Err(format!("slot {slot}: holds record {number:?}").into());
        }
        found.push(number);
    }
    let newest = found.iter().copied().flatten().max().unwrap_or(0);
    if newest < acked {
        return Err(format!("the newest record is {newest}, {acked} was acknowledged").into());
    }
    let must_hold = if exact { newest } else { acked };
    for number in must_hold.saturating_sub(SLOTS - 1).max(1)..=must_hold {
        let there = usize::try_from(number % SLOTS).ok().and_then(|slot| *found.get(slot)?);
        let good = if exact { there == Some(number) } else { there.is_some_and(|there| there >= number) };
        if !good {
            return Err(
                format!("record {number} is missing; its slot holds {there:?}, newest {newest}").into()
            );
        }
    }
    Ok(newest)
}

/// Proves the pages of a mapped writer; gives the newest stamp.
///
/// The writer stamps the first word of page 0, 1, 2 … with its round's number, then begins the next round. `exact`:
/// the pages are as at one instant. Otherwise each has the acknowledged stamp or a later one.
pub(crate) fn check_stamps(content: &[u8], acked: u64, exact: bool) -> Result<u64> {
    let stamps: Vec<u64> = content.chunks(SIZE).map(|page| words(page).next().unwrap_or_default()).collect();
    let newest = stamps.iter().copied().max().unwrap_or(0);
    let oldest = stamps.iter().copied().min().unwrap_or(0);
    if oldest < acked {
        return Err(format!("a page has stamp {oldest}, {acked} was acknowledged").into());
    }
    let one_instant = newest - oldest <= 1 && stamps.is_sorted_by(|earlier, later| earlier >= later);
    if exact && !one_instant {
        return Err(format!("no single instant: {stamps:?}").into());
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(numbers: impl Iterator<Item = u64>) -> Vec<u8> {
        let mut content = vec![0; SIZE * SLOTS as usize];
        for number in numbers {
            let at = (number % SLOTS) as usize * SIZE;
            fill(&mut content[at..at + SIZE], number);
        }
        content
    }

    fn stamps(values: &[u64]) -> Vec<u8> {
        values.iter().flat_map(|value| [&value.to_le_bytes()[..], &[0; SIZE - 8]].concat()).collect()
    }

    #[test]
    fn a_ring_between_two_writes_is_exact() -> Result<()> {
        assert_eq!(check_ring(&ring(1..=5), 3, true)?, 5);
        assert_eq!(check_ring(&ring(1..=500), 500, true)?, 500);
        Ok(())
    }

    #[test]
    fn a_lost_record_is_found() {
        assert!(check_ring(&ring((1..=500).filter(|&number| number != 480)), 490, true).is_err());
        assert!(check_ring(&ring((1..=500).filter(|&number| number != 480)), 490, false).is_err());
        assert!(check_ring(&ring(1..=500), 501, false).is_err());
    }

    #[test]
    fn after_the_acknowledged_ones_records_may_be_missing_only_if_not_exact() {
        let content = ring((1..=500).filter(|&number| number != 495));
        assert!(check_ring(&content, 490, true).is_err());
        assert!(check_ring(&content, 490, false).is_ok());
    }

    #[test]
    fn a_torn_record_is_never_good() {
        let mut content = ring(1..=500);
        content[10 * SIZE + 512..11 * SIZE].fill(0);
        assert!(check_ring(&content, 0, false).is_err());
    }

    #[test]
    fn stamps_of_one_instant_fall_at_most_once() {
        assert!(check_stamps(&stamps(&[7, 7, 6, 6]), 6, true).is_ok());
        assert!(check_stamps(&stamps(&[7, 6, 7, 6]), 6, true).is_err());
        assert!(check_stamps(&stamps(&[8, 7, 6, 6]), 6, true).is_err());
        assert!(check_stamps(&stamps(&[8, 6, 7, 6]), 6, false).is_ok());
        assert!(check_stamps(&stamps(&[8, 6, 7, 6]), 7, false).is_err());
    }
}
