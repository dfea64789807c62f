//! Power cuts between and inside any two writes, failures of every call, damage at every byte.

use super::*;
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// The unit in which a disk keeps its promises about one write.
const SECTOR_BYTES: usize = 512;

#[derive(Debug, Clone)]
enum Name {
    Publish,
    SetAside,
    CreateNext,
    DiscardNext,
}

/// A disk whose writes reach it only at a sync, and that can be cut off or fail at any call.
#[derive(Debug, Clone, Default)]
struct Power {
    /// By inode.
    durable: BTreeMap<u32, Vec<u8>>,
    cached: BTreeMap<u32, Vec<u8>>,
    pending: Vec<(u32, usize, Vec<u8>)>,
    names: BTreeMap<&'static str, u32>,
    durable_names: BTreeMap<&'static str, u32>,
    pending_names: Vec<Name>,
    next_inode: u32,
    calls: usize,
    fail_at: Option<(usize, io::ErrorKind)>,
    /// After this call nothing happens any more.
    cut_at: Option<usize>,
}

#[derive(Debug, Clone, Default)]
struct MemDisk(Rc<RefCell<Power>>);

impl Power {
    /// Counts the call; an error instead of the call where one was asked for.
    fn call(&mut self) -> io::Result<()> {
        let n = self.calls;
        self.calls += 1;
        if self.cut_at.is_some_and(|at| n >= at) {
            return Err(io::Error::other("power is off"));
        }
        match self.fail_at {
            Some((at, kind)) if at == n => Err(io::Error::new(kind, "made to fail")),
            Some(_) | None => Ok(()),
        }
    }

    fn apply_name(names: &mut BTreeMap<&'static str, u32>, name: &Name, fresh: u32) {
        match name {
            Name::Publish => {
                if let Some(inode) = names.remove("next") {
                    names.insert("live", inode);
                }
            }
            Name::SetAside => {
                if let Some(inode) = names.remove("live") {
                    names.insert("aside", inode);
                }
            }
            Name::DiscardNext => {
                names.remove("next");
            }
            Name::CreateNext => {
                names.insert("next", fresh);
            }
        }
    }

    fn slot(&self, slot: Slot) -> io::Result<u32> {
        let name = match slot {
            Slot::Live => "live",
            Slot::Next => "next",
        };
        self.names.get(name).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn put(bytes: &mut Vec<u8>, offset: usize, data: &[u8]) {
        if bytes.len() < offset + data.len() {
            bytes.resize(offset + data.len(), 0);
        }
        bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    /// The disk as it is found after the power came back, given which sectors of which pending write and how many of
    /// the pending names had arrived.
    fn image(&self, names: usize, mut arrived: impl FnMut(usize, usize) -> bool) -> MemDisk {
        let mut durable = self.durable.clone();
        for (w, (inode, offset, data)) in self.pending.iter().enumerate() {
            let file = durable.entry(*inode).or_default();
            for (s, sector) in data.chunks(SECTOR_BYTES).enumerate() {
                if arrived(w, s) {
                    Power::put(file, offset + s * SECTOR_BYTES, sector);
                }
            }
        }
        let mut durable_names = self.durable_names.clone();
        for name in self.pending_names.iter().take(names) {
            Power::apply_name(&mut durable_names, name, self.next_inode);
        }
        for inode in durable_names.values() {
            durable.entry(*inode).or_default();
        }
        MemDisk(Rc::new(RefCell::new(Power {
            cached: durable.clone(),
            durable,
            names: durable_names.clone(),
            durable_names,
            next_inode: self.next_inode + 1,
            ..Power::default()
        })))
    }

    /// Crash images worth looking at: nothing arrived, all, each write alone, all but one, each torn after every few
    /// sectors, and sectors at random; each with every number of pending names.
    fn images(&self, seed: u64) -> Vec<MemDisk> {
        let mut images = Vec::new();
        for names in 0..=self.pending_names.len() {
            images.push(self.image(names, |_, _| false));
            images.push(self.image(names, |_, _| true));
            for w in 0..self.pending.len() {
                images.push(self.image(names, |x, _| x == w));
                images.push(self.image(names, |x, _| x != w));
                let sectors = self.pending[w].2.len().div_ceil(SECTOR_BYTES);
                // The front of a large write holds the records, the rest is zeros.
                for torn in (0..sectors.min(6)).chain([sectors / 2]) {
                    images.push(self.image(names, |x, s| x < w || (x == w && s < torn)));
                    images.push(self.image(names, |x, s| x < w || (x == w && s >= torn)));
                }
            }
            let mut state = seed | 1;
            images.push(self.image(names, |_, _| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                state >> 63 == 1
            }));
        }
        images
    }
}

impl Disk for MemDisk {
    fn name(&self) -> String {
        "test".into()
    }

    fn read(&mut self, max: u64) -> io::Result<Option<Vec<u8>>> {
        let mut p = self.0.borrow_mut();
        p.call()?;
        let Ok(inode) = p.slot(Slot::Live) else { return Ok(None) };
        let bytes = &p.cached[&inode];
        Ok(Some(bytes[..bytes.len().min(usize::try_from(max).unwrap())].to_vec()))
    }

    fn create_next(&mut self) -> io::Result<()> {
        let mut p = self.0.borrow_mut();
        p.call()?;
        p.next_inode += 1;
        let inode = p.next_inode;
        p.cached.insert(inode, Vec::new());
        p.durable.insert(inode, Vec::new());
        p.names.insert("next", inode);
        p.pending_names.push(Name::CreateNext);
        Ok(())
    }

    fn write_at(&mut self, slot: Slot, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut p = self.0.borrow_mut();
        let failed = p.call();
        if p.cut_at.is_some_and(|at| p.calls > at) {
            return failed;
        }
        // A write that fails may have got half way.
        let bytes = if failed.is_err() { &bytes[..bytes.len() / 2] } else { bytes };
        let inode = p.slot(slot)?;
        let offset = usize::try_from(offset).unwrap();
        Power::put(p.cached.get_mut(&inode).unwrap(), offset, bytes);
        p.pending.push((inode, offset, bytes.to_vec()));
        failed
    }

    fn sync(&mut self, slot: Slot) -> io::Result<()> {
        let mut p = self.0.borrow_mut();
        p.call()?;
        let inode = p.slot(slot)?;
        let bytes = p.cached[&inode].clone();
        p.durable.insert(inode, bytes);
        p.pending.retain(|(i, _, _)| *i != inode);
        Ok(())
    }

    fn discard_next(&mut self) -> io::Result<()> {
        self.rename(Name::DiscardNext)
    }

    fn publish(&mut self) -> io::Result<()> {
        self.rename(Name::Publish)
    }

    fn set_aside(&mut self) -> io::Result<()> {
        self.rename(Name::SetAside)
    }

    fn keep_cut(&mut self, _tail: &[u8]) -> io::Result<()> {
        self.0.borrow_mut().call()
    }

    fn sync_dir(&mut self) -> io::Result<()> {
        let mut p = self.0.borrow_mut();
        p.call()?;
        p.durable_names = p.names.clone();
        p.pending_names.clear();
        Ok(())
    }
}

impl MemDisk {
    fn rename(&self, name: Name) -> io::Result<()> {
        let mut p = self.0.borrow_mut();
        p.call()?;
        let fresh = p.next_inode;
        Power::apply_name(&mut p.names, &name, fresh);
        p.pending_names.push(name);
        Ok(())
    }
}

/// What was asked of a journal and what it promised.
#[derive(Debug, Clone, Default)]
struct Told {
    /// Each content that the journal may have: a rewrite adds one, until its outcome is known.
    base: Vec<Vec<Vec<u8>>>,
    /// Records promised, after the base.
    promised: Vec<Vec<u8>>,
    /// Issued after the promised ones and not promised.
    maybe: Option<Vec<u8>>,
    opened: bool,
}

impl Told {
    fn check(&self, found: &[Vec<u8>]) -> std::result::Result<(), String> {
        if !self.opened && found.is_empty() {
            return Ok(());
        }
        let fits = self.base.iter().any(|base| {
            let mut all = base.clone();
            all.extend(self.promised.iter().cloned());
            found == all
                || self.maybe.as_ref().is_some_and(|m| {
                    let mut more = all.clone();
                    more.push(m.clone());
                    found == more
                })
        });
        if fits {
            Ok(())
        } else {
            Err(format!("found {} records, not as promised: {:?}", found.len(), lens(found)))
        }
    }
}

fn lens(records: &[Vec<u8>]) -> Vec<usize> {
    records.iter().map(Vec::len).collect()
}

fn record(n: usize) -> Vec<u8> {
    // Across one sector, several, or within.
    let len = [7, 600, 40, 1_500, 513, 1][n % 6];
    (0..len).map(|i| u8::try_from((i * 31 + n * 7 + 1) % 251).unwrap()).collect()
}

/// Opens, appends, rewrites, appends, all on one disk; goes on after failures as an agent would.
fn workload(disk: &MemDisk, told: &mut Told) {
    let Ok((mut journal, found, _)) = Journal::open_on(disk.clone()) else { return };
    if !told.opened {
        told.opened = true;
        told.base = vec![found];
    }
    for n in 0..9 {
        if n == 5 {
            let all: Vec<Vec<u8>> = told.base[0].iter().chain(&told.promised).cloned().collect();
            let keep: Vec<Vec<u8>> = all.iter().skip(2).cloned().collect();
            let with_maybe = told.maybe.clone();
            match journal.rewrite(&keep) {
                Ok(()) => *told = Told { base: vec![keep], opened: true, ..Told::default() },
                Err(_) => {
                    // Either is there now; nothing may be appended unless the old one surely is.
                    if journal.is_broken() {
                        let mut bases = vec![all.clone(), keep];
                        bases.extend(with_maybe.map(|m| [all, vec![m]].concat()));
                        *told = Told { base: bases, opened: true, ..Told::default() };
                        return;
                    }
                }
            }
        }
        let r = record(n);
        match journal.append(&r) {
            Ok(()) => {
                assert!(told.maybe.is_none(), "an append succeeded after one whose outcome is unknown");
                told.promised.push(r);
            }
            Err(_) if journal.is_broken() => {
                told.maybe = told.maybe.take().or(Some(r));
            }
            Err(_) => {}
        }
    }
}

fn calls_of_workload() -> usize {
    let disk = MemDisk::default();
    workload(&disk, &mut Told::default());
    disk.0.borrow().calls
}

fn reopen(image: &MemDisk, told: &Told, what: &str) -> Vec<Vec<u8>> {
    let (mut journal, found, _) = Journal::open_on(image.clone()).unwrap();
    told.check(&found).unwrap_or_else(|e| panic!("{what}: {e}"));
    journal.append(b"after").unwrap();
    let (_, again, report) = Journal::open_on(image.clone()).unwrap();
    assert_eq!(again.last().map(Vec::as_slice), Some(b"after".as_slice()), "{what}");
    assert_eq!(again[..again.len() - 1], found[..], "{what}");
    assert_eq!(report, Opened::default(), "{what}: what was cut must stay cut");
    found
}

#[test]
fn power_cut_at_every_call() {
    let calls = calls_of_workload();
    assert!(calls > 25, "the workload must be worth cutting: {calls} calls");
    let mut images = 0;
    for cut in 0..=calls {
        let disk = MemDisk::default();
        disk.0.borrow_mut().cut_at = Some(cut);
        let mut told = Told::default();
        workload(&disk, &mut told);
        let power = disk.0.borrow();
        for (i, image) in power.images(cut as u64).iter().enumerate() {
            reopen(image, &told, &format!("cut before call {cut}, image {i}"));
            images += 1;
        }
    }
    assert!(images > 200, "{images} images");
}

#[test]
fn power_cut_again_while_the_journal_is_opened_after_one() {
    let calls = calls_of_workload();
    for cut in (0..=calls).step_by(3) {
        let disk = MemDisk::default();
        disk.0.borrow_mut().cut_at = Some(cut);
        let mut told = Told::default();
        workload(&disk, &mut told);
        let power = disk.0.borrow();
        for (i, image) in power.images(!(cut as u64)).iter().enumerate().step_by(4) {
            for second in 0..8 {
                let image = image.0.borrow().image(0, |_, _| false);
                image.0.borrow_mut().cut_at = Some(second);
                let opened = Journal::open_on(image.clone());
                let power = image.0.borrow();
                for late in power.images(second as u64).iter().step_by(2) {
                    let found = reopen(late, &told, &format!("cut {cut}, image {i}, second cut {second}"));
                    if let Ok((_, seen, _)) = &opened {
                        assert_eq!(*seen, found, "what opening gave must last: cut {cut}/{i}/{second}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_killed_agent_then_a_power_cut_loses_nothing_that_was_seen() {
    let calls = calls_of_workload();
    for kill in 0..=calls {
        let disk = MemDisk::default();
        disk.0.borrow_mut().cut_at = Some(kill);
        workload(&disk, &mut Told::default());
        // The kernel lives on: all that was written is seen by the next agent.
        disk.0.borrow_mut().cut_at = None;
        let (_, seen, _) = Journal::open_on(disk.clone()).unwrap();
        let power = disk.0.borrow();
        for image in power.images(kill as u64) {
            let (_, found, _) = Journal::open_on(image).unwrap();
            assert_eq!(seen, found, "killed before call {kill}");
        }
    }
}

#[test]
fn every_call_may_fail() {
    let calls = calls_of_workload();
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        for at in 0..calls {
            let disk = MemDisk::default();
            disk.0.borrow_mut().fail_at = Some((at, kind));
            let mut told = Told::default();
            workload(&disk, &mut told);
            let after = format!("{kind:?} at call {at}");
            let power = disk.0.borrow();
            for (i, image) in power.images(at as u64).iter().enumerate().step_by(2) {
                reopen(image, &told, &format!("{after}, image {i}"));
            }
        }
    }
}

#[test]
fn a_broken_journal_works_again_after_a_rewrite() {
    let disk = MemDisk::default();
    let (mut journal, _, _) = Journal::open_on(disk.clone()).unwrap();
    journal.append(b"one").unwrap();
    let now = disk.0.borrow().calls;
    disk.0.borrow_mut().fail_at = Some((now + 1, io::ErrorKind::Other));
    assert!(journal.append(b"two").is_err());
    assert!(journal.append(b"three").is_err(), "what the disk holds is unknown");
    journal.rewrite(&[b"one".to_vec()]).unwrap();
    journal.append(b"four").unwrap();
    let (_, found, _) = Journal::open_on(disk).unwrap();
    assert_eq!(found, [b"one".to_vec(), b"four".to_vec()]);
}

#[test]
fn no_space_to_grow_loses_nothing_and_later_appends_succeed() {
    let disk = MemDisk::default();
    let (mut journal, _, _) = Journal::open_on(disk.clone()).unwrap();
    let big = vec![7; RECORD_LIMIT_BYTES];
    let mut count = 0;
    while journal.room_left() >= (RECORD_LIMIT_BYTES + FRAME_BYTES) as u64 {
        journal.append(&big).unwrap();
        count += 1;
    }
    let now = disk.0.borrow().calls;
    disk.0.borrow_mut().fail_at = Some((now, io::ErrorKind::StorageFull));
    assert_eq!(journal.append(&big).unwrap_err().kind, Kind::NoSpace);
    assert!(!journal.is_broken());
    journal.append(b"small").unwrap();
    journal.append(&big).unwrap();
    let (journal, found, report) = Journal::open_on(disk).unwrap();
    assert_eq!(found.len(), count + 2);
    assert_eq!(report, Opened::default());
    assert!(journal.used() > PREALLOCATED_BYTES);
}

#[test]
fn a_full_journal_says_so_and_can_be_rewritten() {
    let (mut journal, _, _) = Journal::open_on(MemDisk::default()).unwrap();
    let big = vec![9; RECORD_LIMIT_BYTES];
    let error = loop {
        if let Err(e) = journal.append(&big) {
            break e;
        }
    };
    assert_eq!(error.kind, Kind::NoSpace);
    assert!(error.hint.is_some() && !journal.is_broken());
    journal.rewrite(&[b"kept".to_vec()]).unwrap();
    journal.append(&big).unwrap();
}

#[test]
fn empty_and_oversized_records_are_refused_and_harm_nothing() {
    let (mut journal, _, _) = Journal::open_on(MemDisk::default()).unwrap();
    for bad in [Vec::new(), vec![1; RECORD_LIMIT_BYTES + 1]] {
        assert_eq!(journal.append(&bad).unwrap_err().kind, Kind::Usage);
        assert_eq!(journal.rewrite(&[bad]).unwrap_err().kind, Kind::Usage);
    }
    journal.append(b"fine").unwrap();
}

/// A small journal's bytes up to its last record, and where each record ends.
fn small() -> (Vec<u8>, Vec<usize>, Vec<Vec<u8>>) {
    let (mut bytes, mut chain) = header(&[5; SEED_BYTES]);
    let records: Vec<Vec<u8>> =
        vec![b"first".to_vec(), vec![0; 9], b"third, a little longer".to_vec(), vec![255; 3]];
    let mut ends = vec![bytes.len()];
    for r in &records {
        let f = frame(&chain, r);
        bytes.extend_from_slice(&f.bytes);
        chain = f.check;
        ends.push(bytes.len());
    }
    (bytes, ends, records)
}

fn open_bytes(bytes: Vec<u8>) -> (MemDisk, Vec<Vec<u8>>, Opened) {
    let disk = MemDisk::default();
    {
        let mut p = disk.0.borrow_mut();
        p.durable.insert(1, bytes.clone());
        p.cached.insert(1, bytes);
        p.names.insert("live", 1);
        p.durable_names.insert("live", 1);
        p.next_inode = 1;
    }
    let (_, found, report) = Journal::open_on(disk.clone()).unwrap();
    (disk, found, report)
}

#[test]
fn truncation_at_every_byte_keeps_every_whole_record() {
    let (bytes, ends, records) = small();
    for cut in 0..=bytes.len() {
        let whole = ends.iter().filter(|e| **e <= cut).count();
        let (disk, found, report) = open_bytes(bytes[..cut].to_vec());
        assert_eq!(found, records[..whole.saturating_sub(1)], "cut at {cut}");
        if whole == 0 {
            assert!(report.why.is_some(), "cut at {cut}");
            assert!(
                disk.0.borrow().durable_names.contains_key("aside"),
                "moved aside, not overwritten: {cut}"
            );
        }
    }
}

#[test]
fn a_changed_byte_anywhere_loses_nothing_before_it() {
    let (bytes, ends, records) = small();
    for at in 0..bytes.len() {
        for flip in [1, 0x80, 0xff] {
            let mut bad = bytes.clone();
            bad[at] ^= flip;
            let (_, found, report) = open_bytes(bad);
            let before = ends.iter().filter(|e| **e <= at).count().saturating_sub(1);
            assert_eq!(found, records[..before], "byte {at} ^ {flip}");
            assert!(report.cut_bytes > 0 && report.why.is_some(), "byte {at} ^ {flip}");
        }
    }
}

#[test]
fn another_journals_records_do_not_pass() {
    let (bytes, ends, records) = small();
    let (other, chain) = header(&[6; SEED_BYTES]);
    let _ = chain;
    let mut mixed = bytes.clone();
    mixed[..other.len()].copy_from_slice(&other);
    assert_eq!(open_bytes(mixed).1, Vec::<Vec<u8>>::new());
    // The same record twice in a row, as a write gone astray would leave it.
    let mut doubled = bytes[..ends[1]].to_vec();
    doubled.extend_from_slice(&bytes[ends[0]..ends[1]]);
    assert_eq!(open_bytes(doubled).1, records[..1]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn garbage_never_panics_and_never_costs_what_stands_before_it(
        start in 0_usize..140,
        garbage in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let (bytes, ends, records) = small();
        let start = start.min(bytes.len());
        let mut bad = bytes[..start].to_vec();
        bad.extend_from_slice(&garbage);
        let before = ends.iter().filter(|e| **e <= start).count().saturating_sub(1);
        let (_, found, _) = open_bytes(bad);
        prop_assert!(found.len() >= before && found[..before] == records[..before]);
    }
}

#[test]
fn on_a_real_disk_it_lasts_and_grows_and_keeps_what_it_cuts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    assert_eq!(Journal::read(&path).unwrap(), (Vec::new(), Opened::default()));
    let (mut journal, found, report) = Journal::open(&path).unwrap();
    assert!(found.is_empty() && report == Opened::default());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), PREALLOCATED_BYTES);
    for n in 0..20 {
        journal.append(&record(n)).unwrap();
    }
    let used = journal.used();
    drop(journal);
    let all: Vec<Vec<u8>> = (0..20).map(record).collect();
    assert_eq!(Journal::read(&path).unwrap().0, all);
    // A torn write after the last record.
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"\x05\x00\x00\x00torn", used).unwrap();
    assert_eq!(Journal::read(&path).unwrap().1.cut_bytes, 8, "reading tells and changes nothing");
    let (mut journal, found, report) = Journal::open(&path).unwrap();
    assert_eq!((found, report.cut_bytes), (all.clone(), 8));
    assert_eq!(std::fs::read(dir.path().join("journal.cut-1")).unwrap(), b"\x05\x00\x00\x00torn");
    journal.append(b"on").unwrap();
    journal.rewrite(&all[18..]).unwrap();
    journal.append(b"on").unwrap();
    drop(journal);
    let (_, found, report) = Journal::open(&path).unwrap();
    assert_eq!(found, [all[18].clone(), all[19].clone(), b"on".to_vec()]);
    assert_eq!(report, Opened::default());
}

#[test]
fn on_a_real_disk_a_foreign_file_is_moved_aside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    for n in 1..=11 {
        std::fs::write(&path, format!("not a journal, number {n}")).unwrap();
        let (mut journal, found, report) = Journal::open(&path).unwrap();
        assert!(found.is_empty() && report.why.is_some());
        journal.append(b"x").unwrap();
    }
    assert_eq!(std::fs::read(dir.path().join("journal.broken-1")).unwrap(), b"not a journal, number 1");
    assert_eq!(std::fs::read(dir.path().join("journal.broken-9")).unwrap(), b"not a journal, number 11");
}

#[test]
fn a_pipe_or_link_in_the_journals_place_is_an_error_not_a_hang() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    assert!(Journal::open(&pipe).is_err());
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("/dev/null", &link).unwrap();
    assert!(Journal::open(&link).is_err());
}
