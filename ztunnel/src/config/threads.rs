//! How many data-plane workers to run.

use mesh_runtime::env::Reader;

use super::cpus;

/// More than any machine has CPUs for.
const MOST: usize = 1024;

/// `ZTUNNEL_WORKER_THREADS` as a number, a percentage of the CPUs, or 0 for all; otherwise what the container's resources suggest.
/// `concurrency` is the mesh configuration's, 0 for all CPUs.
pub(super) fn from_env(r: &Reader<'_>, concurrency: Option<u16>) -> usize {
    let limit = quantity(r, "ZTUNNEL_RESOURCE_CPU_LIMIT");
    let request = quantity(r, "ZTUNNEL_RESOURCE_CPU_REQUEST");
    let hint = quantity(r, "ZTUNNEL_CPU_LIMIT");
    let cpus = limit.or(hint).unwrap_or_else(cpus).max(1);
    let Some(text) = r.optional("ZTUNNEL_WORKER_THREADS") else {
        return match concurrency {
            Some(0) => cpus,
            Some(count) if usize::from(count) <= MOST => count.into(),
            Some(count) => {
                r.problem("defaultConfig.concurrency", &count.to_string(), &format!("at most {MOST} threads"));
                1
            }
            None => default(limit, request, cpus),
        };
    };
    explicit(&text, cpus).unwrap_or_else(|| {
        r.problem("ZTUNNEL_WORKER_THREADS", &text, "a number of threads, a percentage such as 50%, or 0 for all CPUs");
        1
    })
}

/// A limit is there to be used; without one, a quarter of the node, at least two.
fn default(limit: Option<usize>, request: Option<usize>, cpus: usize) -> usize {
    match limit {
        Some(limit) => limit.max(request.unwrap_or(0)),
        None => cpus.div_ceil(4).max(request.unwrap_or(0)).max(2),
    }
}

fn explicit(text: &str, cpus: usize) -> Option<usize> {
    let count = match text.strip_suffix('%') {
        Some(percent) => {
            let percent: usize = percent.parse().ok().filter(|p| *p <= 100)?;
            (cpus * percent).div_ceil(100).max(1)
        }
        None => text.parse().ok()?,
    };
    (count <= MOST).then_some(if count == 0 { cpus } else { count })
}

/// A Kubernetes CPU quantity (`500m`, `1.5`), rounded up to whole CPUs.
fn quantity(r: &Reader<'_>, name: &str) -> Option<usize> {
    let text = r.optional(name)?;
    let milli = match text.strip_suffix('m') {
        Some(milli) => milli.parse().ok(),
        None => text.parse::<f64>().ok().map(|cpus| cpus * 1000.0),
    };
    let whole = milli.map(|m: f64| (m / 1000.0).ceil()).filter(|c| (1.0..=4096.0).contains(c));
    if whole.is_none() {
        r.problem(name, &text, "a CPU quantity such as 500m or 1.5");
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within 1 to 4096 by the filter above")]
    whole.map(|c| c as usize)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn resources_decide_unless_told_otherwise() {
        let count = |pairs: &[(&str, &str)]| {
            let mut vars: HashMap<String, String> =
                pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            vars.entry("ZTUNNEL_CPU_LIMIT".to_owned()).or_insert_with(|| "16".to_owned());
            let reader = Reader::new(&vars);
            let count = from_env(&reader, None);
            reader.finish().map(|()| count).map_err(|p| p.0.len())
        };
        assert_eq!(count(&[]), Ok(4));
        assert_eq!(count(&[("ZTUNNEL_CPU_LIMIT", "2")]), Ok(2));
        assert_eq!(count(&[("ZTUNNEL_RESOURCE_CPU_LIMIT", "1500m")]), Ok(2));
        assert_eq!(count(&[("ZTUNNEL_RESOURCE_CPU_REQUEST", "6")]), Ok(6));
        assert_eq!(count(&[("ZTUNNEL_WORKER_THREADS", "50%")]), Ok(8));
        assert_eq!(count(&[("ZTUNNEL_WORKER_THREADS", "0")]), Ok(16));
        assert_eq!(count(&[("ZTUNNEL_WORKER_THREADS", "3")]), Ok(3));
        assert_eq!(count(&[("ZTUNNEL_WORKER_THREADS", "-1")]), Err(1));
        assert_eq!(count(&[("ZTUNNEL_RESOURCE_CPU_LIMIT", "lots")]), Err(1));
    }
}
