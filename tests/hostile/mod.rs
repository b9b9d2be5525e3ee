//! Peers, and others who may write in a root, that mean harm: what they try, and that nothing comes of it.

mod agent;
mod races;
mod server;
