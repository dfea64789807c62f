//! The slow look at every byte, in small portions: what stat cannot see (bytes that changed behind an unchanged inode:
//! a dying disk, a bit flipped in memory) is found before it is needed.
//!
//! A round goes through the converging live trees and the spares against the newest trusted snapshot, then through the
//! manifests, then through every block of every pack. Between two portions only a small cursor is kept. A live file that
//! fails is not mended here: its entry in the index is told not to vouch for it any more, so that the quick look finds it
//! and the ordinary repair mends it. What fails in the store is healed at once.

use crate::beneath::{Base, Stat};
use crate::compare::distrust;
use crate::content::Reader;
use crate::files::{Meter, cpu_ms};
use crate::heal;
use crate::layout::{Head, Layout, RootRef};
use crate::pack::{ObjectReader, Objects, drop_from_cache};
use crate::repair::spare_reference;
use crate::snapshot::open_base;
use crate::tree::{EntryKind, compare_paths};
use crate::walk::Found;
use crate::{Difference, DifferenceKind, Portion, ScrubCursor, ScrubPlace, Scrubbed, compare, prune};
use host::Result;
use host::clock::Deadline;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Opening a file costs as much as reading so many bytes.
const FILE_COST_BYTES: u64 = 32 * 1024;
/// Damaged files named per portion; the others are found by the quick look that follows, or by the next round.
const MAX_DAMAGED: usize = 256;

/// What one portion may still do.
struct Quota {
    bytes: u64,
    cpu_until_ms: f64,
    deadline: Deadline,
}

impl Quota {
    fn spend(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    fn spent(&self) -> bool {
        self.bytes == 0 || cpu_ms() >= self.cpu_until_ms || self.deadline.passed()
    }
}

pub(crate) fn run(
    layout: &Layout,
    cursor: Option<ScrubCursor>,
    portion: Portion,
    spares: &[(String, PathBuf)],
    deadline: Deadline,
) -> Result<Scrubbed> {
    let meter = Meter::start();
    let (heads, unreadable) = layout.heads()?;
    let mut cursor = cursor.unwrap_or_default();
    let mut done = Scrubbed::default();
    let Some(head) = heads.iter().rfind(|h| h.info.trust.trusted()) else {
        // Nothing is proven yet, so there is nothing to measure by.
        done.cursor = cursor;
        return Ok(done);
    };
    let trees = live_trees(head, spares);
    let total =
        trees.iter().map(|t| t.bytes + t.files * FILE_COST_BYTES).sum::<u64>() + prune::size(layout)?.bytes;
    let mut quota =
        Quota { bytes: total / portion.of.max(1) + 1, cpu_until_ms: cpu_ms() + portion.cpu_ms, deadline };
    let mut hurt: BTreeSet<String> = BTreeSet::new();
    let mut lost_something = !unreadable.is_empty() && matches!(cursor.place, ScrubPlace::Manifests { .. });
    // At least one thing per portion, or a round would never end.
    loop {
        cursor.place = match cursor.place {
            ScrubPlace::Live { root, after } => {
                live(layout, &trees, &root, after.as_deref(), &mut quota, &mut done)?
            }
            ScrubPlace::Manifests { after } => {
                manifests(layout, &heads, &after, &mut quota, &mut lost_something)?
            }
            ScrubPlace::Packs { pack, block } => {
                match packs(layout, &pack, block, &mut quota, &mut done, &mut hurt)? {
                    Some(place) => place,
                    None => {
                        done.round_ended = true;
                        cursor.rounds += 1;
                        ScrubPlace::default()
                    }
                }
            }
        };
        if done.round_ended || quota.spent() {
            break;
        }
    }
    if lost_something || !hurt.is_empty() {
        done.healed = Some(heal::run(layout, Some(&hurt), spares, deadline)?);
    }
    done.cursor = cursor;
    done.cost = meter.cost(0);
    Ok(done)
}

/// The trees that converge to the snapshot, and the ready copies of them.
fn live_trees(head: &Head, spares: &[(String, PathBuf)]) -> Vec<RootRef> {
    let mut all: Vec<RootRef> = head.trees.iter().filter(|t| t.root.class.converges()).cloned().collect();
    for (name, path) in spares {
        all.extend(
            all.iter()
                .find(|t| t.root.name == *name)
                .map(|t| spare_reference(t, path))
                .into_iter()
                .collect::<Vec<_>>(),
        );
    }
    all
}

/// Goes on in one live tree; gives where to go on next.
fn live(
    layout: &Layout,
    trees: &[RootRef],
    root: &str,
    after: Option<&[u8]>,
    quota: &mut Quota,
    done: &mut Scrubbed,
) -> Result<ScrubPlace> {
    // A root that is gone meanwhile: the round begins with the first.
    let number = trees.iter().position(|t| t.root.name == root).unwrap_or(0);
    let next = || match trees.get(number + 1) {
        Some(tree) => ScrubPlace::Live { root: tree.root.name.clone(), after: None },
        None => ScrubPlace::Manifests { after: String::new() },
    };
    let Some(reference) = trees.get(number) else { return Ok(next()) };
    let after = if reference.root.name == root { after } else { None };
    // All of it missing is seen by everybody.
    let Some(base) = open_base(&reference.root)? else { return Ok(next()) };
    let mut reader = Reader::new(&base, &reference.root, &layout.key, None, quota.deadline);
    let Ok(mut tree) = layout.tree(reference) else { return Ok(next()) };
    let mut damaged: Vec<Vec<u8>> = Vec::new();
    let mut stopped: Option<Vec<u8>> = None;
    // A manifest that cannot be read to its end is the manifests' matter.
    while let Ok(Some(entry)) = tree.next() {
        if after.is_some_and(|a| compare_paths(&entry.path, a) != Ordering::Greater)
            || entry.kind != EntryKind::File
            || entry.database
        {
            continue;
        }
        if let Some(found) = find(&base, &entry.path) {
            let right = found.stat.size == entry.size
                && reader.hash(&found, &entry)?.is_some_and(|(live, _)| live.same_content(&entry));
            if !right && damaged.len() < MAX_DAMAGED {
                damaged.push(entry.path.clone());
            }
            done.files += 1;
            done.bytes += found.stat.size;
        }
        quota.spend(entry.size + FILE_COST_BYTES);
        if quota.spent() {
            stopped = Some(entry.path);
            break;
        }
    }
    if !damaged.is_empty() {
        distrust(layout, reference, &damaged)?;
        let kind = DifferenceKind::Changed;
        let found: Vec<Difference> =
            damaged.iter().map(|p| compare::difference(reference, p, kind)).collect();
        done.damaged.extend(found);
    }
    Ok(match stopped {
        Some(path) => ScrubPlace::Live { root: reference.root.name.clone(), after: Some(path) },
        None => next(),
    })
}

/// A regular file as it lies there; what is none, or is gone, the quick look sees.
fn find(base: &Base, path: &[u8]) -> Option<Found> {
    use std::os::fd::AsFd;
    let (dir, name) = base.parent_of(path).ok()?;
    let stat = Stat::at(dir.as_fd(), &name).ok()?;
    stat.is_file().then(|| Found { path: path.to_vec(), stat, companion: 0, is_companion: false })
}

/// Reads manifests to their end and looks whether every object that they name is somewhere.
fn manifests(
    layout: &Layout,
    heads: &[Head],
    after: &str,
    quota: &mut Quota,
    lost_something: &mut bool,
) -> Result<ScrubPlace> {
    let all: BTreeMap<&str, &RootRef> =
        heads.iter().flat_map(|h| &h.trees).map(|t| (t.tree.as_str(), t)).collect();
    let objects = Objects::load(&layout.packs(), &layout.key)?;
    for (name, reference) in
        all.range::<str, _>((std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded))
    {
        let whole = (|| -> Result<bool> {
            let mut tree = layout.tree(reference)?;
            let mut all_there = true;
            while let Some(entry) = tree.next()? {
                all_there &= entry.runs.iter().all(|r| objects.has(&r.name));
            }
            Ok(all_there)
        })();
        *lost_something |= !matches!(whole, Ok(true));
        quota.spend(layout.tree_path(name).metadata().map_or(0, |m| m.len()));
        if quota.spent() {
            return Ok(ScrubPlace::Manifests { after: (*name).to_owned() });
        }
    }
    Ok(ScrubPlace::Packs { pack: String::new(), block: 0 })
}

/// Opens and hashes blocks, from one on; `None` after the last pack.
fn packs(
    layout: &Layout,
    from: &str,
    block: u32,
    quota: &mut Quota,
    done: &mut Scrubbed,
    hurt: &mut BTreeSet<String>,
) -> Result<Option<ScrubPlace>> {
    for path in Objects::paths(&layout.packs())? {
        let name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        let begin = match name.as_str().cmp(from) {
            Ordering::Less => continue,
            Ordering::Equal => block,
            Ordering::Greater => 0,
        };
        // Nobody else reads these; what lies in the page cache says nothing about the disk.
        drop_from_cache(&path);
        let objects = Objects::load_one(&path, &layout.key)?;
        let Some(pack) = objects.packs.first() else {
            // Gone since it was listed, or nothing of it can be read.
            if !objects.lost.is_empty() {
                hurt.insert(name);
            }
            continue;
        };
        if pack.index_damage.is_some() {
            hurt.insert(name.clone());
        }
        let mut reader = ObjectReader::new(&objects, &layout.key);
        let mut records: Vec<_> = objects.records.iter().filter(|r| r.block >= begin).collect();
        records.sort_unstable_by_key(|r| (r.block, r.offset));
        for in_block in records.chunk_by(|a, b| a.block == b.block) {
            let number = in_block[0].block;
            if !in_block.iter().all(|r| reader.proves(r)) {
                hurt.insert(name.clone());
            }
            let stored = pack.blocks.get(number as usize).map_or(0, |b| u64::from(b.1));
            done.blocks += 1;
            done.bytes += stored;
            quota.spend(stored);
            if quota.spent() {
                drop_from_cache(&path);
                return Ok(Some(ScrubPlace::Packs { pack: name, block: number + 1 }));
            }
        }
        drop_from_cache(&path);
    }
    Ok(None)
}
