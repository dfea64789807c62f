//! The donor's end: reads requests, answers them, and knows no other deed.

use crate::Manifest;
use crate::manifest::Entry;
use crate::words::{ENTRIES_BYTES, MAX_OBJECT_BYTES, Name, Reply, Request, Status, read_frame};
use std::io::{self, Read, Write};

/// What a donor must be able to tell. It is asked only for what can be named: see [`Request`].
pub trait Lender {
    /// Who it is and how its node does.
    fn status(&mut self) -> Result<Status, String>;
    /// What its program consists of; calls `working` now and then while that takes long.
    fn list(&mut self, working: &mut dyn FnMut()) -> Result<Manifest, String>;
    /// One object of that list, proven; `None` when it is not (or no longer) here.
    fn object(&mut self, name: &Name) -> Option<Vec<u8>>;
}

/// Requests in one conversation: a whole program, asked for object by object, is 50,000.
const MAX_REQUESTS: usize = 100_000;

/// Answers one conversation to its end.
///
/// # Errors
/// When the other side breaks the protocol or is gone.
pub fn serve(from: &mut dyn Read, to: &mut dyn Write, lender: &mut dyn Lender) -> io::Result<()> {
    let say = |to: &mut dyn Write, reply: &Reply| to.write_all(&reply.to_bytes());
    say(to, &Reply::Greeting)?;
    to.flush()?;
    for _ in 0..MAX_REQUESTS {
        let Some(frame) = read_frame(from)? else { return Ok(()) };
        let request = match Request::parse(&frame) {
            Ok(request) => request,
            Err(why) => {
                say(to, &Reply::Refused(why.clone()))?;
                to.flush()?;
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
        };
        match request {
            Request::Status => match lender.status() {
                Ok(status) => say(to, &Reply::Status(Box::new(status)))?,
                Err(why) => say(to, &Reply::Refused(why))?,
            },
            Request::List => {
                let listed = lender.list(&mut || {
                    // If nobody listens any more, the next write says so.
                    let _ = to.write_all(&Reply::Working.to_bytes()).and_then(|()| to.flush());
                });
                match listed {
                    Ok(manifest) => list(to, &manifest)?,
                    Err(why) => say(to, &Reply::Refused(why))?,
                }
            }
            Request::Get(names) => {
                for name in names {
                    match lender.object(&name).filter(|bytes| bytes.len() <= MAX_OBJECT_BYTES) {
                        Some(bytes) => say(to, &Reply::Object(name, bytes))?,
                        None => say(to, &Reply::Missing(name))?,
                    }
                }
                say(to, &Reply::GetEnd)?;
            }
        }
        to.flush()?;
    }
    say(to, &Reply::Refused("too many requests in one conversation".into()))?;
    to.flush()
}

fn list(to: &mut dyn Write, manifest: &Manifest) -> io::Result<()> {
    let mut batch: Vec<Entry> = Vec::new();
    let mut size = 0;
    let mut bytes = Vec::new();
    for entry in manifest.entries() {
        bytes.clear();
        entry.write(&mut bytes);
        // The list of a file of 2 GiB fills a frame; larger ones are in no program.
        if bytes.len() > 2 * ENTRIES_BYTES {
            let why = Reply::Refused("a file here is too large to be listed".into());
            return to.write_all(&why.to_bytes());
        }
        if size + bytes.len() > ENTRIES_BYTES && !batch.is_empty() {
            to.write_all(&Reply::Entries(std::mem::take(&mut batch)).to_bytes())?;
            size = 0;
        }
        size += bytes.len();
        batch.push(entry.clone());
    }
    if !batch.is_empty() {
        to.write_all(&Reply::Entries(batch).to_bytes())?;
    }
    to.write_all(&Reply::ListEnd(manifest.digest()).to_bytes())
}
