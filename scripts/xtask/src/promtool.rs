// SPDX-License-Identifier: GPL-2.0

//! What Prometheus itself says of the alert rules and of the dashboard's expressions.

use crate::env::{read, src, target, write};
use crate::ktap::Test;
use crate::setup;
use crate::step::{run, tied};
use anyhow::{ensure, Context, Result};
use serde_json::Value;
use std::path::Path;

/// The rules are good, each alert fires when it should, and every expression of the dashboard is one.
pub fn tests() -> Result<Vec<Test>> {
    let promtool = setup::unpacked("promtool")?.join("usr/bin/promtool");
    let rules = src("userspace-ctl/dist/thinram-alerts.yml");
    let panels = target("dashboard-rules.yml");
    let dashboard = read(src("userspace-ctl/dist/grafana-thinram.json"))?;
    write(&panels, as_rules(&serde_json::from_str(&dashboard)?)?)?;
    let cases = src("userspace-ctl/tests/alerts.yml");
    let mut tests = Vec::new();
    for (name, what, file) in [
        ("alert rules are good", "check", &rules),
        ("each alert fires when it should", "test", &cases),
        ("the dashboard's expressions are good", "check", &panels),
    ] {
        tests.push(match ask(&promtool, what, file) {
            Ok(()) => Test::pass(name),
            Err(e) => Test::fail(name, format!("{e:#}")),
        });
    }
    Ok(tests)
}

fn ask(promtool: &Path, what: &str, file: &Path) -> Result<()> {
    let mut command = tied(promtool);
    command.args([what, "rules"]).arg(file);
    run(target("promtool.log"), &mut command)
}

/// The dashboard's expressions as recording rules, with something in place of Grafana's variables.
fn as_rules(dashboard: &Value) -> Result<String> {
    let mut found = Vec::new();
    expressions(dashboard, &mut found);
    ensure!(!found.is_empty(), "the dashboard has no expression");
    let mut rules = Vec::new();
    for (nth, expression) in found.iter().enumerate() {
        let expression = expression.replace("$vm", ".*");
        ensure!(
            !expression.contains('$'),
            "a variable that is not known here: {expression}"
        );
        rules.push(serde_json::json!({"record": format!("panel:{nth}"), "expr": expression}));
    }
    // JSON is YAML.
    let groups = serde_json::json!({"groups": [{"name": "dashboard", "rules": rules}]});
    serde_json::to_string(&groups).context("rules")
}

fn expressions<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value.as_str().filter(|_| key == "expr") {
                    Some(expression) => found.push(expression),
                    None => expressions(value, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn expressions_become_rules() {
        let panel = |expr: &str| json!({"panels": [{"targets": [{"expr": expr, "refId": "A"}]}]});
        let rules = as_rules(&panel("up{vm=~\"$vm\"}")).unwrap();
        assert!(rules.contains(r#"up{vm=~\".*\"}"#), "{rules}");
        assert!(as_rules(&panel("rate(up[$__interval])")).is_err());
        assert!(as_rules(&json!({"panels": []})).is_err());
    }
}
