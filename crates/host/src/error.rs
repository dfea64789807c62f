//! One error for every room that touches the world: what was attempted, why it failed, what to do.

use std::fmt;

/// An error a person can act on. Shown as one line of what, one of why, one of what to do.
#[derive(Debug)]
pub struct Error {
    /// What was being attempted.
    pub what: String,
    /// Why it failed.
    pub why: String,
    /// What to do about it, where there is something to do.
    pub hint: Option<String>,
    /// Coarse kind, for callers that must choose a way on.
    pub kind: Kind,
}

/// What a caller may want to tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Usage or configuration: exit code 2.
    Usage,
    /// The thing asked for does not exist.
    NotFound,
    /// A deadline ran out.
    TimedOut,
    /// Bytes that fail their proof: corrupt, truncated, hostile.
    Corrupt,
    /// No space, or too little for the safety margin.
    NoSpace,
    /// Not permitted.
    Denied,
    /// Anything else the system said.
    System,
}

/// The result of everything that touches the world.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of this kind.
    pub fn new(kind: Kind, what: impl Into<String>, why: impl fmt::Display) -> Error {
        Error { what: what.into(), why: why.to_string(), hint: None, kind }
    }

    /// The same with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Error {
        self.hint = Some(hint.into());
        self
    }

    /// An I/O error with its kind read off the errno.
    #[allow(clippy::wildcard_enum_match_arm)] // The standard library's list grows.
    pub fn io(what: impl Into<String>, e: &std::io::Error) -> Error {
        use std::io::ErrorKind as K;
        let kind = match e.kind() {
            K::NotFound => Kind::NotFound,
            K::TimedOut | K::WouldBlock => Kind::TimedOut,
            K::PermissionDenied => Kind::Denied,
            K::StorageFull | K::QuotaExceeded => Kind::NoSpace,
            _ => Kind::System,
        };
        Error::new(kind, what, e)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

impl std::error::Error for Error {}

/// Says what was being attempted when an operation failed.
pub trait Context<T> {
    /// Wraps the error with what was being attempted.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::io(what(), &e))
    }
}

impl<T> Context<T> for std::result::Result<T, rustix::io::Errno> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::io(what(), &std::io::Error::from(e)))
    }
}

impl<T> Context<T> for Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error { why: e.to_string(), what: what(), hint: e.hint, kind: e.kind })
    }
}
