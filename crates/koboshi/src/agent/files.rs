//! What is watched on disk: the config, the unit, the will of others, and the user's trees.

use super::*;

/// The trees of the user's that are watched, and whether each was without a file when it was last looked at.
#[derive(Debug, Default)]
pub(super) struct UsersTrees {
    roots: Vec<(PathBuf, bool)>,
}

impl UsersTrees {
    pub(super) fn of(node: &Node) -> UsersTrees {
        let users = [engine::Class::Workspace, engine::Class::Credentials, engine::Class::Sessions];
        let roots = node::roots::roots(node).into_iter().filter(|root| users.contains(&root.class));
        let look = |path: PathBuf| {
            let void = node::roots::is_void(&path);
            (path, void)
        };
        UsersTrees { roots: roots.take(MOST_USERS_ROOTS).map(|root| look(root.path)).collect() }
    }

    /// Whether one of them has been emptied or taken away since the last look. Files come and go in them all day, and a
    /// whole look at the disk for each would cost more than all other watches together.
    pub(super) fn emptied(&mut self) -> bool {
        let mut emptied = false;
        for (path, void) in &mut self.roots {
            let now = node::roots::is_void(path);
            emptied |= now && !*void;
            *void = now;
        }
        emptied
    }
}

impl Agent {
    pub(super) fn take_files(&mut self) {
        let events = self.watch.drain().unwrap_or_default();
        if events.is_empty() {
            return;
        }
        let now = clock::now();
        self.ordered |= events.iter().any(|e| e.key == "orders");
        if events.iter().any(|e| e.key == "will") {
            self.read_will();
        }
        // A database is written all the time; only that it came or went is news.
        let news = |e: &host::watch::Event| match e.key.as_str() {
            "will" | "orders" => false,
            "state" => matches!(e.kind, Change::Appeared | Change::Vanished | Change::Lost),
            _ => true,
        };
        // Also when something came: a tree that was brought back may be emptied again.
        let emptied = events.iter().any(|e| e.key == "users") && self.users.emptied();
        let rested = self.exam_taken.map_or(now, |(at, _)| at.plus_ms(USERS_AGAIN_MS));
        self.exam_due =
            exam_due(self.exam_due, now, events.iter().any(|e| e.key != "users" && news(e)), emptied, rested);
    }

    pub(super) fn read_will(&mut self) {
        match Will::load(&self.places) {
            Ok(will) => {
                if will != self.will {
                    self.say(&format!("the owner's will is now {}", describe_will(&will)));
                    self.will = will;
                    self.told_left_alone = false;
                }
            }
            Err(e) => self.say(&e.to_string()),
        }
    }

    /// Watches what a start would need, and what people write to us.
    pub(super) fn watch_files(&mut self) {
        let node = &self.node;
        let mut paths = vec![
            ("config", node.config_path.clone()),
            ("state", node.state_dir.join("state")),
            ("program", node.package_dir.clone()),
            ("program", node.package_dir.join("dist")),
            ("program", node.entry.clone()),
            ("program", node.package_dir.join("package.json")),
            ("runtime", node.node_bin.clone()),
            ("will", self.places.will()),
            ("orders", self.places.orders()),
        ];
        if let Some(unit) = &node.unit {
            paths.extend(unit.files.iter().map(|f| ("unit", f.clone())));
        }
        // Trees of the user's, whose sudden emptiness nothing else tells before the next sweep.
        self.users = UsersTrees::of(node);
        paths.extend(self.users.roots.iter().map(|(root, _)| ("users", root.clone())));
        for (key, path) in paths {
            if let Err(e) = self.watch.add(&path, key) {
                self.say(&e.to_string());
            }
        }
    }
}

/// When the disk is looked at because of what inotify reported: at once for what a start needs; for the user's trees, in
/// which agents make and delete files all day, only so often. What is due sooner is never put off by what is due later.
pub(super) fn exam_due(
    before: Option<Moment>,
    now: Moment,
    program: bool,
    users: bool,
    rested: Moment,
) -> Option<Moment> {
    let soon = now.plus_ms(SETTLE_FILES_MS);
    let later = if rested.boot == now.boot && rested.ms > soon.ms { rested } else { soon };
    let wanted = [before, program.then_some(soon), users.then_some(later)];
    wanted.into_iter().flatten().min_by_key(|at| at.ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_goes_is_no_news_and_a_tree_that_goes_is() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("workspace");
        let mut users = UsersTrees { roots: vec![(tree.clone(), true)] };
        assert!(!users.emptied(), "it never was there");
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("a"), "").unwrap();
        std::fs::write(tree.join("b"), "").unwrap();
        assert!(!users.emptied());
        std::fs::remove_file(tree.join("b")).unwrap();
        assert!(!users.emptied());
        std::fs::remove_file(tree.join("a")).unwrap();
        assert!(users.emptied());
        assert!(!users.emptied(), "told once");
        std::fs::write(tree.join("a"), "").unwrap();
        assert!(!users.emptied());
        std::fs::remove_dir_all(&tree).unwrap();
        assert!(users.emptied());
    }

    #[test]
    fn a_deleted_program_does_not_wait_for_a_users_file() {
        let at = |ms| Moment { boot: 1, ms };
        let now = at(100_000);
        let rested = at(150_000);
        // A temporary file of an agent's went: there is time.
        let due = exam_due(None, now, false, true, rested);
        assert_eq!(due, Some(at(150_000)));
        // Then the program goes.
        assert_eq!(exam_due(due, at(101_000), true, false, rested), Some(at(101_000 + SETTLE_FILES_MS)));
        // What is due at once stays so.
        assert_eq!(exam_due(Some(at(100_200)), now, true, true, rested), Some(at(100_200)));
        // A look long ago is no reason to wait, and nothing happened is no reason to look.
        assert_eq!(exam_due(None, now, false, true, at(5_000)), Some(at(100_000 + SETTLE_FILES_MS)));
        assert_eq!(exam_due(None, now, false, false, rested), None);
    }
}
