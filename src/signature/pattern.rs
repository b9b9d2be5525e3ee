//! Patterns as OpenSSH writes them, in `known_hosts`, `ssh_config`, `allowed_signers` and certificates.

/// `*` and `?`, in time linear in the product of the lengths.
pub fn wild(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(byte) if *byte == b'?' || *byte == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    p = at + 1;
                    n = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// Whether a pattern of a list with commas matches, and none with a `!` in front.
pub fn any_of(list: &str, name: &str) -> bool {
    let mut found = false;
    for pattern in list.split(',') {
        match pattern.strip_prefix('!') {
            Some(pattern) if wild(pattern.as_bytes(), name.as_bytes()) => return false,
            Some(_) => {}
            None => found |= wild(pattern.as_bytes(), name.as_bytes()),
        }
    }
    found
}
