//! What a write to a hidden page does, as data.

/// What happens when the guest writes to a page that hides a breakpoint.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum OnWrite {
    /// The write happens; breakpoints it overwrote are planted again over the new bytes.
    #[default]
    Reapply,
    /// The write happens; breakpoints it overwrote are removed.
    Remove,
    /// The write is thrown away, and the guest goes on behind it.
    Deny,
    /// Somebody is asked which of the others it is to be.
    Ask,
}

/// What is done with one write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteDecision {
    /// It takes effect in the original page.
    Allow,
    /// It is thrown away.
    Deny,
    /// Somebody is asked.
    Ask,
}

/// Decides one write by the policies of the breakpoints whose bytes it covers: one that denies is stronger than one that asks,
/// and both are stronger than those that let it happen. A write beside every breakpoint is allowed.
///
/// ```
/// use vmitap::tap::{OnWrite, WriteDecision, decide};
/// assert_eq!(decide([OnWrite::Reapply, OnWrite::Ask, OnWrite::Deny]), WriteDecision::Deny);
/// assert_eq!(decide([]), WriteDecision::Allow);
/// ```
pub fn decide(covered: impl IntoIterator<Item = OnWrite>) -> WriteDecision {
    let mut decision = WriteDecision::Allow;
    for policy in covered {
        match policy {
            OnWrite::Deny => return WriteDecision::Deny,
            OnWrite::Ask => decision = WriteDecision::Ask,
            OnWrite::Reapply | OnWrite::Remove => {}
        }
    }
    decision
}
