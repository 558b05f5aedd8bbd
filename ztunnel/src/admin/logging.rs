//! `/logging`: shows and changes what is logged while the process runs.

use http::{Method, StatusCode};
use mesh_runtime::{
    admin::{Request, Response, text},
    telemetry,
};

const HELP: &str = "usage: POST /logging               shows the current filter\n\
    \x20      POST /logging?level=SPEC     adds to it\n\
    \x20      POST /logging?reset          goes back to the one the process started with\n\
    \x20      POST /logging?reset&level=SPEC\n\
    SPEC is a comma-separated list of LEVEL (for everything) and TARGET=LEVEL (for one target, such as access or mesh_xds::client);\n\
    LEVEL is off, error, warn, info, debug or trace\n";
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

pub(super) fn respond(request: &Request) -> Response {
    if request.method != Method::POST {
        return text(StatusCode::METHOD_NOT_ALLOWED, HELP);
    }
    match change(request) {
        Ok(filter) => text(StatusCode::OK, format!("current log level is {filter}\n")),
        Err(problem) => text(StatusCode::BAD_REQUEST, format!("{problem}\n{HELP}")),
    }
}

/// The filter in force afterwards; a bad one changes nothing.
fn change(request: &Request) -> Result<String, String> {
    let added = request.query("level").map(spec).transpose()?;
    let reset = request.query.contains_key("reset");
    let base = if reset { telemetry::initial_filter()? } else { telemetry::current_filter()? };
    match added {
        None if reset => telemetry::set_filter(&base),
        None => Ok(base),
        Some(added) => telemetry::set_filter(&format!("{base},{added}")),
    }
}

/// What `level` asks for, in the logger's words. Checked here, as the logger would take a mistyped level for a target.
///
/// # Errors
/// When an item is neither a level nor a target with one; the text names it.
pub fn spec(text: &str) -> Result<String, String> {
    let items: Result<Vec<String>, String> = text.split(',').map(|item| directive(item.trim())).collect();
    Ok(items?.join(","))
}

fn directive(item: &str) -> Result<String, String> {
    let (target, level) = item.split_once('=').map_or((None, item), |(target, level)| (Some(target), level));
    let level = level.to_ascii_lowercase();
    if !LEVELS.contains(&&*level) {
        return Err(format!("`level`: `{item}`: `{level}` is not a level"));
    }
    match target {
        None => Ok(level),
        Some(target) if is_target(target) => Ok(format!("{target}={level}")),
        Some(target) => Err(format!("`level`: `{item}`: `{target}` is not a target")),
    }
}

fn is_target(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b':' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_targets_are_understood_and_nothing_else() {
        for (text, wanted) in [
            ("debug", "debug"),
            ("INFO, access=Trace", "info,access=trace"),
            ("off,mesh_xds::client=warn", "off,mesh_xds::client=warn"),
        ] {
            assert_eq!(spec(text).as_deref(), Ok(wanted));
        }
        for text in ["verbose", "access:debug", "access=loud", "=debug", "[span]=debug", "info,,debug", "a=b=info"] {
            assert!(spec(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_help_names_what_the_parser_takes() {
        assert!(LEVELS.iter().all(|level| HELP.contains(level)));
        for example in ["access", "mesh_xds::client"] {
            assert!(HELP.contains(example) && spec(&format!("{example}=info")).is_ok());
        }
    }
}
