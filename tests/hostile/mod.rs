//! Peers, and others who may write in a root, that mean harm: what they try, and that nothing comes of it.

mod agent;
mod agent_operations;
mod floods;
mod forged;
mod operations;
mod server;
mod swapping;
