//! The mesh's own configuration, where Istio's users keep it: ConfigMap `istio` of the root namespace, key `mesh`.
//!
//! Fields that nothing here depends on are none of our business; which names are fields at all is `mesh-core`'s to say, for ztunnel too.

use mesh_core::{mesh_config, workload::OutboundPolicy};

use super::{Settings, decode::Meta};
use crate::{
    fields::{Cursor, Document, Fields},
    yaml::{self, Node},
};

pub(crate) const NAME: &str = "istio";
const POLICY: &str = "outboundTrafficPolicy";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MeshConfig {
    /// `outboundTrafficPolicy.mode` is REGISTRY_ONLY.
    pub(crate) registry_only: bool,
}

pub(super) fn is_ours(meta: &Meta, settings: &Settings) -> bool {
    *meta.key.name == *NAME && meta.key.namespace == settings.root_namespace
}

pub(super) fn mesh_config(fields: &Fields<'_>) -> Option<MeshConfig> {
    let mesh = fields.required("data")?.fields()?.required("mesh")?;
    match parse(&mesh)? {
        Ok(Some(node)) => read(&mesh.embedded(&node)),
        Ok(None) => Some(MeshConfig { registry_only: false }),
        Err(yaml::Malformed { line, message }) => {
            mesh.at(line).reject(message, "correct the YAML; what was last read stays in force");
            None
        }
    }
}

/// What is in force in place of a configuration that is wrong and has no last good version: the outbound policy as far as it can be read,
/// and the closed one where somebody tried to write it.
pub(super) fn stand_in(object: &Cursor<'_>) -> Option<MeshConfig> {
    let silent = Document::new(object.place());
    let data = object.reported_to(&silent).fields()?.get("data")?.fields()?;
    let mesh = data.get("mesh")?;
    let registry_only = match parse(&mesh)? {
        Ok(Some(node)) => wants_registry_only(&mesh.embedded(&node).fields()?),
        Ok(None) => false,
        Err(_) => mesh.text()?.contains("REGISTRY_ONLY"),
    };
    Some(MeshConfig { registry_only })
}

fn wants_registry_only(fields: &Fields<'_>) -> bool {
    let is_meant = |name: &str| match mesh_config::MESH.field(name) {
        Ok(known) => known == POLICY,
        Err(unknown) => unknown.nearest == Some(POLICY),
    };
    fields.given().any(|(name, policy)| is_meant(name) && outbound(&policy) != Some(OutboundPolicy::AllowAny))
}

fn parse(mesh: &Cursor<'_>) -> Option<Result<Option<Node>, yaml::Malformed>> {
    let text = mesh.text()?;
    // A text of several lines is a block, which starts below its name.
    let first_line = mesh.line().saturating_add(u32::from(text.contains('\n')));
    Some(yaml::parse(text, first_line))
}

fn read(mesh: &Cursor<'_>) -> Option<MeshConfig> {
    let fields = mesh.fields()?;
    let named = |name| {
        let mut given = fields.given();
        given.find(|(written, _)| mesh_config::MESH.field(written) == Ok(name)).map(|(_, value)| value)
    };
    if let Some(aliases) = named("trustDomainAliases").filter(|aliases| !aliases.items().is_empty()) {
        aliases.warn(
            "aliases of the trust domain are not followed: policies match principals as written",
            "write the principals of each trust domain into the policies",
        );
    }
    // Before anything gives up, so that everything is told.
    let outbound = named(POLICY).as_ref().map(outbound);
    if fields.deny_unknown_to(&mesh_config::MESH) {
        return None;
    }
    let policy = outbound.unwrap_or(Some(OutboundPolicy::AllowAny))?;
    Some(MeshConfig { registry_only: policy == OutboundPolicy::RegistryOnly })
}

/// `None` when it is wrong.
fn outbound(policy: &Cursor<'_>) -> Option<OutboundPolicy> {
    let fields = policy.fields()?;
    let unknown = fields.deny_unknown_to(&mesh_config::OUTBOUND);
    let mode = match fields.get("mode") {
        Some(mode) => mode.one_of(&mesh_config::OUTBOUND_MODES),
        None => Some(OutboundPolicy::AllowAny),
    };
    mode.filter(|_| !unknown)
}
