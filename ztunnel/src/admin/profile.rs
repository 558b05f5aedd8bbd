//! `/debug/pprof/*`: where the process spends its time, in the format of pprof (profile.proto of google/pprof).

use std::{
    collections::HashMap,
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::StatusCode;
use mesh_runtime::admin::{Request, Response, binary, text};
use pprof::{Report, Symbol};
use prost::Message;

const SECONDS: (u64, u64, u64) = (1, 300, 10);
const FREQUENCY: (i32, i32, i32) = (1, 1000, 100);
const NO_HEAP: &str = "heap profiling is not active: the allocator of this build (mimalloc) records no allocations, so it cannot be \
    activated either; use `heaptrack` or `perf record -e page-faults -g` on the process, and process_resident_memory_bytes for trends\n";

/// A CPU profile of the seconds to come. One at a time.
pub(super) async fn cpu(request: Request) -> Response {
    let asked = number(&request, "seconds", SECONDS).and_then(|s| Ok((s, number(&request, "frequency", FREQUENCY)?)));
    let (seconds, frequency) = match asked {
        Ok(asked) => asked,
        Err(problem) => return text(StatusCode::BAD_REQUEST, format!("{problem}\n")),
    };
    let failed = |error: String| text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot profile: {error}\n"));
    // Unwinding within the C library or the loader from a signal can deadlock on the loader's lock.
    let builder = pprof::ProfilerGuardBuilder::default().frequency(frequency);
    let guard = match builder.blocklist(&["libc", "libgcc", "pthread", "vdso"]).build() {
        Ok(guard) => guard,
        Err(error) => return failed(error.to_string()),
    };
    let started = SystemTime::now();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    // Resolving names reads the program's debug information, which is not for an async thread.
    let encoded = tokio::task::spawn_blocking(move || {
        let report = guard.report().build().map_err(|error| error.to_string())?;
        Ok(Encoder::default().encode(&report, started, Duration::from_secs(seconds), frequency))
    });
    match encoded.await {
        Ok(Ok(body)) => binary(StatusCode::OK, body),
        Ok(Err(error)) => failed(error),
        Err(error) => failed(error.to_string()),
    }
}

/// There is none; upstream answers the same while its allocator's profiling is off.
pub(super) fn heap() -> Response {
    text(StatusCode::INTERNAL_SERVER_ERROR, NO_HEAP)
}

fn number<T: FromStr + PartialOrd + std::fmt::Display>(
    request: &Request,
    name: &str,
    (least, most, default): (T, T, T),
) -> Result<T, String> {
    let Some(value) = request.query(name) else { return Ok(default) };
    let parsed = value.parse().ok().filter(|number| *number >= least && *number <= most);
    parsed.ok_or_else(|| format!("`{name}` is `{value}`: expected a number from {least} to {most}"))
}

/// Everything that occurs often is written down once.
#[derive(Default)]
struct Encoder {
    profile: Profile,
    strings: HashMap<String, i64>,
    /// By function and line.
    locations: HashMap<(i64, i64), u64>,
}

impl Encoder {
    fn encode(mut self, report: &Report, started: SystemTime, duration: Duration, frequency: i32) -> Vec<u8> {
        // The table's first string is the empty one.
        self.string("");
        let period = 1_000_000_000 / i64::from(frequency.max(1));
        let kinds = [("samples", "count"), ("cpu", "nanoseconds")];
        self.profile.sample_type = kinds.map(|(kind, unit)| self.value_type(kind, unit)).into();
        self.profile.period_type = Some(self.value_type("cpu", "nanoseconds"));
        self.profile.period = period;
        self.profile.duration_nanos = nanos(duration);
        self.profile.time_nanos = nanos(started.duration_since(UNIX_EPOCH).unwrap_or_default());
        let thread = self.string("thread");
        for (frames, count) in &report.data {
            let count = i64::try_from(*count).unwrap_or(i64::MAX);
            let location_id = frames.frames.iter().flatten().map(|symbol| self.location(symbol)).collect();
            let label = vec![Label { key: thread, str: self.string(&frames.thread_name) }];
            self.profile.sample.push(Sample { location_id, value: vec![count, count.saturating_mul(period)], label });
        }
        self.profile.encode_to_vec()
    }

    fn value_type(&mut self, kind: &str, unit: &str) -> ValueType {
        ValueType { r#type: self.string(kind), unit: self.string(unit) }
    }

    fn string(&mut self, text: &str) -> i64 {
        if let Some(at) = self.strings.get(text) {
            return *at;
        }
        let at = i64::try_from(self.strings.len()).unwrap_or(i64::MAX);
        self.profile.string_table.push(text.to_owned());
        self.strings.insert(text.to_owned(), at);
        at
    }

    fn location(&mut self, symbol: &Symbol) -> u64 {
        let (name, line) = (self.string(&symbol.name()), i64::from(symbol.lineno.unwrap_or(0)));
        if let Some(id) = self.locations.get(&(name, line)) {
            return *id;
        }
        // Identifiers start at one; a function of its own for each location costs little and says the same.
        let id = self.locations.len() as u64 + 1;
        let (system_name, filename) = (self.string(&symbol.sys_name()), self.string(&symbol.filename()));
        self.profile.function.push(Function { id, name, system_name, filename });
        self.profile.location.push(Location { id, line: vec![Line { function_id: id, line }] });
        self.locations.insert((name, line), id);
        id
    }
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// The fields of profile.proto that are written here.
#[derive(Clone, PartialEq, Message)]
struct Profile {
    #[prost(message, repeated, tag = "1")]
    sample_type: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    sample: Vec<Sample>,
    #[prost(message, repeated, tag = "4")]
    location: Vec<Location>,
    #[prost(message, repeated, tag = "5")]
    function: Vec<Function>,
    #[prost(string, repeated, tag = "6")]
    string_table: Vec<String>,
    #[prost(int64, tag = "9")]
    time_nanos: i64,
    #[prost(int64, tag = "10")]
    duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    period: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ValueType {
    #[prost(int64, tag = "1")]
    r#type: i64,
    #[prost(int64, tag = "2")]
    unit: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Sample {
    #[prost(uint64, repeated, tag = "1")]
    location_id: Vec<u64>,
    #[prost(int64, repeated, tag = "2")]
    value: Vec<i64>,
    #[prost(message, repeated, tag = "3")]
    label: Vec<Label>,
}

#[derive(Clone, PartialEq, Message)]
struct Label {
    #[prost(int64, tag = "1")]
    key: i64,
    #[prost(int64, tag = "2")]
    str: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Location {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(message, repeated, tag = "4")]
    line: Vec<Line>,
}

#[derive(Clone, PartialEq, Message)]
struct Line {
    #[prost(uint64, tag = "1")]
    function_id: u64,
    #[prost(int64, tag = "2")]
    line: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Function {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(int64, tag = "2")]
    name: i64,
    #[prost(int64, tag = "3")]
    system_name: i64,
    #[prost(int64, tag = "4")]
    filename: i64,
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    fn request(query: &str) -> Request {
        Request {
            method: http::Method::GET,
            path: "/debug/pprof/profile".to_owned(),
            query: mesh_runtime::admin::parse_query(query),
            headers: http::HeaderMap::new(),
        }
    }

    #[tokio::test]
    async fn a_profile_is_complete_in_itself() {
        let busy = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
        let spinning = busy.clone();
        let thread = std::thread::spawn(move || {
            while spinning.load(std::sync::atomic::Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let response = cpu(request("seconds=1&frequency=500")).await;
        busy.store(false, std::sync::atomic::Ordering::Relaxed);
        thread.join().unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let profile = Profile::decode(body).unwrap();
        let text = |at: i64| &*profile.string_table[usize::try_from(at).unwrap()];
        assert_eq!((text(0), profile.period, profile.duration_nanos), ("", 2_000_000, 1_000_000_000));
        let kinds: Vec<(&str, &str)> = profile.sample_type.iter().map(|t| (text(t.r#type), text(t.unit))).collect();
        assert_eq!(kinds, [("samples", "count"), ("cpu", "nanoseconds")]);
        assert!(!profile.sample.is_empty());
        for sample in &profile.sample {
            assert_eq!(sample.value[1], sample.value[0] * profile.period);
            assert!(sample.location_id.iter().all(|id| profile.location.iter().any(|location| location.id == *id)));
        }
    }

    #[tokio::test]
    async fn parameters_out_of_range_are_refused() {
        for (query, wanted) in [
            ("seconds=0", "`seconds` is `0`: expected a number from 1 to 300\n"),
            ("seconds=ten", "`seconds` is `ten`: expected a number from 1 to 300\n"),
            ("frequency=1001", "`frequency` is `1001`: expected a number from 1 to 1000\n"),
        ] {
            let response = cpu(request(query)).await;
            assert_eq!(response.status(), StatusCode::BAD_REQUEST);
            assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), wanted);
        }
    }
}
