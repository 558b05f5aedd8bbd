//! Editing a CNI configuration: our entry in, our entry out, every other byte of meaning as it was.

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::{Value, value::RawValue};

/// The type of our entry, which is the plugin's file name.
pub const PLUGIN: &str = "fairway-cni";
/// What a list made from a single plugin says when that did not.
const OLDEST_VERSION: &str = "0.3.1";
const DEFAULT_NAME: &str = "k8s-pod-network";

/// A configuration no runtime would take either.
#[derive(Debug, thiserror::Error)]
pub enum ConfError {
    #[error("it is not a JSON object: {0}")]
    NotJson(#[from] serde_json::Error),
    #[error("it has two fields `{0}`")]
    Twice(&'static str),
    #[error("it has neither a list of plugins nor a type")]
    NoPlugin,
}

/// A configuration file as it was written, its fields in their order.
#[derive(Debug)]
pub struct Conf {
    fields: Vec<(String, Box<RawValue>)>,
    /// Of a single plugin's file: none.
    plugins: Option<Vec<Box<RawValue>>>,
    text: String,
}

impl Conf {
    pub fn parse(text: &str) -> Result<Self, ConfError> {
        let Fields(fields) = serde_json::from_str(text)?;
        for name in ["plugins", "type"] {
            if fields.iter().filter(|(n, _)| n == name).count() > 1 {
                return Err(ConfError::Twice(name));
            }
        }
        let find = |name: &str| fields.iter().find(|(n, _)| n == name).map(|(_, value)| value);
        let plugins: Option<Vec<Box<RawValue>>> =
            find("plugins").map(|list| serde_json::from_str(list.get())).transpose()?;
        let has_type = find("type").is_some_and(|t| serde_json::from_str(t.get()).is_ok_and(|t: String| !t.is_empty()));
        match &plugins {
            Some(plugins) if plugins.is_empty() => Err(ConfError::NoPlugin),
            None if !has_type => Err(ConfError::NoPlugin),
            _ => Ok(Self { plugins, text: text.to_owned(), fields }),
        }
    }

    /// Whether it is a list, which belongs into a `.conflist`.
    pub fn is_list(&self) -> bool {
        self.plugins.is_some()
    }

    /// The types of its plugins, in order.
    pub fn types(&self) -> Vec<String> {
        match &self.plugins {
            Some(plugins) => plugins.iter().map(|p| type_of(p)).collect(),
            None => self.text_field("type").into_iter().collect(),
        }
    }

    /// Whether it holds exactly this entry, behind a plugin that gives addresses.
    pub fn has(&self, entry: &Value) -> bool {
        let ours: Vec<(usize, Value)> = self.ours().collect();
        matches!(&ours[..], [(index, found)] if *index > 0 && found == entry)
    }

    /// Whether it holds any entry of ours.
    pub fn has_any(&self) -> bool {
        self.ours().next().is_some()
    }

    fn ours(&self) -> impl Iterator<Item = (usize, Value)> {
        let plugins = self.plugins.iter().flatten().enumerate().filter(|(_, p)| type_of(p) == PLUGIN);
        plugins.map(|(index, p)| (index, serde_json::from_str(p.get()).unwrap_or_default()))
    }

    /// The list with our entry as its last. A single plugin becomes a list of its name, by which address managers keep their records.
    pub fn with(&self, entry: &Value) -> String {
        let entry = format!("{entry:#}");
        match &self.plugins {
            Some(plugins) => {
                let others = plugins.iter().filter(|p| type_of(p) != PLUGIN).map(|p| p.get());
                let list = list(others.chain([entry.as_str()]));
                render(self.fields.iter().map(|(name, value)| (name.as_str(), pick(name, value, &list))))
            }
            None => {
                let version = self.text_field("cniVersion").filter(|v| !matches!(v.as_str(), "" | "0.1.0" | "0.2.0"));
                let version = Value::from(version.unwrap_or_else(|| OLDEST_VERSION.into())).to_string();
                let name = Value::from(self.text_field("name").unwrap_or_else(|| DEFAULT_NAME.into())).to_string();
                let list = list([self.text.trim(), entry.as_str()].into_iter());
                render([("cniVersion", version.as_str()), ("name", &name), ("plugins", &list)].into_iter())
            }
        }
    }

    /// Without our entries; `None` when nothing else is in it.
    pub fn without(&self) -> Option<String> {
        let Some(plugins) = &self.plugins else { return (self.types() != [PLUGIN]).then(|| self.text.clone()) };
        let others: Vec<&str> = plugins.iter().filter(|p| type_of(p) != PLUGIN).map(|p| p.get()).collect();
        let list = (!others.is_empty()).then(|| list(others.into_iter()))?;
        Some(render(self.fields.iter().map(|(name, value)| (name.as_str(), pick(name, value, &list)))))
    }

    fn text_field(&self, name: &str) -> Option<String> {
        let (_, value) = self.fields.iter().find(|(n, _)| n == name)?;
        serde_json::from_str(value.get()).ok()
    }
}

fn pick<'a>(name: &str, value: &'a RawValue, list: &'a str) -> &'a str {
    if name == "plugins" { list } else { value.get() }
}

/// Empty for what is no plugin.
fn type_of(plugin: &RawValue) -> String {
    #[derive(Deserialize)]
    struct Typed {
        #[serde(rename = "type", default)]
        kind: String,
    }
    serde_json::from_str(plugin.get()).map(|Typed { kind }| kind).unwrap_or_default()
}

fn list<'a>(plugins: impl Iterator<Item = &'a str>) -> String {
    let plugins: Vec<String> = plugins.map(|p| format!("    {}", indented(p))).collect();
    format!("[\n{}\n  ]", plugins.join(",\n"))
}

/// Multi-line entries of our own keep their shape; those of others are left as they are.
fn indented(plugin: &str) -> String {
    if plugin.starts_with("{\n  \"") { plugin.replace('\n', "\n    ") } else { plugin.to_owned() }
}

fn render<'a>(fields: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let fields: Vec<String> = fields.map(|(name, value)| format!("  {}: {value}", Value::from(name))).collect();
    format!("{{\n{}\n}}\n", fields.join(",\n"))
}

/// The fields of an object in the order of the text.
struct Fields(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Fields;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn entry() -> Value {
        json!({"name": PLUGIN, "type": PLUGIN, "cni_agent_run_dir": "/run"})
    }

    fn parse(text: &str) -> Conf {
        Conf::parse(text).expect("a configuration")
    }

    const LIST: &str = r#"{"zzz": 1.50, "cniVersion": "1.0.0", "name": "net",
        "plugins": [{"type": "bridge", "bridge": "cni0", "ipam": {"z": 1, "a": 2}}, {"type":"portmap","capabilities":{"portMappings":true}}],
        "disableCheck": true}"#;

    #[test]
    fn our_entry_comes_last_and_all_else_stays_in_place_and_order() {
        let edited = parse(LIST).with(&entry());
        assert_eq!(parse(&edited).types(), ["bridge", "portmap", PLUGIN]);
        let names: Vec<String> = parse(&edited).fields.into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["zzz", "cniVersion", "name", "plugins", "disableCheck"]);
        for kept in
            ["1.50", r#""ipam": {"z": 1, "a": 2}"#, r#"{"type":"portmap","capabilities":{"portMappings":true}}"#]
        {
            assert!(edited.contains(kept), "{kept} is missing in {edited}");
        }
        assert!(parse(&edited).has(&entry()) && !parse(LIST).has(&entry()));
    }

    #[test]
    fn an_older_entry_is_replaced_and_twice_is_once_too_often() {
        let mut old = entry();
        old["cni_agent_run_dir"] = "/elsewhere".into();
        let edited = parse(LIST).with(&old);
        assert!(!parse(&edited).has(&entry()) && parse(&edited).has_any());
        assert_eq!(parse(&parse(&edited).with(&entry())).types(), ["bridge", "portmap", PLUGIN]);
        let twice = json!({"plugins": [{"type": "bridge"}, entry(), entry()]}).to_string();
        assert!(!parse(&twice).has(&entry()));
        let first = json!({"plugins": [entry(), {"type": "bridge"}]}).to_string();
        assert!(!parse(&first).has(&entry()), "it needs the addresses of a plugin before it");
        let behind = json!({"plugins": [{"type": "bridge"}, entry(), {"type": "tuning"}]}).to_string();
        assert!(parse(&behind).has(&entry()), "one chained after ours harms nobody");
    }

    #[test]
    fn a_single_plugin_becomes_a_list_of_its_name() {
        for (single, name, version) in [
            (r#"{"cniVersion":"0.4.0","name":"mine","type":"bridge","x":[1]}"#, "mine", "0.4.0"),
            (r#"{"type":"bridge","x":[1]}"#, DEFAULT_NAME, "0.3.1"),
            (r#"{"cniVersion":"0.2.0","type":"bridge","x":[1]}"#, DEFAULT_NAME, "0.3.1"),
        ] {
            assert!(!parse(single).is_list());
            let made: Value = serde_json::from_str(&parse(single).with(&entry())).expect("JSON");
            assert_eq!((made["name"].as_str(), made["cniVersion"].as_str()), (Some(name), Some(version)));
            assert_eq!((&made["plugins"][0]["x"], &made["plugins"][1]), (&json!([1]), &entry()));
        }
    }

    #[test]
    fn taking_our_entry_out_leaves_the_rest_or_nothing() {
        let out = parse(&parse(LIST).with(&entry())).without().expect("others are in it");
        let value = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
        assert_eq!(value(&out), value(LIST));
        assert_eq!(parse(&json!({"plugins": [entry()]}).to_string()).without(), None);
        assert_eq!(parse(&entry().to_string()).without(), None);
        assert!(parse(r#"{"type":"bridge"}"#).without().is_some());
    }

    #[test]
    fn what_no_runtime_takes_is_refused() {
        for bad in ["", "[]", "{", "{}", r#"{"plugins":[]}"#, r#"{"plugins":7}"#, r#"{"type":""}"#, r#"{"type":7}"#] {
            Conf::parse(bad).expect_err(bad);
        }
        Conf::parse(r#"{"type":"a","type":"b"}"#).expect_err("two types");
    }

    fn plugin() -> impl Strategy<Value = Value> {
        ("(bridge|fairway-cni|portmap)", 0..9u32).prop_map(|(kind, n)| json!({"type": kind, "n": n}))
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "[{}\\[\\]\":,a-z0-9 \n\\\\]{0,60}") {
            drop(Conf::parse(&text).map(|conf| (conf.with(&entry()), conf.without())));
        }

        #[test]
        fn in_and_out_again_is_the_list_without_us(plugins in prop::collection::vec(plugin(), 1..5)) {
            let others: Vec<&Value> = plugins.iter().filter(|p| p["type"] != PLUGIN).collect();
            let text = json!({"name": "n", "plugins": plugins}).to_string();
            let edited = parse(&parse(&text).with(&entry()));
            prop_assert_eq!(edited.types().len(), others.len() + 1);
            prop_assert_eq!(edited.has(&entry()), !others.is_empty());
            prop_assert_eq!(&edited.with(&entry()), &edited.text, "a second time changes nothing");
            let out = edited.without().map(|out| serde_json::from_str::<Value>(&out).expect("JSON")["plugins"].clone());
            prop_assert_eq!(out, (!others.is_empty()).then(|| json!(others)));
        }
    }
}
