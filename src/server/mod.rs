//! The server: SFTP sessions and the agent.

pub mod agent;
