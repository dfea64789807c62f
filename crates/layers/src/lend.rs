//! The donor: what a healthy node's host tells a peer that has fallen.
//!
//! It lends the program and the runtime and nothing else: an object is looked for only among those of the list it gave,
//! and each is proven as it is read. The list is that of the newest trusted snapshot, else of the program as it lies
//! there, hashed; an installation that somebody is replacing at the moment is not lent at all. Nothing is written.

use crate::trees;
use host::clock::{self, Deadline};
use node::Node;
use reach::words::MAX_OBJECT_BYTES;
use reach::{Lender, Manifest, Name, Status, Thing, Tree};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use store::Store;
use store::lend::ShelfReader;

/// A sign of life this often while a tree is hashed.
const WORKING_EVERY_MS: u64 = 1_000;

/// A conversation's worth of lending.
pub struct Donor<'a> {
    node: &'a Node,
    shelf: Option<ShelfReader<'a>>,
    /// What the newest trusted snapshot says, where there is one.
    remembered: Option<Remembered>,
    /// What was listed: where each object lies in the live trees.
    listed: HashMap<Name, Place>,
    healthy: Option<bool>,
    why: String,
    koboshi: String,
    deadline: Deadline,
}

impl std::fmt::Debug for Donor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Donor").finish_non_exhaustive()
    }
}

struct Remembered {
    version: Option<String>,
    schema: Option<(u32, u32)>,
    list: Manifest,
}

#[derive(Debug, Clone)]
struct Place {
    tree: Tree,
    path: Vec<u8>,
    at: u64,
    length: usize,
}

impl<'a> Donor<'a> {
    /// A donor of this node. `healthy` and `why` are the word of its agent's judge; the store helps where it can be read.
    pub fn new(
        node: &'a Node,
        store: Option<&Store>,
        shelf: Option<ShelfReader<'a>>,
        healthy: Option<bool>,
        why: String,
        koboshi: &str,
        deadline: Deadline,
    ) -> Donor<'a> {
        let remembered = store.and_then(|s| trees::remembered(s, deadline).ok().flatten()).map(|found| {
            let trees::Remembered { info, list, .. } = found;
            // The program's own word where the same version still lies there, else the schema that it served with.
            let same = node.package_version().is_some_and(|v| info.version.as_deref() == Some(v.as_str()));
            let schema = if same { node.schema_versions() } else { None };
            Remembered { version: info.version, schema, list }
        });
        Donor {
            node,
            shelf,
            remembered,
            listed: HashMap::new(),
            healthy,
            why,
            koboshi: koboshi.to_owned(),
            deadline,
        }
    }
}

impl Lender for Donor<'_> {
    fn status(&mut self) -> Result<Status, String> {
        let (version, schema, source) = match &self.remembered {
            Some(r) => (r.version.clone(), r.schema, "snapshot"),
            None => (self.node.package_version(), self.node.schema_versions(), "live"),
        };
        Ok(Status {
            koboshi: self.koboshi.clone(),
            node: self.node.name.clone(),
            healthy: self.healthy,
            why: self.why.clone(),
            version,
            arch: std::env::consts::ARCH.to_owned(),
            libc: trees::libc(&self.node.node_bin).to_owned(),
            schema,
            source: source.to_owned(),
        })
    }

    fn list(&mut self, working: &mut dyn FnMut()) -> Result<Manifest, String> {
        let manifest = match &self.remembered {
            Some(remembered) => remembered.list.clone(),
            None => {
                if let Some(what) = node::update::at_work(self.node) {
                    return Err(format!("the program here is being replaced: {what}"));
                }
                let mut last = clock::now();
                let mut alive = || {
                    if clock::now().since_ms(last).is_none_or(|ms| ms >= WORKING_EVERY_MS) {
                        last = clock::now();
                        working();
                    }
                };
                trees::live(self.node, &mut alive, self.deadline)
                    .map_err(|e| format!("{}: {}", e.what, e.why))?
            }
        };
        self.listed.clear();
        for entry in manifest.entries() {
            let Thing::File { .. } = entry.thing else { continue };
            for (n, (name, length)) in entry.pieces().enumerate() {
                let at = n as u64 * MAX_OBJECT_BYTES as u64;
                let place = Place { tree: entry.tree, path: entry.path.clone(), at, length };
                self.listed.entry(name).or_insert(place);
            }
        }
        Ok(manifest)
    }

    fn object(&mut self, name: &Name) -> Option<Vec<u8>> {
        let place = self.listed.get(name)?;
        let top = trees::place(self.node, place.tree);
        let full = if place.path.is_empty() { top } else { top.join(OsStr::from_bytes(&place.path)) };
        let live = trees::open(&full).ok().and_then(|file| trees::piece(&file, place.at, place.length, name));
        live.or_else(|| self.shelf.as_mut()?.object(name))
    }
}
