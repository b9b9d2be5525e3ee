//! seccomp: which system calls a session can make. Files beneath descriptors, the sockets that are there, memory, threads, time;
//! everything else is answered by "not permitted", so that a library that tries something new goes on.
//!
//! What matters is what is left out: no program is started and no process made, no socket, no mount, no namespace, no memory that
//! can be executed, nothing of other processes, no key ring, no change of users or capabilities.

use std::collections::BTreeMap;

use libc::{
    CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER, CLONE_NEWUTS, CLONE_THREAD,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Whatever the arguments.
const ALWAYS: &[i64] = &[
    // What is open.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_readahead,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    libc::SYS_sync_file_range,
    libc::SYS_getdents64,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_fgetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fremovexattr,
    // Names; Landlock says which.
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_faccessat,
    SYS_FACCESSAT2,
    libc::SYS_readlinkat,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_fchmodat,
    SYS_FCHMODAT2,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_getcwd,
    libc::SYS_umask,
    // The sockets that are there.
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_getsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_shutdown,
    // Waiting.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_pipe2,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    // Memory. What maps and protects is below.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_membarrier,
    // The SSH library keeps keys out of the swap.
    libc::SYS_mlock,
    libc::SYS_munlock,
    // Threads and what they are told of themselves.
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getcpu,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getgroups,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
    libc::SYS_capget,
    libc::SYS_getrandom,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getrusage,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

// By number, for they are younger than some C libraries.
const SYS_FACCESSAT2: i64 = 439;
const SYS_FCHMODAT2: i64 = 452;

/// Older calls that this architecture has beside those.
#[cfg(target_arch = "x86_64")]
const OLDER: &[i64] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_link,
    libc::SYS_symlink,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_getdents,
    libc::SYS_dup2,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_wait,
    libc::SYS_pipe,
    libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[i64] = &[];

const NAMESPACES: i32 =
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET;

/// Of ioctl(2): cloning blocks of files, and whether bytes wait.
const CONTROLS: [u64; 4] = [0x4004_9409, 0x4020_940d, 0x541b, 0x5421];
/// Of prctl(2): names of threads and of memory, what the processor has, and what is in force.
const PROCESS: [i32; 6] =
    [libc::PR_SET_NAME, libc::PR_GET_NAME, PR_SET_VMA, PR_GET_AUXV, libc::PR_GET_SECCOMP, libc::PR_GET_NO_NEW_PRIVS];
const PR_SET_VMA: i32 = 0x5356_4d41;
const PR_GET_AUXV: i32 = 0x4155_5856;

/// Filters that are not in force yet.
pub(super) struct Filter([BpfProgram; 2]);

/// Whether this kernel filters system calls.
pub(super) fn available() -> bool {
    let actions = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail");
    let told = std::fs::read_to_string("/proc/self/status").is_ok_and(|status| status.contains("\nSeccomp:"));
    made_for() && (told || actions.is_ok_and(|actions| actions.contains("errno")))
}

fn made_for() -> bool {
    cfg!(any(target_arch = "x86_64", target_arch = "aarch64"))
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// A call with one argument that is compared; several rules of a call are alternatives.
fn only(argument: u8, comparison: SeccompCmpOp, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, comparison, value)?])
}

fn rules() -> Result<Rules, seccompiler::BackendError> {
    let mut rules: Rules = ALWAYS.iter().chain(OLDER).map(|call| (*call, Vec::new())).collect();
    let equal = |argument, values: &[u64]| -> Result<Vec<_>, _> {
        values.iter().map(|value| only(argument, SeccompCmpOp::Eq, *value)).collect()
    };
    // Answered by another filter, whose error counts for more than what is allowed here: the C library starts threads by the
    // call with the flags in memory, which cannot be looked at. Told that there is none, it takes the other one.
    rules.insert(libc::SYS_clone3, Vec::new());
    // Threads, and no processes: all that is asked for by these flags, and none of these.
    let flags = (NAMESPACES | CLONE_THREAD) as u32;
    let thread = SeccompCmpOp::MaskedEq(u64::from(flags));
    rules.insert(libc::SYS_clone, vec![only(0, thread, CLONE_THREAD as u64)?]);
    let no_code = || only(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0);
    rules.insert(libc::SYS_mmap, vec![no_code()?]);
    rules.insert(libc::SYS_mprotect, vec![no_code()?]);
    rules.insert(libc::SYS_ioctl, equal(1, &CONTROLS)?);
    rules.insert(libc::SYS_prctl, equal(0, &PROCESS.map(|option| option as u64))?);
    // abort(3) of this process.
    rules.insert(libc::SYS_tgkill, equal(0, &[u64::from(std::process::id())])?);
    // Limits are looked at, not set.
    rules.insert(libc::SYS_prlimit64, vec![only64(2, 0)?]);
    Ok(rules)
}

fn only64(argument: u8, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, value)?])
}

fn compile(rules: Rules, mismatch: SeccompAction, matching: SeccompAction) -> Result<BpfProgram, String> {
    let arch = std::env::consts::ARCH.try_into().map_err(|error: seccompiler::BackendError| error.to_string())?;
    let filter = SeccompFilter::new(rules, mismatch, matching, arch).map_err(|error| error.to_string())?;
    filter.try_into().map_err(|error: seccompiler::BackendError| error.to_string())
}

impl Filter {
    /// Makes the filter.
    pub(super) fn new() -> Result<Filter, String> {
        if !available() {
            return Err(if made_for() { "it is not there" } else { "this processor's calls are not known" }.to_owned());
        }
        let rules = rules().map_err(|error| error.to_string())?;
        let allow = compile(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)?;
        let absent = Rules::from([(libc::SYS_clone3, Vec::new())]);
        let absent = compile(absent, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?;
        Ok(Filter([absent, allow]))
    }

    /// From now on.
    pub(super) fn enforce(&self) -> Result<(), String> {
        self.0.iter().try_for_each(|program| seccompiler::apply_filter(program).map_err(|error| error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h47_what_would_lead_out_is_not_among_the_calls() {
        let rules = rules().unwrap();
        for call in [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_open,
            libc::SYS_pidfd_getfd,
            libc::SYS_kill,
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_pivot_root,
            libc::SYS_chroot,
            libc::SYS_open_tree,
            libc::SYS_move_mount,
            libc::SYS_socket,
            libc::SYS_socketpair,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_accept,
            libc::SYS_accept4,
            libc::SYS_setsockopt,
            libc::SYS_kexec_load,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_userfaultfd,
            libc::SYS_io_uring_setup,
            libc::SYS_keyctl,
            libc::SYS_add_key,
            libc::SYS_request_key,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_setuid,
            libc::SYS_setresuid,
            libc::SYS_setgroups,
            libc::SYS_capset,
            libc::SYS_mknodat,
            libc::SYS_open_by_handle_at,
            libc::SYS_memfd_create,
            libc::SYS_personality,
            libc::SYS_reboot,
        ] {
            assert!(!rules.contains_key(&call), "{call}");
        }
        // Those whose arguments decide.
        for call in
            [libc::SYS_clone, libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_ioctl, libc::SYS_prctl, libc::SYS_tgkill]
        {
            assert!(!rules[&call].is_empty(), "{call}");
        }
        assert!(Filter::new().is_ok());
    }
}
