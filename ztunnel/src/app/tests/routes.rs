//! What the three HTTP ports answer, line by line.

use super::*;

struct Answer {
    status: u16,
    content_type: String,
    body: String,
}

async fn answer(address: SocketAddr, method: &str, path: &str) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let content_type = head.lines().find_map(|line| line.strip_prefix("content-type: ")).unwrap_or_default();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, content_type: content_type.to_owned(), body: body.to_owned() }
}

const TEXT: &str = "text/plain; charset=utf-8";
const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";

#[tokio::test]
async fn every_page_answers_as_documented() {
    telemetry::init("error", telemetry::Format::Plain).unwrap();
    let app = start().await;
    let (admin, stats, readiness) = (app.admin, app.stats, app.readiness);
    // In this order: requests to `/logging` build upon each other.
    let table = [
        (readiness, "GET", "/healthz/ready", 200, TEXT, "ready\n"),
        (readiness, "POST", "/healthz/ready", 405, TEXT, ""),
        (readiness, "GET", "/metrics", 404, TEXT, ""),
        (stats, "GET", "/metrics", 200, TEXT, "# HELP "),
        (stats, "GET", "/stats/prometheus", 200, TEXT, "# HELP "),
        (stats, "POST", "/metrics", 200, TEXT, "# HELP "),
        (stats, "GET", "/", 404, TEXT, ""),
        (admin, "GET", "/", 200, HTML, "<!DOCTYPE html>\n"),
        (admin, "PUT", "/", 200, HTML, "<!DOCTYPE html>\n"),
        (admin, "GET", "/config_dump", 200, JSON, "{"),
        (admin, "POST", "/config_dump", 200, JSON, "{"),
        (admin, "GET", "/logging", 405, TEXT, "usage: POST /logging"),
        (admin, "POST", "/logging", 200, TEXT, "current log level is error\n"),
        (admin, "POST", "/logging?level=access=info", 200, TEXT, "current log level is access=info,error\n"),
        (admin, "POST", "/logging?level=loud", 400, TEXT, "`level`: `loud`: `loud` is not a level\nusage:"),
        (admin, "POST", "/logging?level=a:debug&reset", 400, TEXT, "`level`: `a:debug`: `a:debug` is not a level\n"),
        (admin, "POST", "/logging?level=", 200, TEXT, "current log level is access=info,error\n"),
        (admin, "POST", "/logging?reset&level=off", 200, TEXT, "current log level is off\n"),
        (admin, "POST", "/logging?reset", 200, TEXT, "current log level is error\n"),
        (admin, "GET", "/debug/pprof/profile?seconds=0", 400, TEXT, "`seconds` is `0`: expected"),
        (admin, "GET", "/debug/pprof/heap", 500, TEXT, "heap profiling is not active"),
        (admin, "POST", "/debug/pprof/heap/profiling?activate=true", 500, TEXT, "heap profiling is not active"),
        (admin, "GET", "/nothing", 404, TEXT, "no such page"),
        (admin, "GET", "/quitquitquit", 405, TEXT, ""),
        (admin, "POST", "/quitquitquit", 200, TEXT, "shutdown now\n"),
    ];
    for (port, method, path, status, content_type, body) in table {
        let got = answer(port, method, path).await;
        assert_eq!((got.status, &*got.content_type), (status, content_type), "{method} {path}: {}", got.body);
        assert!(got.body.starts_with(body), "{method} {path}: {}", got.body);
    }
    assert!(app.quit.is_cancelled());
    assert!(answer(stats, "GET", "/metrics").await.body.ends_with("\n# EOF\n"));
    app.stop().await;
}
