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
