//! The spare: a ready tree of the last good program on the node's own file system, swapped in by one rename.
//!
//! Making 38,000 files again takes seconds, and several times that right after the same files were deleted, because
//! the file system avoids inodes that it freed a moment ago. A rename takes none.

use engine::Class;
use host::clock::Deadline;
use host::{Context, Result, files};
use node::Node;
use std::path::PathBuf;
use store::Store;

/// The store's name for the program's root.
const ROOT: &str = "program";
/// Entries counted before the size of a spare is taken as large enough.
const MAX_ENTRIES: u64 = 1_000_000;

/// Where the spare of a node lies: beside the package's own directory, on its file system, hidden from npm.
fn place(node: &Node) -> PathBuf {
    node.prefix.join("lib/.koboshi-spare")
}

/// The spares that can be swapped in. The repair checks each against the snapshot before it uses it.
pub fn ready(node: &Node) -> Vec<(String, PathBuf)> {
    let tree = place(node).join(ROOT);
    if tree.is_dir() { vec![(ROOT.to_owned(), tree)] } else { Vec::new() }
}

/// Bytes the spare takes on disk.
pub fn size(node: &Node) -> u64 {
    files::tree_size(&place(node), MAX_ENTRIES).map_or(0, |s| s.disk_bytes)
}

/// Removes the spare.
pub fn remove(node: &Node) -> Result<()> {
    match std::fs::remove_dir_all(place(node)) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).context(|| format!("remove {}", place(node).display())),
    }
}

/// Makes the spare if there is none, or makes it right again. One line per thing done.
pub fn make(node: &Node, store: &Store, limit_bytes: u64, deadline: Deadline) -> Result<Vec<String>> {
    let Some(info) = store.newest_trusted(Some(Class::Program))? else {
        return Ok(Vec::new());
    };
    let Some(program) = info.classes.get(&Class::Program) else {
        return Ok(Vec::new());
    };
    let dir = place(node);
    let tree = dir.join(ROOT);
    let had = store.check_spare(&info.id, ROOT, &tree, deadline).is_ok_and(|s| s.ready);
    if had {
        return Ok(Vec::new());
    }
    // Blocks and inodes cost more than the bytes: measured 18 % on a real tree; a third is a safe guess.
    let need = program.bytes + program.bytes / 3;
    let space = files::free(&node.prefix)?;
    if need > limit_bytes / 2 || need > space.user_bytes / 4 {
        return Ok(vec![format!("no spare: {need} bytes would be too much of the space there is")]);
    }
    std::fs::create_dir_all(&dir).context(|| format!("make {}", dir.display()))?;
    let spare = store.make_spare(&info.id, ROOT, &tree, deadline)?;
    Ok(vec![format!("a spare of {} files stands ready", spare.files)])
}
