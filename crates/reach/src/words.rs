//! The words of the donor's protocol, version 1, and their bytes (`docs/decisions/0018-donor-protocol.md`).
//!
//! Both sides send frames: `length u32 ‖ kind u8 ‖ body`, big-endian, where the length counts kind and body. What is
//! longer than [`MAX_FRAME_BYTES`], unknown, cut short or followed by anything is refused together with the whole
//! conversation: a peer that cannot keep to this has nothing that we want.

use crate::manifest::Entry;
use serde::{Deserialize, Serialize};
use std::io::Read;

/// The BLAKE3 of an object's bytes.
pub type Name = [u8; 32];

/// What the donor says first. Anything else (a message of the day, another program) is no donor.
pub const GREETING: &[u8] = b"koboshi donor 1";
/// The largest object: a block of the store's, and of every list made here.
pub const MAX_OBJECT_BYTES: usize = 256 << 10;
/// No frame is longer: an object with its name, with room.
pub const MAX_FRAME_BYTES: usize = MAX_OBJECT_BYTES + (1 << 10);
/// Names in one request: with 32 bytes each it fits a pipe, so that a writer never blocks on a reader that waits.
pub const MAX_NAMES: usize = 1_000;
/// A status is a few lines of JSON.
const MAX_STATUS_BYTES: usize = 16 << 10;
/// What went wrong, in words.
const MAX_WHY_BYTES: usize = 1 << 10;
/// Entries are sent in frames of about this size.
pub(crate) const ENTRIES_BYTES: usize = 128 << 10;

/// What a peer asks of a donor. That is all there is to be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Who are you, and is your node well?
    Status,
    /// What does your program consist of?
    List,
    /// These objects, please.
    Get(Vec<Name>),
}

/// What a donor answers.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// The first frame of a conversation.
    Greeting,
    /// To `Status`.
    Status(Box<Status>),
    /// To `List`: some more of it.
    Entries(Vec<Entry>),
    /// To `List`: that was all of it, and this is its digest.
    ListEnd(Name),
    /// To `Get`: one object.
    Object(Name, Vec<u8>),
    /// To `Get`: this one is not (or no longer) here.
    Missing(Name),
    /// To `Get`: that was all.
    GetEnd,
    /// Still at work: hashing a tree takes a while.
    Working,
    /// It cannot be done, and why.
    Refused(String),
}

/// Who a donor is and how its node does. What is not known is absent; unknown members are passed over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// koboshi's version there.
    pub koboshi: String,
    /// How the node is called there.
    pub node: String,
    /// Whether its agent's judge says that it serves; absent where no agent has said anything lately.
    pub healthy: Option<bool>,
    /// One line for people.
    pub why: String,
    /// The program's version that would be listed.
    pub version: Option<String>,
    /// The CPU architecture, as Rust calls it.
    pub arch: String,
    /// `gnu` or `musl`.
    pub libc: String,
    /// The database schemas (state, agent) that this program knows.
    pub schema: Option<(u32, u32)>,
    /// Where the list comes from: `snapshot` (proven good there) or `live` (hashed as it lies).
    pub source: String,
}

const STATUS: u8 = 1;
const LIST: u8 = 2;
const GET: u8 = 3;
const GREETED: u8 = 0x80;
const STATUS_IS: u8 = 0x81;
const ENTRIES: u8 = 0x82;
const LIST_END: u8 = 0x83;
const OBJECT: u8 = 0x84;
const MISSING: u8 = 0x85;
const GET_END: u8 = 0x86;
const WORKING: u8 = 0x87;
const REFUSED: u8 = 0x88;

fn frame(kind: u8, body: &[&[u8]]) -> Vec<u8> {
    let length = 1 + body.iter().map(|b| b.len()).sum::<usize>();
    let mut out = Vec::with_capacity(4 + length);
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    out.push(kind);
    for part in body {
        out.extend_from_slice(part);
    }
    out
}

impl Request {
    /// As a frame.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Request::Status => frame(STATUS, &[]),
            Request::List => frame(LIST, &[]),
            Request::Get(names) => frame(GET, &[names.as_flattened()]),
        }
    }

    /// Reads kind and body of a frame. `Err` says in words what is wrong with it.
    pub fn parse(frame: &[u8]) -> Result<Request, String> {
        let (kind, body) = frame.split_first().ok_or("an empty frame")?;
        match (*kind, body) {
            (STATUS, []) => Ok(Request::Status),
            (LIST, []) => Ok(Request::List),
            (GET, body) => {
                let (names, []) = body.as_chunks::<32>() else {
                    return Err("a name is cut short".into());
                };
                if names.is_empty() || names.len() > MAX_NAMES {
                    return Err(format!("{} names, where 1 to {MAX_NAMES} may be asked for", names.len()));
                }
                Ok(Request::Get(names.to_vec()))
            }
            (kind, _) => Err(format!("no such request ({kind})")),
        }
    }
}

impl Reply {
    /// As a frame.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Reply::Greeting => frame(GREETED, &[GREETING]),
            Reply::Status(status) => {
                let json = serde_json::to_vec(status).unwrap_or_default();
                frame(STATUS_IS, &[&json])
            }
            Reply::Entries(entries) => {
                let mut body = Vec::new();
                for entry in entries {
                    entry.write(&mut body);
                }
                frame(ENTRIES, &[&body])
            }
            Reply::ListEnd(digest) => frame(LIST_END, &[digest]),
            Reply::Object(name, bytes) => frame(OBJECT, &[name, bytes]),
            Reply::Missing(name) => frame(MISSING, &[name]),
            Reply::GetEnd => frame(GET_END, &[]),
            Reply::Working => frame(WORKING, &[]),
            Reply::Refused(why) => {
                let cut = why.floor_char_boundary(MAX_WHY_BYTES.min(why.len()));
                frame(REFUSED, &[&why.as_bytes()[..cut]])
            }
        }
    }

    /// Reads kind and body of a frame. `Err` says in words what is wrong with it.
    pub fn parse(frame: &[u8]) -> Result<Reply, String> {
        let (kind, body) = frame.split_first().ok_or("an empty frame")?;
        let name = |bytes: &[u8]| Name::try_from(bytes).map_err(|_| "a name is cut short".to_owned());
        match *kind {
            GREETED if body == GREETING => Ok(Reply::Greeting),
            GREETED => Err("another protocol is spoken there".into()),
            STATUS_IS if body.len() <= MAX_STATUS_BYTES => serde_json::from_slice(body)
                .map(|status| Reply::Status(Box::new(status)))
                .map_err(|e| format!("its status cannot be read: {e}")),
            STATUS_IS => Err("its status is absurdly long".into()),
            ENTRIES => Entry::read_all(body).map(Reply::Entries),
            LIST_END => name(body).map(Reply::ListEnd),
            OBJECT => {
                let (first, bytes) = body.split_at_checked(32).ok_or("a name is cut short")?;
                if bytes.len() > MAX_OBJECT_BYTES {
                    return Err("an object is longer than objects are".into());
                }
                Ok(Reply::Object(name(first)?, bytes.to_vec()))
            }
            MISSING => name(body).map(Reply::Missing),
            GET_END if body.is_empty() => Ok(Reply::GetEnd),
            WORKING if body.is_empty() => Ok(Reply::Working),
            REFUSED if body.len() <= MAX_WHY_BYTES => {
                // It goes to a log and a terminal: no control characters.
                let text = String::from_utf8_lossy(body);
                Ok(Reply::Refused(text.chars().filter(|c| !c.is_control()).collect()))
            }
            kind => Err(format!("no such answer ({kind}, {} bytes)", body.len())),
        }
    }
}

/// Cuts a stream of bytes into frames, whatever pieces they come in.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
    from: usize,
}

impl Frames {
    /// Takes what was read.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.from > 0 && self.from == self.bytes.len() {
            self.bytes.clear();
            self.from = 0;
        } else if self.from > MAX_FRAME_BYTES {
            self.bytes.drain(..self.from);
            self.from = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame (kind and body). `None`: more is needed. `Err`: this is no such stream.
    pub fn pull(&mut self) -> Option<Result<&[u8], String>> {
        let rest = self.bytes.get(self.from..)?;
        let length = u32::from_be_bytes(rest.first_chunk::<4>().copied()?) as usize;
        if let Err(why) = length_is_sane(length) {
            return Some(Err(why));
        }
        if rest.len() < 4 + length {
            return None;
        }
        let at = self.from + 4;
        self.from = at + length;
        Some(Ok(&self.bytes[at..at + length]))
    }
}

fn length_is_sane(length: usize) -> Result<(), String> {
    if length == 0 || length > MAX_FRAME_BYTES {
        return Err(format!("a frame of {length} bytes: no koboshi speaks there"));
    }
    Ok(())
}

/// Reads one frame from a blocking stream. `None` at its end.
///
/// # Errors
/// When the stream fails, ends within a frame, or holds no frame.
pub fn read_frame(from: &mut dyn Read) -> std::io::Result<Option<Vec<u8>>> {
    let bad = |why: String| std::io::Error::new(std::io::ErrorKind::InvalidData, why);
    let mut head = [0_u8; 4];
    let mut filled = 0;
    while filled < head.len() {
        match from.read(&mut head[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let length = u32::from_be_bytes(head) as usize;
    length_is_sane(length).map_err(bad)?;
    let mut frame = vec![0; length];
    from.read_exact(&mut frame)?;
    Ok(Some(frame))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Thing, Tree};
    use proptest::prelude::*;

    fn replies() -> Vec<Reply> {
        vec![
            Reply::Greeting,
            Reply::Status(Box::new(Status { version: Some("1".into()), ..Status::default() })),
            Reply::Entries(vec![
                Entry { tree: Tree::Program, path: Vec::new(), thing: Thing::Dir },
                Entry {
                    tree: Tree::Program,
                    path: b"a".to_vec(),
                    thing: Thing::File { exec: true, size: 3, names: vec![[7; 32]] },
                },
                Entry {
                    tree: Tree::Program,
                    path: b"b".to_vec(),
                    thing: Thing::Link { target: b"a".to_vec() },
                },
            ]),
            Reply::ListEnd([1; 32]),
            Reply::Object([2; 32], b"bytes".to_vec()),
            Reply::Missing([3; 32]),
            Reply::GetEnd,
            Reply::Working,
            Reply::Refused("no".into()),
        ]
    }

    #[test]
    fn what_is_said_is_understood_in_whatever_pieces_it_comes() {
        let stream: Vec<u8> = replies().iter().flat_map(Reply::to_bytes).collect();
        for piece in [1, 2, 3, 7, stream.len()] {
            let mut frames = Frames::default();
            let mut heard = Vec::new();
            for bytes in stream.chunks(piece) {
                frames.feed(bytes);
                while let Some(frame) = frames.pull() {
                    heard.push(Reply::parse(frame.unwrap()).unwrap());
                }
            }
            assert_eq!(heard, replies());
        }
        for request in [Request::Status, Request::List, Request::Get(vec![[1; 32], [2; 32]])] {
            let bytes = request.to_bytes();
            let frame = read_frame(&mut bytes.as_slice()).unwrap().unwrap();
            assert_eq!(Request::parse(&frame), Ok(request));
        }
    }

    #[test]
    fn absurd_lengths_are_refused_before_anything_is_kept() {
        for length in [0_u32, MAX_FRAME_BYTES as u32 + 1, u32::MAX] {
            let mut frames = Frames::default();
            frames.feed(&length.to_be_bytes());
            assert!(frames.pull().unwrap().is_err(), "{length}");
            assert!(read_frame(&mut length.to_be_bytes().as_slice()).is_err());
        }
        // A shell that greets its user is no donor.
        let mut frames = Frames::default();
        frames.feed(b"Last login: Mon");
        assert!(frames.pull().unwrap().is_err());
    }

    #[test]
    fn a_request_can_ask_for_nothing_else() {
        assert!(Request::parse(&[GET]).is_err(), "no name");
        assert!(Request::parse(&[&[GET], [0; 33].as_slice()].concat()).is_err(), "a cut name");
        let many = vec![0; 32 * (MAX_NAMES + 1)];
        assert!(Request::parse(&[&[GET], many.as_slice()].concat()).is_err());
        assert!(Request::parse(b"\x01/etc/shadow").is_err());
        assert!(Request::parse(b"\x02credentials").is_err());
        for kind in (0..=u8::MAX).filter(|k| ![STATUS, LIST, GET].contains(k)) {
            assert!(Request::parse(&[kind]).is_err(), "{kind}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4_000, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn any_bytes_are_an_answer_a_request_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(request) = Request::parse(&bytes) {
                prop_assert_eq!(&request.to_bytes()[4..], bytes.as_slice());
            }
            let _ = Reply::parse(&bytes);
            let mut frames = Frames::default();
            frames.feed(&bytes);
            for _ in 0..bytes.len() {
                match frames.pull() {
                    Some(Ok(frame)) => { let _ = Reply::parse(frame); }
                    Some(Err(_)) | None => break,
                }
            }
            let _ = read_frame(&mut bytes.as_slice());
        }

        #[test]
        fn a_damaged_or_cut_answer_never_panics(which in 0..9_usize, at in 0..400_usize, with in any::<u8>(), cut in 0..400_usize) {
            let mut bytes = replies()[which].to_bytes();
            let at = at % bytes.len();
            bytes[at] ^= with;
            bytes.truncate(bytes.len() - cut % bytes.len());
            let mut frames = Frames::default();
            frames.feed(&bytes);
            if let Some(Ok(frame)) = frames.pull() {
                let _ = Reply::parse(frame);
            }
        }
    }
}
