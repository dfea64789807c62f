//! What of a node belongs to which class: the roots that a snapshot takes and a repair may touch.
//!
//! Everything that cannot be made anew belongs to exactly one root. Caches, logs, locks, staging directories and
//! sockets belong to none. Paths are resolved here once, because the store follows no symlink.

use crate::{Node, config};
use engine::Class;
use std::path::{Path, PathBuf};
use store::Root;

/// State that is made anew by itself: taken by nobody, and in nobody's way until nothing else explains a failure.
pub const TRANSIENT: [&str; 4] = ["cache", "logs", "tmp", "media/inbound-tmp"];

/// Where one of them is set aside: beside itself, in no snapshot either.
#[must_use]
pub fn aside(transient: &str) -> String {
    format!("{transient}.koboshi-aside")
}

/// Whether nobody misses what was in it.
#[must_use]
pub fn is_cache(transient: &str) -> bool {
    matches!(transient, "cache" | "tmp")
}

/// The roots of a node. A root whose path is missing is listed all the same: that it is missing is the news.
#[must_use]
pub fn roots(node: &Node) -> Vec<Root> {
    let mut roots = Vec::new();
    program(node, &mut roots);
    runtime(node, &mut roots);
    service(node, &mut roots);
    let loaded = config::load(node).ok();
    configuration(node, loaded.as_ref(), &mut roots);
    let workspaces = workspaces(node, loaded.as_ref());
    state(node, &workspaces, &mut roots);
    for (n, path) in workspaces.into_iter().enumerate() {
        let name = if n == 0 { "workspace".into() } else { format!("workspace-{n}") };
        roots.push(root(&name, &path, Class::Workspace));
    }
    roots
}

/// Whether nothing of the state is left: a gateway that runs on makes an empty directory or two again, and what is made
/// anew by itself is nothing.
#[must_use]
pub fn state_is_gone(node: &Node) -> bool {
    match std::fs::read_dir(&node.state_dir) {
        Ok(entries) => entries.flatten().all(|e| {
            let transient =
                TRANSIENT.iter().any(|name| e.file_name() == *name || e.file_name() == *aside(name));
            transient || e.file_type().is_ok_and(|t| t.is_dir()) && is_void(&e.path())
        }),
        Err(e) => e.kind() == std::io::ErrorKind::NotFound,
    }
}

fn root(name: &str, path: &Path, class: Class) -> Root {
    Root { name: name.into(), path: resolved(path), class, exclude: Vec::new(), only: None }
}

/// Missing, or a directory without a file in it (an empty repository left behind counts as empty).
#[must_use]
pub fn is_void(dir: &Path) -> bool {
    match std::fs::read_dir(dir) {
        Ok(entries) => entries.flatten().all(|e| e.file_name() == ".git"),
        Err(e) => e.kind() == std::io::ErrorKind::NotFound,
    }
}

/// The path without symlinks, as far as it exists: as roots, the kernel and the store know it.
#[must_use]
pub fn resolved(path: &Path) -> PathBuf {
    for at in path.ancestors() {
        if let Ok(real) = at.canonicalize() {
            return match path.strip_prefix(at) {
                Ok(rest) if rest.as_os_str().is_empty() => real,
                Ok(rest) => real.join(rest),
                Err(_) => path.to_path_buf(),
            };
        }
    }
    path.to_path_buf()
}

fn program(node: &Node, roots: &mut Vec<Root>) {
    roots.push(root("program", &node.package_dir, Class::Program));
    // The link is part of the program: without it nobody can call it, though the service starts without it.
    let link = node.prefix.join("bin").join("openclaw");
    if let Some(dir) = link.parent() {
        let mut bin = root("program-bin", dir, Class::Program);
        bin.only = Some(vec!["openclaw".into()]);
        roots.push(bin);
    }
}

/// Koboshi's own runtime as a whole; anybody else's only as the one binary, which is then compared and never
/// exchanged as a tree.
fn runtime(node: &Node, roots: &mut Vec<Root>) {
    match &node.runtime_dir {
        Some(dir) => roots.push(root("runtime", dir, Class::Runtime)),
        None => roots.push(root("runtime", &node.node_bin, Class::Runtime)),
    }
}

fn service(node: &Node, roots: &mut Vec<Root>) {
    let Some(unit) = &node.unit else { return };
    for (n, file) in unit.files.iter().enumerate() {
        // An environment file inside the state directory holds secrets of the user's: it goes with the state.
        if !file.starts_with(&node.state_dir) {
            roots.push(root(&format!("service-{n}"), file, Class::Service));
        }
    }
}

fn configuration(node: &Node, loaded: Option<&config::Loaded>, roots: &mut Vec<Root>) {
    roots.push(root("config", &node.config_path, Class::Config));
    let includes = loaded.map(|l| l.files.as_slice()).unwrap_or_default();
    for (n, file) in includes.iter().skip(1).enumerate() {
        roots.push(root(&format!("config-{}", n + 1), file, Class::Config));
    }
    for name in [".env", "gateway.systemd.env"] {
        let file = node.state_dir.join(name);
        if file.is_file() {
            roots.push(root(&format!("config-{}", name.trim_start_matches('.')), &file, Class::Config));
        }
    }
}

fn state(node: &Node, workspaces: &[PathBuf], roots: &mut Vec<Root>) {
    let dir = &node.state_dir;
    roots.push(root("credentials", &dir.join("credentials"), Class::Credentials));
    roots.push(root("state", &dir.join("state"), Class::State));
    let mut agents = root("agents", &dir.join("agents"), Class::Sessions);
    agents.exclude = inside(workspaces, &agents.path);
    roots.push(agents);
    // What else lies there (plugins' data, media, extensions, migrations) is state too, whatever comes later.
    let mut rest = root("state-rest", dir, Class::State);
    let taken: Vec<PathBuf> = roots.iter().map(|r| r.path.clone()).collect();
    rest.exclude = TRANSIENT.iter().flat_map(|name| [(*name).to_owned(), aside(name)]).collect();
    rest.exclude.extend(inside(&taken, &rest.path));
    rest.exclude.extend(inside(&workspaces.iter().map(|w| resolved(w)).collect::<Vec<_>>(), &rest.path));
    // Copies that the program makes of its config: they are its own, and every write would look like a change.
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten().take(1024) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let copy = name.starts_with("openclaw.json.") || name.ends_with(".lock") || name.ends_with(".sock");
        if copy {
            rest.exclude.push(name);
        }
    }
    rest.exclude.sort();
    rest.exclude.dedup();
    roots.push(rest);
}

fn inside(paths: &[PathBuf], dir: &Path) -> Vec<String> {
    let below = |p: &PathBuf| resolved(p).strip_prefix(dir).ok().map(|r| r.to_string_lossy().into_owned());
    paths.iter().filter_map(below).filter(|r| !r.is_empty()).collect()
}

/// The default workspace first, then those of single agents that lie elsewhere.
fn workspaces(node: &Node, loaded: Option<&config::Loaded>) -> Vec<PathBuf> {
    /// Workspaces of one node.
    const WORKSPACES_LIMIT: usize = 64;
    let path = |text: &str| match text.strip_prefix("~/") {
        Some(rest) => node.home.join(rest),
        None => PathBuf::from(text),
    };
    let value = loaded.map(|l| &l.value);
    let main = value
        .and_then(|v| v.pointer("/agents/defaults/workspace"))
        .and_then(|w| w.as_str())
        .map_or_else(|| default_workspace(node), path);
    let mut all = vec![main];
    let entries = value.and_then(|v| v.pointer("/agents/entries")).and_then(|e| e.as_object());
    let listed = value.and_then(|v| v.pointer("/agents/list")).and_then(|e| e.as_array());
    let named = entries.into_iter().flatten().map(|(_, a)| a).chain(listed.into_iter().flatten());
    for agent in named.take(WORKSPACES_LIMIT) {
        let own = agent.get("workspace").and_then(|w| w.as_str()).map(path);
        all.extend(own.filter(|w| w.is_absolute()));
    }
    let mut kept: Vec<PathBuf> = Vec::new();
    for workspace in all {
        let real = resolved(&workspace);
        // A workspace inside another is taken with it; one that holds the whole home would take everything.
        let covered = kept.iter().any(|k| real.starts_with(k));
        if !covered
            && !resolved(&node.home).starts_with(&real)
            && !resolved(&node.state_dir).starts_with(&real)
        {
            kept.push(real);
        }
    }
    kept
}

fn default_workspace(node: &Node) -> PathBuf {
    match &node.profile {
        Some(p) => node.home.join(".openclaw").join(format!("workspace-{p}")),
        None => node.state_dir.join("workspace"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find::tests::node_at;
    use std::collections::HashSet;

    fn file(path: &Path) {
        std::fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
        std::fs::write(path, b"x").expect("write");
    }

    /// The roots that would take a file.
    fn takers(roots: &[Root], path: &Path) -> Vec<String> {
        let takes = |r: &&Root| {
            let Ok(rel) = path.strip_prefix(&r.path) else { return false };
            let excluded = r.exclude.iter().any(|e| rel.starts_with(e));
            let wanted = r.only.as_ref().is_none_or(|only| only.iter().any(|o| rel.starts_with(o)));
            !excluded && wanted
        };
        roots.iter().filter(takes).map(|r| r.name.clone()).collect()
    }

    #[test]
    fn every_file_belongs_to_one_root_or_to_none() {
        let dir = tempfile::tempdir().expect("dir");
        let base = dir.path().canonicalize().expect("real");
        let node = node_at(&base);
        std::fs::create_dir_all(&node.state_dir).expect("mkdir");
        let outside = base.join("elsewhere");
        let config = format!(
            r#"{{gateway:{{mode:"local"}}, "$include":"more.json5", agents:{{defaults:{{workspace:"{s}/workspace"}},entries:{{a:{{workspace:"{o}"}},b:{{workspace:"{s}/workspace/sub"}}}}}}}}"#,
            s = node.state_dir.display(),
            o = outside.display()
        );
        std::fs::write(&node.config_path, config).expect("write");
        std::fs::write(node.state_dir.join("more.json5"), "{channels:{}}").expect("write");
        let s = &node.state_dir;
        for (path, want) in [
            (node.package_dir.join("dist/index.js"), Some("program")),
            (node.prefix.join("bin/openclaw"), Some("program-bin")),
            (node.prefix.join("bin/other"), None),
            (node.node_bin.clone(), Some("runtime")),
            (node.config_path.clone(), Some("config")),
            (s.join("more.json5"), Some("config-1")),
            (s.join(".env"), Some("config-env")),
            (s.join("openclaw.json.bak.1"), None),
            (s.join("state/openclaw.sqlite"), Some("state")),
            (s.join("agents/main/agent/openclaw-agent.sqlite"), Some("agents")),
            (s.join("agents/main/sessions/x.jsonl"), Some("agents")),
            (s.join("credentials/whatsapp/default/creds.json"), Some("credentials")),
            (s.join("workspace/CANARY.md"), Some("workspace")),
            (s.join("workspace/sub/x"), Some("workspace")),
            (outside.join("notes.md"), Some("workspace-1")),
            (s.join("cache/a"), None),
            (s.join("logs/a"), None),
            (s.join("tmp/openclaw-0/gateway.state.lock"), None),
            (s.join("extensions/x/index.js"), Some("state-rest")),
            (s.join("media/a.png"), Some("state-rest")),
        ] {
            file(&path);
            if path == node.config_path || path.ends_with("more.json5") {
                let text = if path == node.config_path {
                    format!(
                        r#"{{gateway:{{mode:"local"}}, "$include":"more.json5", agents:{{defaults:{{workspace:"{s}/workspace"}},entries:{{a:{{workspace:"{o}"}},b:{{workspace:"{s}/workspace/sub"}}}}}}}}"#,
                        s = s.display(),
                        o = outside.display()
                    )
                } else {
                    "{channels:{}}".into()
                };
                std::fs::write(&path, text).expect("write");
            }
            let got = takers(&roots(&node), &path);
            assert_eq!(got, want.into_iter().map(str::to_owned).collect::<Vec<_>>(), "{}", path.display());
        }
        let all = roots(&node);
        let names: HashSet<_> = all.iter().map(|r| r.name.clone()).collect();
        assert_eq!(names.len(), all.len(), "names are unique");
        assert!(names.iter().all(|n| !n.contains('/')));
    }

    #[test]
    fn a_workspace_that_is_the_home_is_not_taken() {
        let dir = tempfile::tempdir().expect("dir");
        let node = node_at(dir.path());
        std::fs::create_dir_all(&node.state_dir).expect("mkdir");
        let config = format!(r#"{{agents:{{defaults:{{workspace:"{}"}}}}}}"#, node.home.display());
        std::fs::write(&node.config_path, config).expect("write");
        assert!(roots(&node).iter().all(|r| r.class != Class::Workspace));
    }
}
