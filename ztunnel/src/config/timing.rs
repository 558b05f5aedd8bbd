//! How long things may take: keep-alive, dead peers, leaving.

use std::time::Duration;

use mesh_net::KeepAlive;
use mesh_runtime::env::Reader;

use super::within;

pub(super) fn keepalive_from(r: &Reader<'_>) -> Option<KeepAlive> {
    let seconds = Duration::from_secs(180);
    let keepalive = KeepAlive {
        idle: kernel_seconds(r, "KEEPALIVE_TIME", seconds),
        interval: kernel_seconds(r, "KEEPALIVE_INTERVAL", seconds),
        retries: within(r, "KEEPALIVE_RETRIES", 9, 1, 127),
    };
    r.bool("KEEPALIVE_ENABLED", true).then_some(keepalive)
}

/// What the kernel takes for keep-alive (tcp(7)); it would refuse each connection otherwise.
fn kernel_seconds(r: &Reader<'_>, name: &str, default: Duration) -> Duration {
    let value = r.duration(name, default);
    if value.subsec_nanos() == 0 && (1..=32_767).contains(&value.as_secs()) {
        return value;
    }
    r.problem(name, &format!("{value:?}"), "whole seconds from 1s to 32767s");
    default
}

/// What keep-alive would take to notice a dead peer, applied to unacknowledged data too.
pub(super) fn user_timeout(r: &Reader<'_>, keepalive: Option<KeepAlive>) -> Option<Duration> {
    let wanted = r.bool("USER_TIMEOUT_ENABLED", false);
    keepalive.filter(|_| wanted).map(|k| k.idle.saturating_add(k.interval.saturating_mul(k.retries)))
}

/// A little less than Kubernetes will wait.
pub(super) fn drain_deadline(r: &Reader<'_>) -> Duration {
    let grace: Option<u64> = r.optional_parse("TERMINATION_GRACE_PERIOD_SECONDS", "a number of seconds");
    let default = match grace {
        Some(seconds) if seconds > 10 => seconds - 5,
        Some(seconds) => seconds.saturating_sub(1).max(1),
        None => 5,
    };
    r.duration("CONNECTION_TERMINATION_DEADLINE", Duration::from_secs(default))
}
