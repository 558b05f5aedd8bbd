//! Logs: one line per event, plain or JSON, written by a thread of its own.
//!
//! A full queue drops the line and counts it: a slow disk or terminal never blocks a connection.

use std::{
    fmt, io,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use tracing::{Event, Level, Subscriber, field::Field, field::Visit};
use tracing_subscriber::{
    EnvFilter, Registry,
    field::RecordFields,
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields, MakeWriter,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    layer::SubscriberExt,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt,
};

/// Lines waiting for the writer thread; more are dropped and counted.
const QUEUE_LINES: usize = 10_000;

/// What is logged within this time of a write goes with the next one. A thread that waits has to be woken, which costs the one who logs
/// more than the line itself.
const GATHER: Duration = Duration::from_millis(2);

static DROPPED: AtomicU64 = AtomicU64::new(0);
/// Lines that were taken, and those of them that were written.
static QUEUED: AtomicU64 = AtomicU64::new(0);
static WRITTEN: AtomicU64 = AtomicU64::new(0);
static FILTER: OnceLock<(String, reload::Handle<EnvFilter, Registry>)> = OnceLock::new();

/// Line format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    Json,
    #[default]
    Plain,
}

/// Starts logging to standard error. `filter` is a `RUST_LOG` expression. A second call in one process changes nothing.
///
/// # Errors
/// When the filter does not parse (the text says which part).
pub fn init(filter: &str, format: Format) -> Result<(), String> {
    let parsed = EnvFilter::try_new(filter).map_err(|e| e.to_string())?;
    let (layer, handle) = reload::Layer::new(parsed);
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_writer(Queue::start(io::stderr(), QUEUE_LINES))
        .fmt_fields(SpanFields(format))
        .event_format(Lines(format));
    if tracing_subscriber::registry().with(layer).with(lines).try_init().is_ok() {
        drop(FILTER.set((filter.to_owned(), handle)));
    }
    Ok(())
}

/// Replaces the filter at run time; returns the filter now in force.
///
/// # Errors
/// When the filter does not parse, or logging was never started.
pub fn set_filter(filter: &str) -> Result<String, String> {
    let (_, handle) = FILTER.get().ok_or("logging is not running in this process")?;
    let parsed = EnvFilter::try_new(filter).map_err(|e| e.to_string())?;
    handle.reload(parsed).map_err(|e| e.to_string())?;
    current_filter()
}

/// The filter the process started with.
///
/// # Errors
/// When logging was never started.
pub fn initial_filter() -> Result<String, String> {
    FILTER.get().map(|(initial, _)| initial.clone()).ok_or_else(|| "logging is not running in this process".to_owned())
}

/// The filter in force.
///
/// # Errors
/// When logging was never started.
pub fn current_filter() -> Result<String, String> {
    let (_, handle) = FILTER.get().ok_or("logging is not running in this process")?;
    handle.with_current(ToString::to_string).map_err(|e| e.to_string())
}

/// Lines lost to a full queue since the start.
pub fn dropped_lines() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Waits until what was logged so far is written, or `within` has passed: for the end of a program. Blocks.
pub fn flush(within: Duration) {
    let (queued, until) = (QUEUED.load(Ordering::Acquire), Instant::now() + within);
    while WRITTEN.load(Ordering::Acquire) < queued && Instant::now() < until {
        std::thread::sleep(GATHER);
    }
}

/// `MakeWriter` over a bounded queue.
#[derive(Clone, Debug)]
struct Queue(SyncSender<Vec<u8>>);

impl Queue {
    fn start(mut out: impl io::Write + Send + 'static, length: usize) -> Self {
        let (lines, queue) = sync_channel::<Vec<u8>>(length);
        let spawned = std::thread::Builder::new().name("log".to_owned()).spawn(move || write_lines(&queue, &mut out));
        if let Err(error) = spawned {
            eprintln!("cannot start the log thread: {error}");
        }
        Self(lines)
    }
}

fn write_lines(queue: &Receiver<Vec<u8>>, out: &mut impl io::Write) {
    while let Ok(mut batch) = queue.recv() {
        // One write for what has piled up, within reason.
        let mut lines = 1;
        while batch.len() < 64 * 1024 {
            let Ok(line) = queue.try_recv() else { break };
            batch.extend_from_slice(&line);
            lines += 1;
        }
        // Nowhere to report a failing log to.
        drop(out.write_all(&batch).and_then(|()| out.flush()));
        WRITTEN.fetch_add(lines, Ordering::Release);
        std::thread::sleep(GATHER);
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(&self.0)
    }
}

struct Line<'a>(&'a SyncSender<Vec<u8>>);

impl io::Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.try_send(bytes.to_vec()) {
            Ok(()) => QUEUED.fetch_add(1, Ordering::Release),
            Err(_) => DROPPED.fetch_add(1, Ordering::Relaxed),
        };
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The two line formats of upstream's logs, so that existing parsers keep working.
struct Lines(Format);

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let meta = event.metadata();
        let mut fields = Fields::default();
        event.record(&mut fields);
        match self.0 {
            Format::Plain => {
                write!(out, "{time}\t{}\t{}", level(*meta.level()), meta.target().trim_start_matches("ztunnel::"))?;
                for span in ctx.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
                    write!(out, ":{}", span.name())?;
                    if let Some(text) = span.extensions().get::<FormattedFields<N>>()
                        && !text.is_empty()
                    {
                        write!(out, "{{{}}}", text.fields)?;
                    }
                }
                write!(out, "\t{}\t", fields.message)?;
                for (i, (name, value)) in fields.others.iter().enumerate() {
                    write!(out, "{}{name}={}", if i == 0 { "" } else { " " }, value.plain())?;
                }
                writeln!(out)
            }
            Format::Json => {
                write!(
                    out,
                    "{{\"level\":\"{}\",\"time\":\"{time}\",\"scope\":{}",
                    level(*meta.level()),
                    json(meta.target())
                )?;
                if !fields.message.is_empty() {
                    write!(out, ",\"message\":{}", json(&fields.message))?;
                }
                for (name, value) in &fields.others {
                    write!(out, ",{}:{}", json(name), value.json())?;
                }
                for span in ctx.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
                    let extensions = span.extensions();
                    let fields = extensions.get::<FormattedFields<N>>().map_or("", |f| f.fields.as_str());
                    write!(out, ",{}:{{{fields}}}", json(span.name()))?;
                }
                writeln!(out, "}}")
            }
        }
    }
}

/// The fields of a span: `id=… peer=…`, or the inside of a JSON object.
struct SpanFields(Format);

impl<'writer> FormatFields<'writer> for SpanFields {
    fn format_fields<R: RecordFields>(&self, mut out: Writer<'writer>, recorded: R) -> fmt::Result {
        let mut fields = Fields::default();
        recorded.record(&mut fields);
        for (i, (name, value)) in fields.others.iter().enumerate() {
            match (self.0, i) {
                (Format::Plain, 0) => write!(out, "{name}={}", value.plain())?,
                (Format::Plain, _) => write!(out, " {name}={}", value.plain())?,
                (Format::Json, 0) => write!(out, "{}:{}", json(name), value.json())?,
                (Format::Json, _) => write!(out, ",{}:{}", json(name), value.json())?,
            }
        }
        Ok(())
    }
}

fn level(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// Strings are quoted in plain text, displayed values are not.
enum Value {
    Displayed(String),
    Text(String),
}

impl Value {
    fn plain(&self) -> String {
        match self {
            Self::Displayed(v) => v.clone(),
            Self::Text(v) => format!("{v:?}"),
        }
    }

    fn json(&self) -> String {
        match self {
            Self::Displayed(v) if v.parse::<f64>().is_ok_and(f64::is_finite) || v == "true" || v == "false" => {
                v.clone()
            }
            Self::Displayed(v) | Self::Text(v) => json(v),
        }
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, Value)>,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
        } else {
            self.others.push((field.name(), Value::Text(value.to_owned())));
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.others.push((field.name(), Value::Text(value.to_string())));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = text;
        } else {
            self.others.push((field.name(), Value::Displayed(text)));
        }
    }
}

/// An error and its causes on one line: `Display` prints one level, the rest is in `source()`.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// A JSON string literal (RFC 8259 §7).
pub fn json(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if u32::from(c) < 0x20 => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        sync::{Arc, Mutex},
    };

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: Format) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let layer = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .fmt_fields(SpanFields(format))
            .event_format(Lines(format));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let address = "10.0.0.1:5";
            let _outer = tracing::info_span!("proxy", wl = "demo/web").entered();
            let _span = tracing::info_span!("inbound", id = 7, peer = %address).entered();
            tracing::info!(target: "access", { src.addr = %address, who = "a \"b\"" }, "connection complete");
        });
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn plain_lines_are_tab_separated() {
        let line = logged(Format::Plain);
        let fields: Vec<&str> = line.trim_end().split('\t').collect();
        assert_eq!(
            fields[1..],
            [
                "info",
                "access:proxy{wl=\"demo/web\"}:inbound{id=7 peer=10.0.0.1:5}",
                "connection complete",
                "src.addr=10.0.0.1:5 who=\"a \\\"b\\\"\""
            ]
        );
    }

    #[test]
    fn json_lines_escape_what_peers_wrote() {
        let line = logged(Format::Json);
        assert!(
            line.contains(
                r#""scope":"access","message":"connection complete","src.addr":"10.0.0.1:5","who":"a \"b\"""#
            ),
            "{line}"
        );
        let spans = r#""proxy":{"wl":"demo/web"},"inbound":{"id":7,"peer":"10.0.0.1:5"}}"#;
        assert!(line.trim_end().ends_with(spans), "{line}");
        assert_eq!(json("a\u{1}\n"), "\"a\\u0001\\n\"");
    }

    /// Blocks in its first write until told to go on.
    struct Stuck {
        entered: SyncSender<()>,
        release: Receiver<()>,
        out: Sink,
    }

    impl io::Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Both fail once the test has seen enough.
            self.entered.send(()).unwrap_or_default();
            self.release.recv().unwrap_or_default();
            self.out.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_queue_drops_lines_and_counts_them_and_never_waits() {
        let ((entered, in_write), (go_on, release)) = (sync_channel(8), sync_channel(8));
        let out = Sink::default();
        let queue = Queue::start(Stuck { entered, release, out: out.clone() }, 2);
        let log = |line: &str| queue.make_writer().write_all(line.as_bytes()).unwrap();
        log("written\n");
        in_write.recv().unwrap();
        let before = dropped_lines();
        for line in ["kept\n", "kept too\n", "lost\n", "lost too\n"] {
            log(line);
        }
        assert_eq!(dropped_lines() - before, 2);
        go_on.send(()).unwrap();
        in_write.recv().unwrap();
        go_on.send(()).unwrap();
        drop((queue, in_write, go_on));
        while !out.0.lock().unwrap().ends_with(b"kept too\n") {
            std::thread::yield_now();
        }
        assert_eq!(*out.0.lock().unwrap(), b"written\nkept\nkept too\n");
    }

    #[test]
    fn a_bad_filter_is_refused() {
        assert!(init("info,=what=", Format::Plain).is_err());
    }
}
