//! One request, one answer.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header::CONTENT_TYPE};
use serde_json::{Value, json};

use super::{
    Mood, Shared, follow, lock, patch,
    request::{Asked, Target},
    store::{Key, Store},
};

pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

pub(super) async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let asked = Asked {
        method: parts.method,
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        body: String::from_utf8_lossy(&body).into_owned(),
    };
    lock(&shared.asked).push(asked.clone());
    let mood = shared.mood.subscribe().wait_for(|mood| *mood != Mood::Frozen).await.map(|mood| *mood);
    let refused = match mood {
        Ok(Mood::Refusing(code)) => Some(code),
        _ => lock(&shared.refuse).as_ref().and_then(|rule| rule(&asked)),
    };
    if let Some(code) = refused {
        let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        return Ok(status(code, "AsTheTestWantsIt"));
    }
    if asked.path == "/version" {
        return Ok(json_answer(StatusCode::OK, json!({"gitVersion": "v1.34.0", "minor": "34"}).to_string()));
    }
    let Some(target) = Target::of(&parts.uri).filter(|target| lock(&shared.store).knows(&target.resource)) else {
        return Ok(status(StatusCode::NOT_FOUND, "NotFound"));
    };
    if asked.method == Method::GET && target.is_watch() {
        return Ok(follow::watch(shared, target));
    }
    let kind = parts.headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let response = work(&mut lock(&shared.store), &asked, &target, kind, shared.options.page);
    shared.announce();
    Ok(response)
}

fn work(store: &mut Store, asked: &Asked, target: &Target, content: &str, page: usize) -> Response<Body> {
    let body = || serde_json::from_str::<Value>(&asked.body).unwrap_or_default();
    match asked.method {
        Method::GET if target.name.is_some() => {
            store.get(&target.key()).map_or_else(|| absent(target), |o| found(Some(o)))
        }
        Method::GET => list(store, target, page),
        Method::POST if target.resource.ends_with("/tokenreviews") => {
            let mut review = body();
            let known = review["spec"]["token"].as_str().and_then(|token| store.reviews.get(token)).cloned();
            review["status"] = known.unwrap_or_else(|| json!({"authenticated": false, "error": "unknown token"}));
            json_answer(StatusCode::CREATED, review.to_string())
        }
        Method::POST if target.resource.ends_with("/selfsubjectaccessreviews") => {
            json_answer(StatusCode::CREATED, json!({"status": {"allowed": true}}).to_string())
        }
        Method::POST => {
            let mut object = body();
            if let Some(namespace) = &target.namespace {
                object["metadata"]["namespace"] = json!(namespace);
            }
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            match store.contains(&Key { name: name.to_owned(), ..target.key() }) {
                true => status(StatusCode::CONFLICT, "AlreadyExists"),
                false => json_answer(StatusCode::CREATED, store.put(&target.resource, object).to_string()),
            }
        }
        Method::PUT => {
            let object = body();
            let sent = object["metadata"]["resourceVersion"].as_str().unwrap_or_default();
            match store.version_of(&target.key()) {
                None => status(StatusCode::NOT_FOUND, "NotFound"),
                Some(current) if !sent.is_empty() && sent != current => status(StatusCode::CONFLICT, "Conflict"),
                Some(_) => found(Some(store.put(&target.resource, object))),
            }
        }
        Method::PATCH => patched(store, target, content, &body()),
        Method::DELETE => found(store.end(&target.key())),
        _ => status(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed"),
    }
}

fn patched(store: &mut Store, target: &Target, content: &str, patch: &Value) -> Response<Body> {
    let key = target.key();
    let current = store.get(&key);
    if content.starts_with("application/apply-patch") {
        if current.is_none() && target.subresource.is_some() {
            return status(StatusCode::NOT_FOUND, "NotFound");
        }
        let manager = target.parameter("fieldManager").unwrap_or_default();
        return found(Some(store.apply(&key, manager, patch.clone(), target.parameter("dryRun").is_some())));
    }
    let Some(mut object) = current else { return status(StatusCode::NOT_FOUND, "NotFound") };
    let uid = &patch["metadata"]["uid"];
    let done = match patch.as_array() {
        Some(operations) => patch::operate(&mut object, operations),
        None if uid.is_string() && *uid != object["metadata"]["uid"] => None,
        None => {
            patch::merge(&mut object, patch);
            Some(())
        }
    };
    match done {
        Some(()) => found(Some(store.put(&target.resource, object))),
        None => status(StatusCode::UNPROCESSABLE_ENTITY, "Invalid"),
    }
}

fn list(store: &Store, target: &Target, page: usize) -> Response<Body> {
    // The token of the next page says behind which object it begins, and as of when the list is.
    let token = target.parameter("continue").and_then(|token| {
        let (version, after) = token.split_once(':')?;
        Some((version.parse::<u64>().ok()?, after.split_once(':')?))
    });
    let (version, (namespace, name)) = token.unwrap_or((store.version, ("", "")));
    if version < store.forgotten {
        return status(StatusCode::GONE, "Expired");
    }
    let limit = target.number("limit").and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX).min(page);
    let after = Key::new(&target.resource, namespace, name);
    let mut objects = store.objects_after(&after).filter(|(key, text)| target.selects(key, || text.value())).peekable();
    let (mut items, mut count, mut last) = (String::new(), 0, None);
    while count < limit
        && let Some((key, text)) = objects.next()
    {
        if count > 0 {
            items.push(',');
        }
        items.push_str(text.item());
        (count, last) = (count + 1, Some(key));
    }
    let mut metadata = json!({"resourceVersion": version.to_string()});
    if let Some(last) = last.filter(|_| objects.peek().is_some()) {
        metadata["continue"] = json!(format!("{version}:{}:{}", last.namespace, last.name));
    }
    json_answer(
        StatusCode::OK,
        format!(r#"{{"kind":"List","apiVersion":"v1","metadata":{metadata},"items":[{items}]}}"#),
    )
}

fn found(object: Option<Value>) -> Response<Body> {
    match object {
        Some(object) => json_answer(StatusCode::OK, object.to_string()),
        None => status(StatusCode::NOT_FOUND, "NotFound"),
    }
}

/// As real servers say it, of what they would have had.
fn absent(target: &Target) -> Response<Body> {
    let (group, plural) = match target.resource.split('/').collect::<Vec<_>>()[..] {
        ["apis", group, _, plural] => (group, plural),
        [.., plural] => ("", plural),
        [] => ("", ""),
    };
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "NotFound", "reason": "NotFound", "code": 404,
        "details": {"name": target.name, "group": group, "kind": plural},
    });
    json_answer(StatusCode::NOT_FOUND, status.to_string())
}

fn status(code: StatusCode, reason: &str) -> Response<Body> {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": reason, "reason": reason, "code": code.as_u16()});
    json_answer(code, status.to_string())
}

fn json_answer(code: StatusCode, json: String) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(json)).boxed_unsync());
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
    response
}
