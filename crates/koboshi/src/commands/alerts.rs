//! `koboshi alert test`: one message through every channel, now.

use super::desk::{Desk, Fields};
use crate::print::Exit;
use crate::voice::{self, Standing};
use alert::{Channel, Facts, Outbox};
use host::clock::Deadline;
use host::{Error, Kind, Result};
use std::time::Duration;

/// One channel's answer; what takes longer than this will not help at night either.
const LIMIT: Duration = Duration::from_secs(30);

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
    let (mut failed, mut reached) = (false, false);
    let mut told = Vec::new();
    let all = voice::channels(&desk.config, &desk.places, node.as_ref().map(|n| n.home.as_path()));
    let remote = all.iter().any(|c| !c.is_local());
    let language = voice::language(&desk.config);
    // Whoever is logged in is not shouted at for a test.
    for channel in all.iter().filter(|c| !matches!(c, Channel::Wall(_))) {
        let result = alert::test(&outbox, channel, &facts, language, Deadline::after(LIMIT));
        failed |= result.is_err();
        reached |= result.is_ok() && !channel.is_local();
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
    if let Some((warning, fix)) = Standing::of(&desk.config, &desk.places).warning(&desk.places) {
        p.line(p.yellow(&warning));
        if !remote {
            p.line("  Only this machine was told: its files and its journal.");
            p.line(format!("  fix: {fix}; the comments in it show how"));
        }
    }
    p.object(Fields::default().put("reached_somebody", reached).put("channels", told).done());
    Ok(if reached && !failed { Exit::Done } else { Exit::Failed })
}
