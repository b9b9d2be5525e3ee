//! (in the making)
/// (in the making)
pub fn diff() {}
