//! Lines for other programs: ArcSight's Common Event Format, version 0, and comma-separated values (RFC 4180). Pure.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use super::Outcome;
use super::event::Event;

/// What a table has, in its order.
const COLUMNS: [&str; 27] = [
    "root",
    "sequence",
    "time",
    "boot",
    "action",
    "result",
    "actor",
    "peer",
    "key",
    "certificate",
    "serial",
    "authority",
    "source",
    "path",
    "size",
    "sha256",
    "mode_before",
    "mode",
    "owner_before",
    "owner",
    "group_before",
    "group",
    "acl",
    "generation",
    "reason",
    "head",
    "hash",
];

/// The first line of a table.
#[must_use]
pub fn csv_header() -> String {
    COLUMNS.join(",") + "\r\n"
}

/// A line of a table.
#[must_use]
pub fn csv(root: &str, event: &Event) -> String {
    let number = |number: Option<u64>| number.map(|number| number.to_string());
    let text = Option::clone;
    let cells: [Option<String>; COLUMNS.len()] = [
        Some(root.to_owned()),
        Some(event.sequence.to_string()),
        Some(event.time.clone()),
        text(&event.boot),
        Some(event.action.clone()),
        Some(outcome(event).to_owned()),
        text(&event.actor),
        text(&event.peer),
        text(&event.key),
        text(&event.certificate),
        number(event.serial),
        text(&event.authority),
        text(&event.source),
        text(&event.path),
        number(event.size),
        text(&event.sha256),
        text(&event.mode_before),
        text(&event.mode),
        text(&event.owner_before),
        text(&event.owner),
        text(&event.group_before),
        text(&event.group),
        text(&event.acl),
        number(event.generation),
        text(&event.reason),
        text(&event.head),
        Some(event.hash.clone()),
    ];
    cells.map(|cell| cell_of(&cell.unwrap_or_default())).join(",") + "\r\n"
}

/// A cell. What a spreadsheet would take for a formula (`=`, `+`, `-`, `@`, and what it skips before them) gets an apostrophe in
/// front: names come from whoever sends them.
fn cell_of(text: &str) -> String {
    let formula = text.starts_with(['=', '+', '-', '@', '\t', '\r', '\n', '＝', '＋', '－', '＠']);
    let guarded = if formula { format!("'{text}") } else { text.to_owned() };
    // Some spreadsheets divide cells by semicolons or tabs.
    if guarded.contains(['"', ',', ';', '\t', '\r', '\n']) || guarded != guarded.trim() {
        return format!("\"{}\"", guarded.replace('"', "\"\""));
    }
    guarded
}

fn outcome(event: &Event) -> &'static str {
    match event.outcome() {
        Outcome::Success => "success",
        Outcome::Failure => "failure",
    }
}

/// What an action is called, and how much it matters from 0 to 10 when it was done.
fn meaning(action: &str) -> (&'static str, u8) {
    match action {
        "publish" => ("Published", 3),
        "metadata" => ("Permissions changed", 4),
        "remove" => ("Removed", 4),
        "trash" => ("Moved to trash", 4),
        "repair" => ("Repaired", 5),
        "quarantine" => ("Moved to quarantine", 6),
        "intent" => ("Publishing begins", 1),
        "login" => ("Login", 3),
        "session" => ("Session ended", 2),
        "connection" => ("Connection ended", 1),
        "check" => ("Checked", 2),
        "configuration" => ("Configuration", 5),
        "refuse" => ("Refused", 7),
        "head" => ("Log signed", 0),
        "rotate" => ("Log rotated", 1),
        "prune" => ("Log files removed", 5),
        _ => ("Event", 3),
    }
}

/// One event for a collector, without a line end. `root` is the directory of the log.
#[must_use]
pub fn cef(root: &str, event: &Event) -> String {
    let (name, usual) = meaning(&event.action);
    let severity = if event.outcome() == Outcome::Failure { 7 } else { usual };
    let version = env!("CARGO_PKG_VERSION");
    let mut text = format!("CEF:0|lockstep|lockstep|{version}|{}|{name}|{severity}|", header(&event.action));
    let mut put = |key: &str, value: &str| {
        if !value.is_empty() {
            let space = if text.ends_with('|') { "" } else { " " };
            let _ = write!(text, "{space}{key}={}", extension(value));
        }
    };
    if let Some(moment) = event.moment() {
        put("rt", &moment.timestamp_millis().to_string());
    }
    put("externalId", &event.sequence.to_string());
    put("act", &event.action);
    put("outcome", outcome(event));
    let some = |text: &Option<String>| text.clone().unwrap_or_default();
    put("suser", &some(&event.actor));
    match event.peer.as_deref().and_then(address) {
        Some((IpAddr::V4(ip), port)) => {
            put("src", &ip.to_string());
            put("spt", &port.map(|port| port.to_string()).unwrap_or_default());
        }
        Some((IpAddr::V6(ip), port)) => {
            put("c6a2Label", "Source IPv6 Address");
            put("c6a2", &ip.to_string());
            put("spt", &port.map(|port| port.to_string()).unwrap_or_default());
        }
        None => {}
    }
    let path = some(&event.path);
    if !path.is_empty() {
        put("fname", path.rsplit('/').next().unwrap_or(&path));
        put("filePath", &path);
    }
    put("fsize", &event.size.map(|size| size.to_string()).unwrap_or_default());
    put("fileHash", &some(&event.sha256));
    put("filePermission", &some(&event.mode));
    put("oldFilePermission", &some(&event.mode_before));
    let pair = |owner: &Option<String>, group: &Option<String>| match (owner, group) {
        (None, None) => String::new(),
        (owner, group) => format!("{}:{}", some(owner), some(group)),
    };
    let certificate = event.certificate.as_ref().map(|id| match event.serial {
        Some(serial) => format!("{id} (serial {serial})"),
        None => id.clone(),
    });
    let labelled = [
        ("cs1", "Root", root.to_owned()),
        ("cs2", "Key", some(&event.key)),
        ("cs3", "Owner", pair(&event.owner, &event.group)),
        ("cs4", "Owner before", pair(&event.owner_before, &event.group_before)),
        ("cs5", "Certificate", some(&certificate)),
        ("cs6", "Source", some(&event.source)),
        ("cn1", "Generation", event.generation.map(|number| number.to_string()).unwrap_or_default()),
        ("flexString1", "Line hash", event.hash.clone()),
        ("flexString2", "ACL", some(&event.acl)),
    ];
    for (key, label, value) in labelled.iter().filter(|(_, _, value)| !value.is_empty()) {
        put(&format!("{key}Label"), label);
        put(key, value);
    }
    put("deviceExternalId", &some(&event.boot));
    put("reason", &some(&event.reason));
    text
}

/// The address that a line has, with its port where it has one.
fn address(peer: &str) -> Option<(IpAddr, Option<u16>)> {
    let socket = peer.parse::<SocketAddr>().map(|socket| (socket.ip(), Some(socket.port())));
    socket.ok().or_else(|| Some((peer.parse().ok()?, None)))
}

/// In a field of the header: a bar ends it.
fn header(text: &str) -> String {
    text.replace('\\', "\\\\").replace('|', "\\|").replace(['\r', '\n'], " ")
}

/// In a value of the extension: an equals sign would begin the next.
fn extension(text: &str) -> String {
    text.replace('\\', "\\\\").replace('=', "\\=").replace('\r', "\\r").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_no_formula_and_stays_in_its_column() {
        for (text, cell) in [
            ("plain", "plain"),
            ("a,b", "\"a,b\""),
            ("say \"x\"", "\"say \"\"x\"\"\""),
            ("=1+1", "'=1+1"),
            ("@x", "'@x"),
            ("-1", "'-1"),
            ("+a,b", "\"'+a,b\""),
            ("\tx", "\"'\tx\""),
            ("a;=1+1", "\"a;=1+1\""),
            ("a\t=1+1", "\"a\t=1+1\""),
            ("a\r\nb", "\"a\r\nb\""),
            ("", ""),
        ] {
            assert_eq!(cell_of(text), cell, "{text:?}");
        }
    }

    #[test]
    fn bars_equals_signs_and_line_ends_are_escaped_where_they_mean_something() {
        let event = Event {
            action: "pub|lish\\".into(),
            path: Some("dir/a=b\\x0a|c".into()),
            reason: Some("one\ntwo".into()),
            peer: Some("192.0.2.7:50022".into()),
            time: "2026-01-31T06:59:02.123Z".into(),
            mode: Some("0640".into()),
            mode_before: Some("0600".into()),
            ..Event::default()
        };
        let text = cef("/data", &event);
        assert!(text.starts_with("CEF:0|lockstep|lockstep|"), "{text}");
        assert!(text.contains("|pub\\|lish\\\\|Event|3|rt=1769842742123 "), "{text}");
        assert!(text.contains(" fname=a\\=b\\\\x0a|c filePath=dir/a\\=b\\\\x0a|c "), "{text}");
        assert!(text.contains(" src=192.0.2.7 spt=50022 ") && text.contains(" reason=one\\ntwo"), "{text}");
        assert!(text.contains(" filePermission=0640 oldFilePermission=0600 "), "{text}");
        assert!(!text.contains('\n'));
    }
}
