//! What was made immutable (`chattr +i`): damaged or in the way, and not even root could put it right.

use super::{Work, open_root};
use crate::Lost;
use crate::snapshot::to_path;
use host::immutable::{self, Fixed};
use std::os::fd::AsFd;
use std::path::PathBuf;

/// What can be changed now, and how it was.
#[derive(Default)]
pub(super) struct Freed<'w>(Vec<One<'w>>);

struct One<'w> {
    work: &'w Work,
    path: &'w [u8],
    /// The directory that `path` lies in.
    above: bool,
    fixed: Fixed,
}

impl<'w> Freed<'w> {
    /// Makes changeable again what is to be changed.
    pub(super) fn all(works: &'w [Work]) -> Freed<'w> {
        let mut freed = Freed::default();
        if rustix::process::geteuid().is_root() {
            works.iter().for_each(|work| freed.of(work));
        }
        freed
    }

    fn of(&mut self, work: &'w Work) {
        let Ok(Some(base)) = open_root(&work.reference) else { return };
        let mut seen: Option<&[u8]> = None;
        for (path, _) in &work.ops {
            let Ok((dir, name)) = base.parent_of(path) else { continue };
            let parent = &path[..path.iter().rposition(|b| *b == b'/').unwrap_or(0)];
            if seen != Some(parent) || path.is_empty() {
                seen = Some(parent);
                let fixed = immutable::lift(dir.as_fd(), b".");
                self.0.extend(fixed.map(|fixed| One { work, path, above: true, fixed }));
            }
            let fixed = immutable::lift(dir.as_fd(), &name);
            self.0.extend(fixed.map(|fixed| One { work, path, above: false, fixed }));
        }
    }

    /// As it was, because nothing is changed after all.
    pub(super) fn undo(self) {
        self.0.iter().for_each(One::undo);
    }

    /// What stays changeable, by its paths. What is `lost` is left as it is, this way too.
    pub(super) fn paths(self, lost: &[Lost]) -> Vec<PathBuf> {
        let (kept, changed): (Vec<One<'_>>, Vec<One<'_>>) = self.0.into_iter().partition(|one| {
            let root = &one.work.reference.root.name;
            !one.above && lost.iter().any(|l| l.root == *root && l.path == to_path(one.path))
        });
        kept.iter().for_each(One::undo);
        changed.iter().map(One::at).collect()
    }
}

impl One<'_> {
    fn undo(&self) {
        let Ok(Some(base)) = open_root(&self.work.reference) else { return };
        let Ok((dir, name)) = base.parent_of(self.path) else { return };
        let name = if self.above { b"." } else { &name[..] };
        immutable::put_back(dir.as_fd(), name, self.fixed);
    }

    fn at(&self) -> PathBuf {
        let root = &self.work.reference.root.path;
        let path = if self.path.is_empty() { root.clone() } else { root.join(to_path(self.path)) };
        match path.parent() {
            Some(parent) if self.above => parent.to_owned(),
            Some(_) | None => path,
        }
    }
}
