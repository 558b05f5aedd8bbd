//! What several kinds have in common.

use std::{borrow::Cow, collections::BTreeMap};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

/// A port number.
#[derive(JsonSchema)]
pub(super) struct Port(#[schemars(range(min = 1, max = 65535))] u32);

/// Which workloads are meant.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase")]
pub(super) struct WorkloadSelector {
    /// Labels that a workload must have, all of them.
    #[schemars(extend("maxProperties" = 4096, "x-kubernetes-validations" = [
        {"rule": "self.all(key, key.size() > 0)", "message": "a label needs a name"},
        {"rule": "self.all(key, !key.contains('*'))", "message": "a selector knows no wildcards: write the label's whole name"},
    ]))]
    match_labels: Option<BTreeMap<String, LabelValue>>,
}

#[derive(JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "!self.contains('*')", "message": "a selector knows no wildcards: write the label's whole value"},
]))]
pub(super) struct LabelValue(#[schemars(length(max = 63))] String);

/// What has become of the object; written by controllers.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase", extend("x-kubernetes-preserve-unknown-fields" = true))]
pub(super) struct Status {
    /// What is true of the object now.
    conditions: Option<Vec<Condition>>,
    /// The generation of the object that this is about.
    observed_generation: Option<Generation>,
    /// What analysers found.
    validation_messages: Option<Vec<ValidationMessage>>,
}

#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase")]
pub(super) struct Condition {
    /// When it was last asked for.
    last_probe_time: Option<Time>,
    /// When `status` last changed.
    last_transition_time: Option<Time>,
    /// The reason, for people.
    message: Option<String>,
    /// The generation of the object that this is about.
    observed_generation: Option<Generation>,
    /// The reason, in one word.
    reason: Option<String>,
    /// True, False or Unknown.
    status: Option<String>,
    /// What the condition is about.
    #[schemars(rename = "type")]
    about: Option<String>,
}

#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase")]
pub(super) struct ValidationMessage {
    /// Where the message is explained.
    documentation_url: Option<String>,
    /// How bad it is.
    level: Option<Level>,
    /// Which message it is.
    #[schemars(rename = "type")]
    about: Option<MessageType>,
}

#[derive(JsonSchema)]
#[schemars(rename_all = "UPPERCASE")]
pub(super) enum Level {
    Unknown,
    Error,
    Warning,
    Info,
}

#[derive(JsonSchema)]
pub(super) struct MessageType {
    /// Its number.
    code: Option<String>,
    /// Its name.
    name: Option<String>,
}

/// RFC 3339.
struct Time;

impl JsonSchema for Time {
    fn schema_name() -> Cow<'static, str> {
        "Time".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "format": "date-time"})
    }
}

/// A 64-bit number, which protobuf's JSON writes as text.
struct Generation;

impl JsonSchema for Generation {
    fn schema_name() -> Cow<'static, str> {
        "Generation".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": true})
    }
}
