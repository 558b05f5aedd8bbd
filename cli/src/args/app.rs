//! The grammar of the small programs that the demo's pods run.

use clap::{Subcommand, ValueEnum};
use lab::apps::relay::Instead;

#[derive(Debug, Subcommand)]
pub(crate) enum App {
    /// Answer HTTP requests.
    Http {
        #[arg(long, default_value = "[::]:8080")]
        listen: String,
        #[arg(long, env = "HOSTNAME", default_value = "server")]
        name: String,
        /// Seconds to go on for when told to terminate.
        #[arg(long, default_value_t = 0)]
        drain: u64,
    },
    /// Echo lines.
    Echo {
        #[arg(long, default_value = "[::]:9000")]
        listen: String,
    },
    /// Serve checksummed streams, half-closes and resets.
    Stream {
        #[arg(long, default_value = "[::]:9001")]
        listen: String,
    },
    /// Greet whoever connects, before he says anything.
    Greet {
        #[arg(long, default_value = "[::]:9002")]
        listen: String,
    },
    /// Keep one connection open and use it.
    Steady {
        target: String,
        #[arg(long, default_value_t = 20)]
        interval_ms: u64,
        /// Reconnect when told so on this address.
        #[arg(long, default_value = "127.0.0.1:9099")]
        control: String,
    },
    /// Tell a steady client to open a new connection.
    Reconnect {
        #[arg(long, default_value = "127.0.0.1:9099")]
        control: String,
    },
    /// GET a URL once and print the answer.
    Get {
        url: String,
        #[arg(long, default_value_t = 5)]
        timeout: u64,
    },
    /// Transfer bytes and check them, or exercise one of TCP's awkward shapes.
    Transfer {
        #[arg(value_enum)]
        mode: TransferMode,
        target: String,
        #[arg(long, default_value_t = 1 << 20)]
        bytes: u64,
        #[arg(long, default_value_t = 1)]
        connections: usize,
    },
    /// Answer every DNS query with one address.
    Nameserver {
        #[arg(long, default_value = "[::]:53")]
        listen: String,
    },
    /// Ask a nameserver for the IPv4 addresses of a name.
    Ask {
        server: String,
        name: String,
        #[arg(long)]
        tcp: bool,
        #[arg(long, default_value_t = 10)]
        timeout: u64,
    },
    /// Be a waypoint for bytes: carry what a PROXY header announces to where it says, and print who is behind it.
    Relay {
        #[arg(long, default_value = "[::]:15088")]
        listen: String,
        /// Dial `OTHER` for connections to `HOST`, port for port.
        #[arg(long, value_name = "HOST=OTHER", value_parser = instead)]
        instead: Vec<Instead>,
    },
    /// Greet every connection with one byte and keep it.
    Hold {
        #[arg(long, default_value = "[::]:9003")]
        listen: String,
    },
    /// Open many connections to `hold`, print how many, and keep them open for a while.
    Idlers {
        target: String,
        #[arg(long, default_value_t = 1000)]
        connections: usize,
        #[arg(long, default_value_t = 3.0)]
        seconds: f64,
    },
    /// Closed-loop HTTP load.
    Load {
        target: String,
        /// What to ask for; `/bytes/N` has a body of N bytes.
        #[arg(long, default_value = "/load")]
        path: String,
        #[arg(long, default_value_t = 8)]
        connections: usize,
        #[arg(long, default_value_t = 3.0)]
        seconds: f64,
        #[arg(long)]
        new_connections: bool,
    },
    /// Do nothing, for ever.
    Idle,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum TransferMode {
    Bulk,
    CloseFirst,
    Download,
    Greeting,
    Many,
    Reset,
    SendReset,
    Slow,
    Upload,
}

fn instead(text: &str) -> Result<Instead, String> {
    match text.split_once('=') {
        Some((host, other)) if !host.is_empty() && !other.is_empty() => {
            Ok(Instead { host: host.to_owned(), other: other.to_owned() })
        }
        _ => Err("expected HOST=OTHER, for instance web=web-endpoints".to_owned()),
    }
}
