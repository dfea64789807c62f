//! Whom the node itself writes to, and with what: the chat tokens of its config and the owners that it lists, so that
//! the node's people can still be told when the node is dead.
//!
//! Called while the node is well, on a thread that is the node's user ([`host::user::as_user`]): the config says which
//! files are read and which program is run, and it belongs to that user. Only sending is ever done with what is found.

use super::{SECRET_LIMIT_BYTES, Variables, load, regular, resolve};
use crate::Node;
use host::clock::Deadline;
use host::run::{Cmd, run};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Contacts kept: more than this many people are not woken.
const CONTACTS_LIMIT: usize = 8;
/// People told through one account.
const TARGETS_LIMIT: usize = 3;
/// Accounts of one chat service that are looked at.
const ACCOUNTS_LIMIT: usize = 16;
/// A program that gives a secret has this long; the gateway itself gives it 5 s unless told otherwise.
const EXEC_LIMIT: Duration = Duration::from_secs(10);
/// Longest token accepted.
const TOKEN_LIMIT_BYTES: usize = 4_096;

/// A chat service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// Telegram.
    Telegram,
    /// Discord.
    Discord,
    /// Slack.
    Slack,
}

impl Service {
    /// Its key under `channels`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Service::Telegram => "telegram",
            Service::Discord => "discord",
            Service::Slack => "slack",
        }
    }

    fn token_key(self) -> &'static str {
        match self {
            Service::Telegram | Service::Slack => "botToken",
            Service::Discord => "token",
        }
    }

    fn variable(self) -> &'static str {
        match self {
            Service::Telegram => "TELEGRAM_BOT_TOKEN",
            Service::Discord => "DISCORD_BOT_TOKEN",
            Service::Slack => "SLACK_BOT_TOKEN",
        }
    }

    /// A listed person as the service's interface knows them; `None` for what cannot be written to (`*`, a name).
    fn person(self, listed: &Value) -> Option<String> {
        let text = match listed {
            Value::String(text) => text.trim().to_owned(),
            Value::Number(n) => n.to_string(),
            Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => return None,
        };
        let bare = ["telegram:", "tg:", "discord:", "slack:", "user:"]
            .into_iter()
            .fold(text.as_str(), |t, prefix| t.strip_prefix(prefix).unwrap_or(t));
        let sound = match self {
            Service::Telegram | Service::Discord => bare.bytes().all(|b| b.is_ascii_digit()),
            Service::Slack => bare.starts_with(['U', 'W']) && bare.bytes().all(|b| b.is_ascii_alphanumeric()),
        };
        (sound && !bare.is_empty() && bare.len() <= 32).then(|| bare.to_owned())
    }
}

/// One person who can be written to through one bot.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contact {
    /// Through what.
    pub service: Service,
    /// The bot's token.
    pub token: String,
    /// The person's id.
    pub to: String,
    /// Another API server, where the config names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_root: Option<String>,
}

impl std::fmt::Debug for Contact {
    /// Without the token; whom it leads to is nobody's business either.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contact").field("service", &self.service).finish_non_exhaustive()
    }
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contacts {
    /// In the order in which they stand in the config.
    pub found: Vec<Contact>,
    /// Why an account that is configured gave nothing, one line each, without secrets.
    pub missing: Vec<String>,
}

/// Reads the node's chat accounts and resolves their tokens. `Err` when the config cannot be read: then what is known
/// from before stands.
pub fn contacts(node: &Node, deadline: Deadline) -> host::Result<Contacts> {
    let config = load(node)?.value;
    let look = Looking { node, config: &config, vars: Variables::of(node, &config), deadline };
    let mut all = Contacts::default();
    for service in [Service::Telegram, Service::Discord, Service::Slack] {
        look.service(service, &mut all);
    }
    Ok(all)
}

struct Looking<'a> {
    node: &'a Node,
    config: &'a Value,
    vars: Variables,
    deadline: Deadline,
}

impl Looking<'_> {
    fn service(&self, service: Service, all: &mut Contacts) {
        let Some(channel) = self.config.pointer("/channels").and_then(|c| c.get(service.name())) else {
            return;
        };
        if disabled(channel) {
            return;
        }
        let none = serde_json::Map::new();
        let accounts = channel.get("accounts").and_then(Value::as_object).unwrap_or(&none);
        let named = accounts.iter().take(ACCOUNTS_LIMIT).filter(|(_, account)| !disabled(account));
        for (name, account) in
            std::iter::once(("default", channel)).chain(named.map(|(n, a)| (n.as_str(), a)))
        {
            let token = match self.token(service, name, account) {
                Ok(Some(token)) => token,
                Ok(None) => continue,
                Err(why) => {
                    all.missing.push(format!("{} ({name}): {why}", service.name()));
                    continue;
                }
            };
            let people = people(service, account).or_else(|| people(service, channel)).unwrap_or_default();
            if people.is_empty() {
                all.missing.push(format!("{} ({name}): its config lists nobody to write to", service.name()));
            }
            let root = |from: &Value| from.get("apiRoot").and_then(Value::as_str).map(str::to_owned);
            for to in people.into_iter().take(TARGETS_LIMIT) {
                let api_root = root(account).or_else(|| root(channel));
                let contact = Contact { service, token: token.clone(), to, api_root };
                if all.found.len() < CONTACTS_LIMIT && !all.found.contains(&contact) {
                    all.found.push(contact);
                }
            }
        }
    }

    /// The account's token; `None` when it names none of its own.
    fn token(&self, service: Service, name: &str, account: &Value) -> Result<Option<String>, String> {
        let of_file =
            account.get("tokenFile").and_then(Value::as_str).filter(|_| service == Service::Telegram);
        let found = match (account.get(service.token_key()), of_file) {
            (Some(secret), _) => self.secret(secret)?,
            (None, Some(path)) => token_file(&self.path(path))?,
            // The environment speaks for the default account only.
            (None, None) if name == "default" => match self.vars.get(service.variable()) {
                Some((token, _)) => token,
                None => return Ok(None),
            },
            (None, None) => return Ok(None),
        };
        let token = found.trim();
        if token.is_empty() || token.len() > TOKEN_LIMIT_BYTES || !token.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err("its token is not one".into());
        }
        Ok(Some(token.to_owned()))
    }

    fn secret(&self, secret: &Value) -> Result<String, String> {
        if secret.get("source").and_then(Value::as_str) == Some("exec") {
            return self.exec(secret);
        }
        resolve(secret, self.node, self.config, &self.vars).map(|(token, _)| token)
    }

    fn path(&self, path: &str) -> PathBuf {
        match path.strip_prefix("~/") {
            Some(rest) => self.node.home.join(rest),
            None => self.node.state_dir.join(path),
        }
    }

    /// Runs the program that the provider names, directly and without a shell, as the gateway does.
    fn exec(&self, reference: &Value) -> Result<String, String> {
        let of = |key: &str| reference.get(key).and_then(Value::as_str);
        let id = of("id").filter(|id| !id.is_empty()).ok_or("its reference has no id")?;
        let default = self.config.pointer("/secrets/defaults/exec").and_then(Value::as_str);
        let provider = of("provider").or(default).unwrap_or("default");
        let spec = self
            .config
            .pointer("/secrets/providers")
            .and_then(|p| p.get(provider))
            .ok_or_else(|| format!("the secret provider {provider:?} is not configured"))?;
        let command = spec.get("command").and_then(Value::as_str).ok_or("its provider names no command")?;
        if !Path::new(command).is_absolute() {
            return Err("its provider's command is no absolute path".into());
        }
        let texts = |key: &str| -> Vec<String> {
            let list = spec.get(key).and_then(Value::as_array).into_iter().flatten();
            list.filter_map(Value::as_str).map(str::to_owned).take(64).collect()
        };
        let own = self.node.command().env;
        let mut env: Vec<(std::ffi::OsString, std::ffi::OsString)> = Vec::new();
        for name in texts("passEnv") {
            let value = self.vars.get(&name).map(|(v, _)| v);
            let value = value.or_else(|| own.iter().find(|(k, _)| *k == name).map(|(_, v)| v.clone()));
            env.extend(value.map(|v| (name.into(), v.into())));
        }
        for (name, value) in spec.get("env").and_then(Value::as_object).into_iter().flatten().take(64) {
            env.extend(value.as_str().map(|v| (name.into(), v.into())));
        }
        let ask = json!({ "protocolVersion": 1, "provider": provider, "ids": [id] });
        let cmd = Cmd {
            env,
            env_clear: true,
            cwd: Some("/".into()),
            input: ask.to_string().into_bytes(),
            ..Cmd::new(command, texts("args"))
        };
        // What it says may be the secret or hold it: nothing of it goes into an error.
        let said = run(&cmd, self.deadline.min(Deadline::after(EXEC_LIMIT)))
            .map_err(|_| "its provider's program cannot be run".to_owned())?;
        if !said.ok() {
            return Err("its provider's program failed or took too long".into());
        }
        let text =
            String::from_utf8(said.stdout).map_err(|_| "its provider's answer is not text".to_owned())?;
        match serde_json::from_str::<Value>(&text) {
            Ok(answer) if answer.is_object() => answer
                .get("values")
                .and_then(|v| v.get(id))
                .and_then(Value::as_str)
                .map(str::to_owned)
                .ok_or_else(|| "its provider's answer holds no such secret".into()),
            _ if spec.get("jsonOnly") == Some(&Value::Bool(false)) => Ok(text),
            Ok(_) | Err(_) => Err("its provider's answer is not the JSON it should be".into()),
        }
    }
}

fn disabled(channel: &Value) -> bool {
    channel.get("enabled") == Some(&Value::Bool(false))
}

/// The people that an account lists as its owners; `None` when it has no such list.
fn people(service: Service, account: &Value) -> Option<Vec<String>> {
    let list = account.get("allowFrom").or_else(|| account.pointer("/dm/allowFrom"))?.as_array()?;
    Some(list.iter().take(256).filter_map(|listed| service.person(listed)).collect())
}

fn token_file(path: &Path) -> Result<String, String> {
    let bytes = regular(path, SECRET_LIMIT_BYTES).map_err(|_| "its tokenFile cannot be read".to_owned())?;
    String::from_utf8(bytes).map_err(|_| "its tokenFile is not text".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find::tests::node_at;
    use std::os::unix::fs::PermissionsExt;

    fn look(config: &str, env: &str) -> (Contacts, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let node = node_at(dir.path());
        std::fs::create_dir_all(&node.state_dir).unwrap();
        let config = config.replace("@", &dir.path().display().to_string());
        std::fs::write(&node.config_path, config).unwrap();
        std::fs::write(node.state_dir.join(".env"), env).unwrap();
        std::fs::write(node.home.join("token"), "7:file\n").unwrap();
        let helper = dir.path().join("helper");
        std::fs::write(
            &helper,
            "#!/bin/sh\nread ask\ncase \"$ask\" in *'\"ids\":[\"bots/tg\"]'*) \
             echo \"{\\\"protocolVersion\\\":1,\\\"values\\\":{\\\"bots/tg\\\":\\\"9:exec$1$GIVEN$HIDDEN\\\"}}\";; \
             *) echo plain;; esac\n",
        )
        .unwrap();
        std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
        (contacts(&node, Deadline::after(Duration::from_secs(20))).unwrap(), dir)
    }

    fn said(contacts: &Contacts) -> Vec<String> {
        contacts.found.iter().map(|c| format!("{} {} {}", c.service.name(), c.token, c.to)).collect()
    }

    #[test]
    fn tokens_are_found_wherever_the_config_may_name_them() {
        let owners = "allowFrom: [42, 'tg:43', '@name', '*', 'telegram:44', 45]";
        for (config, env, wanted) in [
            ("{telegram: {botToken: '1:lit', OWN}}", "", "1:lit"),
            ("{telegram: {botToken: '${TG}', OWN}}", "TG=2:env", "2:env"),
            ("{telegram: {OWN}}", "TELEGRAM_BOT_TOKEN=3:bare", "3:bare"),
            ("{telegram: {tokenFile: '~/token', OWN}}", "", "7:file"),
            (
                "{telegram: {botToken: {source: 'env', provider: 'default', id: 'TG'}, OWN}}",
                "TG=4:ref",
                "4:ref",
            ),
            (
                "{telegram: {OWN, accounts: {work: {botToken: '5:acc'}, off: {enabled: false, botToken: '6:no'}}}}",
                "",
                "5:acc",
            ),
        ] {
            let config = format!("{{channels: {}}}", config.replace("OWN", owners));
            let (got, _dir) = look(&config, env);
            let wanted: Vec<String> = [42, 43, 44].map(|to| format!("telegram {wanted} {to}")).into();
            assert_eq!(said(&got), wanted, "{config}: {:?}", got.missing);
        }
    }

    #[test]
    fn other_services_and_what_cannot_be_used() {
        let (got, _dir) = look(
            "{channels: {discord: {token: 'd', dm: {allowFrom: ['user:77', 'name']}},
              slack: {botToken: 'xoxb', allowFrom: ['U1', 'C2']},
              telegram: {enabled: false, botToken: '1:off', allowFrom: [1]}}}",
            "",
        );
        assert_eq!(said(&got), ["discord d 77", "slack xoxb U1"]);
        let (got, _dir) = look(
            "{channels: {telegram: {botToken: '${GONE}', allowFrom: [1]}, discord: {token: 'd', allowFrom: ['*']},
              slack: {botToken: 'two words', allowFrom: ['U1']}}}",
            "",
        );
        assert!(got.found.is_empty());
        assert_eq!(got.missing.len(), 3, "{:?}", got.missing);
        assert!(!format!("{got:?}").contains("two words"));
        let (got, _dir) = look(
            "{channels: {telegram: {botToken: '1:a', allowFrom: [1], apiRoot: 'https://tg.example'}}}",
            "",
        );
        assert_eq!(got.found[0].api_root.as_deref(), Some("https://tg.example"));
        assert!(!format!("{got:?}").contains("1:a"), "{got:?}");
    }

    #[test]
    fn a_program_gives_the_secret_with_no_more_than_it_is_allowed() {
        let channel =
            "channels: {telegram: {botToken: {source: 'exec', provider: 'vault', id: 'ID'}, allowFrom: [1]}}";
        let provider = |more: &str| {
            format!(
                "{{{channel}, secrets: {{providers: {{vault: {{source: 'exec', command: '@/helper', args: ['-a'], passEnv: ['GIVEN'] {more}}}}}}}}}"
            )
        };
        let (got, _dir) = look(&provider("").replace("ID", "bots/tg"), "GIVEN=-g\nHIDDEN=-h\n");
        assert_eq!(said(&got), ["telegram 9:exec-a-g 1"], "{:?}", got.missing);
        let (got, _dir) = look(&provider("").replace("ID", "other"), "");
        assert!(got.found.is_empty() && got.missing[0].contains("JSON"), "{:?}", got.missing);
        let (got, _dir) = look(&provider(", jsonOnly: false").replace("ID", "other"), "");
        assert_eq!(said(&got), ["telegram plain 1"]);
        let (got, _dir) = look(&provider("").replace("@/helper", "helper"), "");
        assert!(got.missing[0].contains("absolute"), "{:?}", got.missing);
    }
}
