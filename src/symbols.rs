//! Symbols: from a name to an address, and back.

use std::cmp::Reverse;

use crate::addr::Va;
use crate::error::{Result, VmiError};

/// How many names an unknown symbol's error suggests.
const SUGGESTIONS: usize = 3;
/// How many symbols that begin below an address are tried for one that reaches it.
const OVERLAPS: usize = 64;
/// How far a symbol without a size can reach, in bytes.
const LABEL_REACH: u64 = 1 << 16;

/// What a symbol names. The order decides which of two symbols at one address names it: the later one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SymbolKind {
    /// A number that is no address in the image; it never names one.
    Absolute,
    /// A label without a type, as in assembly.
    Label,
    /// Data.
    Object,
    /// Code.
    Function,
}

/// One symbol.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Symbol {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub va: Va,
    /// Bytes it covers; 0 if that is not known.
    pub size: u64,
    /// What it names.
    pub kind: SymbolKind,
    /// Whether it is visible outside the file it was compiled from.
    pub global: bool,
}

/// All symbols of a guest. Look-ups take time logarithmic in their number; suggestions look at all of them.
///
/// ```
/// use vmitap::symbols::{Symbol, SymbolKind, SymbolTable};
/// use vmitap::Va;
/// let symbol = |name: &str, va| Symbol { name: name.into(), va: Va(va), size: 0x20, kind: SymbolKind::Function, global: true };
/// let table: SymbolTable = [symbol("open_file", 0x1000), symbol("read_file", 0x1020)].into_iter().collect();
/// assert_eq!(table.resolve("open_file+0x10")?, Va(0x1010));
/// assert_eq!(table.describe(Va(0x1024)).as_deref(), Some("read_file+0x4"));
/// assert_eq!(table.resolve("open_fil").unwrap_err().to_string(), "symbol \"open_fil\" is not known; the nearest are open_file");
/// # Ok::<(), vmitap::VmiError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SymbolTable {
    /// By address, then kind.
    symbols: Vec<Symbol>,
    /// Indices into `symbols`, by name; of those with the same name the global ones first, then by address.
    by_name: Vec<usize>,
}

impl FromIterator<Symbol> for SymbolTable {
    /// Symbols that are equal in everything are kept once.
    fn from_iter<I: IntoIterator<Item = Symbol>>(symbols: I) -> Self {
        let mut symbols: Vec<Symbol> = symbols.into_iter().collect();
        symbols
            .sort_unstable_by(|a, b| (a.va, a.kind, a.global, a.size, &a.name).cmp(&(b.va, b.kind, b.global, b.size, &b.name)));
        symbols.dedup();
        let mut by_name: Vec<(usize, &Symbol)> = symbols.iter().enumerate().collect();
        by_name.sort_unstable_by_key(|(index, symbol)| (&symbol.name, Reverse(symbol.global), *index));
        let by_name = by_name.into_iter().map(|(index, _)| index).collect();
        Self { symbols, by_name }
    }
}

impl SymbolTable {
    /// How many symbols there are.
    pub fn len(&self) -> usize {
        self.symbols.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.symbols.is_empty()
    }

    /// All symbols, by address.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Symbol> {
        self.symbols.iter()
    }

    /// All symbols of that name: global ones first, then by address.
    pub fn all<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Symbol> + use<'a> {
        let name_of = |index: &usize| self.symbols.get(*index).map(|symbol| symbol.name.as_str());
        let first = self.by_name.partition_point(|index| name_of(index) < Some(name));
        let rest = self.by_name.get(first..).unwrap_or_default();
        let count = rest.partition_point(|index| name_of(index) == Some(name));
        rest.iter().take(count).filter_map(|index| self.symbols.get(*index))
    }

    /// The symbol of that name; of several the first that [`SymbolTable::all`] gives.
    pub fn get(&self, name: &str) -> Option<&Symbol> {
        self.all(name).next()
    }

    /// The symbol of that name.
    ///
    /// # Errors
    /// [`VmiError::SymbolNotFound`] with the most similar names.
    pub fn lookup(&self, name: &str) -> Result<&Symbol> {
        self.get(name).ok_or_else(|| VmiError::SymbolNotFound { name: name.to_owned(), nearest: self.nearest(name) })
    }

    /// The address an expression stands for: `name`, `name+offset` or `name-offset`, the offset decimal or in hex after `0x`.
    ///
    /// # Errors
    /// [`VmiError::SymbolNotFound`]; [`VmiError::InvalidArgument`] if the name is known and the offset is not a number, or
    /// leads out of the address space.
    pub fn resolve(&self, expression: &str) -> Result<Va> {
        let expression = expression.trim();
        // A name can contain either sign, so the whole is tried first.
        let split = if self.get(expression).is_some() { None } else { expression.rfind(['+', '-']) };
        let Some((name, signed)) = split.and_then(|at| expression.split_at_checked(at)) else {
            return Ok(self.lookup(expression)?.va);
        };
        let base = self.lookup(name.trim())?.va;
        let invalid =
            |reason: &str| VmiError::InvalidArgument { what: "symbol expression", reason: format!("{expression:?}: {reason}") };
        let digits = signed.get(1..).unwrap_or_default().trim();
        let offset = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => digits.parse(),
        };
        let offset = offset.map_err(|_| invalid("what follows the sign is not a number"))?;
        let sum = if signed.starts_with('-') { base.0.checked_sub(offset).map(Va) } else { base.checked_add(offset) };
        sum.ok_or_else(|| invalid("the offset leads out of the address space"))
    }

    /// The symbol that covers `va`, and how many bytes into it `va` is.
    ///
    /// Of nested ones the innermost with a size. Where none has a size, the nearest label below, at most 64 KiB away.
    pub fn at(&self, va: Va) -> Option<(&Symbol, u64)> {
        let behind = self.symbols.partition_point(|symbol| symbol.va <= va);
        let below = self.symbols.get(..behind)?.iter().rev().take(OVERLAPS);
        let mut label = None;
        for symbol in below.filter(|symbol| symbol.kind != SymbolKind::Absolute) {
            let offset = va.0 - symbol.va.0;
            if offset < symbol.size {
                // A function without a size, as in assembly, names its address before a label or a section's bound with one does.
                let better = label.filter(|(other, _): &(&Symbol, u64)| other.va == symbol.va && other.kind > symbol.kind);
                return Some(better.unwrap_or((symbol, offset)));
            }
            // Only the nearest one: a sized symbol that ends in between ends what the labels before it reach.
            label = label.or(Some((symbol, offset)));
        }
        label.filter(|(symbol, offset)| symbol.size == 0 && *offset < LABEL_REACH)
    }

    /// `name+0x10` for an address, or `name` at its first byte; `None` if no symbol covers it.
    pub fn describe(&self, va: Va) -> Option<String> {
        let (symbol, offset) = self.at(va)?;
        Some(if offset == 0 { symbol.name.clone() } else { format!("{}+{offset:#x}", symbol.name) })
    }

    /// Up to three names that are most like `name`, best first: by edit distance, up to half the length; or one contains the other.
    pub fn nearest(&self, name: &str) -> Vec<String> {
        if name.is_empty() {
            return Vec::new();
        }
        let most = (name.len() / 2).max(2);
        let mut found: Vec<(usize, &str)> = Vec::new();
        let mut previous = "";
        for symbol in self.by_name.iter().filter_map(|index| self.symbols.get(*index)) {
            let other = symbol.name.as_str();
            if other == previous {
                continue;
            }
            previous = other;
            let related = other.contains(name) || (other.len() > 2 && name.contains(other));
            let distance = if other.len().abs_diff(name.len()) <= most { edit_distance(name, other) } else { usize::MAX };
            if related || distance <= most {
                found.push((distance.min(most + 1), other));
                found.sort_unstable();
                found.truncate(SUGGESTIONS);
            }
        }
        found.into_iter().map(|(_, other)| other.to_owned()).collect()
    }
}

/// How many bytes must be inserted, removed or replaced to make one of the other (Levenshtein).
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut left = i + 1;
        let mut diagonal = i;
        if let Some(first) = row.first_mut() {
            *first = left;
        }
        for (y, cell) in b.bytes().zip(row.iter_mut().skip(1)) {
            let here = (diagonal + usize::from(x != y)).min(*cell + 1).min(left + 1);
            diagonal = std::mem::replace(cell, here);
            left = here;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(symbols: &[(&str, u64, u64, SymbolKind)]) -> SymbolTable {
        let symbol =
            |&(name, va, size, kind): &(&str, u64, u64, _)| Symbol { name: name.into(), va: Va(va), size, kind, global: true };
        symbols.iter().map(symbol).collect()
    }

    #[test]
    fn edit_distance_counts_insertions_removals_and_replacements() {
        for (a, b, distance) in
            [("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0)]
        {
            assert_eq!(edit_distance(a, b), distance, "{a} {b}");
        }
    }

    #[test]
    fn an_expression_is_a_name_with_an_offset_up_or_down() {
        let table = table(&[("f", 0x1000, 0, SymbolKind::Function), ("f-1", 7, 0, SymbolKind::Label)]);
        for (expression, va) in
            [("f", 0x1000), (" f + 0x10 ", 0x1010), ("f+16", 0x1010), ("f-0x10", 0xff0), ("f-1", 7), ("f-1+1", 8)]
        {
            assert_eq!(table.resolve(expression).unwrap(), Va(va), "{expression}");
        }
        for expression in ["f+", "f+x", "f+0x", "f+1x", "f-0x1001", "f+0xffffffffffffffff"] {
            let error = table.resolve(expression).unwrap_err();
            assert!(matches!(error, VmiError::InvalidArgument { what: "symbol expression", .. }), "{expression}: {error}");
        }
        assert!(matches!(table.resolve("g+1"), Err(VmiError::SymbolNotFound { name, .. }) if name == "g"));
        assert!(matches!(table.resolve(""), Err(VmiError::SymbolNotFound { .. })));
    }

    #[test]
    fn an_unknown_name_suggests_the_three_most_like_it() {
        let kind = SymbolKind::Function;
        let names = ["open_file", "open_files", "read_file", "sys_open", "close", "zzz"];
        let table = table(&names.map(|name| (name, 1, 0, kind)));
        let nearest = |name: &str| match table.lookup(name) {
            Err(VmiError::SymbolNotFound { nearest, .. }) => nearest,
            other => panic!("{other:?}"),
        };
        assert_eq!(nearest("open_fike"), ["open_file", "open_files"]);
        // What contains the name comes behind what is spelled like it.
        assert_eq!(nearest("open"), ["open_file", "open_files", "sys_open"]);
        assert_eq!(nearest("q"), [] as [String; 0]);
    }

    #[test]
    fn an_address_is_named_by_the_innermost_symbol_that_covers_it() {
        use SymbolKind::{Absolute, Function, Label, Object};
        let table = table(&[
            ("outer", 0x1000, 0x100, Function),
            ("label", 0x1010, 0, Label),
            ("inner", 0x1020, 0x10, Object),
            ("alias", 0x1000, 0x100, Label),
            ("number", 0x1015, 0, Absolute),
            ("start", 0x2000, 0, Label),
            ("entry", 0x8_0000, 0, Function),
            ("text_start", 0x8_0000, 0, Label),
            ("section", 0x8_0000, 0x100, Label),
        ]);
        for (va, name) in [
            (0xfff, None),
            (0x1000, Some("outer")),
            (0x1018, Some("outer+0x18")),
            (0x1025, Some("inner+0x5")),
            (0x1030, Some("outer+0x30")),
            (0x1100, None),
            (0x2004, Some("start+0x4")),
            (0x8_0000, Some("entry")),
            (0x8_0004, Some("entry+0x4")),
            (0x1_2000, None),
            (u64::MAX, None),
        ] {
            assert_eq!(table.describe(Va(va)).as_deref(), name, "{va:#x}");
        }
    }

    #[test]
    fn of_two_symbols_with_one_name_the_global_one_is_meant() {
        let symbol = |va, global| Symbol { name: "init".into(), va: Va(va), size: 1, kind: SymbolKind::Function, global };
        let table: SymbolTable = [symbol(1, false), symbol(2, true), symbol(3, false), symbol(3, false)].into_iter().collect();
        assert_eq!(table.all("init").map(|symbol| symbol.va.0).collect::<Vec<_>>(), [2, 1, 3]);
        assert_eq!(table.resolve("init").unwrap(), Va(2));
    }
}
