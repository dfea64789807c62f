//! `koboshi pause` and `koboshi resume`: the owner's will, which holds with and without a running agent.

use super::desk::{Desk, Fields, seconds};
use crate::cli::Pause;
use crate::print::Exit;
use host::{Error, Kind, Result};

/// A pause ends by itself; one that never does would be a forgotten one.
const LONGEST_S: u64 = 30 * 86_400;

/// Hands off for a while.
pub(super) fn pause(desk: &Desk, options: &Pause) -> Result<Exit> {
    let for_s = parse(&options.duration)?;
    let until_s = host::clock::wall().as_second().saturating_add(i64::try_from(for_s).unwrap_or(i64::MAX));
    let mut will = desk.will();
    will.paused_until_s = Some(until_s);
    will.save(&desk.places)?;
    let until = jiff::Timestamp::from_second(until_s).map(|t| t.to_string()).unwrap_or_default();
    let p = desk.printer;
    p.line(format!("Paused for {}, until {until}: koboshi watches and touches nothing.", seconds(for_s)));
    p.line("It ends by itself; `koboshi resume` ends it now.");
    if desk.agent().is_none() {
        p.line("No agent is running, so nothing was being guarded anyway.");
    }
    p.object(Fields::default().put("paused", true).put("until", until).put("for_s", for_s).done());
    Ok(Exit::Done)
}

/// Hands on again. A stop by `koboshi node stop` is another matter and stays.
pub(super) fn resume(desk: &Desk) -> Result<Exit> {
    let mut will = desk.will();
    let was = will.paused(host::clock::wall().as_second());
    will.paused_until_s = None;
    will.save(&desk.places)?;
    let p = desk.printer;
    p.line(if was { "Hands on again." } else { "It was not paused." });
    if will.stopped {
        p.line("The node stays down, because it was stopped: `koboshi node start` starts it.");
    }
    let running = desk.agent().is_some();
    if !running {
        p.line("No agent is running: nothing guards the node.");
    }
    let fields = Fields::default().put("paused", false).put("was_paused", was).put("agent_running", running);
    p.object(fields.done());
    Ok(Exit::Done)
}

/// `90s`, `30m`, `2h`, `1d`, or several of them: `1h30m`.
fn parse(text: &str) -> Result<u64> {
    let wrong = |why: String| {
        Error::new(Kind::Usage, format!("pause for {text:?}"), why)
            .hint("say it like 30m, 2h or 1d, at most 30d")
    };
    let mut total_s: u64 = 0;
    let mut number = String::new();
    for c in text.trim().chars() {
        if c.is_ascii_digit() {
            number.push(c);
            continue;
        }
        let unit_s: u64 = match c {
            's' => 1,
            'm' => 60,
            'h' => 3_600,
            'd' => 86_400,
            other => return Err(wrong(format!("{other:?} is no unit of time"))),
        };
        let count: u64 =
            number.parse().map_err(|_| wrong("a number is missing before the unit".to_owned()))?;
        total_s = total_s.saturating_add(count.saturating_mul(unit_s));
        number.clear();
    }
    if !number.is_empty() {
        return Err(wrong(format!("the unit after {number} is missing")));
    }
    match total_s {
        0 => Err(wrong("that is no time at all".to_owned())),
        s if s > LONGEST_S => Err(wrong("that is longer than 30 days".to_owned())),
        s => Ok(s),
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn times_are_read_as_people_write_them() {
        assert_eq!(parse("30m").unwrap(), 1_800);
        assert_eq!(parse("2h").unwrap(), 7_200);
        assert_eq!(parse("1d").unwrap(), 86_400);
        assert_eq!(parse("1h30m").unwrap(), 5_400);
        assert_eq!(parse("30d").unwrap(), 30 * 86_400);
    }

    #[test]
    fn what_is_no_time_is_an_error_with_a_hint() {
        for text in ["", "2", "h", "2w", "-1h", "0m", "31d", "99999999999999999999d", "2h5"] {
            let e = parse(text).unwrap_err();
            assert_eq!(e.kind, host::Kind::Usage, "{text}");
            assert!(e.hint.is_some(), "{text}");
        }
    }
}
