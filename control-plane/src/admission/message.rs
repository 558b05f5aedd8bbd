//! AdmissionReview, `admission.k8s.io/v1`: as much of it as is asked and answered.

use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

use super::judgement::Judgement;

const API_VERSION: &str = "admission.k8s.io/v1";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Review<'a> {
    api_version: String,
    kind: String,
    #[serde(borrow)]
    request: Option<Request<'a>>,
}

/// What shall happen to which object.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Request<'a> {
    uid: String,
    pub(super) kind: Kind,
    #[serde(default)]
    pub(super) sub_resource: Option<String>,
    #[serde(default)]
    pub(super) operation: String,
    #[serde(borrow, default)]
    pub(super) object: Option<&'a RawValue>,
    /// Of an update.
    #[serde(borrow, default)]
    pub(super) old_object: Option<&'a RawValue>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Kind {
    #[serde(default)]
    pub(super) group: String,
    pub(super) kind: String,
}

/// # Errors
/// What is wrong with the request itself; whose author is no user, but an API server, or none.
pub(super) fn read(body: &[u8]) -> Result<Request<'_>, String> {
    let review: Review<'_> = serde_json::from_slice(body).map_err(|error| format!("no AdmissionReview: {error}"))?;
    let Review { api_version, kind, request } = review;
    if api_version != API_VERSION || kind != "AdmissionReview" {
        return Err(format!("expected an AdmissionReview of {API_VERSION}"));
    }
    request.ok_or_else(|| "the AdmissionReview has no request".to_owned())
}

pub(super) fn answer(request: &Request<'_>, judgement: &Judgement) -> Value {
    let mut response = json!({"uid": request.uid, "allowed": true});
    match judgement {
        Judgement::Allowed => {}
        Judgement::Warned(warnings) => response["warnings"] = json!(warnings),
        Judgement::Passed(None) => {}
        Judgement::Passed(Some(why)) => response["warnings"] = json!([why]),
        Judgement::Denied(message) => {
            response["allowed"] = json!(false);
            response["status"] = json!({"code": 422, "reason": "Invalid", "message": message});
        }
    }
    json!({"apiVersion": API_VERSION, "kind": "AdmissionReview", "response": response})
}
