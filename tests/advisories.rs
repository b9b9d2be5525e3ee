//! `scripts/advisories`, against a server that answers as OSV does.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use crate::kit::ends;

/// Answers requests by `answer`, which gets the path and the body, until the test ends.
fn serve(answer: impl Fn(&str, &str) -> String + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut first, mut length) = (String::new(), 0);
            reader.read_line(&mut first).unwrap();
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap() == 0 || line == "\r\n" {
                    break;
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let text = answer(first.split(' ').nth(1).unwrap(), &String::from_utf8(body).unwrap());
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", text.len());
            (&stream).write_all(format!("{head}{text}").as_bytes()).unwrap();
        }
    });
    url
}

#[test]
fn what_is_known_against_a_crate_is_told_unless_a_reason_is_given() {
    let at = tempfile::tempdir().unwrap();
    let package = |name: &str, source: &str| format!("[[package]]\nname = '{name}'\nversion = '1.0.0'\n{source}\n");
    let source = "source = 'registry+https://github.com/rust-lang/crates.io-index'";
    let lock = ["bad", "fine", "excused"].map(|name| package(name, source)).concat() + &package("own", "");
    fs::write(at.path().join("Cargo.lock"), lock).unwrap();
    let deny = "[advisories]\nignore = [{ id = 'RUSTSEC-1', reason = 'not used' }]\n";
    fs::write(at.path().join("deny.toml"), deny).unwrap();
    let url = serve(|path, body| {
        // In the order of the names; what is asked for the second time is the rest of the first.
        match path {
            "/v1/querybatch" if body.contains("page_token") => r#"{"results":[{"vulns":[{"id":"GHSA-3"}]}]}"#.into(),
            "/v1/querybatch" => {
                assert!(body.contains(r#""name": "fine"}, "version": "1.0.0""#) && !body.contains("own"), "{body}");
                r#"{"results":[{"vulns":[{"id":"GHSA-2"}],"next_page_token":"more"},{"vulns":[{"id":"GHSA-1"}]},{}]}"#
                    .into()
            }
            "/v1/vulns/GHSA-1" => r#"{"id":"GHSA-1","aliases":["RUSTSEC-1"],"summary":"one"}"#.into(),
            path => format!(
                r#"{{"id":"{}","summary":"two","affected":[{{"package":{{"name":"bad"}},"ranges":[{{"events":[{{"fixed":"1.0.1"}}]}}]}}]}}"#,
                path.rsplit('/').next().unwrap()
            ),
        }
    });
    let run = |url: &str| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/advisories");
        let arguments = ["--url", url, "--lock", "Cargo.lock", "--deny", "deny.toml"];
        Command::new(script).current_dir(at.path()).args(arguments).output().unwrap()
    };
    let output = run(&url);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{told}");
    for line in [
        "bad 1.0.0: GHSA-2: two; mended by 1.0.1; https://osv.dev/GHSA-2",
        "bad 1.0.0: GHSA-3: two; mended by 1.0.1; https://osv.dev/GHSA-3",
        "excused 1.0.0: GHSA-1: one; mended by no version yet; excused: not used",
        "3 crates, 2 with something against them that is not excused",
    ] {
        assert!(told.contains(line), "{line}: {told}");
    }
    ends(&run("http://127.0.0.1:9"), 2, &["gives no answer"]);
}
