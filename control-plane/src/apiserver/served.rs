//! At which versions the API server has a kind: a list that is not found does not tell a kind that is nowhere from one that is there as
//! something else.

use http::Request;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIGroup;
use kube::{
    Client,
    api::{ApiResource, PartialObjectMeta},
};

/// The versions at which the server has the kind; none if it does not have it at all.
pub(super) async fn versions(client: &Client, resource: &ApiResource) -> kube::Result<Vec<String>> {
    let group = Request::get(format!("/apis/{}", resource.group)).body(Vec::new()).map_err(kube::Error::HttpError)?;
    let Some(group) = found(client.request::<APIGroup>(group).await)? else { return Ok(Vec::new()) };
    let mut versions = Vec::new();
    for offered in group.versions {
        let offers = found(client.list_api_group_resources(&offered.group_version).await)?;
        if offers.is_some_and(|offers| offers.resources.iter().any(|offer| offer.name == resource.plural)) {
            versions.push(offered.version);
        }
    }
    Ok(versions)
}

/// Whether the server says that it has no definition of the kind. It knows that from its first request on, and serves what is defined a
/// little later; false also where it says nothing of the kind, or may not.
pub(super) async fn is_undefined(client: &Client, resource: &ApiResource) -> bool {
    let name = format!("{}.{}", resource.plural, resource.group);
    let asked = Request::get(format!("/apis/{DEFINITIONS}/v1/customresourcedefinitions/{name}")).body(Vec::new());
    let Ok(asked) = asked else { return false };
    match client.request::<PartialObjectMeta>(asked).await {
        // Whatever else answers 404 does not say of what.
        Err(kube::Error::Api(status)) if status.code == 404 => {
            status.details.is_some_and(|details| (details.group.as_str(), &details.name) == (DEFINITIONS, &name))
        }
        _ => false,
    }
}

const DEFINITIONS: &str = "apiextensions.k8s.io";

fn found<T>(answer: kube::Result<T>) -> kube::Result<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(error),
    }
}

/// What to say of a kind that is there at `versions`, and not as it was asked for.
pub(super) fn otherwise(resource: &ApiResource, versions: &[String]) -> String {
    let ApiResource { group, version, plural, .. } = resource;
    if versions.contains(version) {
        return format!("the API server has {plural}.{group} at version {version} and does not serve it yet");
    }
    let versions = versions.join(", ");
    format!(
        "the API server has {plural}.{group} at version {versions} and not at {version}, which is read here: install definitions that serve {version} (those of `fairwayd definitions`, or of a newer Istio)"
    )
}
