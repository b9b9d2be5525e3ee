//! Landlock: which files a session can open, whatever its identity allows; and no TCP, no signals to others.

use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreated, RulesetCreatedAttr as _, RulesetStatus, Scope,
};

/// Before it, files cannot be renamed from one directory to another, which publishing does.
pub(super) const LEAST: u32 = 2;

/// Versions that change what can be asked for, the newest first.
const VERSIONS: [(u32, ABI); 7] =
    [(7, ABI::V7), (6, ABI::V6), (5, ABI::V5), (4, ABI::V4), (3, ABI::V3), (2, ABI::V2), (1, ABI::V1)];

/// What beside the root is read: who this machine is (`stop_at`), randomness, and what tells how many threads are of use.
const READ: [&str; 6] = [
    "/etc/machine-id",
    "/dev/urandom",
    "/proc/sys/kernel/random/boot_id",
    "/proc/self/cgroup",
    "/sys/devices/system/cpu/online",
    "/etc/localtime",
];

/// Why files are not confined.
pub(super) enum Error {
    /// The kernel cannot.
    None(String),
    /// It could, but for this.
    Failed(String),
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Failed(error.to_string())
}

/// The newest version of the interface that the kernel and this program have; 0 for none.
pub(super) fn version() -> u32 {
    let known = |abi: ABI| {
        let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        handled(ruleset, abi).and_then(|ruleset| ruleset.create()).is_ok()
    };
    VERSIONS.iter().find(|(_, abi)| known(*abi)).map_or(0, |(number, _)| *number)
}

fn handled(ruleset: Ruleset, abi: ABI) -> Result<Ruleset, landlock::RulesetError> {
    let ruleset = ruleset.handle_access(AccessFs::from_all(abi))?;
    let net = AccessNet::from_all(abi);
    let ruleset = if net.is_empty() { ruleset } else { ruleset.handle_access(net)? };
    let scope = Scope::from_all(abi);
    if scope.is_empty() { Ok(ruleset) } else { ruleset.scope(scope) }
}

/// Rules that are not in force yet.
pub(super) struct Files {
    rules: RulesetCreated,
    version: u32,
}

impl Files {
    /// Everything beneath `root`, and next to nothing else.
    pub(super) fn new(root: &Path, read_only: bool) -> Result<Files, Error> {
        let version = version();
        let found = VERSIONS.iter().find(|(number, _)| *number == version).filter(|_| version >= LEAST);
        let Some((_, abi)) = found else {
            return Err(Error::None(match version {
                0 => "it is off or not there".to_owned(),
                _ => format!("its version {version} forbids renames that publishing needs"),
            }));
        };
        let reading = AccessFs::ReadFile | AccessFs::ReadDir;
        // Programs are nobody's to start here, and devices nobody's to make or to control.
        let devices = AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev;
        let writing = AccessFs::from_all(*abi) & !(devices | AccessFs::Execute);
        let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        let mut rules = handled(ruleset, *abi).and_then(|ruleset| ruleset.create()).map_err(failed)?;
        let beneath = if read_only { reading } else { writing };
        rules = rules.add_rule(PathBeneath::new(PathFd::new(root).map_err(failed)?, beneath)).map_err(failed)?;
        let further = super::processor_limits();
        for path in READ.iter().map(Path::new).chain(further.iter().map(|path| path.as_path())) {
            // What is not there is not needed.
            if let Ok(file) = PathFd::new(path) {
                rules = rules.add_rule(PathBeneath::new(file, AccessFs::ReadFile)).map_err(failed)?;
            }
        }
        if let Ok(null) = PathFd::new("/dev/null") {
            let both = AccessFs::ReadFile | AccessFs::WriteFile;
            rules = rules.add_rule(PathBeneath::new(null, both)).map_err(failed)?;
        }
        Ok(Files { rules, version })
    }

    /// From now on. Gives the version.
    pub(super) fn enforce(self) -> Result<u32, String> {
        let status = self.rules.restrict_self().map_err(|error| error.to_string())?;
        match status.ruleset {
            RulesetStatus::FullyEnforced => Ok(self.version),
            other => Err(format!("it is {other:?}")),
        }
    }
}
