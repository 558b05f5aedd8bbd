//! Whether an object will be read as it is written, and what to tell its author; without I/O.

use serde_json::value::RawValue;

use super::message::Request;
use crate::{
    objects::{ACCEPTED, Kind, Read, Settings, Spec},
    problem::Problem,
    source::kubernetes::{Received, Watched},
    status,
};

/// Kinds that users write for the mesh.
const JUDGED: [Kind; 4] =
    [Kind::AuthorizationPolicy, Kind::PeerAuthentication, Kind::ServiceEntry, Kind::WorkloadEntry];
/// A tree of more nodes is not built; no object that people write has as many.
const MAX_NODES: usize = 200_000;
/// A denial names no more, and neither do warnings: the first are mended first.
const MAX_TOLD: usize = 20;
/// Longer lines are cut. API servers cut warnings, too.
const MAX_LINE: usize = 1000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Judgement {
    Allowed,
    /// It has less effect than it says.
    Warned(Vec<String>),
    Denied(String),
    /// Not ours to judge; with a warning where that is not to be expected.
    Passed(Option<String>),
}

impl Judgement {
    /// As metrics count it.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Warned(_) => "warned",
            Self::Denied(_) => "denied",
            Self::Passed(_) => "passed",
        }
    }

    fn passed(why: &str) -> Self {
        Self::Passed(Some(format!("not judged by fairwayd: {why}")))
    }
}

pub(super) fn judge(request: &Request<'_>, settings: &Settings) -> Judgement {
    if request.sub_resource.as_ref().is_some_and(|name| !name.is_empty()) {
        return Judgement::Passed(None);
    }
    if !["CREATE", "UPDATE"].contains(&&*request.operation) {
        return Judgement::passed("it judges what is created and updated only");
    }
    let watched = Watched::named(&request.kind.group, &request.kind.kind);
    let Some(watched) = watched.filter(|watched| JUDGED.contains(&watched.kind)) else {
        return Judgement::passed("the kind is none of the mesh's");
    };
    let new = match object(request.object) {
        Ok(new) => new,
        Err(why) => return Judgement::passed(&why),
    };
    // Nothing may keep an object from going.
    if new.is_going() {
        return Judgement::Passed(None);
    }
    let read = |object: &Received| {
        let name = object.key(&watched).to_string().into();
        object.clone().read(&name, &watched, settings)
    };
    let after = read(&new);
    let name = new.key(&watched);
    if !is_wrong(&after) {
        return of_usable(&after);
    }
    let told = listed(&after.problems).join("\n");
    // What was wrong before does not become worse by a label or a finalizer; without this nobody could put one on.
    let before = object(request.old_object).ok().filter(|old| old.asks_the_same(&new));
    if before.is_some_and(|old| is_wrong(&read(&old))) {
        let mut warnings = vec![format!("{name} was wrong before and still is; it is not in force as it is written")];
        warnings.extend(lines(&after.problems));
        return Judgement::Warned(warnings);
    }
    Judgement::Denied(format!("{name} would not mean what it says:\n{told}"))
}

fn object(raw: Option<&RawValue>) -> Result<Received, String> {
    let raw = raw.ok_or_else(|| "the request has no object".to_owned())?.get();
    let marks = raw.bytes().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count();
    if marks > MAX_NODES {
        return Err("the object is too large".to_owned());
    }
    let read = serde_json::from_str::<Received>(raw).map_err(|error| format!("the object cannot be read: {error}"));
    read.map(Received::named)
}

fn is_wrong(read: &Read) -> bool {
    read.unidentified || read.wrong
}

/// Whether an AuthorizationPolicy deserves a warning is for its status to say: one for waypoints has conditions of its own.
fn of_usable(read: &Read) -> Judgement {
    let policy = read.objects.iter().find_map(|object| match &object.spec {
        Spec::AuthorizationPolicy(policy) => Some(&**policy),
        _ => None,
    });
    let acceptance = policy.map(|policy| status::acceptance(false, &read.problems, Some(policy)));
    let warnings = match acceptance {
        Some(None) => Vec::new(),
        Some(Some(acceptance)) if !acceptance.is_true => {
            vec![cut(&format!("its condition {} will be False: {}", ACCEPTED, acceptance.message))]
        }
        Some(Some(_)) | None => lines(&read.problems),
    };
    if warnings.is_empty() { Judgement::Allowed } else { Judgement::Warned(warnings) }
}

fn lines(problems: &[Problem]) -> Vec<String> {
    let told = problems.iter().take(MAX_TOLD).map(|problem| cut(&problem.without_place()));
    let more = problems.len().saturating_sub(MAX_TOLD);
    told.chain((more > 0).then(|| format!("… and {more} more"))).collect()
}

fn listed(problems: &[Problem]) -> Vec<String> {
    lines(problems).iter().map(|line| format!("- {line}")).collect()
}

fn cut(line: &str) -> String {
    let mut cut: String = line.chars().take(MAX_LINE).collect();
    if cut.len() < line.len() {
        cut.push('…');
    }
    cut
}

#[cfg(test)]
mod tests;
