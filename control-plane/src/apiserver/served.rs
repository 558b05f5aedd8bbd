//! At which versions the API server has a kind: a list that is not found does not tell a kind that is nowhere from one that is there as
//! something else.

use http::Request;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIGroup;
use kube::{Client, api::ApiResource};

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
