//! Every policy, at every place a store can have beside a breakpoint, from each vCPU: tests/guests/policy.S, whose stores go through
//! another mapping.

use std::ops::Range;

use vmitap::session::TapState;
use vmitap::tap::OnWrite;
use vmitap::{MemoryAccess, Va};

use super::paging_guest::Guest;

const PAGE: u64 = 4096;
const STORED: u8 = 0xf8;
/// Where breakpoints hide both pages, beside every store.
const HIDING: [u64; 2] = [8, 2 * PAGE - 8];

/// A store: where it begins, how long a round is, and how many rounds; `None` if it is no string instruction.
#[derive(Clone, Copy, Debug)]
struct Store {
    at: u64,
    size: u64,
    rounds: Option<u64>,
    back: bool,
}

const fn plain(at: u64, size: u64) -> Store {
    Store { at, size, rounds: None, back: false }
}

const fn string(at: u64, size: u64, rounds: u64) -> Store {
    Store { at, size, rounds: Some(rounds), back: false }
}

impl Store {
    /// All that it stores to.
    fn range(&self) -> Range<u64> {
        let more = (self.rounds.unwrap_or(1) - 1) * self.size;
        if self.back { self.at - more..self.at + self.size } else { self.at..self.at + self.size + more }
    }
}

/// What a guest was like afterwards.
struct Outcome {
    /// The bytes that were stored to.
    stored: Vec<u64>,
    state: TapState,
    hits: u64,
    asked: u32,
    removed: u64,
}

/// Boots the guest and has it store, with a breakpoint of that policy; whoever is asked answers `answer`.
fn outcome(store: Store, vcpu: u16, tapped: u64, policy: OnWrite, answer: OnWrite) -> Outcome {
    let Store { at, size, rounds, back } = store;
    let line = format!("at={at} size={size} rounds={} back={} by={vcpu}", rounds.unwrap_or(0), u8::from(back));
    let mut guest = Guest::boot("policy.S", 2, &line);
    let area = guest.va("area");
    let tap_under = guest.tap_under(Va(area.0 + tapped), policy);
    let hiding = HIDING.map(|offset| guest.tap_under(Va(area.0 + offset), OnWrite::Reapply));
    let writers = guest.run_asking(tap_under, answer);
    assert!(writers.iter().all(|writer| *writer == vcpu), "{store:?}: {writers:?}");
    assert_eq!(["done", "called"].map(|name| guest.word(name)), [1, 1], "console: {}", guest.console());
    assert_eq!(hiding.map(|tap| guest.hits(tap)), [1, 1], "{store:?}: the others are as they were");
    let mut bytes = [0; 2 * PAGE as usize];
    guest.session.vmi().read(area, guest.here(), &mut bytes).unwrap();
    let stored = (0..2 * PAGE).filter(|at| bytes[*at as usize] == STORED).collect();
    let state = guest.session.state(tap_under);
    Outcome {
        stored,
        state,
        hits: guest.hits(tap_under),
        asked: writers.len() as u32,
        removed: guest.session.stats().removed_by_write,
    }
}

/// Checks a store with each policy, from each vCPU. `covers`: the breakpoint is under it; `kept` is what is stored to all the same when
/// it is thrown away, and `asks` how often somebody is asked, if anybody is.
fn check_asking(store: Store, tapped: u64, covers: bool, kept: Range<u64>, asks: u32) {
    for vcpu in [0, 1] {
        for (policy, answer) in [
            (OnWrite::Reapply, OnWrite::Reapply),
            (OnWrite::Remove, OnWrite::Reapply),
            (OnWrite::Deny, OnWrite::Reapply),
            (OnWrite::Ask, OnWrite::Reapply),
            (OnWrite::Ask, OnWrite::Remove),
            (OnWrite::Ask, OnWrite::Deny),
        ] {
            let case = format!("{store:?} by vCPU {vcpu}, {policy:?} at {tapped}, answer {answer:?}");
            let said = if policy == OnWrite::Ask { answer } else { policy };
            let got = outcome(store, vcpu, tapped, policy, answer);
            let expected = if covers && said == OnWrite::Deny { kept.clone() } else { store.range() };
            assert_eq!(got.stored, expected.collect::<Vec<_>>(), "{case}");
            let is_gone = covers && said == OnWrite::Remove;
            assert_eq!(got.state, if is_gone { TapState::Removed } else { TapState::Active }, "{case}");
            assert_eq!((got.hits, got.removed), (u64::from(!is_gone), u64::from(is_gone)), "{case}");
            assert_eq!(got.asked, if covers && policy == OnWrite::Ask { asks } else { 0 }, "{case}");
        }
    }
}

fn check(store: Store, tapped: u64, covers: bool, kept: Range<u64>) {
    check_asking(store, tapped, covers, kept, 1);
}

/// Checks a store that is carried out whole, or not at all.
fn check_whole(store: Store, tapped: u64, covers: bool) {
    check(store, tapped, covers, 0..0);
}

#[test]
fn a_store_follows_the_policy_of_each_byte_that_it_is_over() {
    check_whole(plain(0x100, 1), 0x100, true);
    check_whole(plain(0x0fd, 4), 0x100, true);
    check_whole(plain(0x100, 8), 0x100, true);
    check_whole(plain(0x0f8, 16), 0x107, true);
}

#[test]
fn a_store_beside_a_byte_is_nothing_to_its_policy() {
    check_whole(plain(0x0ff, 1), 0x100, false);
    check_whole(plain(0x0f8, 8), 0x100, false);
    check_whole(plain(0x101, 1), 0x100, false);
    check_whole(plain(0x101, 16), 0x100, false);
}

#[test]
fn a_store_that_crosses_into_the_page_of_a_byte_follows_its_policy() {
    check_whole(plain(PAGE - 3, 8), PAGE, true);
    check_whole(plain(PAGE - 1, 2), PAGE, true);
    check_whole(plain(PAGE - 3, 16), PAGE + 12, true);
    // It ends before the byte.
    check_whole(plain(PAGE - 3, 8), PAGE + 5, false);
    check_whole(plain(PAGE - 4, 4), PAGE, false);
}

#[test]
fn a_store_that_crosses_out_of_the_page_of_a_byte_follows_its_policy() {
    check_whole(plain(PAGE - 1, 2), PAGE - 1, true);
    check_whole(plain(PAGE - 7, 8), PAGE - 1, true);
    check_whole(plain(PAGE - 9, 16), PAGE - 9, true);
    // It begins behind the byte.
    check_whole(plain(PAGE - 2, 4), PAGE - 3, false);
    check_whole(plain(PAGE, 4), PAGE - 1, false);
}

#[test]
fn the_rounds_of_a_string_instruction_on_one_page_are_one_store() {
    check_whole(string(0x0f0, 1, 0x40), 0x100, true);
    check_whole(string(0x0f0, 8, 4), 0x10f, true);
    check_whole(string(0x100, 2, 3), 0x100, true);
    check_whole(Store { back: true, ..string(0x120, 1, 0x30) }, 0x100, true);
    check_whole(Store { back: true, ..string(0x120, 4, 9) }, 0x100, true);
    // They end before the byte, or begin behind it.
    check_whole(string(0x0f0, 1, 0x10), 0x100, false);
    check_whole(string(0x101, 4, 4), 0x100, false);
    check_whole(Store { back: true, ..string(0x120, 1, 0x20) }, 0x100, false);
    check_whole(Store { back: true, ..string(0x0f8, 8, 4) }, 0x100, false);
}

#[test]
fn a_string_instruction_that_comes_to_another_page_is_decided_on_there_anew() {
    check(string(PAGE - 0x40, 1, 0x80), PAGE + 0x20, true, PAGE - 0x40..PAGE);
    check(string(PAGE - 0x40, 1, 0x80), PAGE - 0x20, true, PAGE..PAGE + 0x40);
    check(string(PAGE - 0x40, 8, 0x10), PAGE + 0x3f, true, PAGE - 0x40..PAGE);
    check(Store { back: true, ..string(PAGE + 0x38, 8, 0x10) }, PAGE - 0x20, true, PAGE..PAGE + 0x40);
    check(Store { back: true, ..string(PAGE + 0x38, 8, 0x10) }, PAGE + 0x20, true, PAGE - 0x40..PAGE);
    // It begins, or ends, where a page does.
    check(Store { back: true, ..string(PAGE, 4, 0x10) }, PAGE - 0x20, true, PAGE..PAGE + 4);
    check(Store { back: true, ..string(PAGE, 4, 0x10) }, PAGE, true, PAGE - 0x3c..PAGE);
    check_whole(string(PAGE - 0x40, 8, 8), PAGE, false);
}

#[test]
fn the_round_of_a_string_instruction_that_lies_on_two_pages_follows_both() {
    // The fourth round has three bytes on the first page. Of the second page nothing is stored either way.
    let up = string(PAGE - 0x1b, 8, 8);
    check(up, PAGE + 2, true, PAGE - 0x1b..PAGE - 3);
    check(up, PAGE + 0x10, true, PAGE - 0x1b..PAGE - 3);
    // With the first page it is decided what becomes of its rounds, and with the second one once more of the round that crosses.
    check_asking(up, PAGE - 2, true, 0..0, 2);
    // The first round is the one that crosses.
    check_whole(string(PAGE - 3, 8, 4), PAGE - 2, true);
    check_whole(string(PAGE - 3, 8, 4), PAGE + 0x10, true);
    // Downwards: three rounds on the second page, and then the one that crosses.
    let down = Store { back: true, ..string(PAGE + 0x15, 8, 8) };
    check(down, PAGE - 2, true, PAGE + 5..PAGE + 0x1d);
    check(down, PAGE - 0x10, true, PAGE + 5..PAGE + 0x1d);
}

#[test]
fn a_store_that_crosses_into_a_watched_page_is_one_of_its_watch_whatever_else_is_there() {
    for (at, size, watched, len) in
        [(PAGE - 4, 8, PAGE, 8), (PAGE - 3, 16, PAGE, 1), (PAGE - 4, 8, PAGE - 8, 16), (PAGE - 1, 2, PAGE, 8)]
    {
        // With nothing on the first page the store is told as of the second.
        for is_hidden in [false, true] {
            let mut guest = Guest::boot("policy.S", 2, &format!("at={at} size={size} rounds=0 back=0 by=0"));
            let area = guest.va("area");
            let beside = is_hidden.then(|| guest.tap_under(Va(area.0 + HIDING[0]), OnWrite::Reapply));
            let watch = guest.watch(Va(area.0 + watched), len, MemoryAccess::W);
            guest.run(|_, hit| panic!("{hit:?}"));
            assert_eq!(["done", "called"].map(|name| guest.word(name)), [1, 1], "console: {}", guest.console());
            assert_eq!(guest.hits(watch), 1, "{size} bytes at {at:#x}, {len} watched at {watched:#x}, {is_hidden}");
            assert_eq!(beside.map(|tap| guest.hits(tap)), is_hidden.then_some(1));
        }
    }
}
