//! Which layers apply now and on what: the world, as the engine is told of it.

use crate::agent::Agent;
use crate::reinstall::{self, Seen};
use engine::{FaultKind, Finding, IncidentKind, Ladder, Layer, Moment, Rung, StartLook, StepId, Verdict};
use layers::{Examination, Need};
use node::gates;
use std::hash::{DefaultHasher, Hash, Hasher};

impl Agent {
    pub(super) fn ladder(&mut self, now: Moment) -> Ladder {
        let exam = self.exam.clone();
        let rungs = rungs(exam.as_ref(), self.book.state().incident.as_ref().map(|i| i.kind), self);
        let inconclusive =
            self.judgement.as_ref().is_some_and(|j| matches!(j.verdict, Verdict::Inconclusive { .. }));
        let alive = self.gateway.as_ref().is_some_and(|fd| !fd.exited());
        let mut ladder = Ladder::new(rungs);
        ladder.holding = self.held();
        ladder.start = StartLook {
            alive,
            progressing: alive && (inconclusive || self.judgement.is_none()),
            intact: exam.as_ref().is_some_and(|e| e.need == Need::Nothing),
        };
        ladder.hands_off = self.hands_off();
        ladder.only = self.only;
        ladder.journal_ok = self.book.journal_ok();
        ladder.evidence = evidence(exam.as_ref(), self.nudges, self.sources.back());
        ladder.jitter_permille = i32::try_from(now.ms % 2_001).unwrap_or(0) - 1_000;
        ladder.limits = self.config.ladder.limits();
        ladder
    }

    /// Whether the layer would have its turn in an incident of this kind, by the look just taken.
    pub(in crate::agent) fn would_apply(&self, layer: Layer, kind: IncidentKind) -> Result<(), String> {
        let rungs = rungs(self.exam.as_ref(), Some(kind), self);
        rungs
            .into_iter()
            .find(|rung| rung.layer == layer)
            .map_or_else(|| Err("there is no such layer".to_owned()), |rung| rung.applies)
    }

    pub(super) fn held(&self) -> Option<StepId> {
        self.step.as_ref()?.name.strip_prefix("step-")?.parse().ok()
    }

    pub(super) fn hung(&self) -> bool {
        self.gateway.is_some()
            && self.judgement.as_ref().is_some_and(|j| matches!(j.verdict, Verdict::NotServing { .. }))
    }

    /// Whether there is room to repair without deleting anything first.
    pub(in crate::agent) fn space_gate(&self) -> Result<(), String> {
        match gates::space(&self.places.state_dir, 0) {
            gates::Gate::Open => Ok(()),
            gates::Gate::Closed(why) => Err(why),
        }
    }
}

/// Hash of what outside could make a failed climb succeed.
fn evidence(exam: Option<&Examination>, nudges: u32, back: [u32; 3]) -> u64 {
    let mut hash = DefaultHasher::new();
    (nudges, back).hash(&mut hash);
    exam.map(|e| (e.inputs, e.snapshot.clone(), e.need)).hash(&mut hash);
    for finding in exam.map(|e| e.findings.as_slice()).unwrap_or_default() {
        (finding.kind, finding.class).hash(&mut hash);
    }
    hash.finish()
}

/// Which layers apply now, and on what.
fn rungs(exam: Option<&Examination>, incident: Option<IncidentKind>, agent: &Agent) -> Vec<Rung> {
    let inputs = |layer: Layer| {
        let mut hash = DefaultHasher::new();
        (layer, exam.map(|e| (e.inputs, e.snapshot.clone())), agent.sources.back_for(layer)).hash(&mut hash);
        hash.finish()
    };
    let snapshot = match exam {
        None => Err("the disk could not be looked at".to_owned()),
        Some(e) if e.store_hangs && !e.rescue => Err("the store does not answer".to_owned()),
        Some(e) if e.snapshot.is_none() && !e.rescue => Err("there is no good snapshot yet".to_owned()),
        Some(_) => agent.space_gate(),
    };
    let dirty = exam.and_then(|e| e.findings.iter().find(|f| keeps_from_starting(f)).map(|f| f.what.clone()));
    let restart = match (exam, dirty) {
        (_, Some(what)) => Err(format!("disk, config and state are not clean: {what}")),
        (None, None) => Err("the disk could not be looked at".to_owned()),
        (Some(_), None) => Ok(()),
    };
    let in_place = match (incident, exam.map(|e| e.need)) {
        (Some(IncidentKind::Latent), Some(Need::InPlace)) => snapshot.clone(),
        (Some(IncidentKind::Latent), _) => Err("nothing is left to be repaired in place".to_owned()),
        (_, _) => Err("the node does not serve".to_owned()),
    };
    let peer_copy = match exam.and_then(|e| e.findings.iter().find(|f| outside(f))) {
        Some(finding) => Err(finding.what.clone()),
        None if agent.config.peer.is_empty() => {
            Err("no peer is configured (koboshi fleet enroll HOST)".to_owned())
        }
        None => agent.space_gate(),
    };
    let peer_inputs = inputs(Layer::PeerCopy) ^ layers::peer_copy::inputs(&agent.config.peer);
    // With nothing to be seen on disk it comes after layer 0, and then reads every byte.
    let restore = match exam.and_then(|e| e.findings.iter().find(|f| outside(f))) {
        Some(finding) => Err(finding.what.clone()),
        None if exam.is_some_and(|e| e.findings.iter().any(given_back)) => agent.space_gate(),
        None => snapshot,
    };
    let version = agent.version_to_install();
    let seen = Seen {
        version: version.as_deref(),
        snapshot: exam.and_then(|e| e.snapshot.as_deref()),
        findings: exam.map(|e| e.findings.as_slice()).unwrap_or_default(),
    };
    let system = match (exam.and_then(|e| e.findings.iter().find(|f| outside(f))), exam) {
        (Some(finding), _) => Err(finding.what.clone()),
        (None, None) => Err("the disk could not be looked at".to_owned()),
        (None, Some(_)) => reinstall::system(&agent.node, &agent.places, seen, agent.sudo.as_ref()),
    };
    let user = match (exam.and_then(|e| e.findings.iter().find(|f| outside(f))), exam) {
        (Some(finding), _) => Err(finding.what.clone()),
        (None, None) => Err("the disk could not be looked at".to_owned()),
        (None, Some(_)) => reinstall::user(&agent.node, &agent.places, seen),
    };
    let install_inputs = |layer: Layer| {
        let mut hash = DefaultHasher::new();
        // A person who asks for a recovery may have mended what nobody here can see: the line, the registry.
        (inputs(layer), &version, agent.nudges, &agent.sudo).hash(&mut hash);
        hash.finish()
    };
    let mut rungs = vec![
        Rung::new(Layer::InPlace, in_place, inputs(Layer::InPlace)),
        Rung::new(Layer::Restart, restart, inputs(Layer::Restart)),
        Rung::new(Layer::Restore, restore, inputs(Layer::Restore)),
        Rung::new(Layer::SystemInstall, system, install_inputs(Layer::SystemInstall)),
        Rung::new(Layer::UserInstall, user, install_inputs(Layer::UserInstall)),
        Rung::new(Layer::PeerCopy, peer_copy, peer_inputs),
    ];
    for rung in &mut rungs {
        if let Some(why) = agent.config.ladder.refuses(rung.layer) {
            rung.applies = Err(why);
        }
    }
    rungs
}

/// What needs no snapshot: files are given back to their user.
fn given_back(finding: &Finding) -> bool {
    finding.kind == FaultKind::Permission
}

/// What no snapshot can put right: somebody else holds the port, or the disk is full.
pub(in crate::agent) fn outside(finding: &Finding) -> bool {
    matches!(finding.kind, FaultKind::PortTaken | FaultKind::DiskFull)
}

/// Whether the disk is as this layer's end wants it; else what is still in the way. What would make a start fail or do harm
/// comes first, also where nothing on the disk could be repaired: starts are scarce.
pub(super) fn disk_allows_a_start(layer: Layer, exam: &Examination) -> Result<(), String> {
    let all = exam.findings.iter();
    let starts = match layer {
        Layer::InPlace => false,
        // It was chosen by a look that barred even more, but for a config that is being edited.
        Layer::Restart => exam.need == Need::Nothing,
        Layer::Restore | Layer::SystemInstall | Layer::UserInstall | Layer::PeerCopy | Layer::Emergency => {
            true
        }
    };
    let bars: Vec<&Finding> = all.filter(|f| starts && bars_a_start(f)).collect();
    let told = |findings: &mut dyn Iterator<Item = &Finding>| {
        findings.map(|f| f.what.as_str()).collect::<Vec<_>>().join("; ")
    };
    if !bars.is_empty() {
        return Err(format!("a start would fail or do harm: {}", told(&mut bars.into_iter())));
    }
    match (layer, exam.need) {
        (_, Need::Nothing) => Ok(()),
        // A config that is being edited keeps nothing from starting that was clean otherwise.
        (Layer::Restart, Need::Later) => Ok(()),
        // What is left concerns nothing that a start needs or would harm, and restore has had its turn.
        (Layer::Restore | Layer::SystemInstall | Layer::UserInstall | Layer::PeerCopy, _) => Ok(()),
        (_, Need::Later | Need::InPlace | Need::Interruption) => {
            Err(format!("the disk is not whole: {}", told(&mut exam.findings.iter())))
        }
    }
}

/// Whether even after a restore no start may be asked for. The workspace, credentials and single agents' databases are
/// read by a gateway that serves; without them it serves less, but it serves.
fn bars_a_start(finding: &Finding) -> bool {
    let apart = finding.class.is_some_and(|c| {
        matches!(c, engine::Class::Workspace | engine::Class::Credentials | engine::Class::Sessions)
    });
    keeps_from_starting(finding) && !apart
}

/// Whether a start with this on the disk would fail or do harm.
pub(crate) fn keeps_from_starting(finding: &Finding) -> bool {
    match finding.kind {
        FaultKind::FilesDamaged
        | FaultKind::ConfigBroken
        | FaultKind::RootMissing
        | FaultKind::DatabaseCorrupt
        | FaultKind::Amnesia
        | FaultKind::RuntimeUnfit
        | FaultKind::PortTaken
        | FaultKind::Permission
        | FaultKind::DiskFull
        | FaultKind::SchemaNewer => true,
        FaultKind::ProcessGone
        | FaultKind::Hung
        | FaultKind::ServiceLatched
        | FaultKind::UpdateAtWork
        | FaultKind::OwnersWill
        | FaultKind::BackupStale
        | FaultKind::Notice => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exam(need: Need, kind: Option<FaultKind>, class: engine::Class) -> Examination {
        let findings: Vec<Finding> = kind
            .map(|kind| Finding { kind, class: Some(class), what: "it is so".into(), evidence: Vec::new() })
            .into_iter()
            .collect();
        serde_json::from_value(serde_json::json!({
            "findings": findings, "need": need, "differences": [], "snapshot": null, "ages_s": {},
            "version": null, "inputs": 1, "cpu_ms": 0.0, "wall_ms": 0.0
        }))
        .unwrap()
    }

    #[test]
    fn no_start_is_wasted_on_what_would_make_it_fail_although_nothing_can_be_repaired() {
        use engine::Class;
        for kind in [
            FaultKind::RuntimeUnfit,
            FaultKind::SchemaNewer,
            FaultKind::PortTaken,
            FaultKind::DiskFull,
            FaultKind::Permission,
        ] {
            for layer in [Layer::Restore, Layer::SystemInstall, Layer::UserInstall, Layer::PeerCopy] {
                let said = disk_allows_a_start(layer, &exam(Need::Nothing, Some(kind), Class::State));
                assert!(said.is_err_and(|why| why.contains("it is so")), "{kind:?} {layer}");
            }
        }
        let allows = |layer, need, kind, class| disk_allows_a_start(layer, &exam(need, kind, class)).is_ok();
        assert!(allows(Layer::Restore, Need::Nothing, None, Class::State));
        // A workspace that could not be brought back keeps nothing from serving.
        assert!(allows(Layer::Restore, Need::InPlace, Some(FaultKind::RootMissing), Class::Workspace));
        assert!(!allows(Layer::InPlace, Need::InPlace, Some(FaultKind::FilesDamaged), Class::Program));
        assert!(!allows(Layer::PeerCopy, Need::Interruption, Some(FaultKind::RootMissing), Class::State));
    }
}
