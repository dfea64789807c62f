use super::*;
use crate::find::tests::node_at;

fn answer(status: u16, content_type: &str, body: &str) -> Result<Response, HttpError> {
    Ok(Response { status, content_type: content_type.into(), body: body.into() })
}

const JSON: &str = "application/json";

#[test]
fn healthz_must_be_right_in_status_type_and_body() {
    assert_eq!(read_health(answer(200, JSON, r#"{"ok":true,"status":"live"}"#)), Health::Live);
    for wrong in [
        answer(200, "text/html", "<!doctype html>"),
        answer(200, "text/html", r#"{"ok":true,"status":"live"}"#),
        answer(200, "", r#"{"ok":true,"status":"live"}"#),
        answer(200, JSON, r#"{"ok":true}"#),
        answer(200, JSON, r#"{"ok":"true","status":"live"}"#),
        answer(200, JSON, "not json"),
        answer(404, "text/plain", "no"),
        answer(503, JSON, r#"{"ok":true,"status":"live"}"#),
        answer(503, JSON, r#"{"emergency":true}"#),
        Err(HttpError::Garbage { why: "SSH".into() }),
    ] {
        assert!(matches!(read_health(wrong.clone()), Health::Wrong { .. }), "{wrong:?}");
    }
    assert_eq!(read_health(Err(HttpError::Refused)), Health::Refused);
    assert_eq!(read_health(Err(HttpError::TimedOut { connected: true })), Health::Silent);
}

#[test]
fn startupz_has_three_words() {
    let started = r#"{"ok":true,"status":"started","version":"2026.9.6","uptimeMs":5430}"#;
    assert_eq!(
        read_startup(answer(200, JSON, started)),
        Startup::Started { version: Some("2026.9.6".into()) }
    );
    let starting = r#"{"ok":false,"status":"starting","pendingReason":"startup-sidecars"}"#;
    assert_eq!(read_startup(answer(503, JSON, starting)), Startup::Starting);
    assert_eq!(read_startup(answer(503, JSON, r#"{"ok":false,"status":"draining"}"#)), Startup::Draining);
    for wrong in [answer(200, JSON, starting), answer(503, JSON, started), answer(200, "text/html", "<html>")]
    {
        assert!(matches!(read_startup(wrong), Startup::Wrong { .. }));
    }
}

#[test]
fn readyz_names_what_fails() {
    let recorded = r#"{"ready":true,"failing":[],"uptimeMs":536416,"eventLoop":{"degraded":false}}"#;
    let none = |ready| Ready::Answer { ready, failing: vec![], suppressed: vec![] };
    assert_eq!(read_ready(answer(200, JSON, recorded)), none(true));
    let failing = r#"{"ready":false,"failing":["telegram"],"suppressed":["discord"]}"#;
    assert_eq!(
        read_ready(answer(503, JSON, failing)),
        Ready::Answer { ready: false, failing: vec!["telegram".into()], suppressed: vec!["discord".into()] }
    );
    for wrong in [
        answer(503, JSON, r#"{"ready":false}"#),
        answer(503, JSON, r#"{"error":"emergency"}"#),
        answer(500, JSON, recorded),
        answer(200, "text/html", "<html>"),
    ] {
        assert!(matches!(read_ready(wrong), Ready::Wrong { .. }));
    }
}

#[test]
fn a_node_that_is_not_there_is_seen_as_such() {
    let dir = tempfile::tempdir().expect("dir");
    let node = node_at(dir.path());
    let seen = look(
        &node,
        &Want { hello: true, identity: true, ..Want::default() },
        Deadline::after(Duration::from_secs(5)),
    );
    assert_eq!(seen.process, None);
    assert_eq!(seen.listening, Listening::Nobody);
    assert_eq!(seen.health, Health::Refused);
    assert!(matches!(seen.identity, Some(IdentityLook::Unreadable { .. })));
    assert_eq!(seen.our_side, None);
}

#[test]
fn a_stranger_on_the_port_is_a_stranger() {
    let dir = tempfile::tempdir().expect("dir");
    let mut node = node_at(dir.path());
    let (port, server) =
        crate::http::tests::serve(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>", true);
    node.port = port;
    let seen = look(&node, &Want::default(), Deadline::after(Duration::from_secs(5)));
    // The server is this test itself, which is no gateway: no lock names it and it runs no Node.
    assert!(
        matches!(seen.listening, Listening::Stranger { who: Some(p), .. } if p.pid == std::process::id())
    );
    assert!(matches!(seen.health, Health::Wrong { .. }));
    drop(server);
}

#[test]
fn no_time_is_our_own_failure() {
    let dir = tempfile::tempdir().expect("dir");
    let seen = look(&node_at(dir.path()), &Want::default(), Deadline::after(Duration::ZERO));
    assert!(seen.our_side.is_some());
}

#[test]
fn a_lock_names_the_process_while_it_lives() {
    let dir = tempfile::tempdir().expect("dir");
    let node = node_at(dir.path());
    let us = ProcessId::current().expect("us");
    let file = lock::path(&node.state_dir, node.ids.uid);
    std::fs::create_dir_all(file.parent().expect("parent")).expect("mkdir");
    let write = |id: ProcessId| {
        let text =
            format!(r#"{{"pid":{},"startTime":{},"configPath":"/c","port":1}}"#, id.pid, id.start_ticks);
        std::fs::write(&file, text).expect("write");
    };
    write(us);
    let seen = process(&node, &Want::default(), None).expect("a process");
    assert!(seen.by_lock && seen.uid_right && seen.id == us);
    write(ProcessId { start_ticks: us.start_ticks + 1, ..us });
    assert_eq!(process(&node, &Want::default(), None), None, "a recycled pid is nobody");
    let other = process(&node, &Want { main: Some(us), ..Want::default() }, None).expect("a process");
    assert!(!other.by_lock);
}

#[test]
fn a_proxy_on_an_address_of_its_own_is_neither_the_gateway_nor_a_stranger_in_its_way() {
    let proxy = std::net::TcpListener::bind("127.0.0.2:0").expect("bind");
    let dir = tempfile::tempdir().expect("dir");
    let mut node = crate::find::tests::node_at(dir.path());
    node.port = proxy.local_addr().expect("address").port();
    let look = look(&node, &Want::default(), Deadline::after(Duration::from_secs(5)));
    assert_eq!((look.listening, look.health), (Listening::Nobody, Health::Refused));
}

#[test]
fn an_update_that_was_searched_for_a_moment_ago_is_taken_over() {
    let dir = tempfile::tempdir().expect("dir");
    let node = crate::find::tests::node_at(dir.path());
    let found = UpdateAtWork { what: "npm writes".into(), progress: 7 };
    for searched in [Some(found), None] {
        let want = Want { update: true, searched: Some(searched.clone()), ..Want::default() };
        assert_eq!(look(&node, &want, Deadline::after(Duration::from_secs(5))).update, searched);
    }
}
