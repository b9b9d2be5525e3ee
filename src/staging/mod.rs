//! Where content waits until it is proven, and the lock that keeps a second run away from it.
//!
//! What always holds: a staged file is born 0600 in a directory of mode 0700 on the target's own file system, and gets
//! owner, ACL and mode only after its SHA-256 was found to be the one that was announced.

mod audience;
mod copy;
mod digests;
mod file;
mod hashing;
pub mod hold;
mod ids;
mod journal;
mod lock;
mod mapped;
mod passed_on;
mod state;

pub use audience::{admit, as_manifest, audience_at, audience_of, open_state};
pub use copy::copy_range;
pub use digests::{DIGESTS, load_digests, store_beside_manifest, store_digests};
pub use file::{Permissions, SET_OWNER, StageError, StagedFile, apply, clean_pages, hash_of, hash_of_both, is_young};
pub use hashing::{Kept, STATE_EVERY};
pub use ids::Ids;
pub use journal::Journal;
pub use lock::{LockError, RootLock, sftp_holder};
pub use mapped::{Mapped, processes};
pub use passed_on::{AREAS, COMING, Standing, is_believed, published, remember_trail, standing, stop_at, trail_of};
pub use state::must_be_own;
