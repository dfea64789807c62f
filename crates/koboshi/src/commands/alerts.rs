//! `koboshi alert test`: one message through every channel, now.

use super::desk::{Desk, Fields};
use crate::print::Exit;
use alert::{Channel, Facts, Outbox};
use host::clock::Deadline;
use host::{Error, Kind, Result};
use std::time::Duration;

/// One channel's answer; what takes longer than this will not help at night either.
const LIMIT: Duration = Duration::from_secs(30);

/// Every channel that would be used: the configured ones, then those on this machine.
pub(super) fn channels(desk: &Desk, home: Option<&std::path::Path>) -> Vec<Channel> {
    let mut channels = desk.config.alert.clone();
    channels.extend(alert::local_channels(&desk.places.state_dir, home));
    channels
}

/// Sends the test and says which channels took it.
pub(super) fn test(desk: &Desk) -> Result<Exit> {
    alert::channel::check(&desk.config.alert)
        .map_err(|why| Error::new(Kind::Usage, "use the [[alert]] channels", why))?;
    desk.places.make()?;
    let node = desk.node().ok();
    let outbox = Outbox::open(&desk.places.outbox())?;
    let facts = Facts {
        node: node.as_ref().map_or_else(|| "main".to_owned(), |n| n.name.clone()),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        incident: format!("test-{}", host::clock::wall().as_second()),
        at: format!("{:.0}", host::clock::wall()),
        ..Facts::default()
    };
    let p = desk.printer;
    let mut failed = false;
    let mut told = Vec::new();
    for channel in channels(desk, node.as_ref().map(|n| n.home.as_path())) {
        let result = alert::test(&outbox, &channel, &facts, Deadline::after(LIMIT));
        failed |= result.is_err();
        let fields = Fields::default()
            .put("channel", channel.name())
            .put("target", channel.target())
            .put("local", channel.is_local())
            .put("accepted", result.is_ok());
        let line = format!("{:12} {}", channel.name(), channel.target());
        match result {
            Ok(()) => {
                p.line(format!("{} {line}", p.green("accepted")));
                told.push(fields.done());
            }
            Err(why) => {
                p.line(format!("{}   {line}: {why}", p.red("failed")));
                told.push(fields.put("why", why).done());
            }
        }
    }
    let reached = !desk.config.alert.is_empty() && !failed;
    if desk.config.alert.is_empty() {
        p.line(
            "Nobody is told: no [[alert]] channel is configured, only files on this machine were written.",
        );
        p.line(format!(
            "  fix: add one to {}; the comments in it show how",
            desk.places.config_file.display()
        ));
    }
    p.object(Fields::default().put("reached_somebody", reached).put("channels", told).done());
    Ok(if reached { Exit::Done } else { Exit::Failed })
}
