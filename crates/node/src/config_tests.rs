use super::*;
use crate::find::tests::node_at;

fn with_config(text: &str) -> (tempfile::TempDir, Node) {
    let dir = tempfile::tempdir().expect("dir");
    let node = node_at(dir.path());
    std::fs::create_dir_all(&node.state_dir).expect("mkdir");
    std::fs::write(&node.config_path, text).expect("write");
    (dir, node)
}

#[test]
fn json5_is_read_within_bounds() {
    let good = "\u{feff}// a comment\n{gateway: {mode: 'local', port: 1_0,},}".replace("1_0", "10");
    assert_eq!(parse(good.as_bytes()).expect("json5").pointer("/gateway/port"), Some(&Value::from(10)));
    for bad in ["", "  \n", "\0\0\0", "{", "{a:1} b", "\u{feff}"] {
        assert_eq!(parse(bad.as_bytes()).map_err(|e| e.kind).err(), Some(Kind::Corrupt), "{bad:?}");
    }
    assert!(parse(&[0xff, 0xfe, b'{', b'}']).is_err());
    assert!(parse("[".repeat(100_000).as_bytes()).is_err(), "depth is bounded before the parser recurses");
    let quoted = format!("{{a: \"{}\" /* {} */}}", "[".repeat(500), "{".repeat(500));
    assert!(parse(quoted.as_bytes()).is_ok(), "brackets in text are no nesting");
}

#[test]
fn includes_are_merged_and_bounded() {
    let (_dir, node) =
        with_config(r#"{"$include": "a.json5", gateway: {port: 2, auth: {"$include": ["b.json5"]}}}"#);
    std::fs::write(node.state_dir.join("a.json5"), "{gateway: {mode: 'local', port: 1}}").expect("write");
    std::fs::write(node.state_dir.join("b.json5"), "{token: 't'}").expect("write");
    let loaded = load(&node).expect("config");
    assert_eq!(loaded.value.pointer("/gateway/mode"), Some(&Value::from("local")));
    assert_eq!(loaded.value.pointer("/gateway/port"), Some(&Value::from(2)), "what stands in the file wins");
    assert_eq!(loaded.value.pointer("/gateway/auth/token"), Some(&Value::from("t")));
    assert_eq!(loaded.files.len(), 3);
    let (_dir, circle) = with_config(r#"{"$include": "openclaw.json"}"#);
    assert!(load(&circle).is_err());
}

#[test]
fn a_fingerprint_is_of_the_meaning() {
    let of = |text: &str| fingerprint(&parse(text.as_bytes()).expect("json5"));
    assert_eq!(of("{a: 1, b: [2, 'x']}"), of("{ \"b\": [2,\"x\"], // c\n \"a\": 1 }"));
    assert_ne!(of("{a: 1}"), of("{a: 2}"));
    assert_ne!(of("{a: '1'}"), of("{a: 1}"));
    assert_ne!(of("{a: [1, 2]}"), of("{a: [2, 1]}"));
}

#[test]
fn the_token_is_found_where_the_gateway_finds_it() {
    type Case = (&'static str, &'static str, Token);
    let token = |s: &str| Token::Token(s.into());
    let cases: Vec<Case> = vec![
        ("{gateway:{auth:{mode:'token',token:'lit'}}}", "", token("lit")),
        ("{gateway:{auth:{token:'${GW}'}}}", "GW=fromenv\n", token("fromenv")),
        ("{gateway:{auth:{token:'$GW'}}}", "export GW='quo ted' # c\n", token("quo ted")),
        ("{env:{vars:{GW:'inline'}},gateway:{auth:{token:'${GW}'}}}", "", token("inline")),
        ("{gateway:{auth:{token:{source:'env',provider:'default',id:'GW'}}}}", "GW=ref\n", token("ref")),
        ("{gateway:{auth:{}}}", "OPENCLAW_GATEWAY_TOKEN=bare\n", token("bare")),
        ("{gateway:{auth:{mode:'password',password:'pw'}}}", "", Token::Password("pw".into())),
        ("{gateway:{auth:{password:'pw'}}}", "", Token::Password("pw".into())),
        ("{gateway:{auth:{mode:'none'}}}", "", Token::Open),
        (
            "{secrets:{providers:{f:{source:'file',path:'~/s.json'}}},gateway:{auth:{token:{source:'file',provider:'f',id:'/gw/t'}}}}",
            "",
            token("infile"),
        ),
    ];
    for (config, env, want) in cases {
        let (_dir, node) = with_config(config);
        std::fs::write(node.state_dir.join(".env"), env).expect("write");
        std::fs::write(node.home.join("s.json"), r#"{"gw":{"t":"infile"}}"#).expect("write");
        assert_eq!(super::token(&node).0, want, "{config}");
    }
    for hopeless in [
        "{gateway:{auth:{token:'${MISSING}'}}}",
        "{gateway:{auth:{token:'a${B}c'}}}",
        "{gateway:{auth:{token:{source:'exec',provider:'x',id:'y'}}}}",
        "{gateway:{auth:{mode:'trusted-proxy'}}}",
        "{gateway:{auth:{token:5}}}",
        "{gateway:{}}",
        "{",
    ] {
        let (_dir, node) = with_config(hopeless);
        let (token, source) = super::token(&node);
        assert!(matches!(token, Token::Unknown(_)), "{hopeless}");
        assert!(matches!(source, TokenSource::None { .. }), "{hopeless}");
    }
}

#[test]
fn env_files_are_read_as_written() {
    let vars = parse_env("# c\nA=1\nexport B=\"x y\"\nC='z # no'\nD=v # comment\nBAD KEY=1\nE=\n=f\nF=a=b\n");
    let get = |k: &str| vars.get(k).map(String::as_str);
    assert_eq!((get("A"), get("B"), get("C"), get("D")), (Some("1"), Some("x y"), Some("z # no"), Some("v")));
    assert_eq!((get("E"), get("F"), vars.len()), (Some(""), Some("a=b"), 6));
}

#[test]
fn ports_come_from_environment_config_or_profile() {
    let config = parse(b"{gateway:{port:5000}}").expect("json5");
    assert_eq!(port(Some(&config), Some("6000"), None), 6_000);
    assert_eq!(port(Some(&config), Some("127.0.0.1:6001"), None), 6_001);
    assert_eq!(port(Some(&config), Some("rubbish"), None), 5_000);
    assert_eq!(port(None, None, None), crate::DEFAULT_PORT);
    let rescue = port(None, None, Some("rescue"));
    assert!((20_000..60_000).contains(&rescue));
    assert_ne!(rescue, port(None, None, Some("ops")));
}

#[test]
fn a_bare_lan_bind_counts_only_without_any_token() {
    let text = "{gateway:{mode:'local',bind:'lan'}}";
    let (_dir, node) = with_config(text);
    assert_eq!(check(&node).len(), 1);
    std::fs::write(node.state_dir.join(".env"), "OPENCLAW_GATEWAY_TOKEN=t\n").expect("write");
    assert_eq!(check(&node), []);
}
