//! Who does what, and where: npm and every trial as somebody without privileges, the program's own tree as its owner.

use super::{Order, STAGES};
use host::run::Ids;
use host::user::as_user;
use host::{Context, Error, Kind, Result, files};
use node::Node;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The account that builds for root, where the packager made one.
const BUILDER: &str = "koboshi-build";
/// Nobody, on every Linux.
const NOBODY: Ids = Ids { uid: 65_534, gid: 65_534 };
const ACCOUNTS_LIMIT_BYTES: u64 = 4 << 20;

/// Who does what.
#[derive(Debug, Clone)]
pub struct Place {
    /// Whom npm and trials run as: never root.
    pub builder: Ids,
    /// Who owns the program, and so does the work on it.
    pub owner: Ids,
    /// Whose npm settings count: those of the one who owns the program.
    pub rc_home: Option<PathBuf>,
    /// Where stages lie.
    pub stages: PathBuf,
}

impl Place {
    /// Who may do what for this node, seen from who we are.
    ///
    /// # Errors
    /// When nobody here may: the reason is the gate's.
    pub fn of(target: &Node, order: &Order) -> Result<Place> {
        let _ = order;
        let what = || format!("install into {}", target.prefix.display());
        let modules = target.package_dir.parent().unwrap_or(&target.prefix);
        let meta = existing(modules).metadata().context(what)?;
        let owner = Ids { uid: meta.uid(), gid: meta.gid() };
        let me = Ids::current();
        if me.uid != 0 && owner.uid != me.uid {
            return Err(Error::new(
                Kind::Denied,
                what(),
                format!("it belongs to user {}, and this is user {}", owner.uid, me.uid),
            ));
        }
        let users = owner.uid == target.ids.uid && owner.uid != 0;
        if owner.uid != 0 && !users {
            return Err(Error::new(
                Kind::Denied,
                what(),
                format!("it belongs to user {}, the node runs as user {}", owner.uid, target.ids.uid),
            )
            .hint("give the prefix to the node's user or to root"));
        }
        // A read-only file system or an immutable directory says so at once, also to root.
        for dir in [existing(modules), existing(&target.prefix.join(STAGES))] {
            let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
            if let Err(e) = rustix::fs::access(dir, access) {
                return Err(Error::new(
                    Kind::Denied,
                    what(),
                    format!("{} cannot be written to: {e}", dir.display()),
                ));
            }
        }
        let owner = if users { target.ids } else { owner };
        let builder = match (me.uid, users) {
            (0, true) => target.ids,
            (0, false) => account(BUILDER).unwrap_or(if target.ids.uid == 0 { NOBODY } else { target.ids }),
            (_, _) => me,
        };
        // What goes into a root-owned program comes from where root's settings say, not from where the user's do.
        let rc_home = if users {
            Some(target.home.clone())
        } else {
            // A service of root's has no HOME.
            let told = std::env::var_os("HOME").map(PathBuf::from).filter(|h| h.is_absolute());
            told.or_else(|| (me.uid == 0).then(|| PathBuf::from("/root")))
        };
        Ok(Place { builder, owner, rc_home, stages: target.prefix.join(STAGES) })
    }

    /// Work on the program's own trees, with the rights of its owner and no more.
    pub(super) fn as_owner<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        as_user(self.owner, work)
    }

    /// A fresh scratch directory of ours, with everybody let through to what they are given in it. What a killed run
    /// left is removed first.
    pub(super) fn base(&self, order: &Order) -> Result<PathBuf> {
        const PREFIX: &str = "koboshi-install-";
        let me = Ids::current();
        let parent = order.scratch.clone().unwrap_or_else(|| {
            // Root's own directories let nobody through.
            if me.uid == 0 { PathBuf::from("/var/tmp") } else { order.state_dir.clone() }
        });
        let mark = format!("{PREFIX}{:08x}-", hash(&order.state_dir));
        for entry in std::fs::read_dir(&parent).into_iter().flatten().flatten() {
            let ours = entry.file_name().to_string_lossy().starts_with(&mark);
            if ours && entry.metadata().is_ok_and(|m| m.is_dir() && m.uid() == me.uid) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let base = parent.join(format!("{mark}{}-{}", std::process::id(), host::clock::now().ms));
        files::make_private_dir(&base)?;
        let open = std::fs::Permissions::from_mode(0o711);
        std::fs::set_permissions(&base, open).context(|| format!("open {}", base.display()))?;
        Ok(base)
    }
}

/// The deepest directory that is there.
pub(super) fn existing(path: &Path) -> &Path {
    path.ancestors().find(|p| p.is_dir()).unwrap_or(Path::new("/"))
}

fn account(name: &str) -> Option<Ids> {
    let text = files::read_bounded(Path::new("/etc/passwd"), ACCOUNTS_LIMIT_BYTES).ok()?;
    String::from_utf8_lossy(&text).lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then_some(())?;
        let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        (uid != 0).then_some(Ids { uid, gid })
    })
}

/// FNV-1a: the same for every build, so that an upgraded agent finds what the old one left.
fn hash(path: &Path) -> u32 {
    path.as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(*b)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(prefix: &Path, ids: Ids) -> Result<Place> {
        let node: Node = serde_json::from_value(serde_json::json!({
            "name": "t", "prefix": prefix, "package_dir": prefix.join("lib/node_modules/openclaw"), "entry": "/e",
            "node_bin": "/n", "home": "/h", "state_dir": "/s", "config_path": "/c", "port": 1, "ids": ids, "user": "t"
        }))
        .unwrap();
        let order = Order {
            version: "1.0.0".into(),
            integrity: None,
            state_dir: "/s".into(),
            scratch: None,
            npm_limit: std::time::Duration::from_secs(1),
            layer: engine::Layer::SystemInstall,
        };
        Place::of(&node, &order)
    }

    #[test]
    fn nothing_is_built_or_tried_as_root() {
        let dir = tempfile::tempdir().unwrap();
        let me = Ids::current();
        let ours = place(&dir.path().join("not/there/yet"), me).unwrap();
        assert_eq!(ours.owner.uid, me.uid);
        if me.uid != 0 {
            assert_eq!(ours.builder, me);
            return;
        }
        assert_ne!(ours.builder.uid, 0, "root's own node is built by somebody else");
        let user = Ids { uid: 12_345, gid: 12_345 };
        assert_ne!(place(dir.path(), user).unwrap().builder.uid, 0, "root's prefix, a user's node");
        std::os::unix::fs::chown(dir.path(), Some(user.uid), Some(user.gid)).unwrap();
        let theirs = place(dir.path(), user).unwrap();
        assert_eq!((theirs.builder, theirs.owner), (user, user));
        assert_eq!(theirs.rc_home.as_deref(), Some(Path::new("/h")));
        let e = place(dir.path(), Ids { uid: 1, gid: 1 }).unwrap_err();
        assert!(e.why.contains("belongs to user 12345"), "{e}");
    }
}
