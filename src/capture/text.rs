//! Comparing what is in guest memory with a pattern, without allocating.

use crate::addr::Va;
use crate::arch::amd64::AddressContext;
use crate::core::VmiCore;
use crate::driver::VmiDriver;

use super::filter::{MAX_TEXT, TextKind, TextTest};

/// Bytes compared in one go.
const STEP: usize = 256;

/// Whether what is at `va` fits the pattern; `None` if memory that decides it cannot be read.
pub fn fits<D: VmiDriver + ?Sized>(
    vmi: &VmiCore<D>,
    (va, context): (Va, AddressContext),
    kind: TextKind,
    test: TextTest,
    max: usize,
    pattern: &[u8],
) -> Option<bool> {
    match test {
        TextTest::Equal | TextTest::StartsWith => begins(vmi, (va, context), kind, test, pattern),
        TextTest::EndsWith | TextTest::Contains => searched(vmi, (va, context), kind, test, max, pattern),
    }
}

fn begins<D: VmiDriver + ?Sized>(
    vmi: &VmiCore<D>,
    (va, context): (Va, AddressContext),
    kind: TextKind,
    test: TextTest,
    pattern: &[u8],
) -> Option<bool> {
    let mut step = [0; STEP];
    let mut at = va;
    for part in pattern.chunks(STEP) {
        // To the end of the page first: a string that differs there says nothing about the next page.
        let (now, later) = part.split_at(part.len().min(at.page_rest() as usize));
        for part in [now, later] {
            let there = step.get_mut(..part.len())?;
            vmi.read(at, context, there).ok()?;
            // A string that ends earlier differs too: no pattern holds a zero.
            if there != part {
                return Some(false);
            }
            at = at.checked_add(part.len() as u64)?;
        }
    }
    if test == TextTest::StartsWith || kind == TextKind::Bytes {
        return Some(true);
    }
    let end = step.get_mut(..kind.unit())?;
    vmi.read(at, context, end).ok()?;
    Some(end.iter().all(|byte| *byte == 0))
}

#[inline(never)]
fn searched<D: VmiDriver + ?Sized>(
    vmi: &VmiCore<D>,
    (va, context): (Va, AddressContext),
    kind: TextKind,
    test: TextTest,
    max: usize,
    pattern: &[u8],
) -> Option<bool> {
    let mut buffer = [0; MAX_TEXT as usize];
    let buffer = buffer.get_mut(..max)?;
    let unit = kind.unit();
    let (mut have, mut end) = (0, None);
    while have < max && end.is_none() {
        let at = va.checked_add(have as u64)?;
        let len = (max - have).min(STEP).min(at.page_rest() as usize);
        vmi.read(at, context, buffer.get_mut(have..have + len)?).ok()?;
        // The unit that was cut off by a page's end is looked at whole.
        let from = have / unit * unit;
        have += len;
        if kind != TextKind::Bytes {
            let mut units = buffer.get(from..have)?.chunks_exact(unit);
            end = units.position(|unit| unit.iter().all(|byte| *byte == 0)).map(|index| from + index * unit);
        }
    }
    let is_whole = end.is_some() || kind == TextKind::Bytes;
    let text = buffer.get(..end.unwrap_or(max))?;
    Some(match test {
        TextTest::EndsWith => is_whole && text.ends_with(pattern),
        _ => pattern.is_empty() || text.windows(pattern.len()).step_by(unit).any(|window| window == pattern),
    })
}
