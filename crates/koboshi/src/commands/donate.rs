//! `koboshi donate NODE`: the forced command of a peer's key. Speaks the donor's protocol on its standard streams, and
//! nothing else ever appears there.
//!
//! It only reads: what is asked for can name no path, and what is given is the program and its runtime.

use crate::agent::status::Status;
use crate::cli::Cli;
use crate::patient;
use crate::places::Places;
use crate::print::Exit;
use crate::step;
use engine::Verdict;
use host::clock::Deadline;
use host::files::LockFile;
use host::{Error, Kind, Result};
use layers::lend::Donor;
use reach::{Lender, Manifest, Name};
use std::time::Duration;

/// A conversation is over after this, whatever the other side does: a whole program takes seconds.
const LIMIT: Duration = Duration::from_secs(180);
/// Peers served at a time: each costs a core and the disk, and the node here comes first.
const AT_A_TIME: u32 = 3;

/// Serves one conversation.
pub fn run(cli: &Cli, name: Option<&str>) -> Result<Exit> {
    let deadline = Deadline::after(LIMIT);
    std::thread::spawn(move || {
        std::thread::sleep(deadline.left());
        std::process::exit(i32::from(Exit::Failed.code()));
    });
    let (config, places) = super::open(cli)?;
    let node = patient::find(&places, &config)?;
    if let Some(name) = name.filter(|n| *n != node.name) {
        let why = format!("the node here is called {}", node.name);
        return Err(Error::new(Kind::NotFound, format!("lend the program of node {name}"), why));
    }
    let place = free_place(&places);
    // A store that this account cannot read, or that is damaged, is done without: the live program is hashed instead.
    let store = step::open_store(&places).unwrap_or_default();
    let shelf = store.as_ref().and_then(|s| s.shelf().ok());
    let (healthy, why) = health(&places);
    let reader = shelf.as_ref().map(store::lend::Shelf::reader);
    let version = env!("CARGO_PKG_VERSION");
    let mut donor = Donor::new(&node, store.as_ref(), reader, healthy, why, version, deadline);
    let mut from = std::io::stdin().lock();
    let mut to = std::io::BufWriter::with_capacity(256 << 10, std::io::stdout().lock());
    let served = match &place {
        Place::Full => reach::serve(&mut from, &mut to, &mut Busy),
        Place::Held(_) | Place::Unknown => reach::serve(&mut from, &mut to, &mut donor),
    };
    // A peer that hung up has what it wanted.
    Ok(if served.is_ok() { Exit::Done } else { Exit::Failed })
}

/// A place among those served at a time.
enum Place {
    /// Held until we end.
    Held(#[allow(dead_code, reason = "holding it is its use")] LockFile),
    /// All are taken.
    Full,
    /// Nobody counts here: the directory is not ours to write in.
    Unknown,
}

fn free_place(places: &Places) -> Place {
    for n in 0..AT_A_TIME {
        match LockFile::try_take(&places.run_dir.join(format!("donate-{n}.lock"))) {
            Ok(Some(lock)) => return Place::Held(lock),
            Ok(None) => {}
            Err(_) => return Place::Unknown,
        }
    }
    Place::Full
}

/// Says that it is busy, to every question.
struct Busy;

impl Lender for Busy {
    fn status(&mut self) -> std::result::Result<reach::Status, String> {
        Err(format!("it is busy: {AT_A_TIME} others are served at the moment"))
    }
    fn list(&mut self, _: &mut dyn FnMut()) -> std::result::Result<Manifest, String> {
        Err("it is busy".into())
    }
    fn object(&mut self, _: &Name) -> Option<Vec<u8>> {
        None
    }
}

/// The word of the judge of the agent here, if one runs.
fn health(places: &Places) -> (Option<bool>, String) {
    match Status::load(places) {
        Ok(status) if status.alive() => match &status.verdict {
            Verdict::Serving { .. } => (Some(true), "serving".to_owned()),
            Verdict::NotServing { why } => (Some(false), why.clone()),
            Verdict::Inconclusive { why } => (None, why.clone()),
        },
        Ok(_) | Err(_) => (None, "no agent has anything to say here".to_owned()),
    }
}
