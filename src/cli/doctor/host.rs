//! What a login to a host would agree to, and whether the host is known: nothing is logged in to, and nothing trusted.

use russh::keys::ssh_key::public::KeyData;
use russh::keys::ssh_key::{HashAlg, PublicKey};

use crate::cli::Failure;
use crate::cli::finding::Finding;
use crate::cli::login::{Ssh, Warn as _, failed, parse_host};
use crate::error::Escaped;
use crate::signature::MIN_RSA_BITS;
use crate::ssh::{Finding as Judged, Offer, Shown, SshRemote};
use crate::wire::kexinit::{KexInit, agreed};

const STRICT: &str = "kex-strict-s-v00@openssh.com";
/// Key exchanges that stay secret from whoever records them now and has a quantum computer later.
const POST_QUANTUM: [&str; 1] = ["mlkem768x25519-sha256"];

pub(super) fn look(host: &str, ssh: &Ssh) -> Result<Vec<Finding>, Failure> {
    let (user, host) = parse_host(host)?;
    let resolved = ssh.resolve(user.as_deref(), &host)?;
    resolved.warn();
    let options = resolved.options;
    let outlook = options.look();
    let remote = SshRemote::new(options).map_err(failed)?;
    let offer = remote.offer().map_err(failed)?;
    let mut findings = of_offer(&offer);
    match remote.scan() {
        Ok(shown) => findings.extend(shown.iter().map(of_key)),
        Err(error) => findings.push(Finding::error("host key", error.message, "")),
    }
    findings.extend(outlook.wrong.into_iter().map(|reason| Finding::error("login", reason, "")));
    findings.extend(outlook.doubtful.into_iter().map(|(reason, remedy)| Finding::warning("login", reason, &remedy)));
    Ok(findings)
}

/// What would be agreed to, in the order in which it is.
fn of_offer(offer: &Offer) -> Vec<Finding> {
    let Offer { version, theirs, ours } = offer;
    let mut findings = vec![Finding::ok("host", version.clone()), exchange(theirs, ours), strict(theirs)];
    let both = [
        ("cipher to it", &ours.ciphers_to_server, &theirs.ciphers_to_server),
        ("cipher from it", &ours.ciphers_to_client, &theirs.ciphers_to_client),
    ];
    for (about, ours, theirs) in both {
        findings.push(match agreed(ours, theirs) {
            Some(cipher) => Finding::ok(about, format!("{cipher}, which authenticates what it encrypts")),
            None => none(about, ours, theirs, "Ciphers"),
        });
    }
    findings.push(match agreed(&ours.host_keys, &theirs.host_keys) {
        Some(kind) => Finding::ok("type of host key", kind),
        None => none("type of host key", &ours.host_keys, &theirs.host_keys, "HostKeyAlgorithms"),
    });
    findings.extend(weak(theirs));
    findings
}

fn none(about: &str, ours: &[String], theirs: &[String], keyword: &str) -> Finding {
    let says = format!(
        "it has none that is strong enough: it offers {}, and one of {} is needed",
        theirs.join(", "),
        ours.join(", ")
    );
    Finding::error(about, says, &format!("update its SSH server, or {keyword} of its sshd_config"))
}

fn exchange(theirs: &KexInit, ours: &KexInit) -> Finding {
    let about = "key exchange";
    match agreed(&ours.exchanges, &theirs.exchanges) {
        None => none(about, &ours.exchanges, &theirs.exchanges, "KexAlgorithms"),
        Some(name) if POST_QUANTUM.contains(&name) => {
            Finding::ok(about, format!("{name}, which a quantum computer does not break, as far as is known"))
        }
        Some(name) => Finding::warning(
            about,
            format!("{name}: who records the connection today can read it when there are quantum computers"),
            "OpenSSH has mlkem768x25519-sha256 since 9.9, and 'lockstep serve' has it",
        ),
    }
}

fn strict(theirs: &KexInit) -> Finding {
    match theirs.exchanges.iter().any(|name| name == STRICT) {
        true => Finding::ok("strict key exchange", "it has it: messages cannot be removed unseen (CVE-2023-48795)"),
        false => Finding::error(
            "strict key exchange",
            "it does not have it: somebody on the way could remove messages unseen (CVE-2023-48795); lockstep does not log in there",
            "update its SSH server; OpenSSH has it since 9.6, and Debian's 9.2p1 since its update of December 2023",
        ),
    }
}

/// What the host would agree to with others.
fn weak(theirs: &KexInit) -> Option<Finding> {
    let sha1 = |name: &str| name.ends_with("-sha1") || name.contains("group1-");
    let cipher = |name: &str| name.contains("cbc") || name.starts_with("arcfour") || name.starts_with("3des");
    let mac = |name: &str| ["md5", "sha1", "umac-64", "ripemd"].iter().any(|part| name.contains(part));
    let key = |name: &str| name == "ssh-rsa" || name == "ssh-dss";
    let lists: [(&Vec<String>, &dyn Fn(&str) -> bool); 6] = [
        (&theirs.exchanges, &sha1),
        (&theirs.ciphers_to_server, &cipher),
        (&theirs.ciphers_to_client, &cipher),
        (&theirs.macs_to_server, &mac),
        (&theirs.macs_to_client, &mac),
        (&theirs.host_keys, &key),
    ];
    let mut found: Vec<&str> = Vec::new();
    for (names, is_weak) in lists {
        for name in names.iter().filter(|name| is_weak(name)) {
            if !found.contains(&name.as_str()) {
                found.push(name);
            }
        }
    }
    (!found.is_empty()).then(|| {
        let says = format!("with other clients it would agree to {}; lockstep does not ask for them", found.join(", "));
        Finding::warning(
            "weak algorithms",
            says,
            "leave them out of KexAlgorithms, Ciphers, MACs and HostKeyAlgorithms of its sshd_config",
        )
    })
}

fn of_key(shown: &Shown) -> Finding {
    let named = name_of(&shown.key);
    if let KeyData::Rsa(key) = shown.key.key_data()
        && key.key_size() < MIN_RSA_BITS
    {
        let says = format!("{named} is too short: {} bits, and {MIN_RSA_BITS} are the least", key.key_size());
        return Finding::warning(
            "host key",
            says,
            "make a new one there: ssh-keygen -A, after the old file is moved away",
        );
    }
    match &shown.finding {
        Judged::Trusted => Finding::ok("host key", format!("{named} is known")),
        Judged::New => Finding::warning(
            "host key",
            format!("{named} is not known here"),
            "compare it with what its owner says, then: lockstep keys scan-host --add --fingerprint SHA256:… HOST",
        ),
        Judged::Refused(reason) => Finding::error("host key", reason.clone(), ""),
    }
}

fn name_of(key: &PublicKey) -> String {
    let name = format!("{} {}", key.algorithm(), key.fingerprint(HashAlg::Sha256));
    Escaped(name.as_bytes()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::finding::Level;

    fn list(names: &str) -> Vec<String> {
        names.split(',').map(str::to_owned).collect()
    }

    fn side(exchanges: &str, keys: &str, ciphers: &str, macs: &str) -> KexInit {
        KexInit {
            exchanges: list(exchanges),
            host_keys: list(keys),
            ciphers_to_server: list(ciphers),
            ciphers_to_client: list(ciphers),
            macs_to_server: list(macs),
            macs_to_client: list(macs),
        }
    }

    #[test]
    fn h57_what_would_be_agreed_to_is_weighed() {
        let ours =
            side("mlkem768x25519-sha256,curve25519-sha256", "ssh-ed25519", "aes128-gcm@openssh.com", "hmac-sha2-256");
        let weighed = |theirs: KexInit| {
            let offer = Offer { version: "SSH-2.0-x".into(), theirs, ours: ours.clone() };
            of_offer(&offer)
                .into_iter()
                .map(|found| (found.about, (found.level, found.says)))
                .collect::<std::collections::BTreeMap<_, _>>()
        };
        let strict = "kex-strict-s-v00@openssh.com";
        let good = weighed(side(
            &format!("curve25519-sha256,mlkem768x25519-sha256,{strict}"),
            "ssh-ed25519",
            "aes128-gcm@openssh.com",
            "hmac-sha2-256",
        ));
        assert!(good.values().all(|(level, _)| *level == Level::Ok), "{good:?}");
        assert!(good["key exchange"].1.starts_with("mlkem768x25519-sha256"), "{good:?}");
        let old = weighed(side("curve25519-sha256,diffie-hellman-group14-sha1", "ssh-rsa", "aes128-cbc", "hmac-sha1"));
        for about in ["strict key exchange", "cipher to it", "cipher from it", "type of host key"] {
            assert_eq!(old[about].0, Level::Error, "{about}");
        }
        assert_eq!(old["key exchange"].0, Level::Warning);
        assert!(
            old["weak algorithms"].1.contains("diffie-hellman-group14-sha1, aes128-cbc, hmac-sha1, ssh-rsa"),
            "{old:?}"
        );
    }
}
