//! A list of what a program and its runtime consist of, as one host tells it to another.
//!
//! It holds nothing that differs between hosts (owner, times), so that two hosts with the same program have lists with
//! the same digest. Whoever holds a [`Manifest`] may rely on it: paths lead nowhere but below their tree, every
//! directory comes before what it holds, nothing is named twice, links stay inside, and the sums are bounded.

use crate::words::{MAX_OBJECT_BYTES, Name};
use std::collections::BTreeSet;

/// Entries of one list: a real program has 44,000.
const MAX_ENTRIES: usize = 400_000;
/// All files together: a real program with its runtime has 700 MB.
const MAX_TOTAL_BYTES: u64 = 8 << 30;
/// One path, as the kernel bounds it.
const MAX_PATH_BYTES: usize = 4_096;
/// One component of it.
const MAX_COMPONENT_BYTES: usize = 255;
/// Directories within directories.
const MAX_DEPTH: usize = 64;
/// Names of ours beside what is being repaired: never part of a program.
const OWN_PREFIX: &[u8] = b".koboshi-";

/// Which tree an entry belongs to. There are no others: state, credentials and locks cannot be named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tree {
    /// The package's directory.
    Program,
    /// The Node runtime: a directory, or one binary (then its only entry has an empty path).
    Runtime,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Thing {
    /// A directory.
    Dir,
    /// A regular file: its pieces of 256 KiB, the last one shorter, by the BLAKE3 of each.
    File {
        /// May be executed.
        exec: bool,
        /// Bytes.
        size: u64,
        /// The pieces' names, in order.
        names: Vec<Name>,
    },
    /// A symbolic link.
    Link {
        /// Where it points.
        target: Vec<u8>,
    },
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its tree.
    pub tree: Tree,
    /// Below the tree's root; empty = the root itself.
    pub path: Vec<u8>,
    /// What it is.
    pub thing: Thing,
}

const PROGRAM: u8 = 0;
const RUNTIME: u8 = 1;
const DIR: u8 = 0;
const FILE: u8 = 1;
const EXEC: u8 = 2;
const LINK: u8 = 3;

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or("an entry is cut short")?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N)?.try_into().map_err(|_| "an entry is cut short".to_owned())
    }

    fn text(&mut self) -> Result<Vec<u8>, String> {
        let length = u16::from_be_bytes(self.array()?);
        Ok(self.take(usize::from(length))?.to_vec())
    }
}

/// How many pieces a file of this size has.
#[must_use]
pub(crate) fn pieces(size: u64) -> u64 {
    size.div_ceil(MAX_OBJECT_BYTES as u64)
}

impl Entry {
    /// Appends the entry: `tree u8 ‖ kind u8 ‖ path`, then of a file `size u64 ‖ names`, of a link its target. A text is
    /// `length u16 ‖ bytes`.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let text = |bytes: &[u8], out: &mut Vec<u8>| {
            out.extend_from_slice(&u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes());
            out.extend_from_slice(bytes);
        };
        out.push(match self.tree {
            Tree::Program => PROGRAM,
            Tree::Runtime => RUNTIME,
        });
        match &self.thing {
            Thing::Dir => {
                out.push(DIR);
                text(&self.path, out);
            }
            Thing::File { exec, size, names } => {
                out.push(if *exec { EXEC } else { FILE });
                text(&self.path, out);
                out.extend_from_slice(&size.to_be_bytes());
                out.extend_from_slice(names.as_flattened());
            }
            Thing::Link { target } => {
                out.push(LINK);
                text(&self.path, out);
                text(target, out);
            }
        }
    }

    fn read(from: &mut Cursor<'_>) -> Result<Entry, String> {
        let [tree, kind] = from.array()?;
        let tree = match tree {
            PROGRAM => Tree::Program,
            RUNTIME => Tree::Runtime,
            other => return Err(format!("no such tree ({other})")),
        };
        let path = from.text()?;
        let thing = match kind {
            DIR => Thing::Dir,
            FILE | EXEC => {
                let size = u64::from_be_bytes(from.array()?);
                // Bounded by what is left of the frame before anything is allocated.
                let bytes = usize::try_from(pieces(size)).ok().and_then(|n| n.checked_mul(32));
                let (names, _) = from.take(bytes.ok_or("an absurd size")?)?.as_chunks::<32>();
                Thing::File { exec: kind == EXEC, size, names: names.to_vec() }
            }
            LINK => Thing::Link { target: from.text()? },
            other => return Err(format!("no such kind of entry ({other})")),
        };
        Ok(Entry { tree, path, thing })
    }

    pub(crate) fn read_all(bytes: &[u8]) -> Result<Vec<Entry>, String> {
        let mut from = Cursor(bytes);
        let mut entries = Vec::new();
        while !from.0.is_empty() {
            entries.push(Entry::read(&mut from)?);
        }
        Ok(entries)
    }

    /// Name and length of each piece of a file.
    pub fn pieces(&self) -> impl Iterator<Item = (Name, usize)> + '_ {
        let (size, names) = match &self.thing {
            Thing::File { size, names, .. } => (*size, names.as_slice()),
            Thing::Dir | Thing::Link { .. } => (0, [].as_slice()),
        };
        names.iter().enumerate().map(move |(n, name)| {
            let left = size.saturating_sub(n as u64 * MAX_OBJECT_BYTES as u64);
            (*name, usize::try_from(left).unwrap_or(usize::MAX).min(MAX_OBJECT_BYTES))
        })
    }
}

/// A checked list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    entries: Vec<Entry>,
    /// The directories that lead to the last entry.
    above: Vec<Vec<u8>>,
    bytes: u64,
}

impl Manifest {
    /// Adds an entry. `Err` says in words why it has no place in any list.
    pub fn push(&mut self, entry: Entry) -> Result<(), String> {
        let shown =
            || String::from_utf8_lossy(&entry.path).chars().filter(|c| !c.is_control()).collect::<String>();
        if self.entries.len() >= MAX_ENTRIES {
            return Err(format!("more than {MAX_ENTRIES} entries"));
        }
        if !is_safe(&entry.path) {
            return Err(format!("`{}` leads out of the tree, or is absurd", shown()));
        }
        let last = self.entries.last();
        if last.is_some_and(|last| order(last, &entry) != std::cmp::Ordering::Less) {
            return Err(format!("`{}` comes twice, or out of order", shown()));
        }
        if last.is_none_or(|last| last.tree != entry.tree) {
            self.above.clear();
            if !entry.path.is_empty() {
                return Err("a tree begins with something else than its root".into());
            }
        } else {
            let parent = parent(&entry.path).ok_or("a tree with two roots")?;
            while self.above.last().is_some_and(|dir| dir != parent) {
                self.above.pop();
            }
            if self.above.is_empty() {
                return Err(format!("`{}` lies in no directory", shown()));
            }
        }
        match &entry.thing {
            Thing::Dir => self.above.push(entry.path.clone()),
            Thing::File { size, names, .. } => {
                self.bytes = self
                    .bytes
                    .checked_add(*size)
                    .filter(|b| *b <= MAX_TOTAL_BYTES)
                    .ok_or("absurdly large")?;
                if pieces(*size) != names.len() as u64 {
                    return Err(format!("`{}` has not as many pieces as its size needs", shown()));
                }
            }
            Thing::Link { target } => {
                if !stays_inside(&entry.path, target) {
                    return Err(format!("the link `{}` leads out of the tree", shown()));
                }
            }
        }
        self.entries.push(entry);
        Ok(())
    }

    /// All entries, sorted; each directory before what it holds.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Only those of one tree, as a list of its own.
    #[must_use]
    pub fn only(&self, tree: Tree) -> Manifest {
        let mut only = Manifest::default();
        for entry in self.entries.iter().filter(|e| e.tree == tree) {
            if let Thing::File { size, .. } = &entry.thing {
                only.bytes += size;
            }
            only.entries.push(entry.clone());
        }
        only
    }

    /// Whether it holds anything of this tree.
    #[must_use]
    pub fn has(&self, tree: Tree) -> bool {
        self.entries.iter().any(|e| e.tree == tree)
    }

    /// Bytes of all files together.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Regular files.
    #[must_use]
    pub fn files(&self) -> usize {
        self.entries.iter().filter(|e| matches!(e.thing, Thing::File { .. })).count()
    }

    /// Every distinct piece.
    #[must_use]
    pub fn names(&self) -> BTreeSet<Name> {
        self.entries.iter().flat_map(Entry::pieces).map(|(name, _)| name).collect()
    }

    /// What two hosts compare: the BLAKE3 of all entries as they are sent.
    #[must_use]
    pub fn digest(&self) -> Name {
        let mut hash = blake3::Hasher::new();
        let mut bytes = Vec::new();
        for entry in &self.entries {
            bytes.clear();
            entry.write(&mut bytes);
            hash.update(&bytes);
        }
        *hash.finalize().as_bytes()
    }
}

/// A depth-first walk with sorted names, tree by tree.
fn order(a: &Entry, b: &Entry) -> std::cmp::Ordering {
    let parts = |e: &Entry| e.path.split(|c| *c == b'/').map(<[u8]>::to_vec).collect::<Vec<_>>();
    a.tree.cmp(&b.tree).then_with(|| match (a.path.is_empty(), b.path.is_empty()) {
        (true, true) => std::cmp::Ordering::Equal,
        (true, false) => std::cmp::Ordering::Less,
        (false, true) => std::cmp::Ordering::Greater,
        (false, false) => parts(a).cmp(&parts(b)),
    })
}

fn parent(path: &[u8]) -> Option<&[u8]> {
    if path.is_empty() {
        return None;
    }
    Some(path.iter().rposition(|c| *c == b'/').map_or(&[], |at| &path[..at]))
}

fn is_safe(path: &[u8]) -> bool {
    let part = |p: &[u8]| {
        !p.is_empty()
            && p != b"."
            && p != b".."
            && p.len() <= MAX_COMPONENT_BYTES
            && !p.starts_with(OWN_PREFIX)
    };
    path.len() <= MAX_PATH_BYTES
        && !path.contains(&0)
        && (path.is_empty()
            || (path.split(|c| *c == b'/').all(part) && path.split(|c| *c == b'/').count() <= MAX_DEPTH))
}

/// Whether a link at `path` points at something below the same root, whatever lies there.
fn stays_inside(path: &[u8], target: &[u8]) -> bool {
    if target.is_empty() || target.len() > MAX_PATH_BYTES || target.starts_with(b"/") || target.contains(&0) {
        return false;
    }
    let mut depth = path.split(|c| *c == b'/').count() - 1;
    for part in target.split(|c| *c == b'/') {
        match part {
            b"" | b"." => {}
            b".." => match depth.checked_sub(1) {
                Some(up) => depth = up,
                None => return false,
            },
            _ => depth += 1,
        }
    }
    !path.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dir(path: &str) -> Entry {
        Entry { tree: Tree::Program, path: path.into(), thing: Thing::Dir }
    }
    fn file(path: &str, size: u64) -> Entry {
        let names = (0..pieces(size)).map(|n| [n as u8; 32]).collect();
        Entry { tree: Tree::Program, path: path.into(), thing: Thing::File { exec: false, size, names } }
    }
    fn link(path: &str, target: &str) -> Entry {
        Entry { tree: Tree::Program, path: path.into(), thing: Thing::Link { target: target.into() } }
    }
    fn pushed(entries: &[Entry]) -> Result<Manifest, String> {
        let mut m = Manifest::default();
        entries.iter().try_for_each(|e| m.push(e.clone()))?;
        Ok(m)
    }

    #[test]
    fn a_list_is_a_walk() {
        let list = [
            dir(""),
            dir("a"),
            file("a/b", 300_000),
            dir("a/c"),
            file("a/c/d", 0),
            file("a-b", 1),
            link("z", "a/b"),
        ];
        let m = pushed(&list).unwrap();
        assert_eq!((m.files(), m.bytes()), (3, 300_001));
        let pieces: Vec<usize> = list[2].pieces().map(|(_, n)| n).collect();
        assert_eq!(pieces, [262_144, 37_856]);
        assert_ne!(m.digest(), pushed(&list[..6]).unwrap().digest());
    }

    #[test]
    fn a_list_that_lies_is_refused() {
        for (bad, why) in [
            (vec![file("a", 1)], "no root"),
            (vec![dir(""), dir("")], "two roots"),
            (vec![dir(""), file("a", 1), file("a", 1)], "twice"),
            (vec![dir(""), file("b", 1), file("a", 1)], "out of order"),
            (vec![dir(""), file("a/b", 1)], "in no directory"),
            (vec![dir(""), file("a", 1), file("a/b", 1)], "in a file"),
            (vec![dir(""), link("a", "b"), file("a/b", 1)], "through a link"),
            (vec![dir(""), file("../a", 1)], "climbs"),
            (vec![dir(""), file("/etc/passwd", 1)], "absolute"),
            (vec![dir(""), file("a//b", 1)], "an empty name"),
            (vec![dir(""), file("a\0b", 1)], "a nul"),
            (vec![dir(""), file(".koboshi-tmp-1", 1)], "a name of ours"),
            (vec![dir(""), link("a", "/etc")], "an absolute link"),
            (vec![dir(""), link("a", "../x")], "a link that leaves"),
            (vec![dir(""), dir("d"), link("d/a", "../../x")], "a link that leaves from below"),
        ] {
            assert!(pushed(&bad).is_err(), "{why}");
        }
        let wrong = Entry { thing: Thing::File { exec: false, size: 1, names: vec![] }, ..file("a", 1) };
        assert!(pushed(&[dir(""), wrong.clone()]).is_err(), "too few pieces");
        let Thing::File { exec, .. } = wrong.thing else { unreachable!() };
        let vast = Entry { thing: Thing::File { exec, size: u64::MAX, names: vec![] }, ..wrong };
        assert!(pushed(&[dir(""), vast]).is_err(), "absurdly large");
        assert!(pushed(&[dir(""), dir("d"), link("d/a", "../x")]).is_ok());
    }

    #[test]
    fn a_size_that_the_frame_cannot_hold_allocates_nothing() {
        let mut bytes = vec![PROGRAM, FILE, 0, 1, b'a'];
        bytes.extend_from_slice(&u64::MAX.to_be_bytes());
        assert!(Entry::read_all(&bytes).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4_000, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn whatever_is_accepted_stays_below_its_tree(bytes in proptest::collection::vec(
            prop_oneof![Just(0_u8), Just(1), Just(2), Just(3), Just(b'/'), Just(b'.'), Just(b'a'), any::<u8>()], 0..200))
        {
            if let Ok(entries) = Entry::read_all(&bytes) {
                let mut again = Vec::new();
                entries.iter().for_each(|e| e.write(&mut again));
                prop_assert_eq!(&again, &bytes);
                let mut m = Manifest::default();
                for e in entries {
                    if m.push(e.clone()).is_ok() {
                        prop_assert!(!e.path.starts_with(b"/"));
                        prop_assert!(e.path.split(|c| *c == b'/').all(|p| p != b".."));
                    }
                }
            }
        }
    }
}
