//! The algorithms that both ends of lockstep agree to, as client and as server: authenticated key exchange with a
//! post-quantum one first, authenticated ciphers, the fastest first, no SHA-1, nothing over numbers that take long to compute with.

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
        cipher: vec![cipher::AES_128_GCM, cipher::AES_256_GCM, cipher::CHACHA20_POLY1305].into(),
        mac: vec![mac::HMAC_SHA256_ETM, mac::HMAC_SHA512_ETM].into(),
        ..Preferred::default()
    }
}
