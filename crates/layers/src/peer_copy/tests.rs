use super::*;
use reach::{Entry, Thing};
use std::os::unix::fs::symlink;

fn node(dir: &Path) -> Node {
    let package = dir.join("prefix/lib/node_modules/openclaw");
    serde_json::from_value(serde_json::json!({
        "name": "t", "prefix": dir.join("prefix"), "package_dir": package, "entry": package.join("dist/index.js"),
        "node_bin": dir.join("node"), "home": dir, "state_dir": dir.join("state"),
        "config_path": dir.join("state/openclaw.json"), "port": 1, "ids": host::run::Ids::current(), "user": "t"
    }))
    .unwrap()
}

fn later() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// A program as it lies at `root`, and its list.
fn program(root: &Path, words: &str) -> Manifest {
    write(&root.join("package.json"), "{\"version\":\"1\"}");
    write(&root.join("dist/index.js"), words);
    write(&root.join("dist/large.js"), &words.repeat(100_000));
    symlink("../dist/index.js", root.join("dist/link.js")).ok();
    let (list, whole) = trees::one(Tree::Program, root, later());
    assert!(whole);
    list
}

fn fill(stage: &mut Stage, live: &Path) {
    let (now, _) = trees::one(Tree::Program, live, later());
    let mut near = Near { live: (live, &now), spare: None, shelf: None };
    stage.fill(&mut near, later()).unwrap();
}

fn give_all(stage: &mut Stage, list: &Manifest, from: &Path) {
    for name in stage.missing() {
        for entry in list.entries() {
            for (n, (piece, length)) in entry.pieces().enumerate() {
                if piece == name {
                    let path = from.join(String::from_utf8(entry.path.clone()).unwrap());
                    let file = trees::open(&path).unwrap();
                    let at = n as u64 * reach::words::MAX_OBJECT_BYTES as u64;
                    stage.put(&name, &trees::piece(&file, at, length, &name).unwrap()).unwrap();
                }
            }
        }
    }
}

#[test]
fn what_is_near_is_not_asked_for_and_what_an_earlier_try_proved_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let elsewhere = dir.path().join("donor");
    let list = program(&elsewhere, "// good\n");
    program(&node.package_dir, "// good\n");
    write(&node.package_dir.join("dist/index.js"), "// bad\n");
    write(&node.package_dir.join("dist/extra.js"), "// not wanted\n");
    let live = trees::place(&node, Tree::Program);
    let mut stage = Stage::open(Tree::Program, list.clone(), Modes::default(), &live, later()).unwrap();
    fill(&mut stage, &live);
    assert_eq!(stage.missing().len(), 1, "only the damaged file's piece");
    assert!(stage.prove(Tree::Program, later()).is_err(), "not before it is whole");
    drop(stage);

    // Killed; the live tree is gone by now, and something strange lies in the stage.
    std::fs::remove_dir_all(&node.package_dir).unwrap();
    let staged = Stage::staged(Tree::Program, &live);
    write(&staged.join("dist/strange/x.js"), "// strange\n");
    let mut stage = Stage::open(Tree::Program, list.clone(), Modes::default(), &live, later()).unwrap();
    fill(&mut stage, &live);
    assert_eq!(stage.missing().len(), 1, "the rest was kept");
    give_all(&mut stage, &list, &elsewhere);
    stage.prove(Tree::Program, later()).unwrap();

    // A byte that changes after it was written is seen.
    write(&staged.join("dist/index.js"), "// evil\n");
    assert!(stage.prove(Tree::Program, later()).is_err());
}

#[test]
fn nothing_planted_in_the_stage_or_its_place_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let list = program(&dir.path().join("donor"), "// good\n");
    program(&node.package_dir, "// good\n");
    let live = trees::place(&node, Tree::Program);
    let victim = dir.path().join("victim");
    std::fs::create_dir(&victim).unwrap();
    write(&victim.join("index.js"), "the user's");
    let beside = Stage::dir_for(Tree::Program, &live);
    symlink(&victim, &beside).unwrap();
    assert!(
        Stage::open(Tree::Program, list.clone(), Modes::default(), &live, later()).is_err(),
        "our directory is a link"
    );
    std::fs::remove_file(&beside).unwrap();
    std::fs::create_dir_all(beside.join("program")).unwrap();
    symlink(&victim, beside.join("program/dist")).unwrap();
    let mut stage = Stage::open(Tree::Program, list.clone(), Modes::default(), &live, later()).unwrap();
    fill(&mut stage, &live);
    stage.prove(Tree::Program, later()).unwrap();
    assert_eq!(std::fs::read_to_string(victim.join("index.js")).unwrap(), "the user's");
}

#[test]
fn a_program_that_was_never_proven_here_goes_back_and_one_that_served_stays() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let live = trees::place(&node, Tree::Program);
    let quarantine = dir.path().join("quarantine/00000001");
    let index = || std::fs::read_to_string(node.package_dir.join("dist/index.js")).unwrap();
    let exchange = || {
        let donor = dir.path().join("donor");
        let list = program(&donor, "// foreign\n");
        let mut stage = Stage::open(Tree::Program, list.clone(), Modes::default(), &live, later()).unwrap();
        fill(&mut stage, &live);
        give_all(&mut stage, &list, &donor);
        exchange::swap_by(&Stage::staged(Tree::Program, &live), &live, later()).unwrap();
    };
    program(&node.package_dir, "// before\n");
    assert!(!is_open(&node));
    assert!(!conclude(&node, &quarantine, false, later()).unwrap());
    exchange();
    assert!(is_open(&node));
    assert_eq!(index(), "// foreign\n");
    assert!(conclude(&node, &quarantine, false, later()).unwrap());
    assert_eq!(index(), "// before\n");
    assert!(!is_open(&node));

    exchange();
    assert!(conclude(&node, &quarantine, true, later()).unwrap());
    assert_eq!(index(), "// foreign\n");
    assert_eq!(std::fs::read_to_string(quarantine.join("program/dist/index.js")).unwrap(), "// before\n");
    assert!(!Stage::dir_for(Tree::Program, &live).exists(), "nothing of ours is left beside it");
}

#[test]
fn who_may_lend_what() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let help = Help { peers: &[], identity: PathBuf::new(), me: PathBuf::new(), known: PathBuf::new() };
    let copy = Copy {
        node: &node,
        store: None,
        spare: None,
        want_version: Some("2026.9.6".into()),
        served_schema: Some(18),
        help: &help,
        known: Vec::new(),
        goal: None,
        stages: Vec::new(),
        waiting: Vec::new(),
        deadline: later(),
        limits: engine::Limits::default(),
    };
    let good = Status {
        healthy: Some(true),
        version: Some("2026.9.6".into()),
        arch: std::env::consts::ARCH.into(),
        libc: trees::libc(&node.node_bin).into(),
        schema: Some((18, 1)),
        source: "live".into(),
        ..Status::default()
    };
    let fits = |change: &dyn Fn(&mut Status)| {
        let mut status = good.clone();
        change(&mut status);
        copy.fits(&status)
    };
    assert_eq!(fits(&|_| {}), Ok(()));
    assert_eq!(fits(&|s| s.healthy = None), Ok(()), "no agent there says anything");
    assert_eq!(
        fits(&|s| (s.healthy, s.source) = (Some(false), "snapshot".into())),
        Ok(()),
        "proven good once"
    );
    assert_eq!(fits(&|s| s.version = Some("2026.9.7".into())), Ok(()), "newer, and the same schema");
    type Change<'a> = (&'a dyn Fn(&mut Status), &'a str);
    let changes: [Change<'_>; 7] = [
        (&|s| s.arch = "riscv64".into(), "another machine"),
        (&|s| s.libc = "other".into(), "another libc"),
        (&|s| s.healthy = Some(false), "not well itself"),
        (&|s| s.version = None, "nothing to lend"),
        (&|s| s.version = Some("2026.9.5".into()), "older"),
        (&|s| (s.version, s.schema) = (Some("2026.9.7".into()), Some((19, 1))), "would migrate"),
        (&|s| (s.version, s.schema) = (Some("2026.9.7".into()), None), "newer, and nobody knows its schema"),
    ];
    for (change, why) in changes {
        assert!(fits(change).is_err(), "{why}");
    }
}

#[test]
fn a_list_holds_what_lies_there_and_nothing_of_ours() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("p");
    let list = program(&root, "// good\n");
    write(&root.join(".koboshi-tmp-1"), "ours");
    assert_eq!(trees::one(Tree::Program, &root, later()).0.digest(), list.digest());
    let exec = |list: &Manifest| {
        list.entries().iter().any(|e: &Entry| matches!(e.thing, Thing::File { exec: true, .. }))
    };
    assert!(!exec(&list));
    std::fs::set_permissions(root.join("dist/index.js"), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    assert!(exec(&trees::one(Tree::Program, &root, later()).0));
    symlink("/etc/passwd", root.join("out")).unwrap();
    assert!(!trees::one(Tree::Program, &root, later()).1, "a link that leaves is in no list");
}

// ---- the whole layer, over the real protocol ----

/// Names the conversation that this very binary is to hold as a donor, in a child of its own: a [`Target`] in JSON.
const DONOR: &str = "KOBOSHI_TEST_DONOR";
const VERSION: &str = "2026.9.6";

/// How a donor behaves.
struct Liar<'a> {
    donor: crate::lend::Donor<'a>,
    how: String,
}

impl reach::Lender for Liar<'_> {
    fn status(&mut self) -> std::result::Result<Status, String> {
        let mut status = self.donor.status()?;
        if self.how.starts_with("misnamed") {
            status.version = Some(VERSION.into());
        }
        Ok(status)
    }
    fn list(&mut self, working: &mut dyn FnMut()) -> std::result::Result<Manifest, String> {
        self.donor.list(working)
    }
    fn object(&mut self, name: &Name) -> Option<Vec<u8>> {
        let mut bytes = self.donor.object(name)?;
        match self.how.as_str() {
            "flips" => bytes[0] ^= 1,
            "vanishes" => std::process::exit(1),
            _ => {}
        }
        Some(bytes)
    }
}

/// The donor's end. Passes at once where nobody calls.
#[test]
fn donor() {
    let Ok(target) = std::env::var(DONOR) else { return };
    let target: Target = serde_json::from_str(&target).unwrap();
    let node = node(&target.identity);
    let donor = crate::lend::Donor::new(&node, None, None, Some(true), String::new(), "test", later());
    let mut liar = Liar { donor, how: target.host };
    let mut to = std::fs::OpenOptions::new().write(true).open("/proc/self/fd/3").unwrap();
    let _ = reach::serve(&mut std::io::stdin().lock(), &mut to, &mut liar);
}

/// A file that is run is written by a process that has ended: no other test's child can hold it open meanwhile.
fn script(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let write = "printf %s \"$1\" > \"$0\" && chmod 755 \"$0\"";
    let cmd = host::run::Cmd::new("sh", ["-c", write, path.to_str().unwrap(), text]);
    assert_eq!(host::run::run(&cmd, later()).unwrap().status, Some(0));
}

/// Notes what the unit was told, and says no more.
#[derive(Default)]
struct Told(Vec<&'static str>);

impl host::service::Manager for Told {
    fn kind(&self) -> &'static str {
        "told"
    }
    fn look(&mut self, _: Deadline) -> Result<host::service::ServiceState> {
        Ok(host::service::ServiceState::unknown())
    }
    fn clear_latch(&mut self, _: Deadline) -> Result<()> {
        self.0.push("clear");
        Ok(())
    }
    fn start(&mut self, _: Deadline) -> Result<()> {
        self.0.push("start");
        Ok(())
    }
    fn stop(&mut self, _: Duration, _: Deadline) -> Result<host::service::Stopped> {
        self.0.push("stop");
        Ok(host::service::Stopped::Clean { took_ms: 0 })
    }
    fn hold(&mut self, _: Deadline) -> Result<()> {
        self.0.push("hold");
        Ok(())
    }
    fn release(&mut self, _: Deadline) -> Result<()> {
        self.0.push("release");
        Ok(())
    }
    fn reload(&mut self, _: Deadline) -> Result<()> {
        Ok(())
    }
}

/// A fallen node and hosts that offer it a program.
struct Site {
    dir: tempfile::TempDir,
    node: Node,
    peers: Vec<Peer>,
    store: Option<store::Store>,
    told: Told,
}

impl Site {
    fn new() -> Site {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        script(&base.join("node"), "#!/bin/sh\necho v26.10.0\n");
        let me = std::env::current_exe().unwrap();
        let call = format!(
            "#!/bin/sh\nexec 3>&1 >/dev/null\n{DONOR}=\"$2\" exec '{}' --exact peer_copy::tests::donor --nocapture\n",
            me.display()
        );
        script(&base.join("me"), &call);
        let node = Node { version: Some(VERSION.into()), ..node(&base) };
        Site { dir, node, peers: Vec::new(), store: None, told: Told::default() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().canonicalize().unwrap()
    }

    /// A program of this version, which differs by `words`, with a file that only its owner may run.
    fn lay(at: &Path, version: &str, words: &str) {
        program(at, words);
        write(&at.join("package.json"), &format!("{{\"version\":\"{version}\"}}"));
        write(&at.join("bin/own.sh"), words);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o744);
        std::fs::set_permissions(at.join("bin/own.sh"), mode).unwrap();
    }

    /// Another host with a program; `how` is its name and what it does.
    fn donor(&mut self, how: &str, version: &str, words: &str) -> &mut Peer {
        let n = self.peers.len();
        let base = self.path().join(format!("donor-{n}"));
        Site::lay(&node(&base).package_dir, version, words);
        script(&base.join("node"), "#!/bin/sh\necho v26.10.0\n");
        self.peers.push(Peer {
            host: how.into(),
            user: "x".into(),
            port: 22,
            host_key: format!("key {n}"),
            identity: base,
            trusted: false,
        });
        self.peers.last_mut().unwrap()
    }

    /// The program lies here, and a trusted snapshot of it.
    fn with_snapshot(&mut self, words: &str) {
        Site::lay(&self.node.package_dir, VERSION, words);
        let base = self.path();
        let store = store::Store::open_or_create(&base.join("store"), &base.join("keys/key")).unwrap();
        let root = store::Root {
            name: "program".into(),
            path: self.node.package_dir.clone(),
            class: Class::Program,
            exclude: Vec::new(),
            only: None,
        };
        let request = store::Request {
            roots: std::slice::from_ref(&root),
            classes: &[Class::Program],
            note: "",
            version: Some(VERSION),
            node: serde_json::Value::Null,
            baseline: serde_json::Value::Null,
        };
        let id = store.snapshot(&request, &mut |_| {}, later()).unwrap().id;
        store.set_trust(&id, store::Trust::Good).unwrap();
        self.store = Some(store);
    }

    /// The program is gone, and what the store held of it too.
    fn fall(&self) {
        std::fs::remove_dir_all(&self.node.package_dir).unwrap();
        for pack in std::fs::read_dir(self.path().join("store/packs")).into_iter().flatten() {
            std::fs::remove_file(pack.unwrap().path()).unwrap();
        }
    }

    fn known(&self) -> PathBuf {
        known_programs(&self.path())
    }

    fn copy(&mut self) -> Result<Report> {
        let base = self.path();
        let help = Help {
            peers: &self.peers,
            identity: PathBuf::new(),
            me: base.join("me"),
            known: known_programs(&base),
        };
        let mut bench = Bench {
            limits: engine::Limits::default(),
            node: &self.node,
            manager: &mut self.told,
            store: self.store.as_ref(),
            baseline: None,
            quarantine: base.join("quarantine/00000001"),
            spares: Vec::new(),
            deadline: Deadline::after(Duration::from_secs(60)),
        };
        work(&mut bench, &help, false)
    }

    fn runs(&self) -> Option<String> {
        std::fs::read_to_string(self.node.package_dir.join("dist/index.js")).ok()
    }
}

#[test]
fn by_our_own_list_every_liar_is_left_and_what_comes_is_what_was_to_the_last_mode() {
    let mut site = Site::new();
    site.with_snapshot("// good\n");
    site.fall();
    site.donor("flips", VERSION, "// good\n");
    site.donor("honest but other", VERSION, "// evil\n");
    site.donor("vanishes", VERSION, "// good\n");
    let silent = site.copy();
    assert!(silent.is_err() && site.runs().is_none(), "{silent:?}");
    assert!(site.told.0.is_empty(), "nothing is stopped for what could not be had: {:?}", site.told.0);
    site.donor("whole", VERSION, "// good\n");
    let report = site.copy().unwrap();
    assert_eq!(site.runs().as_deref(), Some("// good\n"));
    // Held before it is stopped, and left held: whoever empties the step's container takes that back.
    assert_eq!(site.told.0, ["hold", "stop", "clear"], "{report:?}");
    let store = site.store.as_ref().unwrap();
    let info = store.newest_trusted(None).unwrap().unwrap();
    let swept = store.sweep(&info.id, &[Class::Program], later()).unwrap();
    assert!(swept.differences.is_empty(), "a look finds damage in it: {:?}", swept.differences);
}

#[test]
fn what_serves_no_list_of_ours_needs_two_witnesses_or_one_that_is_trusted() {
    let mut site = Site::new();
    site.donor("first", VERSION, "// evil\n");
    let alone = site.copy().unwrap_err();
    assert!(alone.why.contains("a second donor must agree"), "{alone}");
    // The same host under another name is no second witness.
    site.donor("the same again", VERSION, "// evil\n").host_key = "key 0".into();
    assert!(site.copy().is_err() && site.runs().is_none());
    // Neither is one that has something else.
    site.donor("other", VERSION, "// good\n");
    assert!(site.copy().is_err() && site.runs().is_none());
    assert!(site.told.0.is_empty());
    site.donor("agrees with the one before", VERSION, "// good\n");
    site.copy().unwrap();
    assert_eq!(site.runs().as_deref(), Some("// good\n"));
    assert!(is_open(&site.node), "it never served here: it goes back if it does not now");

    let mut site = Site::new();
    site.donor("trusted", VERSION, "// good\n").trusted = true;
    site.copy().unwrap();
    assert_eq!(site.runs().as_deref(), Some("// good\n"));
}

#[test]
fn a_digest_that_was_written_down_knows_the_program_and_no_other() {
    // Served here once; the store is lost.
    let mut site = Site::new();
    site.with_snapshot("// good\n");
    remember(site.store.as_ref().unwrap(), &site.known(), later()).unwrap();
    site.fall();
    site.store = None;
    site.donor("evil", VERSION, "// evil\n");
    site.donor("misnamed", "2026.9.7", "// good\n");
    assert!(site.copy().is_err() && site.runs().is_none());
    site.donor("whole", VERSION, "// good\n");
    site.copy().unwrap();
    assert_eq!(site.runs().as_deref(), Some("// good\n"));
    assert!(!is_open(&site.node), "it served here: it stays");

    // Made here of the registry's tarballs, never seen to serve.
    let mut site = Site::new();
    Site::lay(&site.node.package_dir, VERSION, "// made\n");
    remember_made(&site.node.package_dir, VERSION, &site.known(), later()).unwrap();
    site.fall();
    site.donor("evil", VERSION, "// evil\n");
    site.donor("whole", VERSION, "// made\n");
    let report = site.copy().unwrap();
    assert_eq!(site.runs().as_deref(), Some("// made\n"));
    assert!(report.done.iter().any(|l| l.contains("registry's proven tarballs")), "{report:?}");
    assert!(is_open(&site.node), "whether it serves is still to be seen");
}

#[test]
fn a_program_under_a_false_name_is_refused_whoever_vouches_for_it() {
    let mut site = Site::new();
    site.donor("misnamed", "2026.9.5", "// old\n").trusted = true;
    let refused = site.copy().unwrap_err();
    assert!(refused.why.contains("it is 2026.9.5, its donor called it 2026.9.6"), "{refused}");
    assert!(site.runs().is_none() && site.told.0.is_empty());
}

#[test]
fn having_served_says_more_than_having_been_made() {
    let dir = tempfile::tempdir().unwrap();
    let known = known_programs(dir.path());
    // As the version before wrote it.
    std::fs::write(&known, r#"[{"version":"1","digest":"aa"}]"#).unwrap();
    let one = |version: &str, digest: &str, by| Known { version: version.into(), digest: digest.into(), by };
    assert_eq!(load(&known), [one("1", "aa", By::Serving)]);
    note_known(one("1", "aa", By::Registry), &known).unwrap();
    note_known(one("2", "bb", By::Registry), &known).unwrap();
    note_known(one("2", "bb", By::Serving), &known).unwrap();
    assert_eq!(load(&known), [one("2", "bb", By::Serving), one("1", "aa", By::Serving)]);
}
