//! The algorithms that both ends of lockstep agree to, as client and as server: authenticated key exchange with a
//! post-quantum one first, authenticated ciphers, the one that this processor is fastest with first, no SHA-1, nothing over numbers that take long to compute with.

use russh::{Preferred, cipher, kex, mac};

/// Which end it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum End {
    Client,
    Server,
}

/// What is offered; types of host keys are left to the caller.
pub fn preferred(end: End) -> Preferred {
    let (extensions, strict) = match end {
        End::Client => (kex::EXTENSION_SUPPORT_AS_CLIENT, kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT),
        End::Server => (kex::EXTENSION_SUPPORT_AS_SERVER, kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER),
    };
    Preferred {
        kex: vec![kex::MLKEM768X25519_SHA256, kex::CURVE25519, kex::CURVE25519_PRE_RFC_8731, extensions, strict].into(),
        cipher: ciphers(computes_aes()).into(),
        mac: vec![mac::HMAC_SHA256_ETM, mac::HMAC_SHA512_ETM].into(),
        ..Preferred::default()
    }
}

/// Of those that both ends take, the one that the client names first is used.
fn ciphers(computes_aes: bool) -> Vec<cipher::Name> {
    let mut ciphers = vec![cipher::AES_128_GCM, cipher::AES_256_GCM, cipher::CHACHA20_POLY1305];
    if !computes_aes {
        ciphers.rotate_right(1);
    }
    ciphers
}

/// Whether the processor has instructions for AES-GCM: with them it is five times as fast as ChaCha20, and without them several times slower.
fn computes_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_that_does_not_compute_aes_begins_with_chacha20() {
        let (with, without) = (ciphers(true), ciphers(false));
        assert_eq!((with[0], without[0]), (cipher::AES_128_GCM, cipher::CHACHA20_POLY1305));
        // What is offered is the same.
        assert!(with.iter().all(|cipher| without.contains(cipher)) && with.len() == without.len());
    }

    #[test]
    fn what_the_processor_says_of_itself_is_what_is_known_of_it() {
        let told = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let has = |flag: &str| told.split_whitespace().any(|word| word == flag);
        let all: &[&str] = if cfg!(target_arch = "x86_64") { &["aes", "pclmulqdq"] } else { &["aes"] };
        assert_eq!(computes_aes(), all.iter().all(|flag| has(flag)));
    }
}
