//! The power cut at every moment at which the store makes something durable, visible or gone.
//!
//! As root on a real ext4 that is shut down without its journal (`FS_IOC_SHUTDOWN`): what was not synced is lost. For
//! others, and as root as well, the process is killed at the same moments: everything written so far is there.
//! Afterwards: the older or the newer state, whole; what is trusted verifies; nothing that nobody names grows for ever.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test may stop and may speak"
)]

mod common;

use common::{PROGRAM, noise, request, root, settle, soon, truth};
use engine::words::Class;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use store::fault::on_each_moment;
use store::{Depth, Plan, Request, Root, Scope, Store, Trust};

/// The hook is the process's.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
/// Large enough for a journal.
const DISK_BYTES: u64 = 24 << 20;
/// Records hold times and costs, whose digits vary.
const SIZE_SLACK_BYTES: u64 = 4096;
/// More moments than any case has.
const MANY: u64 = 300;
/// The classes of [`Ground::nest`].
const NEST: [Class; 4] = [Class::Sessions, Class::Workspace, Class::Config, Class::State];
const CASE: &str = "KOBOSHI_TEST_CASE";
const AT: &str = "KOBOSHI_TEST_AT";
const MOMENT: &str = "KOBOSHI_TEST_MOMENT";

/// Where a case plays: a node's program and its store, all in one directory.
struct Ground {
    dir: PathBuf,
}

impl Ground {
    fn live(&self) -> PathBuf {
        self.dir.join("prefix/lib/openclaw")
    }
    fn spare(&self) -> PathBuf {
        self.dir.join("prefix/lib/.koboshi-spare/program")
    }
    fn roots(&self) -> Vec<Root> {
        vec![root("program", &self.live(), Class::Program)]
    }
    /// The same tree as roots that lie in one another, the outermost last, as a state directory has them.
    fn nest(&self) -> Vec<Root> {
        let live = self.live();
        let mut dist = root("a-dist", &live.join("dist"), Class::Sessions);
        dist.exclude = vec!["deep".into()];
        let mut rest = root("z-rest", &live, Class::State);
        rest.exclude = vec!["big.bin".into(), "dist".into()];
        let deep = root("b-deep", &live.join("dist/deep"), Class::Workspace);
        vec![dist, deep, root("c-big", &live.join("big.bin"), Class::Config), rest]
    }
    fn open(&self) -> host::Result<Store> {
        Store::open_or_create(&self.dir.join("store"), &self.dir.join("keys/key"))
    }
    fn store(&self) -> Store {
        self.open().unwrap()
    }
    fn take(&self) -> host::Result<String> {
        let roots = self.roots();
        let asked: Request<'_> = request(&roots, &PROGRAM);
        Ok(self.open()?.snapshot(&asked, &mut |_| {}, soon())?.id)
    }
    fn take_good(&self) -> String {
        let id = self.take().unwrap();
        self.store().set_trust(&id, Trust::Good).unwrap();
        id
    }
    fn good(&self) -> String {
        self.store().newest_trusted(None).unwrap().unwrap().id
    }
    fn plan(&self) -> Plan {
        Plan { quarantine: self.dir.join("quarantine/1"), ..Plan::default() }
    }
    fn repair(&self) -> host::Result<()> {
        let store = self.store();
        let spares = vec![("program".to_owned(), self.spare())];
        let plan = Plan { spares, ..self.plan() };
        store.repair(&self.good(), Scope::Classes(&PROGRAM), &plan, soon()).map(|_| ())
    }
    /// Everything outside the store, by content.
    fn contents(&self) -> Vec<String> {
        common::walk(&self.dir)
            .iter()
            .filter(|p| p.is_file() && !p.starts_with(self.dir.join("store")))
            .map(|p| blake3::hash(&fs::read(p).unwrap()).to_hex().to_string())
            .collect()
    }
    fn make_tree(&self) {
        let live = self.live();
        fs::create_dir_all(live.join("dist/deep")).unwrap();
        for i in 0..12u64 {
            fs::write(live.join(format!("dist/{i}.js")), noise(i, 200 + i as usize * 300)).unwrap();
            fs::write(live.join(format!("dist/deep/{i}.js")), noise(100 + i, 900)).unwrap();
        }
        fs::write(live.join("big.bin"), noise(1000, 300_000)).unwrap();
        std::os::unix::fs::symlink("big.bin", live.join("link")).unwrap();
        settle(&live);
    }
    /// Every snapshot there is can be read and is whole, and the newest trusted one is among them.
    fn whole(&self, at: &str) -> Vec<String> {
        let store = self.store();
        assert!(store.unreadable().unwrap().is_empty(), "{at}");
        let ids: Vec<String> = store.list().unwrap().into_iter().map(|i| i.id).collect();
        for id in &ids {
            assert_eq!(store.verify(Some(id), soon()).unwrap().bad, [], "{at}: {id}");
        }
        ids
    }
}

/// What is known from before the cut and from the run without one.
struct Known {
    /// Ids of snapshots before.
    ids: Vec<String>,
    /// The tree before.
    before: BTreeMap<PathBuf, String>,
    /// What outside the store may not be lost.
    contents: Vec<String>,
    /// The store's size after the act and a prune, uncut.
    size: u64,
}

struct Case {
    name: &'static str,
    prepare: fn(&Ground),
    act: fn(&Ground) -> host::Result<()>,
    /// `done`: the act said that it had succeeded before the power went.
    check: fn(&Ground, &Known, bool, &str),
    /// What the prune afterwards is asked for.
    limit: u64,
}

const CASES: [Case; 10] = [
    Case {
        name: "first",
        prepare: |_| {},
        act: |g| g.take().map(|_| ()),
        check: check_first,
        limit: u64::MAX,
    },
    Case {
        name: "snapshot",
        prepare: |g| {
            g.take_good();
            fs::write(g.live().join("big.bin"), noise(1001, 300_000)).unwrap();
            fs::write(g.live().join("new.js"), noise(1002, 3_000)).unwrap();
        },
        act: |g| g.take().map(|_| ()),
        check: check_snapshot,
        limit: u64::MAX,
    },
    Case {
        name: "trust",
        prepare: |g| {
            g.take_good();
            fs::write(g.live().join("new.js"), noise(1002, 3_000)).unwrap();
            g.take().unwrap();
        },
        act: |g| {
            let newest = g.store().list()?.pop().unwrap().id;
            g.store().set_trust(&newest, Trust::Good)
        },
        check: check_trust,
        limit: u64::MAX,
    },
    Case {
        name: "prune",
        prepare: |g| {
            for i in 0..3 {
                // Each pack keeps something that the last snapshot needs, so that they are rewritten.
                fs::write(g.live().join("grow.bin"), noise(2000 + i, 200_000)).unwrap();
                fs::write(g.live().join(format!("dist/kept-{i}")), noise(3000 + i, 20_000)).unwrap();
                g.take_good();
            }
        },
        act: |g| g.store().prune(0, soon()).map(|_| ()),
        check: check_prune,
        limit: 0,
    },
    Case {
        name: "repair",
        prepare: |g| {
            g.take_good();
            fs::write(g.live().join("big.bin"), noise(5, 70_000)).unwrap();
            fs::write(g.live().join("dist/1.js"), b"damaged").unwrap();
            fs::remove_file(g.live().join("dist/2.js")).unwrap();
            fs::write(g.live().join("extra"), b"somebody's").unwrap();
        },
        act: Ground::repair,
        check: check_repair,
        limit: u64::MAX,
    },
    Case {
        name: "repair of a tree",
        prepare: |g| {
            g.take_good();
            fs::remove_dir_all(g.live().join("dist")).unwrap();
            fs::write(g.live().join("dist"), b"a file in the place of a directory").unwrap();
        },
        act: Ground::repair,
        check: check_repair,
        limit: u64::MAX,
    },
    Case {
        name: "repair of a nest",
        prepare: |g| {
            let roots = g.nest();
            let id = g.store().snapshot(&request(&roots, &NEST), &mut |_| {}, soon()).unwrap().id;
            g.store().set_trust(&id, Trust::Good).unwrap();
            fs::remove_dir_all(g.live()).unwrap();
        },
        act: |g| g.store().repair(&g.good(), Scope::Classes(&NEST), &g.plan(), soon()).map(|_| ()),
        check: check_nest,
        limit: u64::MAX,
    },
    Case {
        name: "spare",
        prepare: |g| {
            g.take_good();
        },
        act: |g| g.store().make_spare(&g.good(), "program", &g.spare(), soon()).map(|_| ()),
        check: check_spare,
        limit: u64::MAX,
    },
    Case {
        name: "repair from the spare",
        prepare: |g| {
            g.take_good();
            g.store().make_spare(&g.good(), "program", &g.spare(), soon()).unwrap();
            fs::remove_dir_all(g.live()).unwrap();
        },
        act: Ground::repair,
        check: check_repair,
        limit: u64::MAX,
    },
    Case {
        name: "heal",
        prepare: |g| {
            g.take_good();
            for pack in fs::read_dir(g.dir.join("store/packs")).unwrap() {
                let pack = pack.unwrap().path();
                let mut bytes = fs::read(&pack).unwrap();
                let middle = bytes.len() / 3;
                bytes[middle] ^= 1;
                fs::write(&pack, bytes).unwrap();
            }
        },
        act: |g| g.store().heal(&[], soon()).map(|h| assert_eq!(h.lost, [])),
        check: check_heal,
        limit: u64::MAX,
    },
];

fn check_heal(g: &Ground, _: &Known, done: bool, at: &str) {
    let store = g.store();
    // Between healing and removing there are two of each; whoever tidies then must keep the right one.
    store.prune(u64::MAX, soon()).unwrap();
    if done {
        assert_eq!(store.verify(None, soon()).unwrap().bad, [], "{at}");
    }
    let whole_now = store.verify(Some(&g.good()), soon()).unwrap().bad.is_empty();
    if !whole_now {
        assert_eq!(store.heal(&[], soon()).unwrap().lost, [], "{at}");
    }
    let truth_before = truth(&g.live());
    fs::remove_dir_all(g.live()).unwrap();
    g.repair().unwrap();
    assert_eq!(truth(&g.live()), truth_before, "{at}");
}

fn check_first(g: &Ground, _: &Known, done: bool, at: &str) {
    let ids = g.whole(at);
    assert!(ids.len() == 1 || ids.is_empty() && !done, "{at}: {ids:?}");
    let id = g.take().unwrap();
    assert_eq!(g.store().compare(&id, &PROGRAM, Depth::Hash, soon()).unwrap(), [], "{at}");
}

fn check_snapshot(g: &Ground, known: &Known, done: bool, at: &str) {
    let ids = g.whole(at);
    assert!(ids.starts_with(&known.ids), "{at}");
    assert!(ids.len() == known.ids.len() + 1 || ids.len() == known.ids.len() && !done, "{at}: {ids:?}");
    if let Some(new) = ids.get(known.ids.len()) {
        assert_eq!(g.store().compare(new, &PROGRAM, Depth::Hash, soon()).unwrap(), [], "{at}");
    }
}

fn check_trust(g: &Ground, known: &Known, done: bool, at: &str) {
    assert_eq!(g.whole(at), known.ids, "{at}");
    let trusted = g.good();
    assert!(trusted == known.ids[1] || trusted == known.ids[0] && !done, "{at}");
}

fn check_prune(g: &Ground, known: &Known, done: bool, at: &str) {
    let ids = g.whole(at);
    assert!(ids.ends_with(&known.ids[2..]), "{at}: the newest stays");
    assert!(!done || ids.len() == 1, "{at}: {ids:?}");
    assert_eq!(g.store().compare(&g.good(), &PROGRAM, Depth::Hash, soon()).unwrap(), [], "{at}");
}

fn is_ours(path: &Path) -> bool {
    path.components().any(|c| c.as_os_str().to_string_lossy().starts_with(".koboshi-tmp-"))
}

fn check_repair(g: &Ground, known: &Known, done: bool, at: &str) {
    g.whole(at);
    let now = if g.live().exists() { truth(&g.live()) } else { BTreeMap::new() };
    let contents = g.contents();
    let lost = known.contents.iter().find(|c| !contents.contains(c));
    assert_eq!(lost, None, "{at}: these bytes are nowhere any more");
    let id = g.good();
    if done {
        assert_eq!(g.store().compare(&id, &PROGRAM, Depth::Hash, soon()).unwrap(), [], "{at}");
    }
    // The next one finishes the work.
    g.repair().unwrap();
    assert_eq!(g.store().compare(&id, &PROGRAM, Depth::Hash, soon()).unwrap(), [], "{at}");
    let good = truth(&g.live());
    // Every path was the old or the new one, whole.
    for (path, line) in now.iter().filter(|(p, _)| !is_ours(p)) {
        assert!(
            good.get(path) == Some(line) || known.before.get(path) == Some(line),
            "{at}: {}: {line}",
            path.display()
        );
    }
    let leftovers: Vec<_> = common::walk(&g.dir.join("prefix")).into_iter().filter(|p| is_ours(p)).collect();
    assert_eq!(leftovers, Vec::<PathBuf>::new(), "{at}: the next repair clears up");
}

/// A root and all that lies in it are there at once or not at all: half of them would look as if their owner had deleted
/// the other half.
fn check_nest(g: &Ground, known: &Known, done: bool, at: &str) {
    g.whole(at);
    let differences = || g.store().compare(&g.good(), &NEST, Depth::Hash, soon()).unwrap();
    if done || g.live().exists() {
        assert_eq!(differences(), [], "{at}");
    }
    let contents = g.contents();
    assert_eq!(known.contents.iter().find(|c| !contents.contains(c)), None, "{at}");
    g.store().repair(&g.good(), Scope::Classes(&NEST), &g.plan(), soon()).unwrap();
    assert_eq!(differences(), [], "{at}");
    let leftovers: Vec<_> = common::walk(&g.dir.join("prefix")).into_iter().filter(|p| is_ours(p)).collect();
    assert_eq!(leftovers, Vec::<PathBuf>::new(), "{at}: the next repair clears up");
}

fn check_spare(g: &Ground, _: &Known, done: bool, at: &str) {
    g.whole(at);
    let id = g.good();
    let ready = g.store().check_spare(&id, "program", &g.spare(), soon()).unwrap().ready;
    assert!(ready || !done, "{at}");
    if !ready {
        g.store().make_spare(&id, "program", &g.spare(), soon()).unwrap();
    }
    // What is called ready is right to the last byte.
    assert_eq!(truth(&g.spare()), truth(&g.live()), "{at}");
}

fn known(g: &Ground) -> Known {
    // Not made before its time: a key and a store that are cut short must not be in the way.
    let ids = match g.dir.join("store").exists() {
        true => g.store().list().unwrap().into_iter().map(|i| i.id).collect(),
        false => Vec::new(),
    };
    let before = if g.live().exists() { truth(&g.live()) } else { BTreeMap::new() };
    Known { ids, before, contents: g.contents(), size: 0 }
}

/// The check of the case, then: nothing that nobody needs stays.
fn check(case: &Case, g: &Ground, known: &Known, done: bool, at: &str) {
    (case.check)(g, known, done, at);
    let store = g.store();
    // Until the newer state stands, its size is not to be expected.
    (case.act)(g).unwrap();
    store.prune(case.limit, soon()).unwrap();
    let size = store.size().unwrap().bytes;
    let names = store.list().unwrap().len() as u64;
    // A snapshot that was taken again is one more record.
    let slack = SIZE_SLACK_BYTES * (1 + names);
    assert!(size <= known.size + slack, "{at}: {size} bytes, {} without a cut", known.size);
    let tmp = fs::read_dir(g.dir.join("store/tmp")).unwrap().count();
    assert_eq!(tmp, 0, "{at}");
}

/// The case uncut: what size it leaves.
fn measure(case: &Case, g: &Ground, known: &mut Known) {
    on_each_moment(None);
    (case.act)(g).unwrap();
    let moments = on_each_moment(None);
    g.store().prune(case.limit, soon()).unwrap();
    known.size = g.store().size().unwrap().bytes;
    assert!((2..MANY - 10).contains(&moments), "{}: {moments} moments", case.name);
}

// ---- killed ----

/// The body of the child: plays one case and dies at one moment.
#[test]
fn child() {
    let (Ok(case), Ok(at), Ok(moment)) = (std::env::var(CASE), std::env::var(AT), std::env::var(MOMENT))
    else {
        return;
    };
    let moment: u64 = moment.parse().unwrap();
    let case = CASES.iter().find(|c| c.name == case).unwrap();
    on_each_moment(Some(Box::new(move |number, _| {
        if number == moment {
            std::process::abort();
        }
    })));
    (case.act)(&Ground { dir: PathBuf::from(at) }).unwrap();
}

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    assert!(run(Command::new("cp").arg("-a").args([from, to])), "cp");
}

#[allow(clippy::disallowed_methods, reason = "a tool that ends by itself")]
fn run(command: &mut Command) -> bool {
    command
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

#[test]
fn a_kill_at_every_moment_is_no_crash_that_is_seen() {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for case in &CASES {
        let tmp = common::quick_dir();
        let top = tmp.path().canonicalize().unwrap();
        let (work, kept) = (top.join("work"), top.join("kept"));
        let g = Ground { dir: work.clone() };
        g.make_tree();
        (case.prepare)(&g);
        let mut known = known(&g);
        copy(&work, &kept);
        measure(case, &g, &mut known);
        // Until there are no more: how many there are varies by one or two with the clock's ticks.
        for moment in 1..MANY {
            let at = format!("{} killed at {moment}", case.name);
            copy(&kept, &work);
            let lived = run(Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child"])
                .env(CASE, case.name)
                .env(AT, &work)
                .env(MOMENT, moment.to_string()));
            check(case, &g, &known, lived, &at);
            if lived {
                break;
            }
        }
    }
}

// ---- the power cut ----

/// An ext4 of our own in a file.
struct Disk {
    image: PathBuf,
    at: PathBuf,
}

impl Disk {
    fn mount(&self) -> bool {
        // Nothing becomes durable by itself: no timed commit, no flush of a renamed file.
        run(Command::new("mount")
            .args(["-t", "ext4", "-o", "loop,commit=600,noauto_da_alloc"])
            .args([&self.image, &self.at]))
    }
    fn unmount(&self) {
        assert!(run(Command::new("umount").arg(&self.at)), "somebody still holds {}", self.at.display());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run(Command::new("umount").arg("-l").arg(&self.at));
    }
}

/// FS_IOC_SHUTDOWN with NOLOGFLUSH: as if the power had gone. The kernel call has no safe wrapper; perl is on every
/// Debian.
fn cut(at: &Path) -> bool {
    let call = "open(my $d, '<', $ARGV[0]) or exit 1; my $how = pack('L', 2); ioctl($d, 0x8004587d, $how) or exit 2;";
    run(Command::new("perl").args(["-e", call]).arg(at))
}

#[test]
fn a_power_cut_at_every_moment_leaves_the_older_or_the_newer_as_root() {
    if !common::is_root() {
        println!("left out, not root: power cuts on a real file system");
        return;
    }
    if !common::in_own_mounts("a_power_cut_at_every_moment_leaves_the_older_or_the_newer_as_root") {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let tmp = common::quick_dir();
    let top = tmp.path().canonicalize().unwrap();
    let disk = Disk { image: top.join("image"), at: top.join("disk") };
    fs::create_dir(&disk.at).unwrap();
    fs::File::create(&disk.image).unwrap().set_len(DISK_BYTES).unwrap();
    let made = run(Command::new("mkfs.ext4")
        .args(["-q", "-m", "0", "-O", "has_journal", "-J", "size=4"])
        .arg(&disk.image));
    if !made || !disk.mount() {
        println!("left out, no ext4 on a loop device here: power cuts on a real file system");
        return;
    }
    assert!(cut(&disk.at), "perl and ext4's shutdown");
    disk.unmount();
    let empty = top.join("empty");
    fs::copy(&disk.image, &empty).unwrap();
    for case in &CASES {
        fs::copy(&empty, &disk.image).unwrap();
        assert!(disk.mount());
        let g = Ground { dir: disk.at.clone() };
        g.make_tree();
        (case.prepare)(&g);
        let mut known = known(&g);
        disk.unmount();
        let kept = top.join("kept");
        fs::copy(&disk.image, &kept).unwrap();
        assert!(disk.mount());
        measure(case, &g, &mut known);
        disk.unmount();
        for moment in 1..MANY {
            fs::copy(&kept, &disk.image).unwrap();
            assert!(disk.mount());
            let cut_at = std::sync::Arc::new(Mutex::new(None));
            let (there, said) = (disk.at.clone(), cut_at.clone());
            on_each_moment(Some(Box::new(move |number, what| {
                if number == moment {
                    *said.lock().unwrap_or_else(PoisonError::into_inner) = Some(what);
                    assert!(cut(&there));
                }
            })));
            let done = (case.act)(&g).is_ok();
            on_each_moment(None);
            let cut_at = *cut_at.lock().unwrap_or_else(PoisonError::into_inner);
            // After the last: it has said that it is done, so it must be.
            if cut_at.is_none() {
                assert!(done && cut(&disk.at), "{}", case.name);
            }
            disk.unmount();
            assert!(disk.mount());
            let at = format!("{} cut at {moment} ({})", case.name, cut_at.unwrap_or("after the last"));
            check(case, &g, &known, done && cut_at.is_none(), &at);
            disk.unmount();
            if cut_at.is_none() {
                break;
            }
        }
    }
}
