//! User certificates: what must hold beside the authority's signature, which has been verified before.
//!
//! Stricter than sshd in one point: a certificate without principals is good for nobody.

use russh::keys::ssh_key::certificate::CertType;
use russh::keys::{Algorithm, Certificate};

use super::authorized_keys::{Asked, Grant, forced, strong};
use crate::config::AddressList;
use crate::error::Escaped;

/// Checks a certificate whose authority is trusted. `principals` is the list of the authority's line: any of them must
/// be in the certificate, in place of the user's name.
///
/// # Errors
/// Why it is refused.
pub fn check(certificate: &Certificate, principals: Option<&str>, asked: &Asked<'_>) -> Result<Grant, String> {
    if certificate.cert_type() != CertType::User {
        return Err("it is a host's certificate, not a user's".into());
    }
    if matches!(certificate.signature().algorithm(), Algorithm::Rsa { hash: None } | Algorithm::Dsa) {
        return Err("the authority signed it with SHA-1; sign it anew: ssh-keygen -t rsa-sha2-512".into());
    }
    strong(certificate.public_key()).and_then(|()| strong(certificate.signature_key()))?;
    if asked.now < certificate.valid_after() {
        return Err(format!("it is not valid yet: not before {}, now it is {}", certificate.valid_after(), asked.now));
    }
    if asked.now >= certificate.valid_before() {
        return Err(format!("it has expired: valid before {}, now it is {}", certificate.valid_before(), asked.now));
    }
    let wanted: Vec<&str> = match principals {
        Some(list) => listed(list).collect(),
        None => vec![asked.user],
    };
    let good = certificate.valid_principals().iter().filter(|principal| wanted.contains(&principal.as_str()));
    let good: Vec<String> = good.cloned().collect();
    if good.is_empty() {
        let list = certificate.valid_principals().join(", ");
        let list = if list.is_empty() { "nobody".to_owned() } else { Escaped(list.as_bytes()).to_string() };
        return Err(format!("it is for {list}, not for {}", wanted.join(" or ")));
    }
    // An authority whose line names principals is believed nothing else.
    let roles = if principals.is_some() { good.clone() } else { certificate.valid_principals().to_vec() };
    let mut grant = Grant { principals: good, roles, ..Grant::default() };
    for (name, value) in certificate.critical_options().iter() {
        match name.as_str() {
            "force-command" => {
                grant.read_only |= forced(value).map_err(|reason| format!("force-command: {reason}"))?;
            }
            "source-address" => {
                let addresses = AddressList::of_certificate(value);
                let addresses = addresses.map_err(|_| "its source-address cannot be read")?;
                if !addresses.admits(asked.peer) {
                    return Err(format!("source-address {value} does not admit {}", asked.peer.to_canonical()));
                }
            }
            name => return Err(format!("its critical option {} is not understood", Escaped(name.as_bytes()))),
        }
    }
    Ok(grant)
}

/// Whether its key may sign without being touched.
pub(super) fn untouched(certificate: &Certificate) -> bool {
    certificate.extensions().iter().any(|(name, _)| name == "no-touch-required")
}

/// The principals that a line names.
pub(super) fn listed(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::super::authorized_keys::AuthorizedKeys;
    use super::*;
    use crate::trust::Credential;
    use russh::keys::PrivateKey;
    use russh::keys::ssh_key::certificate::Builder;
    use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
    use russh::keys::ssh_key::public::{KeyData, SkEd25519};

    const NOW: u64 = 1_700_000_000;

    fn key(seed: u8) -> PrivateKey {
        PrivateKey::new(KeypairData::Ed25519(Ed25519Keypair::from_seed(&[seed; 32])), "").unwrap()
    }

    fn made(by: u8, from: u64, until: u64, change: impl Fn(&mut Builder)) -> Certificate {
        made_as(CertType::User, by, from, until, change)
    }

    fn made_as(kind: CertType, by: u8, from: u64, until: u64, change: impl Fn(&mut Builder)) -> Certificate {
        made_of(key(2).public_key().key_data().clone(), kind, by, from, until, change)
    }

    fn made_of(
        of: KeyData,
        kind: CertType,
        by: u8,
        from: u64,
        until: u64,
        change: impl Fn(&mut Builder),
    ) -> Certificate {
        let mut builder = Builder::new([9; 32], of, from, until).unwrap();
        builder.serial(7).unwrap().key_id("id").unwrap();
        builder.cert_type(kind).unwrap();
        change(&mut builder);
        builder.sign(&key(by)).unwrap()
    }

    #[test]
    fn h55_a_security_key_is_to_be_touched_where_it_is_certified_too() {
        let KeyData::Ed25519(public) = *key(2).public_key().key_data() else { unreachable!() };
        let key_data = KeyData::SkEd25519(SkEd25519::new(public, "ssh:"));
        let authority = key(1).public_key().to_openssh().unwrap();
        let asked = Asked { user: "sync", peer: [10, 0, 0, 1].into(), now: NOW };
        for (line, extension, good) in [
            ("cert-authority", false, false),
            ("cert-authority", true, false),
            ("cert-authority,no-touch-required", false, false),
            ("cert-authority,no-touch-required", true, true),
        ] {
            let certificate = made_of(key_data.clone(), CertType::User, 1, NOW - 10, NOW + 10, |b| {
                b.valid_principal("sync").unwrap();
                if extension {
                    b.extension("no-touch-required", "").unwrap();
                }
            });
            let lines = AuthorizedKeys::parse(format!("{line} {authority}\n").as_bytes());
            match lines.authorize(Credential::Certificate(&certificate), &asked) {
                Ok(_) => assert!(good, "{line} {extension}"),
                Err(reason) => assert!(!good && reason.contains("no-touch-required"), "{line} {extension}: {reason}"),
            }
        }
    }

    #[test]
    fn h55_each_refusal_has_a_reason_of_its_own() {
        let sync = |b: &mut Builder| {
            b.valid_principal("sync").unwrap();
        };
        let option = |name: &'static str, value: &'static str| {
            move |b: &mut Builder| {
                b.valid_principal("sync").unwrap().critical_option(name, value).unwrap();
            }
        };
        let other = |b: &mut Builder| {
            b.valid_principal("alice").unwrap();
        };
        let all = |b: &mut Builder| {
            b.all_principals_valid().unwrap();
        };
        let good = |change: &dyn Fn(&mut Builder)| made(1, NOW - 10, NOW + 10, change);
        let cases: [(Certificate, Result<bool, &str>); 15] = [
            (good(&sync), Ok(false)),
            (made(3, NOW - 10, NOW + 10, sync), Err("is not listed")),
            (made_as(CertType::Host, 1, NOW - 10, NOW + 10, sync), Err("a host's certificate")),
            (made(1, NOW + 1, NOW + 10, sync), Err("not valid yet")),
            (made(1, NOW - 10, NOW, sync), Err("has expired")),
            (good(&other), Err("it is for alice, not for sync")),
            (good(&all), Err("it is for nobody")),
            (good(&option("source-address", "10.0.0.0/8,192.0.2.1")), Ok(false)),
            (good(&option("source-address", "192.0.2.0/24")), Err("does not admit 10.0.0.1")),
            (good(&option("source-address", "10.0.0.*")), Err("cannot be read")),
            (good(&option("source-address", "10.0.0.7/8")), Err("cannot be read")),
            (good(&option("force-command", "internal-sftp -R")), Ok(true)),
            (good(&option("force-command", "/bin/sh")), Err("is not a file server")),
            (good(&option("verify-required", "")), Err("verify-required is not understood")),
            (good(&option("strange@example.org", "x")), Err("strange@example.org is not understood")),
        ];
        let asked = Asked { user: "sync", peer: [10, 0, 0, 1].into(), now: NOW };
        let authority = key(1).public_key().to_openssh().unwrap();
        let lines = AuthorizedKeys::parse(format!("cert-authority {authority}\n").as_bytes());
        assert!(lines.has_authority());
        for (certificate, expected) in &cases {
            match (lines.authorize(Credential::Certificate(certificate), &asked), expected) {
                (Ok(grant), Ok(read_only)) => assert_eq!(grant.read_only, *read_only),
                (Err(reason), Err(part)) => assert!(reason.contains(part), "{part}: {reason}"),
                (got, expected) => panic!("{expected:?}: {got:?}"),
            }
        }
    }

    #[test]
    fn s27_the_line_of_the_authority_restricts_too() {
        let authority = key(1).public_key().to_openssh().unwrap();
        let certificate = made(1, NOW - 10, NOW + 10, |b| {
            b.valid_principal("trainers").unwrap();
        });
        let asked = Asked { user: "sync", peer: [10, 0, 0, 1].into(), now: NOW };
        for (options, part) in [
            ("cert-authority", Some("not for sync")),
            ("cert-authority,principals=\"ops,trainers\"", None),
            ("cert-authority,principals=\"ops\"", Some("not for ops")),
            ("cert-authority,principals=\"ops\",principals=\"trainers\"", Some("there twice")),
            ("cert-authority,principals=\"\"", Some("it is for trainers")),
            ("cert-authority,principals=\"trainers\",from=\"192.0.2.0/24\"", Some("does not admit")),
            ("cert-authority,principals=\"trainers\",command=\"/bin/sh\"", Some("not a file server")),
            ("cert-authority,principals=\"trainers\",strange", Some("strange is not understood")),
            ("restrict", Some("without cert-authority")),
        ] {
            let lines = AuthorizedKeys::parse(format!("{options} {authority}\n").as_bytes());
            let got = lines.authorize(Credential::Certificate(&certificate), &asked);
            assert_eq!(got.is_ok(), part.is_none(), "{options}: {got:?}");
            if let (Err(reason), Some(part)) = (got, part) {
                assert!(reason.contains(part), "{options}: {reason}");
            }
        }
        // The key in the certificate is listed by itself: that lets the key in, never the certificate.
        let plain = key(2).public_key().to_openssh().unwrap();
        let lines = AuthorizedKeys::parse(plain.as_bytes());
        assert!(lines.authorize(Credential::Key(key(2).public_key().key_data()), &asked).is_ok());
        assert!(lines.authorize(Credential::Certificate(&certificate), &asked).is_err());
    }
}
