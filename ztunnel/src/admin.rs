//! The admin port: what the process knows, why it decides as it does, how loudly it logs, and when it leaves.

use std::{
    future::{Ready, ready},
    sync::Arc,
};

use http::{Method, StatusCode};
use mesh_runtime::{
    admin::{AdminServer, Request, Response, json, text},
    telemetry,
};
use tokio_util::sync::CancellationToken;

use crate::{inpod::manager::PodTable, pods::Shared};

pub mod config_dump;
pub mod why;

const INDEX: &str = "ztunnel admin\n\n\
    GET  /config_dump\n\
    GET  /debug/why/outbound?namespace=&pod=&destination=IP:PORT[&probe=true]\n\
    GET  /debug/why/inbound?namespace=&pod=&source_ip=&source_identity=&destination=IP:PORT[&probe=true]\n\
    POST /logging?level=info,target=debug&reset\n\
    POST /quitquitquit\n";
const LOGGING_HELP: &str = "use POST: no parameter lists; level=<off|error|warn|info|debug|trace> or \
    level=<target>=<level>, comma-separated, adds; reset starts from the initial filter\n";

/// What the handlers answer from.
#[derive(Clone, Debug)]
pub struct Context {
    pub shared: Arc<Shared>,
    pub pods: PodTable,
    /// Cancelled by `POST /quitquitquit`.
    pub quit: CancellationToken,
}

/// The routes of the admin port.
pub fn server(context: Context) -> AdminServer {
    let route = |handler: fn(&Context, &Request) -> Response| {
        let context = context.clone();
        move |request: Request| -> Ready<Response> { ready(handler(&context, &request)) }
    };
    let (outbound, inbound) = (context.clone(), context.clone());
    AdminServer::new()
        .route("/", route(|_, _| text(StatusCode::OK, INDEX)))
        .route("/config_dump", route(|context, _| config_dump::respond(context)))
        .route("/debug/why/outbound", move |request| why::outbound(outbound.clone(), request))
        .route("/debug/why/inbound", move |request| why::inbound(inbound.clone(), request))
        .route("/logging", route(|_, request| logging(request)))
        .route("/quitquitquit", route(quit))
}

fn logging(request: &Request) -> Response {
    if request.method != Method::POST {
        return text(StatusCode::METHOD_NOT_ALLOWED, LOGGING_HELP);
    }
    match change_filter(request) {
        Ok(filter) => text(StatusCode::OK, format!("current log level is {filter}\n")),
        Err(problem) => text(StatusCode::BAD_REQUEST, format!("{problem}\n{LOGGING_HELP}")),
    }
}

fn change_filter(request: &Request) -> Result<String, String> {
    let base =
        if request.query.contains_key("reset") { telemetry::set_filter(None) } else { telemetry::current_filter() };
    match request.query("level") {
        Some(level) => telemetry::set_filter(Some(&format!("{},{level}", base?))),
        None => base,
    }
}

fn quit(context: &Context, request: &Request) -> Response {
    if request.method != Method::POST {
        return text(StatusCode::METHOD_NOT_ALLOWED, "use POST\n");
    }
    context.quit.cancel();
    text(StatusCode::OK, "shutdown now\n")
}

/// A JSON answer of anything that serialises.
fn answer(value: &impl serde::Serialize) -> Response {
    match serde_json::to_vec_pretty(value) {
        Ok(body) => json(StatusCode::OK, body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot encode the answer: {error}\n")),
    }
}
