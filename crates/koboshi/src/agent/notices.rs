//! When something outside the course of an incident is told, and how often: pure, so that it can be tried with any clock.
//!
//! Each kind goes out at most once a day from one agent; the outbox knows the day's messages too, so that an agent that
//! is started again and again does not repeat them. What comes and goes by itself (a channel that reconnects) is told only
//! once it has lasted.

use super::will::Will;
use alert::Notice;
use engine::{Class, FaultKind, Finding, Moment};
use node::{Baseline, Judgement};

/// A lasting condition is told this often.
const DAY_MS: u64 = 24 * 3_600_000;
/// Names in one message; the rest is counted.
const NAMED: usize = 8;

/// What was told, and what may have to be.
#[derive(Debug, Default)]
pub(super) struct Notices {
    told: Vec<(Notice, Moment)>,
    lasting: Vec<(Notice, Moment)>,
    /// The end of the pause that is running, by the wall clock.
    pause: Option<i64>,
}

impl Notices {
    /// Whether this may be told now; asking is telling.
    pub(super) fn tell(&mut self, kind: Notice, now: Moment) -> bool {
        let told =
            self.told.iter().any(|(k, at)| *k == kind && now.since_ms(*at).is_some_and(|ms| ms < DAY_MS));
        if !told {
            self.told.retain(|(k, _)| *k != kind);
            self.told.push((kind, now));
        }
        !told
    }

    /// The same for a condition that holds or does not: only once it has held for `least_ms` without a break.
    pub(super) fn tell_lasting(&mut self, kind: Notice, holds: bool, least_ms: u64, now: Moment) -> bool {
        if !holds {
            self.lasting.retain(|(k, _)| *k != kind);
            return false;
        }
        let since = match self.lasting.iter().find(|(k, _)| *k == kind) {
            Some((_, since)) => *since,
            None => {
                self.lasting.push((kind, now));
                now
            }
        };
        now.since_ms(since).is_some_and(|ms| ms >= least_ms) && self.tell(kind, now)
    }

    /// The end of a pause that has just run out by itself. One that somebody ended, or moved, is no news to him.
    pub(super) fn pause_ran_out(&mut self, will: &Will, now_s: i64) -> Option<i64> {
        if will.paused(now_s) {
            self.pause = will.paused_until_s;
            return None;
        }
        self.pause.take().filter(|until| will.paused_until_s == Some(*until))
    }
}

/// What the judge only tells: an update that takes long, probes that fail on our own side, a certificate out of date.
pub(super) fn of_the_judge(judgement: &Judgement) -> Vec<(Notice, String)> {
    let told = judgement.findings.iter().filter(|f| f.kind == FaultKind::Notice);
    told.filter_map(|finding| {
        let kind = match finding.class {
            None => Notice::OwnSide,
            Some(Class::Program) if finding.what.starts_with("an update") => Notice::UpdateLong,
            // All that the judge tells of the config while the node serves.
            Some(Class::Config) => Notice::Certificate,
            Some(_) => return None,
        };
        Some((kind, finding.what.clone()))
    })
    .collect()
}

/// What is new about a baseline: another version, or another identity (a fresh onboarding). Counts and configs change all
/// day.
pub(super) fn news(before: &Baseline, after: &Baseline) -> Option<String> {
    let mut news = Vec::new();
    if let (Some(was), Some(is)) = (&before.version, &after.version)
        && was != is
    {
        news.push(format!("version {is} serves, after {was}"));
    }
    if let (Some(was), Some(is)) = (&before.device_id, &after.device_id)
        && was != is
    {
        news.push("the node has another identity: it was onboarded anew".to_owned());
    }
    (!news.is_empty()).then(|| news.join("; "))
}

/// Why there is too little space for safe work, where a look at the disk says so.
pub(super) fn short_of_space(findings: &[Finding], low: Option<&str>) -> Option<String> {
    let full = findings.iter().find(|f| f.kind == FaultKind::DiskFull).map(|f| f.what.as_str());
    full.or(low).map(str::to_owned)
}

/// Files that went, in one line.
pub(super) fn names(gone: &[std::path::PathBuf]) -> Option<String> {
    let named: Vec<String> = gone.iter().take(NAMED).map(|p| p.display().to_string()).collect();
    match (named.is_empty(), gone.len() - named.len()) {
        (true, _) => None,
        (false, 0) => Some(named.join(", ")),
        (false, more) => Some(format!("{}, and {more} more", named.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Moment {
        Moment { boot: 1, ms }
    }

    #[test]
    fn each_kind_is_told_once_a_day() {
        let mut notices = Notices::default();
        let told =
            (0..3 * 24 * 60).filter(|minute| notices.tell(Notice::DiskLow, at(minute * 60_000))).count();
        assert_eq!(told, 3, "once a day in three days, asked every minute");
        assert!(notices.tell(Notice::FileMissing, at(0)), "another kind is another matter");
        assert!(notices.tell(Notice::DiskLow, Moment { boot: 2, ms: 5 }), "a new boot begins anew");
    }

    #[test]
    fn what_only_flickers_is_not_told() {
        let mut notices = Notices::default();
        let mut tell = |holds, ms| notices.tell_lasting(Notice::Degraded, holds, 600_000, at(ms));
        for n in 0..100 {
            assert!(!tell(true, n * 500_000), "a channel that reconnects in time");
            assert!(!tell(false, n * 500_000 + 400_000));
        }
        let since = 100_000_000;
        assert!(!tell(true, since) && !tell(true, since + 599_999));
        assert!(tell(true, since + 600_000));
        assert!(!tell(true, since + 3_600_000), "told");
        assert!(tell(true, since + 600_000 + DAY_MS), "and again a day later, while it lasts");
    }

    #[test]
    fn a_pause_that_runs_out_is_told_once_and_one_that_is_ended_is_not() {
        let paused = |until: Option<i64>| Will { paused_until_s: until, ..Will::default() };
        let mut notices = Notices::default();
        assert_eq!(notices.pause_ran_out(&paused(Some(50)), 100), None, "over before this agent lived");
        assert_eq!(notices.pause_ran_out(&paused(Some(200)), 100), None);
        assert_eq!(notices.pause_ran_out(&paused(Some(300)), 150), None, "made longer");
        assert_eq!(notices.pause_ran_out(&paused(Some(300)), 300), Some(300));
        assert_eq!(notices.pause_ran_out(&paused(Some(300)), 301), None, "once");
        assert_eq!(notices.pause_ran_out(&paused(Some(500)), 400), None);
        assert_eq!(notices.pause_ran_out(&paused(None), 410), None, "koboshi resume");
        assert_eq!(notices.pause_ran_out(&paused(None), 600), None);
    }

    #[test]
    fn only_another_version_or_identity_is_news() {
        let of = |version: Option<&str>, device: Option<&str>| Baseline {
            version: version.map(str::to_owned),
            device_id: device.map(str::to_owned),
            ..Baseline::default()
        };
        let was = of(Some("1.0"), Some("a"));
        assert_eq!(news(&Baseline::default(), &was), None, "the first is none");
        let same = Baseline { config: Some("other".into()), onboarded: Some("later".into()), ..was.clone() };
        assert_eq!(news(&was, &same), None);
        assert_eq!(news(&was, &of(None, None)), None, "what is not known is not other");
        assert_eq!(news(&was, &of(Some("1.1"), Some("a"))).as_deref(), Some("version 1.1 serves, after 1.0"));
        let both = news(&was, &of(Some("1.1"), Some("b"))).unwrap_or_default();
        assert!(both.contains("1.1") && both.contains("onboarded anew"), "{both}");
    }

    #[test]
    fn a_full_disk_is_told_before_a_low_one_and_room_enough_not_at_all() {
        let full = |kind| Finding { kind, class: None, what: "3 KB are free".into(), evidence: Vec::new() };
        assert_eq!(short_of_space(&[full(FaultKind::Notice)], None), None);
        assert_eq!(short_of_space(&[], Some("40 MB are free")).as_deref(), Some("40 MB are free"));
        let both = short_of_space(&[full(FaultKind::DiskFull)], Some("40 MB are free"));
        assert_eq!(both.as_deref(), Some("3 KB are free"));
    }

    #[test]
    fn what_the_judge_only_tells_is_passed_on_by_its_kind() {
        let finding =
            |kind, class, what: &str| Finding { kind, class, what: what.to_owned(), evidence: Vec::new() };
        let judgement = Judgement {
            verdict: engine::Verdict::Serving { degraded: Vec::new() },
            confirmed: true,
            first_good: None,
            confidence: node::Confidence::Full,
            findings: vec![
                finding(FaultKind::Notice, None, "probes fail on our side"),
                finding(FaultKind::Notice, Some(Class::Program), "an update has been at work for 46 min"),
                finding(FaultKind::Notice, Some(Class::Program), "another program than the baseline"),
                finding(FaultKind::Notice, Some(Class::Config), "the certificate is out of date"),
                finding(FaultKind::Hung, None, "no answer"),
            ],
            process: None,
        };
        let told = of_the_judge(&judgement);
        let wanted = [
            (Notice::OwnSide, "probes fail on our side".to_owned()),
            (Notice::UpdateLong, "an update has been at work for 46 min".to_owned()),
            (Notice::Certificate, "the certificate is out of date".to_owned()),
        ];
        assert_eq!(told, wanted);
    }

    #[test]
    fn names_are_few_and_the_rest_is_counted() {
        let files = |n: usize| (0..n).map(|i| format!("/w/{i}").into()).collect::<Vec<_>>();
        assert_eq!(names(&[]), None);
        assert_eq!(names(&files(2)).as_deref(), Some("/w/0, /w/1"));
        assert!(names(&files(NAMED + 3)).is_some_and(|n| n.ends_with("/w/7, and 3 more")));
    }
}
