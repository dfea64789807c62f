//! The gateway's process: followed whoever started it, its starts counted, its end noticed while it still dies, and
//! understood by who ended it.

use super::*;

impl Agent {
    /// Holds a descriptor on the gateway's process, so that its end is known at once.
    pub(super) fn follow_gateway(&mut self) {
        let id = self.service.main().or_else(|| self.node.gateway());
        let followed = self.gateway.as_ref().map(PidFd::id);
        if id.is_some() && id != followed {
            if let Some(id) = id {
                self.service.adopt(id);
                self.gateway = id.open().ok();
                self.count_start(id);
            }
        } else if self.gateway.as_ref().is_some_and(PidFd::exited) {
            self.gateway = None;
        }
        match &self.gateway {
            None => self.death_watch = None,
            Some(gateway) => {
                let id = gateway.id();
                // Only a gateway of our own: of another's, the service manager must first say whose end this is.
                if self.service.embedded() && self.death_watch.as_ref().is_none_or(|w| w.process() != id) {
                    self.death_watch = DeathWatch::of(id);
                }
            }
        }
    }

    /// Whether the journal knows of a start from which this process can have come.
    pub(super) fn on_the_books(&self, id: ProcessId, now: Moment) -> bool {
        /// `/proc/PID/stat` counts in hundredths of a second since boot.
        const MS_PER_TICK: u64 = 10;
        /// From the record of a start to its process; systemd may take its time.
        const BETWEEN_MS: u64 = 5_000;
        let state = self.book.state();
        let born_ms = now.ms.saturating_sub(id.start_ticks.saturating_mul(MS_PER_TICK));
        let t = state.time_ms(now);
        state
            .starts_ms
            .iter()
            .map(|start| t.saturating_sub(*start))
            .any(|ago_ms| ago_ms + 1_000 >= born_ms && ago_ms <= born_ms.saturating_add(BETWEEN_MS))
    }

    /// A start that somebody else made counts in the ration too: OpenClaw does not ask who started it.
    pub(super) fn count_start(&mut self, id: ProcessId) {
        /// A process this old at first sight was not started under our eyes.
        const YOUNG_MS: u64 = 30_000;
        /// `/proc/PID/stat` counts in hundredths of a second since boot.
        const MS_PER_TICK: u64 = 10;
        let now = clock::now();
        // Asked for by this agent, or by one that died before it saw the process.
        let ours = self.asked_start.take().is_some() || self.on_the_books(id, now);
        let young = now.ms.saturating_sub(id.start_ticks.saturating_mul(MS_PER_TICK)) < YOUNG_MS;
        let new = self.counted != Some(id);
        if new && !ours && young {
            self.write(Record::new(now, Event::StartSeen { by: "somebody else".to_owned() }));
        }
        self.counted = Some(id);
        if new && !ours {
            self.keep_stopped();
        }
    }

    /// The gateway's process has lost its memory and will have ended in a moment. Nobody but koboshi stops a gateway
    /// of koboshi's own, so nothing is to be waited for.
    pub(super) fn gateway_dying(&mut self) {
        let Some(watch) = self.death_watch.take() else {
            return;
        };
        // Not dying: the thread ended by itself. Another one is watched from the next look on.
        let climbing = self.book.state().climb().is_some_and(|climb| !climb.in_place);
        if climbing || self.will.stopped || self.ending || !watch.dying() {
            return;
        }
        self.forget_the_process();
        self.ending_unexplained = true;
        self.open_or_escalate(IncidentKind::Outage, "the gateway ended".to_owned());
    }

    /// An incident that was opened while the gateway was dying waits for its end before anything is looked at: until then
    /// it holds its port and its databases, and nobody may look into it to see whose they are.
    pub(super) fn see_it_end(&mut self) {
        /// A kernel that takes back gigabytes takes some seconds. A process that hangs in it is seen by the judge.
        const END_LIMIT: Duration = Duration::from_secs(10);
        if !std::mem::take(&mut self.ending_unexplained) {
            return;
        }
        let ended = self.gateway.as_ref().is_none_or(|gateway| gateway.wait(Deadline::after(END_LIMIT)));
        let what = if ended {
            how_it_ended(&self.service.look(Deadline::after(MANAGER_LIMIT)))
        } else {
            format!("the kernel has not ended it after {} s", END_LIMIT.as_secs())
        };
        self.noticed(vec![Finding { kind: FaultKind::ProcessGone, class: None, what, evidence: Vec::new() }]);
    }

    /// What was said of a process that is gone is not published any longer.
    pub(super) fn forget_the_process(&mut self) {
        self.serving_since = None;
        self.judgement = None;
        self.next_look = clock::now();
    }

    /// The gateway's process has ended: known within milliseconds, and judged by who ended it.
    pub(super) fn gateway_exited(&mut self) {
        self.gateway = None;
        self.death_watch = None;
        self.ending_unexplained = false;
        self.forget_the_process();
        let climbing = self.book.state().climb().is_some_and(|climb| !climb.in_place);
        if climbing || self.home.at_work() || self.will.stopped || self.ending {
            return;
        }
        let deadline = Deadline::after(MANAGER_LIMIT);
        let state = self.service.look(deadline);
        if !self.service.embedded() {
            if state.active == Active::Deactivating || state.active == Active::Inactive {
                // A stop or the first half of a restart: known in a moment.
                self.unit_stopped = Some(clock::now());
                return;
            }
            if state.in_motion() {
                // systemd starts it again by itself; only damage that would make that fail is put right first.
                self.say("the gateway ended; systemd is about to start it again");
                if !self.before_the_next_try() {
                    self.exam_due = Some(clock::now());
                }
                return;
            }
        }
        self.open_or_escalate(IncidentKind::Outage, format!("the gateway ended: {}", how_it_ended(&state)));
    }

    /// A unit that was on its way down: stopped for good, restarted, or failed?
    pub(super) fn follow_stopping_unit(&mut self) {
        let Some(since) = self.unit_stopped else {
            return;
        };
        let now = clock::now();
        let state = self.service.look(Deadline::after(MANAGER_LIMIT));
        match state.active {
            Active::Deactivating => self.unit_stopped = Some(now),
            Active::Inactive if now.since_ms(since).is_some_and(|ms| ms < STOPPED_FOR_GOOD_MS) => {}
            Active::Inactive => {
                self.unit_stopped = None;
                self.bare_stopped(down_by_will(&state));
            }
            Active::Failed => {
                self.unit_stopped = None;
                self.open_or_escalate(IncidentKind::Outage, "the unit failed as it ended".to_owned());
            }
            Active::Active | Active::Activating | Active::AutoRestart | Active::Unknown => {
                self.unit_stopped = None;
            }
        }
    }

    /// An enabled unit was stopped and nobody said why. Once it is started again, after a while; then it is obeyed.
    pub(super) fn bare_stopped(&mut self, disabled: bool) {
        let now = clock::now();
        if disabled {
            self.leave_alone("its unit is disabled or masked");
            return;
        }
        self.bare_stops.retain(|at| now.since_ms(*at).is_some_and(|ms| ms < BARE_STOP_AGAIN_MS));
        if self.bare_stops.is_empty() {
            self.say(&format!("the unit was stopped; it is started again in {} s", BARE_STOP_MS / 1000));
            self.bare_stops.push(now);
            self.bare_stop = Some(now);
        } else {
            self.will.stopped = true;
            self.will.by_stops = true;
            if let Err(e) = self.will.save(&self.places) {
                self.say(&e.to_string());
            }
            self.leave_alone("its unit was stopped twice within the hour");
        }
    }

    pub(super) fn leave_alone(&mut self, why: &str) {
        if !self.told_left_alone {
            self.told_left_alone = true;
            self.say(&format!("left alone: {why}"));
            self.notice(alert::Notice::StoppedByOwner, why);
        }
    }
}

pub(super) fn how_it_ended(state: &host::service::ServiceState) -> String {
    match (state.exit_status, state.exit_signal) {
        (_, Some(signal)) => format!("signal {signal} ended it"),
        (Some(code), None) => format!("it exited with code {code}"),
        (None, None) => "it is gone".to_owned(),
    }
}

/// The owner took the unit down and says so.
pub(super) fn down_by_will(state: &host::service::ServiceState) -> bool {
    (state.masked && !state.held) || state.enabled == Some(false)
}
