//! What the SSH library decides without asking: it refuses certificates by their dates and signatures itself, and only
//! says so in its log.

/// Its words, and ours.
const REFUSALS: [(&str, &str); 2] = [
    ("Certificate is expired or not yet valid", "the certificate has expired or is not valid yet"),
    ("Certificate signature is invalid", "the certificate's signature is wrong"),
];

/// Why the one client of this process was refused, if a line of the library's log says so.
pub fn refusal(line: &str) -> Option<&'static str> {
    REFUSALS.iter().find(|(words, _)| line.contains(words)).map(|(_, reason)| *reason)
}
