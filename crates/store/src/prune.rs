//! Keeping the store within its limit: the oldest snapshots go first, never what a trusted newest one needs.
//!
//! Order makes it crash safe: records of snapshots first, then manifests nobody names, then packs, each rewritten
//! pack durable before the old one goes. A crash anywhere leaves garbage for the next prune, never a hole.

use crate::content::late;
use crate::files;
use crate::layout::{Head, Layout};
use crate::pack::{Finished, ObjectReader, Objects, PackWriter};
use crate::verify::Needed;
use crate::{Pruned, Size};
use engine::words::Class;
use host::clock::Deadline;
use host::{Context, Error, Kind, Result};
use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::PoisonError;

/// A pack is rewritten when less than this much of it is still needed.
const WORTH_KEEPING_PERCENT: u64 = 60;
/// Small packs are gathered when there are more than this many of them.
const MAX_SMALL_PACKS: usize = 24;
const SMALL_PACK_BYTES: u64 = 4 * 1024 * 1024;

/// Bytes on disk.
pub(crate) fn size(layout: &Layout) -> Result<Size> {
    let sum = |part: &str| -> Result<(u64, u64)> {
        let dir = layout.dir.join(part);
        let (mut bytes, mut count) = (0, 0);
        for entry in std::fs::read_dir(&dir).context(|| format!("listing {}", dir.display()))? {
            if let Ok(meta) = entry.and_then(|e| e.metadata()) {
                bytes += meta.len();
                count += 1;
            }
        }
        Ok((bytes, count))
    };
    let packs_bytes = sum("packs")?.0;
    let (heads_bytes, snapshots) = sum("snapshots")?;
    let others: u64 =
        ["trees", "trust", "index", "tmp"].iter().map(|p| sum(p).map(|s| s.0)).sum::<Result<u64>>()?;
    Ok(Size { bytes: packs_bytes + heads_bytes + others, packs_bytes, snapshots })
}

/// What may never go: the newest snapshot, and for each class the newest trusted one that holds it. One that was taken
/// while all of the class was gone holds nothing of it: then the newest with anything in it stays too.
fn protected(heads: &[Head]) -> HashSet<String> {
    let mut keep: HashSet<String> = heads.last().map(|h| h.info.id.clone()).into_iter().collect();
    for class in Class::ALL {
        let newest =
            heads.iter().rev().find(|h| h.info.trust.trusted() && h.info.classes.contains_key(&class));
        keep.extend(newest.map(|h| h.info.id.clone()));
        let filled = heads
            .iter()
            .rev()
            .find(|h| h.info.trust.trusted() && h.info.classes.get(&class).is_some_and(|c| c.files > 0));
        keep.extend(filled.map(|h| h.info.id.clone()));
    }
    keep
}

pub(crate) fn run(layout: &Layout, limit_bytes: u64, deadline: Deadline) -> Result<Pruned> {
    let _lock = layout.write_lock(deadline)?;
    layout.tidy()?;
    let mut done = Pruned { before_bytes: size(layout)?.bytes, ..Pruned::default() };
    let (heads, bad) = layout.heads()?;
    let Some(_nobody_reads) = layout.no_readers(deadline)? else {
        return Err(Error::new(Kind::TimedOut, "pruning the store", "a repair or verify is reading from it")
            .hint("it is tried again at the next snapshot"));
    };
    let mut objects = Objects::load(&layout.packs(), &layout.key)?;
    objects.forget_broken_twins(&layout.key);
    let keep = protected(&heads);
    let mut needed = Needed::none(&objects);
    let mut seen = HashSet::new();
    // From what must stay, then from the newest on, for as long as it fits.
    let mut bytes = 0u64;
    let mut kept: Vec<&Head> = Vec::new();
    let (must, may): (Vec<&Head>, Vec<&Head>) = heads.iter().rev().partition(|h| keep.contains(&h.info.id));
    let cost = |record: usize| {
        let r = &objects.records[record];
        let (_, stored, raw) = objects.packs[r.pack as usize].blocks[r.block as usize];
        // Its share of the sealed block.
        u64::from(stored) * r.length() as u64 / u64::from(raw.max(1)) + 48
    };
    for head in must {
        mark(layout, head, &objects, &mut needed, &mut seen, &mut bytes, &cost, deadline)?;
        kept.push(head);
    }
    done.over_limit = bytes > limit_bytes;
    let mut full = done.over_limit;
    for head in may {
        if !full {
            let (mut more, mut trees) = (bytes, seen.clone());
            let mut trial = needed.copy();
            mark(layout, head, &objects, &mut trial, &mut trees, &mut more, &cost, deadline)?;
            if more <= limit_bytes {
                (bytes, needed, seen) = (more, trial, trees);
                kept.push(head);
                continue;
            }
            full = true;
        }
        done.removed.push(head.info.id.clone());
    }
    done.removed.reverse();
    for id in &done.removed {
        layout.remove_head(id)?;
    }
    // A snapshot whose record cannot be read may be mended by hand: its manifests and objects stay as long as there is
    // room. Nobody can tell them from what is needed by none.
    if bad.is_empty() || full || done.before_bytes > limit_bytes {
        remove_trust(layout)?;
        remove_trees(layout, &kept)?;
        collect(layout, &objects, &needed, deadline)?;
    }
    done.after_bytes = size(layout)?.bytes;
    Ok(done)
}

#[allow(clippy::too_many_arguments, reason = "one accumulator each for objects, manifests and bytes")]
fn mark(
    layout: &Layout,
    head: &Head,
    objects: &Objects,
    needed: &mut Needed,
    seen: &mut HashSet<String>,
    bytes: &mut u64,
    cost: &dyn Fn(usize) -> u64,
    deadline: Deadline,
) -> Result<()> {
    for r in &head.trees {
        if !seen.contains(&r.tree) {
            *bytes += layout.tree_path(&r.tree).metadata().map(|m| m.len()).unwrap_or(0);
        }
    }
    match needed.mark(layout, head, objects, seen, deadline, &mut |record| *bytes += cost(record)) {
        // One with a damaged manifest keeps what its readable part names.
        Err(e) if e.kind != Kind::TimedOut => Ok(()),
        other => other,
    }
}

fn remove_trees(layout: &Layout, kept: &[&Head]) -> Result<()> {
    let named: HashSet<&str> = kept.iter().flat_map(|h| h.trees.iter().map(|t| t.tree.as_str())).collect();
    let dir = layout.dir.join("trees");
    for entry in std::fs::read_dir(&dir).context(|| format!("listing {}", dir.display()))? {
        let path = entry.context(|| format!("listing {}", dir.display()))?.path();
        let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        if !named.contains(stem.as_str()) {
            files::remove(&path).context(|| format!("removing {}", path.display()))?;
        }
    }
    files::sync_dir(&dir)
}

/// Removes trust in snapshots that are gone: a crash between a record and its trust leaves one.
fn remove_trust(layout: &Layout) -> Result<()> {
    let there: HashSet<String> = layout.ids()?.into_iter().collect();
    let dir = layout.dir.join("trust");
    for entry in std::fs::read_dir(&dir).context(|| format!("listing {}", dir.display()))? {
        let path = entry.context(|| format!("listing {}", dir.display()))?.path();
        let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        if !there.contains(&stem) {
            files::remove(&path).context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

/// Removes packs that nobody needs and rewrites those that few need.
fn collect(layout: &Layout, objects: &Objects, needed: &Needed, deadline: Deadline) -> Result<()> {
    let mut live = vec![0u64; objects.packs.len()];
    let mut live_records: Vec<Vec<usize>> = vec![Vec::new(); objects.packs.len()];
    for (i, r) in objects.records.iter().enumerate() {
        if needed.has(i) {
            let (_, stored, raw) = objects.packs[r.pack as usize].blocks[r.block as usize];
            live[r.pack as usize] += u64::from(stored) * r.length() as u64 / u64::from(raw.max(1));
            live_records[r.pack as usize].push(i);
        }
    }
    let small = |p: usize| objects.packs[p].bytes < SMALL_PACK_BYTES;
    let many_small = (0..objects.packs.len()).filter(|p| small(*p)).count() > MAX_SMALL_PACKS;
    let old: Vec<usize> = (0..objects.packs.len())
        .filter(|p| {
            live[*p] * 100 < objects.packs[*p].bytes * WORTH_KEEPING_PERCENT || many_small && small(*p)
        })
        .collect();
    let moved = rewrite(layout, objects, &old, &mut live_records, deadline)?;
    for pack in old {
        if moved[pack] {
            let path = &objects.packs[pack].path;
            files::remove(path).context(|| format!("removing {}", path.display()))?;
        }
    }
    files::sync_dir(&layout.packs())
}

/// Copies what is needed of these packs into new ones; true for those that may now go.
fn rewrite(
    layout: &Layout,
    objects: &Objects,
    old: &[usize],
    live_records: &mut [Vec<usize>],
    deadline: Deadline,
) -> Result<Vec<bool>> {
    let mut may_go = vec![false; objects.packs.len()];
    let finished: Mutex<Vec<Finished>> = Mutex::new(Vec::new());
    let done = |pack: Finished| -> Result<()> {
        finished.lock().unwrap_or_else(PoisonError::into_inner).push(pack);
        Ok(())
    };
    let tmp = layout.tmp();
    let mut writer = PackWriter::new(&tmp, &layout.key, &done)?;
    let mut reader = ObjectReader::new(objects, &layout.key);
    let mut buffer = Vec::new();
    for pack in old {
        let records = &mut live_records[*pack];
        records.sort_unstable_by_key(|i| (objects.records[*i].block, objects.records[*i].offset));
        let mut whole = true;
        for record in records.iter() {
            if deadline.passed() {
                return Err(late("pruning the store"));
            }
            let r = &objects.records[*record];
            buffer.clear();
            match reader.read(&r.name, r.domain(), &mut buffer) {
                Ok(()) => writer.add(r.name, r.domain(), &buffer)?,
                // What cannot be proven cannot be moved: its pack stays, for whoever can mend it.
                Err(_) => whole = false,
            }
        }
        may_go[*pack] = whole;
    }
    writer.finish()?;
    for pack in finished.into_inner().unwrap_or_else(PoisonError::into_inner) {
        files::publish(&pack.file, &pack.tmp, &layout.packs().join(format!("{}.pack", pack.name)))?;
    }
    Ok(may_go)
}
