use super::*;

/// A node whose every path lies under `base`; nothing is created.
pub(crate) fn node_at(base: &Path) -> Node {
    let prefix = base.join("prefix");
    let package_dir = prefix.join("lib/node_modules/openclaw");
    let home = base.join("home");
    Node {
        name: "main".into(),
        entry: package_dir.join("dist/index.js"),
        package_dir,
        prefix,
        node_bin: base.join("node/bin/node"),
        runtime_dir: None,
        state_dir: home.join(".openclaw"),
        config_path: home.join(".openclaw/openclaw.json"),
        home,
        port: 1,
        profile: None,
        ids: Ids::current(),
        user: "tester".into(),
        unit: None,
        env: Vec::new(),
        version: None,
    }
}

/// A machine under a temporary directory.
struct Machine {
    dir: tempfile::TempDir,
    world: World,
}

impl Machine {
    fn new() -> Machine {
        let dir = tempfile::tempdir().expect("dir");
        let root = dir.path().canonicalize().expect("real");
        let ids = Ids::current();
        let account = Account { name: "claw".into(), ids, home: root.join("home/claw") };
        std::fs::create_dir_all(&account.home).expect("home");
        let world = World {
            accounts: vec![account],
            path: Vec::new(),
            env: BTreeMap::new(),
            own_uid: ids.uid,
            processes: false,
            root,
        };
        Machine { dir, world }
    }

    fn at(&self, path: &str) -> PathBuf {
        let _ = &self.dir;
        self.world.root.join(path)
    }

    fn write(&self, path: &str, text: &str) {
        let file = self.at(path);
        std::fs::create_dir_all(file.parent().expect("parent")).expect("mkdir");
        std::fs::write(file, text).expect("write");
    }

    fn program(&self, package: &str) {
        self.write(&format!("{package}/package.json"), r#"{"name":"openclaw","version":"2026.9.6"}"#);
        self.write(&format!("{package}/openclaw.mjs"), "");
        self.write(&format!("{package}/dist/index.js"), "x");
    }

    fn state(&self, dir: &str, port: Option<u16>) {
        let port = port.map_or(String::new(), |p| format!("port:{p},"));
        self.write(&format!("{dir}/openclaw.json"), &format!("{{gateway:{{{port}mode:\"local\"}}}}"));
    }

    fn find(&self, hint: &Hint) -> Result<Found> {
        find_in(hint, &self.world)
    }

    fn only(&self) -> Found {
        self.find(&Hint::default()).expect("one node")
    }
}

#[test]
fn every_layout_is_found() {
    // Where the package lies, where its Node lies, what the prefix is.
    let home = "home/claw";
    let cases: &[(&str, &str, &str)] = &[
        ("usr/lib/node_modules/openclaw", "usr/bin/node", "usr"),
        ("usr/local/lib/node_modules/openclaw", "usr/local/bin/node", "usr/local"),
        ("home/claw/.npm-global/lib/node_modules/openclaw", "usr/bin/node", "home/claw/.npm-global"),
        (
            "home/claw/.nvm/versions/node/v26.10.0/lib/node_modules/openclaw",
            "home/claw/.nvm/versions/node/v26.10.0/bin/node",
            "home/claw/.nvm/versions/node/v26.10.0",
        ),
        (
            "home/claw/.local/share/fnm/node-versions/v26.1.0/installation/lib/node_modules/openclaw",
            "home/claw/.local/share/fnm/node-versions/v26.1.0/installation/bin/node",
            "home/claw/.local/share/fnm/node-versions/v26.1.0/installation",
        ),
        (
            "home/claw/.volta/tools/image/packages/openclaw/lib/node_modules/openclaw",
            "home/claw/.volta/tools/image/node/26.1.0/bin/node",
            "home/claw/.volta/tools/image/packages/openclaw",
        ),
        ("home/claw/n/lib/node_modules/openclaw", "home/claw/n/bin/node", "home/claw/n"),
        (
            "home/claw/.local/share/mise/installs/node/26.2.0/lib/node_modules/openclaw",
            "home/claw/.local/share/mise/installs/node/26.2.0/bin/node",
            "home/claw/.local/share/mise/installs/node/26.2.0",
        ),
        (
            "home/claw/.local/share/pnpm/global/5/node_modules/openclaw",
            "usr/bin/node",
            "home/claw/.local/share/pnpm/global/5",
        ),
        (
            "home/claw/.bun/install/global/node_modules/openclaw",
            "usr/bin/node",
            "home/claw/.bun/install/global",
        ),
    ];
    for (package, node, prefix) in cases {
        let m = Machine::new();
        m.program(package);
        m.write(node, "node");
        m.state(&format!("{home}/.openclaw"), Some(18_800));
        let found = m.only();
        assert_eq!(found.node.package_dir, m.at(package), "{package}");
        assert_eq!(found.node.node_bin, m.at(node), "{package}");
        assert_eq!(found.node.prefix, m.at(prefix), "{package}");
        assert_eq!(found.node.entry, m.at(package).join("dist/index.js"));
        assert_eq!(found.node.version.as_deref(), Some("2026.9.6"));
        assert_eq!((found.node.port, found.node.name.as_str()), (18_800, "main"));
        assert!(found.how.len() >= 3, "{:?}", found.how);
    }
}

#[test]
fn the_rc_file_and_path_name_prefixes() {
    let m = Machine::new();
    m.write("home/claw/.npmrc", "registry=https://x/\nprefix = ~/tools\n");
    m.program("home/claw/tools/lib/node_modules/openclaw");
    m.write("usr/bin/node", "node");
    m.state("home/claw/.openclaw", None);
    let found = m.only();
    assert_eq!(found.node.prefix, m.at("home/claw/tools"));
    assert_eq!(found.node.port, crate::DEFAULT_PORT);
    assert!(found.how.iter().any(|h| h.contains(".npmrc")), "{:?}", found.how);

    let mut m = m;
    m.program("srv/p/lib/node_modules/openclaw");
    m.write("srv/p/bin/node", "node");
    std::os::unix::fs::symlink("../lib/node_modules/openclaw/openclaw.mjs", m.at("srv/p/bin/openclaw"))
        .expect("link");
    m.world.path = vec![m.at("nowhere"), m.at("srv/p/bin")];
    let found = m.only();
    assert_eq!((found.node.prefix, found.node.node_bin), (m.at("srv/p"), m.at("srv/p/bin/node")));
    assert_eq!(found.others.len(), 1, "{:?}", found.others);
}

#[test]
fn a_unit_is_the_strongest_witness_even_when_its_program_is_gone() {
    let m = Machine::new();
    m.program("usr/lib/node_modules/openclaw");
    m.write("usr/bin/node", "node");
    m.state("home/claw/.openclaw", Some(1));
    let gone = m.at("opt/x/lib/node_modules/openclaw");
    m.write(
        "home/claw/.config/systemd/user/openclaw-gateway.service",
        &format!(
            "[Service]\nExecStart={} {}/dist/index.js gateway --port 18999\nEnvironment=OPENCLAW_NO_AUTO_UPDATE=1 SECRET=s\n",
            m.at("usr/bin/node").display(),
            gone.display()
        ),
    );
    let found = m.only();
    assert_eq!(found.node.package_dir, gone);
    assert_eq!(found.node.prefix, m.at("opt/x"));
    assert_eq!(found.node.port, 18_999);
    let unit = found.node.unit.clone().expect("unit");
    assert_eq!((unit.name.as_str(), unit.scope), ("openclaw-gateway.service", Scope::User));
    assert_eq!(found.node.env, [("OPENCLAW_NO_AUTO_UPDATE".to_owned(), "1".to_owned())], "no secret is kept");
    assert_eq!(found.others.len(), 1, "{:?}", found.others);
}

#[test]
fn a_system_unit_belongs_to_its_user_and_may_move_everything() {
    let m = Machine::new();
    m.program("usr/lib/node_modules/openclaw");
    m.write("usr/bin/node", "node");
    std::os::unix::fs::symlink(m.at("usr/lib/node_modules/openclaw/openclaw.mjs"), m.at("usr/bin/openclaw"))
        .expect("link");
    m.state("srv/state", Some(5));
    m.write(
        "etc/systemd/system/openclaw-gateway.service",
        &format!(
            "[Service]\nUser=claw\nExecStart={} gateway\nEnvironment=OPENCLAW_STATE_DIR={}\n",
            m.at("usr/bin/openclaw").display(),
            m.at("srv/state").display()
        ),
    );
    let found = m.only();
    assert_eq!(found.node.state_dir, m.at("srv/state"));
    assert_eq!(found.node.port, 5);
    assert_eq!(found.node.unit.as_ref().map(|u| u.scope), Some(Scope::System));
    let command = found.node.command();
    assert!(command.env.iter().any(|(k, v)| k == "OPENCLAW_STATE_DIR" && v.ends_with("srv/state")));
    assert_eq!(command.args[1..], ["gateway", "--port", "5"]);
}

#[test]
fn several_nodes_are_listed_and_a_hint_chooses() {
    let m = Machine::new();
    m.program("usr/lib/node_modules/openclaw");
    m.write("usr/bin/node", "node");
    m.state("home/claw/.openclaw", None);
    m.state("home/claw/.openclaw-rescue", None);
    let e = m.find(&Hint::default()).expect_err("two nodes");
    assert_eq!(e.kind, Kind::Usage);
    assert!(e.why.contains("rescue") && e.why.contains("18789"), "{}", e.why);
    assert!(e.hint.is_some_and(|h| h.contains("--profile")));
    let hint = Hint { name: Some("rescue".into()), ..Hint::default() };
    let rescue = m.find(&hint).expect("the rescue node").node;
    assert_eq!(rescue.profile.as_deref(), Some("rescue"));
    assert_eq!(rescue.state_dir, m.at("home/claw/.openclaw-rescue"));
    assert_eq!(rescue.port, config::port(None, None, Some("rescue")));
    assert!(rescue.command().env.contains(&("OPENCLAW_PROFILE".into(), "rescue".into())));
    let hint = Hint { state_dir: Some(m.at("home/claw/.openclaw")), ..Hint::default() };
    assert_eq!(m.find(&hint).expect("main").node.name, "main");
    let hint = Hint { port: Some(4), ..Hint::default() };
    assert_eq!(m.find(&hint).map_err(|e| e.kind).err(), Some(Kind::NotFound));
}

#[test]
fn nothing_and_a_bare_installation_have_their_own_words() {
    let m = Machine::new();
    let e = m.find(&Hint::default()).expect_err("nothing");
    assert_eq!(e.kind, Kind::NotFound);
    m.program("usr/lib/node_modules/openclaw");
    m.write("usr/bin/node", "node");
    let e = m.find(&Hint::default()).expect_err("no state");
    assert!(e.why.contains("installed") && e.hint.is_some_and(|h| h.contains("onboard")), "{}", e.why);
}

#[test]
fn a_config_that_is_gone_does_not_hide_the_node() {
    let m = Machine::new();
    m.program("usr/lib/node_modules/openclaw");
    m.write("usr/bin/node", "node");
    m.write("home/claw/.openclaw/state/openclaw.sqlite", "");
    assert_eq!(m.only().node.config_path, m.at("home/claw/.openclaw/openclaw.json"));
}

#[test]
fn of_two_managed_versions_the_newer_is_taken() {
    let m = Machine::new();
    for v in ["v9.11.0", "v24.20.1", "v24.9.0"] {
        m.program(&format!("home/claw/.nvm/versions/node/{v}/lib/node_modules/openclaw"));
        m.write(&format!("home/claw/.nvm/versions/node/{v}/bin/node"), "node");
    }
    m.state("home/claw/.openclaw", None);
    let found = m.only();
    assert_eq!(found.node.node_bin, m.at("home/claw/.nvm/versions/node/v24.20.1/bin/node"));
    assert_eq!(found.others.len(), 2);
}

#[test]
fn a_state_without_a_program_is_named() {
    let m = Machine::new();
    m.state("home/claw/.openclaw", None);
    let e = m.find(&Hint::default()).expect_err("no program");
    assert!(e.why.contains(".openclaw") && e.hint.is_some_and(|h| h.contains("--prefix")), "{}", e.why);
    m.program("srv/p/lib/node_modules/openclaw");
    m.write("srv/n/node", "node");
    let hint = Hint { prefix: Some(m.at("srv/p")), node_bin: Some(m.at("srv/n/node")), ..Hint::default() };
    assert_eq!(m.find(&hint).expect("a node").node.prefix, m.at("srv/p"));
}
