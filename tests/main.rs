//! All integration tests in one binary.

// A test that cannot go on fails; saying why at each step would hide what it tests.
#![allow(clippy::unwrap_used)]

mod adoption;
mod agent_disk;
mod agent_wire;
mod architecture;
mod certificates;
mod check;
mod check_index;
mod check_layouts;
mod check_sample;
mod cli;
mod confined;
mod daemon;
mod disk;
mod hostile_agent;
mod hostile_races;
mod hostile_server;
mod interop;
mod keys;
mod killed;
mod kit;
mod kubernetes;
mod layout;
mod model;
mod names;
mod oms;
mod pipeline;
mod pipes;
mod policy;
mod push;
mod quarantine;
mod quickstart;
mod readers;
mod repair;
mod rogue;
mod scenarios_permissions;
mod serve;
mod serve_access;
mod serve_limits;
mod serve_wire;
mod sftp_side_by_side;
mod signatures;
mod slurm;
mod ssh;
mod sshd_faults;
mod stock;
mod stock_faults;
mod stock_order;
mod stock_pipes;
mod systemd;
mod units;
mod web;
mod wire;
mod wire_openssh;
