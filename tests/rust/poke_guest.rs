//! Guests that patch their own code through another mapping, under a session: tests/guests/poke.S.

use vmitap::session::{TapId, TapState};
use vmitap::tap::OnWrite;

use super::paging_guest::Guest;

fn tap(guest: &mut Guest, name: &str, on_write: OnWrite) -> TapId {
    guest.tap_under(guest.va(name), on_write)
}

fn assert_right(guest: &Guest) {
    let words = ["done", "wrong", "unlike"].map(|name| guest.word(name));
    assert_eq!(words, [1, 0, 0], "done, wrong results, unlike bytes; console: {}", guest.console());
}

#[test]
fn a_kernel_that_patches_its_text_and_a_code_generator_work_as_ever_and_stay_tapped() {
    for vcpus in [1, 2] {
        let mut plain = Guest::boot("poke.S", vcpus, "n=30");
        plain.run(|_, _| {});
        assert_right(&plain);
        let mut guest = Guest::boot("poke.S", vcpus, "n=30");
        let [site, after, jit] = ["site", "site_ret", "jit"].map(|name| tap(&mut guest, name, OnWrite::Reapply));
        guest.run(|_, _| {});
        assert_right(&guest);
        let (calls, int3s) = (guest.word("site_calls"), guest.word("int3_calls"));
        assert_eq!((guest.hits(site), guest.hits(after)), (calls, calls), "{vcpus} vCPUs");
        assert_eq!((guest.hits(jit), guest.word("jit_calls")), (30, 30));
        // The guest's own INT3 at the byte that is tapped went to the guest each time.
        let stats = guest.session.stats();
        assert!(int3s >= 20, "{int3s}");
        assert_eq!(stats.reinjected, int3s);
        assert!(stats.hidden_writes > 70, "{stats:?}");
        assert_eq!(stats.removed_by_write, 0);
        if vcpus == 1 {
            assert_eq!((calls, int3s), (plain.word("site_calls"), plain.word("int3_calls")));
        }
    }
}

#[test]
fn code_that_is_patched_beside_breakpoints_runs_as_written_on_both_pages() {
    for vcpus in [1, 2] {
        let mut guest = Guest::boot("poke.S", vcpus, "n=30");
        // None of these is on an instruction that is patched, so what is patched is run where the breakpoints are.
        let [pad, after, jit] = ["pad", "site_ret", "jit_ret"].map(|name| tap(&mut guest, name, OnWrite::Reapply));
        guest.run(|_, _| {});
        assert_right(&guest);
        let calls = ["site_calls", "jit_calls"].map(|name| guest.word(name));
        assert_eq!([guest.hits(after), guest.hits(jit), guest.hits(pad)], [calls[0], calls[1], 0], "{vcpus} vCPUs");
        assert_eq!(guest.session.stats().reinjected, guest.word("int3_calls"));
    }
}

#[test]
fn a_write_through_another_mapping_removes_what_it_overwrites_and_nothing_else() {
    for vcpus in [1, 2] {
        let mut guest = Guest::boot("poke.S", vcpus, "n=30");
        // `site_ret` is overwritten with what it is in every third round, `jit` in each.
        let [site, jit] = ["site", "jit"].map(|name| tap(&mut guest, name, OnWrite::Remove));
        let after = tap(&mut guest, "site_ret", OnWrite::Reapply);
        guest.run(|_, _| {});
        assert_right(&guest);
        let states = [site, jit, after].map(|tap| guest.session.state(tap));
        assert_eq!(states, [TapState::Removed, TapState::Removed, TapState::Active]);
        assert_eq!((guest.hits(jit), guest.hits(after)), (0, guest.word("site_calls")));
        assert_eq!(guest.session.stats().removed_by_write, 2);
        if vcpus == 1 {
            assert_eq!(guest.hits(site), 0, "it was overwritten before the first call");
        }
    }
}

#[test]
fn a_write_through_another_mapping_is_denied_where_a_breakpoint_is_under_it() {
    let mut guest = Guest::boot("poke.S", 2, "n=4");
    let jit = tap(&mut guest, "jit", OnWrite::Deny);
    guest.run(|_, _| {});
    // The string instruction as a whole counts as executed, and has written nothing: the function returns what it always did.
    assert_eq!(["done", "wrong", "unlike"].map(|name| guest.word(name)), [1, 4, 0]);
    assert_eq!((guest.hits(jit), guest.session.state(jit)), (4, TapState::Active));
    let mut guest = Guest::boot("poke.S", 1, "n=4");
    tap(&mut guest, "site", OnWrite::Deny);
    guest.run(|_, _| {});
    assert_eq!((guest.word("done"), guest.word("int3_calls")), (1, 0), "the guest could not put its INT3 there");
    // The tail is not under the breakpoint, so it was written; the third round's store is, so it was not, which two calls notice.
    assert_eq!((guest.word("wrong"), guest.word("unlike")), (2, 1));
}

#[test]
fn whoever_asks_is_asked_by_each_vcpu_that_writes() {
    let mut guest = Guest::boot("poke.S", 2, "n=6");
    let jit = tap(&mut guest, "jit", OnWrite::Ask);
    let writers = guest.run_asking(jit, OnWrite::Reapply);
    let askers = [0, 1].map(|vcpu| writers.iter().filter(|writer| **writer == vcpu).count());
    assert_right(&guest);
    assert_eq!((guest.hits(jit), askers), (6, [3, 3]));
}

#[test]
fn a_store_across_a_border_follows_the_policy_of_a_byte_on_the_second_page() {
    for vcpus in [1, 2] {
        // Each third round a store begins on the page of `pad`, and ends behind `site_ret` on the next; it leaves the byte there as it is.
        let boot = |policy| {
            let mut guest = Guest::boot("poke.S", vcpus, "n=4");
            tap(&mut guest, "pad", OnWrite::Reapply);
            let after = tap(&mut guest, "site_ret", policy);
            (guest, after)
        };
        let (mut guest, after) = boot(OnWrite::Deny);
        guest.run(|_, _| {});
        assert_eq!((guest.word("done"), guest.word("unlike")), (1, 1), "{vcpus} vCPUs: none of it was written");
        assert!(guest.word("wrong") >= 1);
        assert_eq!((guest.session.state(after), guest.hits(after)), (TapState::Active, guest.word("site_calls")));
        for (answer, state) in [(OnWrite::Reapply, TapState::Active), (OnWrite::Remove, TapState::Removed)] {
            let (mut guest, after) = boot(OnWrite::Ask);
            assert_eq!(guest.run_asking(after, answer).len(), 1, "{vcpus} vCPUs");
            assert_right(&guest);
            assert_eq!(guest.session.state(after), state);
        }
        let (mut guest, after) = boot(OnWrite::Remove);
        guest.run(|_, _| {});
        assert_right(&guest);
        assert_eq!((guest.session.state(after), guest.session.stats().removed_by_write), (TapState::Removed, 1));
    }
}

#[test]
fn a_string_store_that_comes_to_a_breakpoint_follows_its_policy() {
    for vcpus in [1, 2] {
        // `generate` begins five bytes before it, and leaves the byte as it is.
        let boot = |policy| {
            let mut guest = Guest::boot("poke.S", vcpus, "n=4");
            let end = tap(&mut guest, "jit_ret", policy);
            (guest, end)
        };
        let (mut guest, end) = boot(OnWrite::Deny);
        guest.run(|_, _| {});
        assert_eq!(["done", "wrong", "unlike"].map(|name| guest.word(name)), [1, 4, 0], "{vcpus} vCPUs: none of it was written");
        assert_eq!((guest.hits(end), guest.session.state(end)), (4, TapState::Active));
        let (mut guest, end) = boot(OnWrite::Ask);
        assert_eq!(guest.run_asking(end, OnWrite::Reapply).len(), 4, "{vcpus} vCPUs");
        assert_right(&guest);
        assert_eq!((guest.hits(end), guest.session.state(end)), (4, TapState::Active));
        let (mut guest, end) = boot(OnWrite::Remove);
        guest.run(|_, _| {});
        assert_right(&guest);
        assert_eq!((guest.session.state(end), guest.session.stats().removed_by_write), (TapState::Removed, 1));
    }
}
