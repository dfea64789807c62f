//! The file systems of the hosts: one btrfs image, templates in it made once, a host's root a snapshot of one.
//!
//! A snapshot is made in milliseconds and is a whole file system of its own: renames, exchanges and hard links work in
//! it as on any disk, which the lower layer of an overlay does not give. The finished image is kept in the cache
//! under a name that says what went into it; each run works on a copy, so several runs never meet.

use super::judge;
use super::registry::{self, Recording, Registry};
use super::tool::must;
use super::{Lab, Site};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What the image may grow to; it is sparse and takes 3 GB at first.
const IMAGE_BYTES: u64 = 40 << 30;
/// What a Debian tree needs to become one of our hosts.
const PACKAGES: &str = "systemd,systemd-sysv,dbus,dbus-user-session,libpam-systemd,libnss-systemd,sudo,openssh-server,\
    openssh-client,ca-certificates,iproute2,procps,curl,iputils-ping,nftables,udev,git,sqlite3,e2fsprogs,\
    libatomic1";
/// Raised whenever what is below makes other templates than before.
const EDITION: &str = "1";
/// A slow mirror is slow.
const DEBIAN_LIMIT: Duration = Duration::from_secs(900);
/// Copying, unpacking.
const COPY_LIMIT: Duration = Duration::from_secs(300);
/// `npm install` from our own registry: 45 s on an idle machine, many minutes on a crowded one.
const NPM_LIMIT: Duration = Duration::from_secs(2400);
/// Onboarding and the like: commands of OpenClaw.
const OPENCLAW_LIMIT: Duration = Duration::from_secs(600);
/// A first start, with its compile cache cold.
const START_LIMIT: Duration = Duration::from_secs(900);

/// Which prepared host a snapshot is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Template {
    /// Debian with Node and npm.
    Base,
    /// A node in the user's own npm prefix, run by the user's systemd.
    User,
    /// A node in `/usr/local`, run by a system unit as the user.
    System,
}

impl Template {
    fn name(self) -> &'static str {
        match self {
            Template::Base => "base",
            Template::User => "user",
            Template::System => "system",
        }
    }
}

/// The image that a run works on.
pub(crate) struct Pool {
    dir: PathBuf,
    scratch: PathBuf,
}

impl Pool {
    /// Mounts an image; inside the cage, so it goes with it.
    fn mount(image: &Path, scratch: &Path) -> Result<Pool, String> {
        let dir = scratch.join("pool");
        // Two images of one identity cannot be mounted on one machine at a time.
        must(&["btrfstune", "-f", "-m", &text(image)], scratch, COPY_LIMIT)?;
        std::fs::create_dir_all(&dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
        let words = ["mount", "-o", "loop,noatime,discard=async,commit=120", &text(image), &text(&dir)];
        must(&words, scratch, COPY_LIMIT)?;
        Ok(Pool { dir, scratch: scratch.to_owned() })
    }

    /// A new root for a host.
    pub(crate) fn snapshot(&self, template: Template, name: &str) -> Result<PathBuf, String> {
        let to = self.dir.join(name);
        let from = text(&self.dir.join(template.name()));
        must(&["btrfs", "-q", "subvolume", "snapshot", &from, &text(&to)], &self.scratch, COPY_LIMIT)?;
        Ok(to)
    }

    /// A directory in the pool that is no host's root: the upper layer of an overlay, for example.
    pub(crate) fn scratch_dir(&self, name: &str) -> Result<PathBuf, String> {
        let dir = self.dir.join(name);
        std::fs::create_dir_all(&dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
        Ok(dir)
    }

    fn seal(self) -> Result<(), String> {
        must(&["umount", &text(&self.dir)], &self.scratch, COPY_LIMIT).map(drop)
    }
}

/// A run's own copy of the finished image, which is made first where there is none.
pub(crate) fn pool(lab: &Lab, recording: &Arc<Recording>) -> Result<Pool, String> {
    let dir = lab.cache.join("lab");
    std::fs::create_dir_all(&dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
    let suite = suite()?;
    // Two runs that both find none make it one after the other.
    let lock =
        File::create(dir.join("lock")).map_err(|e| format!("make the lock in {}: {e}", dir.display()))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).map_err(|e| format!("lock: {e}"))?;
    let debian = dir.join(format!("debian-{}.img", debian_key(lab, &suite)?));
    let hosts = dir.join(format!("hosts-{}.img", hosts_key(&debian, lab, recording)?));
    if !hosts.exists() {
        println!("the templates of the hosts are made once (some minutes)");
        make(&debian, |half| build_debian(lab, &suite, half))?;
        make(&hosts, |half| build_nodes(lab, recording, &debian, half))?;
    }
    let own = lab.work.join("disk.img");
    must(&["cp", "--sparse=always", &text(&hosts), &text(&own)], &lab.work, COPY_LIMIT)?;
    drop(lock);
    Pool::mount(&own, &lab.work)
}

/// Makes an image under another name first, so that there is a whole one or none; those of its kind with another key
/// go, because nobody asks for them again and they are gigabytes.
fn make(image: &Path, build: impl FnOnce(&Path) -> Result<(), String>) -> Result<(), String> {
    if image.exists() {
        return Ok(());
    }
    let dir = image.parent().unwrap_or(Path::new("/"));
    let half = image.with_extension("building");
    let _ = std::fs::remove_file(&half);
    if let Err(why) = build(&half) {
        let _ = std::fs::remove_file(&half);
        return Err(why);
    }
    let name = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let kind = name.split('-').next().unwrap_or_default();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let other = entry.file_name().to_string_lossy().into_owned();
        if other.starts_with(&format!("{kind}-")) && other.ends_with(".img") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    std::fs::rename(&half, image).map_err(|e| format!("name {}: {e}", image.display()))
}

/// The Debian that this machine runs, so that what is built here runs there.
fn suite() -> Result<String, String> {
    let text = std::fs::read_to_string("/etc/os-release").map_err(|e| format!("read os-release: {e}"))?;
    let value = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
    if value("ID") != Some("debian") {
        return Err("this machine is no Debian, of whose packages hosts are made".to_owned());
    }
    value("VERSION_CODENAME").map(str::to_owned).ok_or_else(|| "this Debian has no name".to_owned())
}

/// Everything that a plain host depends on.
fn debian_key(lab: &Lab, suite: &str) -> Result<String, String> {
    let node = registry::kept_tarball(&lab.cache, registry::node_package())?;
    let npm = registry::kept_tarball(&lab.cache, "npm")?;
    let mut hash = blake3::Hasher::new();
    for part in [EDITION, suite, PACKAGES, &text(&node), &text(&npm)] {
        hash.update(part.as_bytes()).update(b"\0");
    }
    hash_tree(&lab.root.join("lab/base"), &mut hash)?;
    Ok(hash.finalize().to_hex()[..16].to_owned())
}

/// Everything that the prepared nodes depend on besides.
fn hosts_key(debian: &Path, lab: &Lab, recording: &Recording) -> Result<String, String> {
    let mut hash = blake3::Hasher::new();
    for part in [EDITION, &text(debian), &recording.openclaw] {
        hash.update(part.as_bytes()).update(b"\0");
    }
    hash_tree(&lab.root.join("lab"), &mut hash)?;
    Ok(hash.finalize().to_hex()[..16].to_owned())
}

/// Names and contents of every file below a directory, in the order of their names.
fn hash_tree(top: &Path, hash: &mut blake3::Hasher) -> Result<(), String> {
    let mut dirs = vec![top.to_owned()];
    let mut files = Vec::new();
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).map_err(|e| format!("list {}: {e}", dir.display()))?.flatten() {
            if entry.path().is_dir() { dirs.push(entry.path()) } else { files.push(entry.path()) }
        }
    }
    files.sort();
    for file in files {
        let name = file.strip_prefix(top).unwrap_or(&file);
        let bytes = std::fs::read(&file).map_err(|e| format!("read {}: {e}", file.display()))?;
        hash.update(text(name).as_bytes()).update(b"\0").update(&bytes).update(b"\0");
    }
    Ok(())
}

// ---- the templates ----

fn build_debian(lab: &Lab, suite: &str, image: &Path) -> Result<(), String> {
    let file = File::create(image).map_err(|e| format!("make {}: {e}", image.display()))?;
    file.set_len(IMAGE_BYTES).map_err(|e| format!("size {}: {e}", image.display()))?;
    drop(file);
    must(&["mkfs.btrfs", "-q", "-m", "single", "--nodiscard", &text(image)], &lab.work, COPY_LIMIT)?;
    let pool = Pool::mount(image, &lab.work)?;
    base(lab, suite, &pool)?;
    pool.seal()
}

fn build_nodes(lab: &Lab, recording: &Arc<Recording>, debian: &Path, image: &Path) -> Result<(), String> {
    must(&["cp", "--sparse=always", &text(debian), &text(image)], &lab.work, COPY_LIMIT)?;
    let pool = Pool::mount(image, &lab.work)?;
    install(lab, &pool, recording)?;
    let [user, system] = std::thread::scope(|s| {
        let user = s.spawn(|| node(lab, &pool, Template::User));
        let system = s.spawn(|| node(lab, &pool, Template::System));
        [user, system].map(|t| t.join().unwrap_or_else(|_| Err("its thread died".to_owned())))
    });
    user.map_err(|e| format!("template user: {e}"))?;
    system.map_err(|e| format!("template system: {e}"))?;
    pool.seal()
}

fn base(lab: &Lab, suite: &str, pool: &Pool) -> Result<(), String> {
    println!("-- base: Debian {suite}");
    let root = pool.dir.join("base");
    must(&["btrfs", "-q", "subvolume", "create", &text(&root)], &lab.work, COPY_LIMIT)?;
    let include = format!("--include={}", PACKAGES.replace(char::is_whitespace, ""));
    let words = [
        "eatmydata",
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        "--dpkgopt=force-unsafe-io",
        &include,
        suite,
        &text(&root),
    ];
    must(&words, &lab.work, DEBIAN_LIMIT)?;
    let node = text(&registry::kept_tarball(&lab.cache, registry::node_package())?);
    let npm = text(&registry::kept_tarball(&lab.cache, "npm")?);
    let script = r#"set -e
        root=$1 files=$2 node=$3 npm=$4
        # Nothing that waits for hardware, a terminal or the internet.
        chroot "$root" systemctl --quiet mask systemd-timesyncd.service systemd-networkd-wait-online.service \
            apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
            getty@.service console-getty.service getty.target systemd-udevd.service systemd-udev-trigger.service
        chroot "$root" useradd --create-home --uid 1000 --shell /bin/bash claw
        mkdir -p "$root/var/lib/systemd/linger" && : > "$root/var/lib/systemd/linger/claw"
        rm -f "$root"/etc/ssh/ssh_host_*
        cp -r "$files/base/." "$root/" && chmod 440 "$root/etc/sudoers.d/claw"
        mkdir -p "$root/usr/local/lib/node_modules/npm" "$root/usr/local/bin"
        tar -xzf "$npm" --strip-components=1 --no-same-owner -C "$root/usr/local/lib/node_modules/npm"
        tar -xzf "$node" --strip-components=1 --no-same-owner -C "$root/usr/local" package/bin/node
        chmod 755 "$root/usr/local/bin/node"
        ln -s ../lib/node_modules/npm/bin/npm-cli.js "$root/usr/local/bin/npm"
        ln -s ../lib/node_modules/npm/bin/npx-cli.js "$root/usr/local/bin/npx"
        chmod 755 "$root"/usr/local/lib/node_modules/npm/bin/*.js"#;
    let files = text(&lab.root.join("lab"));
    must(&["sh", "-c", script, "sh", &text(&root), &files, &node, &npm], &lab.work, COPY_LIMIT).map(drop)
}

/// The program, installed by the real npm from the lab's own registry: into the user's prefix by the user, and the
/// same files, as root's, into `/usr/local`.
fn install(lab: &Lab, pool: &Pool, recording: &Arc<Recording>) -> Result<(), String> {
    let version = &recording.openclaw;
    println!("-- npm install openclaw@{version}");
    let user = pool.snapshot(Template::Base, Template::User.name())?;
    let mut site = Site::bare(lab, "t-npm")?;
    let registry = Registry::new(site.switch.netns(), Arc::clone(recording))?;
    let mut host = site.host_on("n1", user.clone())?;
    host.boot()?;
    // With the prefix, npm's global settings move too; the registry must stand in the user's own.
    host.claw_must(&format!(
        "npm config set --location=user prefix=$HOME/.npm-global registry={}/",
        registry::URL
    ))?;
    host.claw_must_within(&format!("npm install -g openclaw@{version}"), NPM_LIMIT)?;
    host.must("printf '%s\n' 'export PATH=$HOME/.npm-global/bin:$PATH' >> /home/claw/.profile")?;
    host.must("rm -rf /home/claw/.npm/_cacache /home/claw/.npm/_logs")?;
    host.stop()?;
    drop(registry);
    let system = pool.snapshot(Template::Base, Template::System.name())?;
    let script = r#"set -e
        cp -a --reflink=always "$1/home/claw/.npm-global/lib/node_modules/openclaw" "$2/usr/local/lib/node_modules/openclaw"
        chown -R root:root "$2/usr/local/lib/node_modules/openclaw"
        ln -s ../lib/node_modules/openclaw/openclaw.mjs "$2/usr/local/bin/openclaw""#;
    must(&["sh", "-c", script, "sh", &text(&user), &text(&system)], &lab.work, COPY_LIMIT).map(drop)
}

/// One kind of node, made as its administrator would make it, on a host that is then powered off.
fn node(lab: &Lab, pool: &Pool, kind: Template) -> Result<(), String> {
    let name = kind.name();
    let mut site = Site::bare(lab, &format!("t-{name}"))?;
    let mut host = site.host_on("n1", pool.dir.join(name))?;
    host.boot()?;
    println!("-- {name}: openclaw onboard");
    onboard(&host)?;
    match kind {
        Template::User => {
            host.claw_must_within("openclaw gateway install --port 18789", OPENCLAW_LIMIT)?;
            host.claw("systemctl --user start openclaw-gateway.service")?;
        }
        Template::System | Template::Base => {
            let unit = std::fs::read_to_string(lab.root.join("lab/system/openclaw-gateway.service"))
                .map_err(|e| format!("read the system unit: {e}"))?;
            host.write("/etc/systemd/system/openclaw-gateway.service", &unit)?;
            host.must("systemctl daemon-reload && systemctl enable --now openclaw-gateway.service")?;
        }
    }
    host.token = judge::read_token(&host);
    println!("-- {name}: first start, a cron job, some files");
    if let Err(why) = judge::serves_within(&host, START_LIMIT) {
        let told =
            host.root("journalctl --no-pager -n 40 -o cat; tail -n 20 /tmp/openclaw/*.log | cut -c1-300")?;
        return Err(format!("{why}: {}", told.out));
    }
    host.claw_must_within(
        "openclaw cron add --name lab-rows --cron '0 5 1 1 *' --session main --system-event 'a row of the user' \
         --disabled --json",
        OPENCLAW_LIMIT,
    )?;
    seed(lab, &host)?;
    judge::Ledger::take(&host)?;
    let stop = match kind {
        Template::User => {
            host.claw_within("systemctl --user stop openclaw-gateway.service", OPENCLAW_LIMIT)?
        }
        Template::System | Template::Base => {
            host.root_within("systemctl stop openclaw-gateway.service", OPENCLAW_LIMIT)?
        }
    };
    if !stop.ok() {
        return Err(format!("the gateway did not stop: {}", stop.words()));
    }
    host.must("journalctl --quiet --rotate --vacuum-size=1M; true")?;
    host.stop()
}

/// Onboards a node without any key, and has it ask nobody outside for news.
pub(crate) fn onboard(host: &super::host::Host) -> Result<(), String> {
    host.claw_must_within(
        "openclaw onboard --non-interactive --accept-risk --mode local --auth-choice skip --gateway-port 18789 \
         --gateway-bind loopback --skip-health --skip-channels --skip-skills --json </dev/null",
        OPENCLAW_LIMIT,
    )?;
    host.claw_must(
        "node -e 'const fs = require(\"fs\"), f = \".openclaw/openclaw.json\", c = JSON.parse(fs.readFileSync(f)); \
         (c.models ??= {}).catalogRefresh = { enabled: false }; (c.update ??= {}).checkOnStart = false; \
         fs.writeFileSync(f, JSON.stringify(c, null, 2))'",
    )
    .map(drop)
}

/// The user's own things.
fn seed(lab: &Lab, host: &super::host::Host) -> Result<(), String> {
    let from = text(&lab.root.join("lab/user"));
    let to = text(&host.path("/home/claw/.openclaw"));
    must(&["cp", "-r", &format!("{from}/."), &to], &lab.work, COPY_LIMIT)?;
    host.must(
        "chown -R claw:claw /home/claw/.openclaw/workspace /home/claw/.openclaw/credentials && \
         chmod -R go= /home/claw/.openclaw/credentials",
    )
    .map(drop)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
