//! Healing the store itself: what fails its proof is written anew from wherever the same bytes still lie.
//!
//! A damaged pack is replaced as a whole, its good objects with it: the new one is durable before the old one goes, so
//! a power cut leaves one of them or both. A pack of which something is lost for good stays where it is, for whoever
//! can mend it. Nothing is believed on the way: an object is written under its name only after its hash was right.

use crate::content::{domain, late};
use crate::elsewhere::{Elsewhere, Missed};
use crate::files::{self, Meter};
use crate::key::Name;
use crate::layout::{Head, Layout, RootRef};
use crate::pack::{Finished, ObjectReader, Objects, PackWriter};
use crate::seal;
use crate::snapshot::to_path;
use crate::tree::{EntryKind, Live, TreeReader, TreeWriter};
use crate::verify::prove;
use crate::{Bad, Healed, Trust, VerifyReport};
use host::clock::Deadline;
use host::{Context, Error, Kind, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Findings listed one by one.
const MAX_BAD: usize = 1_000;
/// Snapshots named per finding.
const MAX_NAMED: usize = 20;
/// Objects looked for elsewhere in one go, about 100 bytes each; the rest is for the next.
const MAX_MISSED: usize = 500_000;
/// How long the removal of a replaced pack waits for readers; if they stay, a later prune removes it.
const READERS_WAIT: Duration = Duration::from_secs(2);
/// Looks at the clock once in so many entries.
const CLOCK_EVERY: u64 = 4_096;

/// `only`: the packs to be proven; all when `None`. That every object which a manifest names is there is always seen to.
pub(crate) fn run(
    layout: &Layout,
    only: Option<&BTreeSet<String>>,
    spares: &[(String, PathBuf)],
    deadline: Deadline,
) -> Result<Healed> {
    let meter = Meter::start();
    let _lock = layout.write_lock(deadline)?;
    layout.tidy()?;
    let (heads, unreadable) = layout.heads()?;
    let mut done = Healed::default();
    for (id, e) in &unreadable {
        let what = format!("snapshot {id}");
        done.lost.push(Bad { what, why: e.why.clone(), snapshots: vec![id.clone()] });
    }
    manifests(layout, &heads, &mut done)?;

    let objects = Objects::load(&layout.packs(), &layout.key)?;
    let named = |pack: u32| only.is_none_or(|o| o.contains(&objects.packs[pack as usize].name));
    let looked_at = |i: usize| named(objects.records[i].pack);
    let broken = prove(layout, &objects, &looked_at, &mut VerifyReport::default(), deadline)?;
    let mut damaged: BTreeSet<u32> = broken.keys().map(|i| objects.records[*i].pack).collect();
    damaged.extend(
        (0..objects.packs.len()).filter(|p| objects.packs[*p].index_damage.is_some()).map(|p| p as u32),
    );
    let mut reader = ObjectReader::new(&objects, &layout.key);
    let mut buffer = Vec::new();
    let mut lost_names: HashSet<Name> = HashSet::new();
    for i in broken.keys() {
        let r = &objects.records[*i];
        buffer.clear();
        if reader.read(&r.name, r.domain(), &mut buffer).is_err() {
            lost_names.insert(r.name);
        }
    }
    let missed = missed(layout, &heads, &objects, &lost_names, deadline)?;
    if damaged.is_empty() && missed.is_empty() && objects.lost.is_empty() {
        done.cost = meter.cost(0);
        return Ok(done);
    }

    let finished: Mutex<Vec<Finished>> = Mutex::new(Vec::new());
    let collect = |pack: Finished| -> Result<()> {
        finished.lock().unwrap_or_else(PoisonError::into_inner).push(pack);
        Ok(())
    };
    let tmp = layout.tmp();
    let mut writer = PackWriter::new(&tmp, &layout.key, &collect)?;
    let elsewhere = Elsewhere::new(layout, Vec::new(), spares, deadline);
    let mut still: HashMap<Name, String> = HashMap::new();
    for m in missed.values() {
        if elsewhere.find(m, &mut buffer)?.is_some() {
            writer.add(m.name, m.domain, &buffer)?;
            done.objects += 1;
        } else {
            let why = objects.places(&m.name).first().map_or_else(
                || "it is not in the store".to_string(),
                |r| format!("its bytes in pack {} fail their proof", objects.packs[r.pack as usize].name),
            );
            still.insert(m.name, format!("{why}, and no other file here has the same bytes"));
        }
    }
    // A pack goes only when nothing of it is lost to anybody, also not to a snapshot whose record may be mended by hand.
    // One without its index may hold what nobody can see.
    let nobody_misses = still.is_empty() && unreadable.is_empty();
    let goes = |pack: u32| {
        if objects.packs[pack as usize].index_damage.is_some() && !nobody_misses {
            return false;
        }
        let mut bad = broken.keys().map(|i| &objects.records[*i]).filter(|r| r.pack == pack);
        bad.all(|r| !lost_names.contains(&r.name) || !still.contains_key(&r.name) && unreadable.is_empty())
    };
    let going: Vec<u32> = damaged.into_iter().filter(|p| goes(*p)).collect();
    for (i, r) in objects.records.iter().enumerate().filter(|(_, r)| going.contains(&r.pack)) {
        if deadline.passed() {
            return Err(late("healing the store"));
        }
        // A crash after healing has left a copy already.
        let mut others = objects.places(&r.name).iter().filter(|p| !going.contains(&p.pack));
        if broken.contains_key(&i) || others.any(|p| reader.proves(p)) {
            continue;
        }
        buffer.clear();
        if reader.read(&r.name, r.domain(), &mut buffer).is_ok() {
            writer.add(r.name, r.domain(), &buffer)?;
        }
    }
    writer.finish()?;
    let mut added = 0;
    for pack in finished.into_inner().unwrap_or_else(PoisonError::into_inner) {
        added += pack.bytes;
        files::publish(&pack.file, &pack.tmp, &layout.packs().join(format!("{}.pack", pack.name)))?;
    }
    done.packs = going.len() as u64;
    let mut gone: Vec<PathBuf> = going.iter().map(|p| objects.packs[*p as usize].path.clone()).collect();
    if nobody_misses {
        // Nobody needs what nobody can read; a file that is whole and says something else is not ours.
        gone.extend(objects.lost.iter().map(|(path, _)| PathBuf::from(path)).filter(|p| is_cut_short(p)));
    }
    if !gone.is_empty() && layout.no_readers(Deadline::after(READERS_WAIT).min(deadline))?.is_some() {
        for path in gone {
            files::remove(&path).context(|| format!("removing {}", path.display()))?;
        }
        files::sync_dir(&layout.packs())?;
    }
    if !still.is_empty() {
        name_lost(layout, &heads, &still, &mut done);
    }
    distrust(layout, &heads, &mut done)?;
    done.lost.truncate(MAX_BAD);
    done.cost = meter.cost(added);
    Ok(done)
}

fn is_cut_short(pack: &std::path::Path) -> bool {
    pack.metadata().is_ok_and(|m| m.len() < seal::HEADER_BYTES as u64)
}

/// Each distinct manifest once, newest first.
fn distinct(heads: &[Head]) -> Vec<&RootRef> {
    let mut seen = HashSet::new();
    heads.iter().rev().flat_map(|h| &h.trees).filter(|t| seen.insert(&t.tree)).collect()
}

/// Writes damaged manifests anew where the index of the live tree still repeats them.
fn manifests(layout: &Layout, heads: &[Head], done: &mut Healed) -> Result<()> {
    for reference in distinct(heads) {
        let Err(e) = layout.prove_tree(reference) else { continue };
        if !matches!(e.kind, Kind::Corrupt | Kind::NotFound) {
            return Err(e);
        }
        match from_index(layout, reference) {
            Ok(()) => done.manifests += 1,
            Err(no) => {
                let what = format!("the list of what `{}` held", reference.root.name);
                let why = format!("{}; it cannot be made again: {}", e.why, no.why);
                let snapshots = heads
                    .iter()
                    .filter(|h| h.trees.iter().any(|t| t.tree == reference.tree))
                    .map(|h| h.info.id.clone());
                done.lost.push(Bad { what, why, snapshots: snapshots.take(MAX_NAMED).collect() });
            }
        }
    }
    Ok(())
}

fn from_index(layout: &Layout, reference: &RootRef) -> Result<()> {
    let id = reference.tree_id()?;
    let mut index = TreeReader::index(&layout.index_path(&reference.root.name), &layout.key)?;
    if index.basis != id {
        let what = format!("making the manifest of `{}` again", reference.root.name);
        return Err(Error::new(Kind::NotFound, what, "the live tree is no longer what it lists"));
    }
    let mut new = TreeWriter::tree(layout.tmp_file()?, &layout.key, id)?;
    while let Some(entry) = index.next()? {
        new.push(&crate::tree::Entry { live: Live::default(), ..entry })?;
    }
    let (file, tmp) = new.finish()?;
    files::publish(&file, &tmp, &layout.tree_path(&reference.tree))
}

/// What the manifests name and no pack holds whole.
fn missed(
    layout: &Layout,
    heads: &[Head],
    objects: &Objects,
    lost: &HashSet<Name>,
    deadline: Deadline,
) -> Result<BTreeMap<Name, Missed>> {
    let mut all = BTreeMap::new();
    let mut count = 0u64;
    for reference in distinct(heads) {
        let Ok(mut tree) = layout.tree(reference) else { continue };
        let domain = domain(reference.root.class);
        while let Ok(Some(entry)) = tree.next() {
            count += 1;
            if count.is_multiple_of(CLOCK_EVERY) && deadline.passed() {
                return Err(late("healing the store"));
            }
            if entry.kind != EntryKind::File {
                continue;
            }
            let chunk = u64::from(entry.chunk_bytes());
            let mut at = 0;
            for run in &entry.runs {
                let length = usize::try_from((entry.size - at).min(chunk)).unwrap_or(0);
                if (lost.contains(&run.name) || !objects.has(&run.name)) && all.len() < MAX_MISSED {
                    let file_bytes = entry.size;
                    all.entry(run.name).or_insert(Missed { name: run.name, domain, length, file_bytes, at });
                }
                at = at.saturating_add(u64::from(run.count) * chunk).min(entry.size);
            }
        }
    }
    Ok(all)
}

/// Names the files that are lost, and the snapshots that need them.
fn name_lost(layout: &Layout, heads: &[Head], still: &HashMap<Name, String>, done: &mut Healed) {
    let mut files: BTreeMap<(String, Vec<u8>, Name), Vec<String>> = BTreeMap::new();
    for head in heads {
        for reference in &head.trees {
            let Ok(mut tree) = layout.tree(reference) else { continue };
            while let Ok(Some(entry)) = tree.next() {
                let Some(run) = entry.runs.iter().find(|r| still.contains_key(&r.name)) else { continue };
                let key = (reference.root.name.clone(), entry.path, run.name);
                if files.len() < MAX_BAD || files.contains_key(&key) {
                    files.entry(key).or_default().push(head.info.id.clone());
                }
            }
        }
    }
    for ((root, path, name), snapshots) in files {
        let what = format!("{root}/{}", to_path(&path).display());
        let why = still.get(&name).cloned().unwrap_or_default();
        done.lost.push(Bad { what, why, snapshots });
    }
}

/// Takes trust from snapshots that lost something, as far as whole ones hold the same classes.
fn distrust(layout: &Layout, heads: &[Head], done: &mut Healed) -> Result<()> {
    let hurt: HashSet<&String> = done.lost.iter().flat_map(|b| &b.snapshots).collect();
    let trusted: Vec<&Head> = heads.iter().filter(|h| h.info.trust.trusted()).collect();
    let mut distrusted = Vec::new();
    for head in trusted.iter().filter(|h| hurt.contains(&h.info.id)) {
        let held_by_another =
            |class| trusted.iter().any(|o| !hurt.contains(&o.info.id) && o.info.classes.contains_key(class));
        if head.info.classes.keys().all(held_by_another) {
            layout.write_trust(&head.info.id, Trust::Candidate)?;
            distrusted.push(head.info.id.clone());
        }
    }
    drop(hurt);
    for bad in &mut done.lost {
        bad.snapshots.truncate(MAX_NAMED);
    }
    done.distrusted = distrusted;
    Ok(())
}
