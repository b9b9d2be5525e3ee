//! File systems that do not tell of every change: those that others write to over a network, or that a process answers for.

use std::os::fd::AsFd;

/// Numbers of statfs(2), from `linux/magic.h` and the sources of those that are not in the kernel.
const KINDS: [(u32, &str); 19] = [
    (0x6969, "NFS"),
    (0x0bd0_0bd0, "Lustre"),
    (0x6573_5546, "FUSE"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x517b, "SMB"),
    (0x0102_1997, "9p"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x7375_7245, "Coda"),
    (0x4750_4653, "GPFS"),
    (0x1983_0326, "BeeGFS"),
    (0x00c3_6400, "Ceph"),
    (0x7461_636f, "OCFS2"),
    (0x0116_1970, "GFS2"),
    (0xaad7_aaea, "PanFS"),
    (0x786f_4256, "vboxsf"),
    (0xbacb_acbc, "vmhgfs"),
    (0x2030_528d, "OrangeFS"),
];

/// Its name, when events do not tell all that changes on it.
pub fn silent(directory: &impl AsFd) -> Option<&'static str> {
    let found = rustix::fs::fstatfs(directory).ok()?;
    // The field's width is not the same everywhere; the numbers have 32 bits.
    name(found.f_type as u32)
}

fn name(magic: u32) -> Option<&'static str> {
    KINDS.iter().find(|(number, _)| *number == magic).map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_told_apart() {
        assert_eq!((name(0x6969), name(0xff53_4d42), name(0x0102_1994)), (Some("NFS"), Some("CIFS"), None));
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(silent(&std::fs::File::open(directory.path()).unwrap()), None);
    }
}
