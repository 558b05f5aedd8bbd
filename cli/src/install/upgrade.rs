//! `fairway upgrade`: control plane, node agent, ztunnel, each when the one before is ready; it stops at the first that is not.

use std::process::ExitCode;

use anyhow::bail;

use super::Installation;
use crate::{args::Upgrade, cluster, output::say};

pub(crate) fn run(options: &Upgrade) -> anyhow::Result<ExitCode> {
    cluster::block_on(async {
        let cluster = options.connection.open().await?;
        let installation = Installation::prepare(cluster, &options.selection).await?;
        let Some(before) = &installation.before else {
            bail!(
                "nothing was installed by `fairway` in namespace {}: use `fairway install`, or what installed it",
                installation.namespace
            )
        };
        let after = &installation.after;
        say!(
            "{}/…:{} (fairway {}) -> {}/…:{} (fairway {})",
            before.hub,
            before.tag,
            before.version,
            after.hub,
            after.tag,
            after.version
        );
        installation.may_go_on(&options.selection).await?;
        installation.roll(true, options.selection.timeout).await
    })
}
