//! The mesh's own configuration, where Istio's users keep it: ConfigMap `istio` of the root namespace, key `mesh`.
//!
//! Fields that nothing here depends on are none of our business; MeshConfig has many.

use super::{Settings, decode::Meta};
use crate::{
    fields::{Cursor, Fields},
    yaml,
};

pub(crate) const NAME: &str = "istio";

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
    let text = mesh.text()?;
    // A text of several lines is a block, which starts below its name.
    let first_line = mesh.line().saturating_add(u32::from(text.contains('\n')));
    match yaml::parse(text, first_line) {
        Ok(Some(node)) => read(&mesh.embedded(&node)),
        Ok(None) => Some(MeshConfig { registry_only: false }),
        Err(yaml::Malformed { line, message }) => {
            mesh.at(line).reject(message, "correct the YAML; what was last read stays in force");
            None
        }
    }
}

fn read(mesh: &Cursor<'_>) -> Option<MeshConfig> {
    let fields = mesh.fields()?;
    if let Some(aliases) = fields.get("trustDomainAliases").filter(|aliases| !aliases.items().is_empty()) {
        aliases.warn(
            "aliases of the trust domain are not followed: policies match principals as written",
            "write the principals of each trust domain into the policies",
        );
    }
    let policy = fields.get("outboundTrafficPolicy").and_then(|policy| policy.fields());
    let mode = policy.as_ref().and_then(|policy| policy.get("mode"));
    // Both are asked, so that both tell.
    if fields.deny_misspelt() | policy.as_ref().is_some_and(Fields::deny_misspelt) {
        return None;
    }
    let registry_only = match mode {
        Some(mode) => mode.one_of(&[("ALLOW_ANY", false), ("REGISTRY_ONLY", true)])?,
        None => false,
    };
    Some(MeshConfig { registry_only })
}
