//! One step of daily operation or recovery: this very binary again, in a container of its own, under a deadline.
//!
//! So the agent stays small, nothing it does can hang it, and whatever a step started dies with its container. The
//! request and the answer are files in the run directory. The answer is a claim: the judge decides.

use crate::config::Config;
use crate::patient::Service;
use crate::places::Places;
use crate::{room, spare, sudo, voice};
use alert::Outbox;
use engine::{Class, FaultKind, Finding};
use host::clock::Deadline;
use host::{Error, Kind, Result, files};
use layers::install::{Proof, home};
use layers::{Bench, Care, Examination, Report};
use node::{Baseline, Node};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;
use store::{Depth, Request as Take, Store, Trust};

/// Requests and answers hold findings and counts, not data.
const MAX_BYTES: u64 = 8 << 20;
/// A step that was told no deadline (run by hand) gets this.
const DEFAULT_LIMIT: Duration = Duration::from_secs(60);

/// A round of the slow look is cut into so many portions.
pub const SCRUB_PORTIONS: u64 = 96;
/// The CPU time of one portion, in milliseconds: with what its step costs, 0.04 % of one core at the very most.
const SCRUB_CPU_MS: f64 = 250.0;
/// One pass of delivery. Within the 30 s that an emergency has for its message lie the end of a pass that began just
/// before, with a channel that hangs, and one more in which every channel that answers gets it.
const PASS_LIMIT: Duration = Duration::from_secs(15);

/// What a step is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "work")]
pub enum Work {
    /// Looks at the whole disk side.
    Examine {
        /// How closely.
        care: Care,
        /// Also whether anything of the user's was written: a copy of the state may be due.
        users: bool,
    },
    /// Takes a snapshot of these classes; all when none are named.
    Snapshot {
        /// Which.
        classes: Vec<Class>,
        /// Why.
        note: String,
    },
    /// The node has served long enough with what the newest candidate holds: checks that, and trusts it.
    Settle,
    /// One small portion of the slow look at every byte.
    Scrub,
    /// Brings store and quarantine within their limit and makes the spare again.
    Tidy {
        /// Only the store: an incident is open, and what it has put aside is not to be touched.
        store_only: bool,
    },
    /// Makes room on a full disk.
    Room {
        /// Also by giving the reserve.
        reserve: bool,
        /// The open incident: what it has put aside is not to be touched.
        incident: Option<u64>,
    },
    /// Sends what waits in the outbox.
    Deliver,
    /// Reads the chat accounts of the node's config while the node is well, and keeps them sealed.
    Contacts,
    /// Tells the dead man's switch that all is well.
    Beat,
    /// Asks registry, peers and store whether they answer; `done` names those that do.
    Sources,
    /// Layer 0.
    Restart {
        /// The gateway does not answer.
        hung: bool,
    },
    /// Layer 1.
    Restore {
        /// Why.
        findings: Vec<Finding>,
        /// The gateway does not answer.
        hung: bool,
        /// The second turn, with a wider scope.
        wider: bool,
        /// For the quarantine's name.
        incident: u64,
    },
    /// Layer 4.
    PeerCopy {
        /// The gateway does not answer.
        hung: bool,
        /// For the quarantine's name.
        incident: u64,
    },
    /// The start after layer 4 failed: what was never proven here goes back.
    PeerBack {
        /// For the quarantine's name.
        incident: u64,
    },
    /// The climb failed: what layer 1 replaced on suspicion alone goes back.
    TrialOver {
        /// For the quarantine's name.
        incident: u64,
    },
    /// Layer 2.
    SystemInstall {
        /// The last good version.
        version: String,
        /// The gateway does not answer.
        hung: bool,
        /// For the quarantine's name.
        incident: u64,
    },
    /// Layer 3.
    UserInstall {
        /// The last good version.
        version: String,
        /// The gateway does not answer.
        hung: bool,
        /// For the quarantine's name.
        incident: u64,
    },
    /// Asks sudo whether it would let us.
    AskSudo {
        /// For what.
        #[serde(default)]
        home: bool,
    },
    /// What layer 2 or 3 put in place was not accepted: back to what was there before.
    TakeBack,
    /// Builds the program beside the home of a displaced node, which serves meanwhile.
    StageHome {
        /// The version that serves.
        version: String,
    },
    /// Stops the gateway and moves it home.
    MoveHome {
        /// The version that stands ready.
        version: String,
    },
    /// The node did not serve at home: back to where it came from.
    HomeBack,
    /// Layer in-place.
    InPlace {
        /// Why.
        findings: Vec<Finding>,
        /// For the quarantine's name.
        incident: u64,
    },
}

impl Work {
    /// Whether it makes a program anew, which takes more than any other work.
    pub fn installs(&self) -> bool {
        match self {
            Work::SystemInstall { .. } | Work::UserInstall { .. } | Work::StageHome { .. } => true,
            Work::Examine { .. }
            | Work::Snapshot { .. }
            | Work::Settle
            | Work::Tidy { .. }
            | Work::Room { .. }
            | Work::Deliver
            | Work::Contacts
            | Work::Beat
            | Work::Sources
            | Work::Scrub
            | Work::TrialOver { .. }
            | Work::Restart { .. }
            | Work::Restore { .. }
            | Work::AskSudo { .. }
            | Work::PeerCopy { .. }
            | Work::PeerBack { .. }
            | Work::TakeBack
            | Work::MoveHome { .. }
            | Work::HomeBack
            | Work::InPlace { .. } => false,
        }
    }
}

/// A request, as the agent writes it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// What to do.
    pub work: Work,
    /// The configuration to do it under.
    pub config_file: PathBuf,
    /// The patient.
    pub node: Node,
    /// What is expected of it.
    pub baseline: Option<Baseline>,
    /// The store did not answer a moment ago: whoever opened it now would hang with it.
    #[serde(default)]
    pub without_store: bool,
}

/// What a step says it found or did.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "answer")]
pub enum Answer {
    /// Of `Examine`.
    Examined(Box<Examination>),
    /// Of `Snapshot`.
    Taken {
        /// The snapshot.
        id: String,
        /// What it cost, in milliseconds.
        wall_ms: f64,
        /// Files of the user's that lay still for long, that the last trusted snapshot holds and this one does not.
        gone: Vec<PathBuf>,
    },
    /// Of `Settle`.
    Settled {
        /// What is trusted now; `None` when there was nothing to settle or the disk says otherwise.
        id: Option<String>,
        /// Why not.
        why: Option<String>,
        /// The config that is proven by it.
        #[serde(default)]
        config: Option<String>,
    },
    /// Of `Scrub`.
    Scrubbed {
        /// One line each.
        done: Vec<String>,
        /// The next quick look will find damage in the live trees, or the spare is to be made again.
        damaged: bool,
        /// What the store has lost for good, one line; a snapshot is wanted and somebody is to know.
        lost: Option<String>,
    },
    /// Of `Tidy` and `Room`.
    Tidied {
        /// One line each.
        done: Vec<String>,
    },
    /// Of `Deliver`.
    Delivered {
        /// Keys that a channel accepted.
        accepted: Vec<String>,
        /// Still waiting.
        waiting: usize,
        /// When to try again, in milliseconds.
        again_ms: Option<u64>,
    },
    /// Of `Contacts`.
    Remembered {
        /// How many people can be written to.
        count: usize,
        /// Why an account gave nothing, one line each.
        missing: Vec<String>,
    },
    /// Of `Beat`.
    Beaten {
        /// Why it was not heard; `None` when it was.
        why: Option<String>,
    },
    /// Of the layers.
    Done(Report),
    /// It failed.
    Failed {
        /// What was attempted.
        what: String,
        /// Why it failed.
        why: String,
    },
}

impl Answer {
    /// The part that was asked for, or in one line why there is none. A step that answers another question than it was
    /// asked has failed, whatever it says.
    pub fn wanted<T>(
        answer: Option<Answer>,
        pick: impl FnOnce(Answer) -> Option<T>,
    ) -> std::result::Result<T, String> {
        match answer {
            Some(Answer::Failed { what, why }) => Err(format!("{what}: {why}")),
            Some(answer) => pick(answer).ok_or_else(|| "it answered something else".to_owned()),
            None => Err("it gave no answer in time".to_owned()),
        }
    }

    /// The report of a layer's work.
    pub fn report(self) -> Option<Report> {
        if let Answer::Done(report) = self { Some(report) } else { None }
    }
}

/// Where the answer to a request lies.
pub fn answer_path(request: &Path) -> PathBuf {
    request.with_extension("answer")
}

/// What a step answered; a step that was killed answered nothing.
pub fn answer(request: &Path) -> Option<Answer> {
    let bytes = files::read_bounded(&answer_path(request), MAX_BYTES).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Runs one step and writes its answer.
pub fn run(request_path: &Path) -> Result<()> {
    let bytes = files::read_bounded(request_path, MAX_BYTES)?;
    let request: Request = serde_json::from_slice(&bytes)
        .map_err(|e| Error::new(Kind::Usage, format!("read the request {}", request_path.display()), e))?;
    let deadline = Deadline::from_env().unwrap_or_else(|| Deadline::after(DEFAULT_LIMIT));
    let early = |answer: &Answer| say(request_path, answer);
    let outcome = work(&request, deadline, &early);
    let said = match &outcome {
        Ok(answer) => answer.clone(),
        Err(e) => Answer::Failed { what: e.what.clone(), why: e.why.clone() },
    };
    say(request_path, &said)?;
    outcome.map(|_| ())
}

fn say(request_path: &Path, answer: &Answer) -> Result<()> {
    let text = serde_json::to_vec(answer).map_err(|e| Error::new(Kind::System, "write the answer", e))?;
    files::write_for_now(&answer_path(request_path), &text, 0o600)
}

/// Looks. What can be said without the store is said before it is touched: a disk that hangs takes everybody along who
/// reads from it, and only restore needs it.
fn examine(
    request: &Request,
    places: &Places,
    (care, users): (Care, bool),
    deadline: Deadline,
    early: &dyn Fn(&Answer) -> Result<()>,
) -> Result<Answer> {
    let node = &request.node;
    // A proof that cannot be read proves nothing.
    let proof = Proof::load(&places.state_dir).unwrap_or_default();
    let seen = layers::see(node, request.baseline.as_ref(), care, deadline);
    // In daily life nothing waits for this answer, and the second weighing would be paid for all day.
    if care != Care::Quick || request.without_store {
        let mut known = layers::weigh(node, seen.clone(), None, proof.as_ref(), deadline)?;
        known.store_hangs = true;
        known.low = known.low.or_else(|| node::gates::low(&[&places.state_dir]));
        known.notice(
            "the store did not answer: it is not known what is different from the snapshot".to_owned(),
        );
        let known = Answer::Examined(Box::new(known));
        if request.without_store {
            return Ok(known);
        }
        early(&known)?;
    }
    // A store that cannot be used is a reason why a layer does not apply, not why nothing can be looked at.
    let store = open_store(places);
    let usable = store.as_ref().ok().and_then(Option::as_ref);
    let mut examination = layers::weigh(node, seen, usable, proof.as_ref(), deadline)?;
    if let Err(e) = store {
        examination.notice(format!("the store cannot be used: {}", e.why));
    }
    examination.low = examination.low.or_else(|| node::gates::low(&[&places.state_dir]));
    examination.users = users.then(|| node::users::stamp(node, deadline));
    Ok(Answer::Examined(Box::new(examination)))
}

fn work(request: &Request, deadline: Deadline, early: &dyn Fn(&Answer) -> Result<()>) -> Result<Answer> {
    let config = crate::config::load(&request.config_file)?;
    let places = Places::new(request.config_file.clone(), &config)?;
    node::copies::keep_in(places.reading());
    let node = &request.node;
    match &request.work {
        Work::Examine { care, users } => examine(request, &places, (*care, *users), deadline, early),
        Work::Snapshot { classes, note } => {
            // What its user writes is not the update's, and an update may hang for long.
            if classes.is_empty() || classes.iter().any(|c| c.converges()) {
                no_update_at_work(node, "take a snapshot")?;
            }
            no_maintenance(node, "take a snapshot")?;
            let before = open_store(&places).ok().flatten().and_then(|s| s.newest_trusted(None).ok()?);
            let info =
                snapshot(&places, node, request.baseline.as_ref(), classes, note, &mut |_| {}, deadline)?;
            let gone = before.map(|b| gone(&places, &b.id, &info.id, deadline)).unwrap_or_default();
            Ok(Answer::Taken { id: info.id, wall_ms: info.cost.wall_ms, gone })
        }
        Work::Settle => {
            no_maintenance(node, "trust the newest snapshot")?;
            let answer = settle(&places, node, request.baseline.as_ref(), deadline)?;
            settle_peer_copy(&places, node, &answer, deadline)?;
            Ok(answer)
        }
        Work::Scrub => scrub(&places, node, deadline),
        Work::Tidy { store_only } => tidy(&places, &config, node, *store_only, deadline),
        Work::Room { reserve, incident } => {
            Ok(Answer::Tidied { done: room::make(node, &places, *reserve, *incident, deadline) })
        }
        Work::Deliver => {
            let mut outbox = Outbox::open_with_spare(&places.outbox(), &places.outbox_spare())?;
            let channels = voice::channels(&config, &places, Some(&node.home));
            // Told in time to whoever waits for it, whatever a channel does meanwhile.
            let pass = config.ladder.limits().span(PASS_LIMIT);
            let delivery = alert::deliver(&mut outbox, &channels, deadline.min(Deadline::after(pass)));
            Ok(Answer::Delivered {
                accepted: delivery.accepted.iter().filter(|r| !r.local).map(|r| r.key.clone()).collect(),
                waiting: delivery.queued,
                again_ms: delivery.next.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
            })
        }
        Work::Contacts => {
            let (count, missing) = voice::remember(&places, node, deadline)?;
            Ok(Answer::Remembered { count, missing })
        }
        Work::Beat => Ok(Answer::Beaten {
            why: match &config.heartbeat.url {
                Some(url) => alert::heartbeat(url, deadline.min(Deadline::after(PASS_LIMIT))).err(),
                None => Some("no heartbeat address is configured".to_owned()),
            },
        }),
        Work::Sources => crate::sources::ask(node, &config, &places, deadline, early),
        Work::Restart { hung } => {
            with_bench(request, &config, &places, 0, deadline, |bench| layers::restart::work(bench, *hung))
        }
        Work::Restore { findings, hung, wider, incident } => {
            with_bench(request, &config, &places, *incident, deadline, |bench| {
                layers::restore::work(bench, findings, *hung, *wider)
            })
        }
        Work::TrialOver { incident } => {
            with_bench(request, &config, &places, *incident, deadline, layers::trial::over)
        }
        Work::SystemInstall { version, hung, incident } => {
            let order = crate::reinstall::order(&places, version, engine::Layer::SystemInstall);
            let by_root = sudo::needed(node, &places);
            if by_root && version == layers::install::NEWEST {
                let what = "have root install the newest version";
                return Err(Error::new(Kind::Denied, what, "root installs none that never served here"));
            }
            data_is_kept(request, &places, version, deadline)?;
            with_bench(request, &config, &places, *incident, deadline, |bench| {
                if by_root {
                    return sudo::through(bench, &places, version);
                }
                layers::system_install::work(bench, &order, *hung)
            })
        }
        Work::UserInstall { version, hung, incident } => {
            let order = crate::reinstall::order(&places, version, engine::Layer::UserInstall);
            data_is_kept(request, &places, version, deadline)?;
            with_bench(request, &config, &places, *incident, deadline, |bench| {
                layers::user_install::work(bench, &order, *hung)
            })
        }
        Work::AskSudo { home } => {
            let errand = if *home { sudo::Errand::Home } else { sudo::Errand::Install };
            match sudo::ask(errand, node, sudo::ask_limit(config.ladder.limits()), deadline) {
                Ok(()) => Ok(Answer::Done(Report::default())),
                Err(why) => Err(Error::new(Kind::Denied, "have root install the program", why)),
            }
        }
        Work::TakeBack => with_bench(request, &config, &places, 0, deadline, |bench| {
            let mut report = Report::default();
            layers::install::take_back(&places.state_dir, bench.manager, bench.deadline, &mut report)?;
            Ok(report)
        }),
        Work::PeerCopy { hung, incident } => {
            let help = layers::peer_copy::Help {
                peers: &config.peer,
                identity: places.donate_key(),
                me: "/proc/self/exe".into(),
                known: places.known_programs(),
            };
            with_bench(request, &config, &places, *incident, deadline, |bench| {
                layers::peer_copy::work(bench, &help, *hung)
            })
        }
        Work::PeerBack { incident } => with_bench(request, &config, &places, *incident, deadline, |bench| {
            let mut report = Report::default();
            layers::peer_copy::take_back(bench, true, &mut report).map(|()| report)
        }),
        Work::StageHome { version } => {
            let order = crate::reinstall::order(&places, version, engine::Layer::SystemInstall);
            let moved = layers::install::Moved::load(&places.state_dir)?;
            let by_root = moved.map(|m| m.home).filter(|home| sudo::needed(home, &places));
            with_bench(request, &config, &places, 0, deadline, |bench| match by_root {
                Some(home) => sudo::home_through(bench, &home, &order),
                None => home::stage(bench, &order),
            })
        }
        Work::MoveHome { version } => {
            let order = crate::reinstall::order(&places, version, engine::Layer::SystemInstall);
            with_bench(request, &config, &places, 0, deadline, |bench| home::go(bench, &order))
        }
        Work::HomeBack => {
            with_bench(request, &config, &places, 0, deadline, |bench| home::back(bench, &places.state_dir))
        }
        Work::InPlace { findings, incident } => {
            with_bench(request, &config, &places, *incident, deadline, |bench| {
                layers::in_place::work(bench, findings)
            })
        }
    }
}

/// While somebody replaces the program, what lies there is no picture of anything and proves nothing: tried again later.
fn no_update_at_work(node: &Node, what: &str) -> Result<()> {
    match node::update::at_work(node) {
        Some(update) => Err(Error::new(Kind::System, what, format!("an update is at work: {update}"))),
        None => Ok(()),
    }
}

/// While the databases themselves are being worked on, what lies there is no picture of them.
fn no_maintenance(node: &Node, what: &str) -> Result<()> {
    match node::update::of_state(node) {
        Some(held) => Err(Error::new(Kind::System, what, held)),
        None => Ok(()),
    }
}

/// Before a version that never served here may open the data, and migrate it to where nobody can follow, a copy of the
/// data is taken.
fn data_is_kept(request: &Request, places: &Places, version: &str, deadline: Deadline) -> Result<()> {
    const DATA: [Class; 3] = [Class::State, Class::Sessions, Class::Config];
    if version != layers::install::NEWEST {
        return Ok(());
    }
    let (node, baseline) = (&request.node, request.baseline.as_ref());
    let note = "before a newer version";
    snapshot(places, node, baseline, &DATA, note, &mut |_| {}, deadline).map(|_| ())
}

fn with_bench(
    request: &Request,
    config: &Config,
    places: &Places,
    incident: u64,
    deadline: Deadline,
    work: impl FnOnce(&mut Bench<'_>) -> Result<Report>,
) -> Result<Answer> {
    let containers = places.containers(&request.node)?;
    let mut service = Service::of(&request.node, config, &containers, places)?;
    // A damaged store must not keep layer 0 from working.
    let store = if request.without_store { None } else { open_store(places).unwrap_or_default() };
    let mut bench = Bench {
        node: &request.node,
        manager: service.manager(),
        store: store.as_ref(),
        baseline: request.baseline.as_ref(),
        quarantine: places.quarantine().join(format!("{incident:08}")),
        spares: spare::ready(&request.node),
        deadline,
        limits: config.ladder.limits(),
    };
    work(&mut bench).map(Answer::Done)
}

/// The store, if there is one yet.
pub fn open_store(places: &Places) -> Result<Option<Store>> {
    // An empty directory is a disk that was mounted for a store to come.
    if std::fs::read_dir(places.store()).map_or(true, |mut entries| entries.next().is_none()) {
        return Ok(None);
    }
    Store::open(&places.store(), &places.key_file).map(Some)
}

/// Takes a snapshot of `classes` (all when empty) and publishes it as a candidate.
pub fn snapshot(
    places: &Places,
    node: &Node,
    baseline: Option<&Baseline>,
    classes: &[Class],
    note: &str,
    progress: &mut dyn FnMut(store::Progress),
    deadline: Deadline,
) -> Result<store::SnapshotInfo> {
    let store = Store::open_or_create(&places.store(), &places.key_file)?;
    let roots = node::roots::roots(node);
    let all = Class::ALL;
    let version = node.package_version();
    let json = |e: serde_json::Error| Error::new(Kind::System, "describe the node", e);
    let request = Take {
        roots: &roots,
        classes: if classes.is_empty() { &all } else { classes },
        note,
        version: version.as_deref(),
        node: serde_json::to_value(node).map_err(json)?,
        baseline: serde_json::to_value(baseline).map_err(json)?,
    };
    store.snapshot(&request, progress, deadline)
}

/// What the user deleted since the last trusted snapshot, as far as it is worth a word: of the workspace and of
/// credentials, and only what nobody had written for a week. Agents make and delete files all day. What cannot be compared
/// is not told; the snapshot is taken all the same.
fn gone(places: &Places, before: &str, now: &str, deadline: Deadline) -> Vec<PathBuf> {
    const STILL: Duration = Duration::from_secs(7 * 86_400);
    let Ok(Some(store)) = open_store(places) else { return Vec::new() };
    let mut gone =
        store.gone(before, now, &[Class::Workspace, Class::Credentials], STILL, deadline).unwrap_or_default();
    gone.retain(|path| !node::users::comes_and_goes(path));
    gone
}

/// What the next start depends on: a snapshot is trusted for what it holds of these.
const PROVEN: [Class; 4] = [Class::Program, Class::Runtime, Class::Service, Class::Config];

/// Why a snapshot must not be trusted by what lies on disk now, if there is a reason: what it holds of the program is no
/// longer exactly that, or the next start would not survive it. What was `carried` over from a trusted snapshot was proven
/// by that one.
fn unproven(
    store: &Store,
    info: &store::SnapshotInfo,
    carried: &dyn Fn(Class) -> bool,
    node: &Node,
    baseline: Option<&Baseline>,
    deadline: Deadline,
) -> Result<Option<String>> {
    let classes: Vec<Class> = PROVEN.into_iter().filter(|class| !carried(*class)).collect();
    if classes.iter().any(|c| c.converges()) {
        no_update_at_work(node, "trust the newest snapshot")?;
    }
    let differences = store.compare(&info.id, &classes, Depth::Stat, deadline)?;
    if let Some(first) = differences.first() {
        return Ok(Some(format!(
            "{} differences from the candidate, the first in {}/{}",
            differences.len(),
            first.root,
            first.path.display()
        )));
    }
    // A gateway goes on with the program and the config it has read: serving proves nothing about what lies there now.
    let unknown = Baseline::default();
    let looked =
        node::triage::examine(node, baseline.unwrap_or(&unknown), node::triage::Depth::Quick, deadline);
    // What is sick now is not what this one holds of it, where that was carried over from a trusted snapshot or left out.
    let elsewhere = |class: Class| carried(class) || !info.classes.contains_key(&class);
    let held = |f: &&Finding| unfit_to_trust(f) && !f.class.is_some_and(elsewhere);
    let sick = looked.findings.iter().find(held);
    Ok(sick.map(|sick| format!("it holds what the next start would not survive: {}", sick.what)))
}

/// Why what a snapshot that was just taken holds must not be trusted on the owner's word, if there is a reason: it was
/// taken of a tree that somebody was changing, so that it is a picture of nothing that ever was.
///
/// # Errors
///
/// An update or offline maintenance is at work; the store or a live tree cannot be read.
pub fn blurred(
    store: &Store,
    info: &store::SnapshotInfo,
    node: &Node,
    baseline: &Baseline,
    deadline: Deadline,
) -> Result<Option<String>> {
    no_maintenance(node, "trust what is there")?;
    if let Some(why) = unproven(store, info, &|_| false, node, Some(baseline), deadline)? {
        return Ok(Some(why));
    }
    // A user's trees are written to all the time; what goes from them meanwhile may be only the beginning of it.
    let users = [Class::Workspace, Class::Credentials];
    let gone = store
        .compare(&info.id, &users, Depth::Stat, deadline)?
        .into_iter()
        .find(|d| d.kind == store::DifferenceKind::Missing && !node::users::comes_and_goes(&d.path));
    Ok(gone.map(|d| format!("{}/{} was deleted while the copy was taken", d.root, d.path.display())))
}

/// Trusts the newest candidate if the live program, runtime, service files and config are exactly what it holds: the
/// node has just served for the settling time with them.
fn settle(places: &Places, node: &Node, baseline: Option<&Baseline>, deadline: Deadline) -> Result<Answer> {
    let Some(store) = open_store(places)? else {
        return Ok(Answer::Settled { id: None, why: Some("there is no store yet".into()), config: None });
    };
    let Some(newest) = store.list()?.into_iter().max_by_key(|i| i.number) else {
        return Ok(Answer::Settled { id: None, why: Some("there is no snapshot yet".into()), config: None });
    };
    let config = node::config::load(node).ok().map(|l| node::config::fingerprint(&l.value));
    if newest.trust.trusted() {
        return Ok(Answer::Settled { id: Some(newest.id), why: None, config });
    }
    let before = store.newest_trusted(None)?;
    // What was carried over from a trusted snapshot was proven by that one; what lies on disk since may never have run.
    let carried = |class: Class| {
        before.as_ref().is_some_and(|b| {
            let when = |info: &store::SnapshotInfo| info.classes.get(&class).map(|c| c.taken);
            when(b).is_some() && when(b) == when(&newest)
        })
    };
    if let Some(why) = unproven(&store, &newest, &carried, node, baseline, deadline)? {
        return Ok(Answer::Settled { id: None, why: Some(why), config: None });
    }
    if let Some(before) = before {
        // A user's tree that is empty all of a sudden is no good copy of it, whoever emptied it.
        let emptied = before.classes.iter().find(|(class, was)| {
            !class.converges() && was.files > 0 && newest.classes.get(class).is_none_or(|is| is.files == 0)
        });
        if let Some((class, was)) = emptied {
            let why = format!(
                "the {class} held {} files in snapshot {} and holds none now; `koboshi accept` trusts it all the same",
                was.files, before.id
            );
            return Ok(Answer::Settled { id: None, why: Some(why), config: None });
        }
    }
    store.set_trust(&newest.id, Trust::Good)?;
    Ok(Answer::Settled { id: Some(newest.id), why: None, config })
}

/// The node served for the settling time: a peer's program is its own from now on, and what it consists of is written
/// down apart from the store.
fn settle_peer_copy(places: &Places, node: &Node, answer: &Answer, deadline: Deadline) -> Result<()> {
    if !matches!(answer, Answer::Settled { id: Some(_), .. })
        || node::update::at_work(node).is_some()
        || !node::triage::program_is_whole(node)
    {
        // What a snapshot without the program proves is nothing about the program.
        return Ok(());
    }
    layers::peer_copy::conclude(node, &places.quarantine().join("peer-copy"), true, deadline)?;
    match open_store(places)? {
        Some(store) => layers::peer_copy::remember(&store, &places.known_programs(), deadline),
        None => Ok(()),
    }
}

/// One portion of the slow look. Its cursor is a help: without it a round begins anew.
fn scrub(places: &Places, node: &Node, deadline: Deadline) -> Result<Answer> {
    /// A cursor is a name and a path.
    const CURSOR_LIMIT_BYTES: u64 = 1 << 20;
    /// Of a round's damage, this much is told.
    const TOLD: usize = 3;
    let (mut done, mut lost) = (Vec::new(), None);
    let Some(store) = open_store(places)? else {
        return Ok(Answer::Scrubbed { done, damaged: false, lost });
    };
    let trusted = store.newest_trusted(None)?.and_then(|info| info.version);
    if node::update::at_work(node).is_some()
        || trusted != node.package_version() && node.package_version().is_some()
    {
        // Another program than the remembered one is not damage; a damaged package.json is the quick look's.
        return Ok(Answer::Scrubbed { done, damaged: false, lost });
    }
    let file = places.scrub();
    let cursor =
        files::read_bounded(&file, CURSOR_LIMIT_BYTES).ok().and_then(|b| serde_json::from_slice(&b).ok());
    let portion = store::Portion { of: SCRUB_PORTIONS, cpu_ms: SCRUB_CPU_MS };
    let found = store.scrub(cursor, portion, &spare::ready(node), deadline)?;
    let text =
        serde_json::to_vec(&found.cursor).map_err(|e| Error::new(Kind::System, "keep the cursor", e))?;
    files::write_atomic(&file, &text, 0o600)?;
    for d in found.damaged.iter().take(TOLD) {
        done.push(format!(
            "{}/{} has other bytes than it had, behind an unchanged inode",
            d.root,
            d.path.display()
        ));
    }
    if let Some(healed) = &found.healed {
        done.push(format!(
            "the store was damaged and healed: {} objects, {} packs, {} manifests written anew",
            healed.objects, healed.packs, healed.manifests
        ));
        lost = healed.lost.first().map(|first| {
            let more = healed.lost.len() - 1;
            let trust = match healed.distrusted.as_slice() {
                [] => String::new(),
                ids => format!("; no longer trusted: {}", ids.join(", ")),
            };
            format!("{}: {}; and {more} more{trust}", first.what, first.why)
        });
    }
    if found.round_ended {
        let left = collect_leftovers(places, &store, node, deadline)?;
        done.extend(left);
    }
    Ok(Answer::Scrubbed { done, damaged: !found.damaged.is_empty(), lost })
}

/// Moves what killed repairs left under the node's roots to the quarantine.
fn collect_leftovers(
    places: &Places,
    store: &Store,
    node: &Node,
    deadline: Deadline,
) -> Result<Option<String>> {
    let to = places.quarantine().join("leftovers");
    let moved = store.collect_leftovers(&node::roots::roots(node), &to, deadline)?;
    Ok((moved > 0)
        .then(|| format!("{moved} pieces that killed repairs had left were moved to {}", to.display())))
}

/// What no snapshot may hold that is to be trusted: it would be restored one day.
fn unfit_to_trust(finding: &Finding) -> bool {
    match finding.kind {
        FaultKind::FilesDamaged
        | FaultKind::ConfigBroken
        | FaultKind::DatabaseCorrupt
        | FaultKind::Amnesia
        | FaultKind::RuntimeUnfit
        | FaultKind::SchemaNewer
        | FaultKind::UpdateAtWork => true,
        // A workspace may be emptied by its owner; that its state is gone is nobody's intention.
        FaultKind::RootMissing => finding.class == Some(Class::State),
        FaultKind::ProcessGone
        | FaultKind::Hung
        | FaultKind::ServiceLatched
        | FaultKind::PortTaken
        | FaultKind::Permission
        | FaultKind::DiskFull
        | FaultKind::OwnersWill
        | FaultKind::BackupStale
        | FaultKind::Notice => false,
    }
}

fn tidy(
    places: &Places,
    config: &Config,
    node: &Node,
    store_only: bool,
    deadline: Deadline,
) -> Result<Answer> {
    let mut done = if store_only { Vec::new() } else { layers::install::settle(&places.state_dir)? };
    let Some(store) = open_store(places)? else {
        return Ok(Answer::Tidied { done });
    };
    if !store_only {
        done.extend(home::leave(&places.state_dir, &store)?);
        done.extend(collect_leftovers(places, &store, node, deadline)?);
    }
    let limit = crate::space::limit_bytes(config, places)?;
    let spare_bytes = spare::size(node);
    let pruned = store.prune(limit.saturating_sub(spare_bytes), deadline)?;
    if !pruned.removed.is_empty() {
        done.push(format!("{} old snapshots removed", pruned.removed.len()));
    }
    if pruned.over_limit {
        done.push(format!("what must be kept is larger than the limit of {limit} bytes"));
    }
    if store_only {
        return Ok(Answer::Tidied { done });
    }
    let freed = store::trim_quarantine(
        &places.quarantine(),
        &store,
        limit.saturating_sub(spare_bytes + pruned.after_bytes),
        config.store.quarantine_days,
        deadline,
    )?;
    if freed > 0 {
        done.push(format!("{freed} bytes of the quarantine freed"));
    }
    // That there is none keeps nothing else from being done.
    done.extend(room::keep_reserve(node, places).unwrap_or_else(|e| Some(e.to_string())));
    if config.store.spare {
        done.extend(spare::make(node, &store, limit, deadline)?);
    }
    Ok(Answer::Tidied { done })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_answer_that_was_asked_for_counts() {
        let wanted = |answer| Answer::wanted(answer, Answer::report);
        let report = Report { done: vec!["stopped".into()], ..Report::default() };
        assert_eq!(wanted(Some(Answer::Done(report))).map(|r| r.done), Ok(vec!["stopped".to_owned()]));
        let failed = Answer::Failed { what: "stop".into(), why: "it lives".into() };
        assert_eq!(wanted(Some(failed)).map(|r| r.done), Err("stop: it lives".to_owned()));
        let other = Answer::Tidied { done: vec!["x".into()] };
        assert!(wanted(Some(other)).is_err_and(|why| why.contains("something else")));
        assert!(wanted(None).is_err_and(|why| why.contains("no answer")));
    }
}
