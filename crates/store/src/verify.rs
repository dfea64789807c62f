//! Proving the store itself: every byte that a snapshot needs is opened, unpacked and hashed.

use crate::content::late;
use crate::files::Meter;
use crate::key::Name;
use crate::layout::{Head, Layout};
use crate::pack::Objects;
use crate::seal::Cipher;
use crate::snapshot::WORKERS;
use crate::{Bad, VerifyReport, hex};
use host::clock::Deadline;
use host::{Error, Kind, Result};
use std::collections::{BTreeMap, HashSet};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Findings listed one by one; more of the same adds nothing.
const MAX_BAD: usize = 1000;
/// Snapshots named per finding.
const MAX_NAMED: usize = 20;

/// Which objects the manifests of these snapshots need, one bit for each record of the index.
pub(crate) struct Needed {
    bits: Vec<u64>,
    pub(crate) missing: Vec<(Name, String)>,
}

impl Needed {
    pub(crate) fn none(objects: &Objects) -> Needed {
        Needed { bits: vec![0; objects.records.len().div_ceil(64)], missing: Vec::new() }
    }

    pub(crate) fn copy(&self) -> Needed {
        Needed { bits: self.bits.clone(), missing: Vec::new() }
    }

    pub(crate) fn has(&self, record: usize) -> bool {
        self.bits[record / 64] & (1 << (record % 64)) != 0
    }

    fn set(&mut self, record: usize) -> bool {
        let was = self.has(record);
        self.bits[record / 64] |= 1 << (record % 64);
        !was
    }

    /// Marks what a snapshot's manifests name (trees already seen are passed over); `fresh` hears of each record
    /// marked for the first time.
    pub(crate) fn mark(
        &mut self,
        layout: &Layout,
        head: &Head,
        objects: &Objects,
        seen: &mut HashSet<String>,
        deadline: Deadline,
        fresh: &mut dyn FnMut(usize),
    ) -> Result<()> {
        for reference in &head.trees {
            if !seen.insert(reference.tree.clone()) {
                continue;
            }
            let mut tree = layout.tree(reference)?;
            let mut count = 0u32;
            while let Some(entry) = tree.next()? {
                count = count.wrapping_add(1);
                if count.is_multiple_of(4096) && deadline.passed() {
                    return Err(late("reading manifests"));
                }
                for run in &entry.runs {
                    let at = objects.records.partition_point(|r| r.name < run.name);
                    if objects.records.get(at).is_none_or(|r| r.name != run.name) {
                        if self.missing.len() < MAX_BAD {
                            self.missing.push((run.name, head.info.id.clone()));
                        }
                    } else if self.set(at) {
                        fresh(at);
                    }
                }
            }
        }
        Ok(())
    }
}

pub(crate) fn run(layout: &Layout, id: Option<&str>, deadline: Deadline) -> Result<VerifyReport> {
    let meter = Meter::start();
    let _reading = layout.read_lock();
    let mut report = VerifyReport::default();
    let heads = match id {
        Some(id) => vec![layout.head(id)?],
        None => {
            let (heads, bad) = layout.heads()?;
            for (id, e) in bad {
                report.bad.push(Bad { what: format!("snapshot {id}"), why: e.why, snapshots: vec![id] });
            }
            heads
        }
    };
    let mut objects = Objects::load(&layout.packs(), &layout.key)?;
    if id.is_some() {
        // A snapshot is whole if each object is right in one place.
        objects.forget_broken_twins(&layout.key);
    }
    for (path, why) in &objects.lost {
        report.bad.push(Bad { what: path.clone(), why: why.clone(), snapshots: Vec::new() });
    }
    for pack in &objects.packs {
        if let Some(why) = &pack.index_damage {
            let why = format!("{why}; it was read without");
            report.bad.push(Bad { what: pack.path.display().to_string(), why, snapshots: Vec::new() });
        }
    }
    let mut needed = Needed::none(&objects);
    let mut seen = HashSet::new();
    for head in &heads {
        if let Err(e) = needed.mark(layout, head, &objects, &mut seen, deadline, &mut |_| {}) {
            match e.kind {
                Kind::TimedOut => return Err(e),
                Kind::Usage
                | Kind::NotFound
                | Kind::Corrupt
                | Kind::NoSpace
                | Kind::Denied
                | Kind::System => {
                    let id = head.info.id.clone();
                    report.bad.push(Bad { what: e.what, why: e.why, snapshots: vec![id] });
                }
            }
        }
    }
    for (name, id) in &needed.missing {
        let what = format!("object {}", hex::encode(&name[..8]));
        report.bad.push(Bad { what, why: "it is not in the store".into(), snapshots: vec![id.clone()] });
    }
    let wanted = |i: usize| id.is_none() || needed.has(i);
    let broken = prove(layout, &objects, &wanted, &mut report, deadline)?;
    name_snapshots(layout, &heads, &objects, broken, &mut report);
    report.bad.truncate(MAX_BAD);
    report.cost = meter.cost(0);
    Ok(report)
}

/// Opens every block that holds a wanted record; gives the records that failed and why.
pub(crate) fn prove(
    layout: &Layout,
    objects: &Objects,
    wanted: &dyn Fn(usize) -> bool,
    report: &mut VerifyReport,
    deadline: Deadline,
) -> Result<BTreeMap<usize, String>> {
    let mut wanted: Vec<usize> = (0..objects.records.len()).filter(|i| wanted(*i)).collect();
    wanted.sort_unstable_by_key(|i| {
        let r = &objects.records[*i];
        (r.pack, r.block, r.offset)
    });
    let mut blocks: Vec<&[usize]> = Vec::new();
    let mut rest = &wanted[..];
    while let Some(first) = rest.first() {
        let of = |i: &usize| (objects.records[*i].pack, objects.records[*i].block);
        let count = rest.iter().take_while(|i| of(i) == of(first)).count();
        blocks.push(&rest[..count]);
        rest = &rest[count..];
    }
    let (next, bytes, proven) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let broken = Mutex::new(BTreeMap::new());
    let work = || -> Result<()> {
        let cipher = Cipher::new(&layout.key);
        // A few blocks at a time keep the reading sequential.
        const AT_ONCE: usize = 8;
        loop {
            let from = next.fetch_add(AT_ONCE, Ordering::Relaxed);
            if from >= blocks.len() {
                return Ok(());
            }
            if deadline.passed() {
                return Err(late("verifying the store"));
            }
            for block in &blocks[from..blocks.len().min(from + AT_ONCE)] {
                let first = &objects.records[block[0]];
                let pack = &objects.packs[first.pack as usize];
                let opened = pack.block(&cipher, first.block);
                for record in *block {
                    let r = &objects.records[*record];
                    let from = r.offset as usize;
                    let why = match &opened {
                        Err(why) => format!("block {} of pack {}: {why}", r.block, pack.name),
                        Ok(b) => match b.data().get(from..from + r.length()) {
                            Some(data) if layout.key.name(r.domain(), data) == r.name => {
                                proven.fetch_add(1, Ordering::Relaxed);
                                bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
                                continue;
                            }
                            Some(_) | None => {
                                format!("its bytes in pack {} do not match its name", pack.name)
                            }
                        },
                    };
                    broken.lock().unwrap_or_else(PoisonError::into_inner).insert(*record, why);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..WORKERS).map(|_| scope.spawn(work)).collect();
        let mine = work();
        others.into_iter().fold(mine, |all, other| {
            all.and(
                other
                    .join()
                    .unwrap_or_else(|_| Err(Error::new(Kind::System, "verifying", "a thread failed"))),
            )
        })
    })?;
    report.objects = proven.into_inner();
    report.bytes = bytes.into_inner();
    Ok(broken.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Says which snapshots need what is broken.
fn name_snapshots(
    layout: &Layout,
    heads: &[Head],
    objects: &Objects,
    broken: BTreeMap<usize, String>,
    report: &mut VerifyReport,
) {
    if broken.is_empty() {
        return;
    }
    let mut users: BTreeMap<Name, Vec<String>> =
        broken.keys().take(MAX_BAD).map(|i| (objects.records[*i].name, Vec::new())).collect();
    for head in heads {
        for reference in &head.trees {
            let Ok(mut tree) = layout.tree(reference) else { continue };
            while let Ok(Some(entry)) = tree.next() {
                for run in &entry.runs {
                    if let Some(list) = users.get_mut(&run.name)
                        && list.len() < MAX_NAMED
                        && list.last() != Some(&head.info.id)
                    {
                        list.push(head.info.id.clone());
                    }
                }
            }
        }
    }
    for (record, why) in broken.into_iter().take(MAX_BAD) {
        let name = objects.records[record].name;
        let snapshots = users.get(&name).cloned().unwrap_or_default();
        report.bad.push(Bad { what: format!("object {}", hex::encode(&name[..8])), why, snapshots });
    }
}
