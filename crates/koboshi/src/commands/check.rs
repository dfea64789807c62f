//! `koboshi check`: one look at the node.

use super::desk::{Desk, Fields, findings_json, verdict_name, verdict_why};
use super::judging;
use crate::print::Exit;
use engine::Verdict;
use host::{Result, clock};
use node::{Confidence, Judgement, Node};
use serde_json::Value;

/// Probes once and says what was seen.
pub(super) fn run(desk: &Desk) -> Result<Exit> {
    let node = desk.node()?;
    let began = clock::now();
    let judgement = judging::look(desk, &node, &mut judging::judge(desk));
    let took_ms = clock::now().since_ms(began).unwrap_or(0);
    let p = desk.printer;
    p.line(headline(desk, &node, &judgement.verdict));
    if judgement.verdict.is_serving() && judgement.confidence == Confidence::Http {
        p.line("  judged by ownership and HTTP only: koboshi doctor says why");
    }
    let why = verdict_why(&judgement.verdict).unwrap_or_default();
    for finding in judgement.findings.iter().filter(|f| !why.contains(&f.what)) {
        p.line(format!("  {}", finding.what));
    }
    p.object(json(&node, &judgement).put("took_ms", took_ms as f64).done());
    Ok(exit(&judgement.verdict))
}

/// The exit code that goes with a verdict.
pub(super) fn exit(verdict: &Verdict) -> Exit {
    match verdict {
        Verdict::Serving { .. } => Exit::Done,
        Verdict::NotServing { .. } => Exit::Failed,
        Verdict::Inconclusive { .. } => Exit::Inconclusive,
    }
}

/// The verdict as one coloured line.
pub(super) fn headline(desk: &Desk, node: &Node, verdict: &Verdict) -> String {
    let p = desk.printer;
    let word = match verdict {
        Verdict::Serving { degraded } if degraded.is_empty() => p.green("serving"),
        Verdict::Serving { .. } => p.yellow("serving, degraded"),
        Verdict::NotServing { .. } => p.red("not serving"),
        Verdict::Inconclusive { .. } => p.yellow("not known yet"),
    };
    let why = verdict_why(verdict).map_or_else(String::new, |why| format!(": {why}"));
    format!("{} {word}{why}", p.bold(&node.name))
}

/// The node for JSON.
pub(super) fn node_json(node: &Node) -> Value {
    Fields::default()
        .put("name", node.name.as_str())
        .maybe("version", node.package_version().or_else(|| node.version.clone()))
        .put("port", node.port)
        .put("user", node.user.as_str())
        .put("prefix", node.prefix.display().to_string())
        .put("state_dir", node.state_dir.display().to_string())
        .maybe("unit", node.unit.as_ref().map(|u| u.name.clone()))
        .done()
}

fn json(node: &Node, judgement: &Judgement) -> Fields {
    Fields::default()
        .put("node", node_json(node))
        .put("verdict", verdict_name(&judgement.verdict))
        .maybe("why", verdict_why(&judgement.verdict))
        .put(
            "confidence",
            match judgement.confidence {
                Confidence::Full => "full",
                Confidence::Http => "http",
            },
        )
        .maybe("pid", judgement.process.map(|p| p.pid))
        .put("findings", findings_json(&judgement.findings))
}
