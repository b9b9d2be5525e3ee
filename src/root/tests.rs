//! Nothing outside a root is reached, with openat2(2) and without it.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

fn rel(path: &str) -> RelPath {
    RelPath::new(path).unwrap()
}

/// A directory `root` with a file beside it, opened both ways.
fn both(test: impl Fn(&Root, &Path)) {
    for open in [Root::open, Root::open_without_openat2] {
        let outer = tempfile::tempdir().unwrap();
        let inside = outer.path().join("root");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(outer.path().join("secret"), "secret").unwrap();
        test(&open(&inside).unwrap(), &inside);
        assert_eq!(std::fs::read_to_string(outer.path().join("secret")).unwrap(), "secret");
    }
}

#[test]
fn h14_h63_links_that_leave_the_root_are_refused_and_others_followed_when_asked() {
    both(|root, at| {
        std::fs::create_dir_all(at.join("a/b")).unwrap();
        std::fs::write(at.join("a/file"), "inside").unwrap();
        for (name, target) in [
            ("up", "../secret"),
            ("absolute", "/etc/passwd"),
            ("sneaky", "a/../../secret"),
            ("out", ".."),
            ("fine", "a/file"),
            ("back", "a/b/../file"),
            ("loop", "loop"),
        ] {
            symlink(target, at.join(name)).unwrap();
        }
        for bad in ["up", "absolute", "sneaky", "out/secret", "out/root/a/file", "loop"] {
            assert!(root.open_read(&rel(bad), Follow::Beneath).is_err(), "{bad}");
            assert!(root.open_read(&rel(bad), Follow::Never).is_err(), "{bad}");
        }
        for good in ["fine", "back", "a/file"] {
            let mut text = String::new();
            std::io::Read::read_to_string(&mut root.open_read(&rel(good), Follow::Beneath).unwrap(), &mut text)
                .unwrap();
            assert_eq!(text, "inside", "{good}");
        }
        assert!(root.open_read(&rel("fine"), Follow::Never).is_err());
        assert_eq!(root.stat(&rel("up"), Follow::Never).unwrap().kind, FileKind::Symlink);
        assert_eq!(root.stat(&rel("fine"), Follow::Beneath).unwrap().kind, FileKind::Regular);
        assert_eq!(root.read_link(&rel("up")).unwrap(), b"../secret");
    });
}

#[test]
fn h15_a_link_in_the_last_component_is_replaced_or_removed_itself() {
    both(|root, at| {
        symlink("../secret", at.join("link")).unwrap();
        symlink("..", at.join("out")).unwrap();
        assert!(root.create_new(&rel("link"), 0o600).is_err());
        assert!(root.mkdir(&rel("out/made"), 0o700).is_err());
        assert!(root.unlink(&rel("out/secret")).is_err());
        assert!(root.rename(&rel("link"), &rel("out/stolen"), RenameFlags::empty()).is_err());
        assert!(root.mkdir_all(&rel("out/deeper"), 0o700).is_err());
        drop(root.create_new(&rel("new"), 0o600).unwrap());
        root.rename(&rel("new"), &rel("link"), RenameFlags::empty()).unwrap();
        assert_eq!(root.stat(&rel("link"), Follow::Never).unwrap().kind, FileKind::Regular);
        root.remove_tree(&rel("out")).unwrap();
        assert!(at.parent().unwrap().join("secret").exists());
    });
}

#[test]
fn h14_a_parent_that_is_swapped_for_a_link_leads_nowhere() {
    both(|root, at| {
        std::fs::create_dir(at.join("dir")).unwrap();
        let outside = at.parent().unwrap().join("outside");
        std::fs::create_dir(&outside).unwrap();
        symlink(&outside, at.join("link")).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let (dir, link) = (at.join("dir"), at.join("link"));
                    let _ =
                        rustix::fs::renameat_with(rustix::fs::CWD, &dir, rustix::fs::CWD, &link, RenameFlags::EXCHANGE);
                }
            });
            for round in 0..2000 {
                let path = rel(&format!("dir/file{round}"));
                let _ = root.create_new(&path, 0o600);
                let _ = root.mkdir(&rel(&format!("dir/made{round}")), 0o700);
                let _ = root.unlink(&path);
                let _ = root.rename(&path, &rel("dir/renamed"), RenameFlags::empty());
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    });
}

#[test]
fn trees_of_any_depth_are_made_and_removed() {
    both(|root, at| {
        let deep = rel(&vec!["d"; 200].join("/"));
        root.mkdir_all(&deep, 0o700).unwrap();
        drop(root.create_new(&deep.join("file").unwrap(), 0o600).unwrap());
        assert_eq!(root.subroot(&deep).unwrap().names(None, Follow::Never).unwrap(), [b"file".to_vec()]);
        root.remove_tree(&rel("d")).unwrap();
        assert_eq!(std::fs::read_dir(at).unwrap().count(), 0);
        root.remove_tree(&rel("d")).unwrap();
    });
}

#[test]
fn a_tree_whose_paths_are_too_long_to_be_named_is_removed() {
    both(|root, at| {
        let name = rel(&"n".repeat(250));
        let mut here = root.reopen().unwrap();
        for _ in 0..40 {
            here.mkdir(&name, 0o700).unwrap();
            drop(here.create_new(&rel("file"), 0o600).unwrap());
            here = here.subroot(&name).unwrap();
        }
        root.remove_tree(&name).unwrap();
        assert_eq!(root.names(None, Follow::Never).unwrap(), [b"file".to_vec()]);
        assert!(at.join("file").exists());
    });
}

#[test]
fn a_fifo_does_not_block_and_metadata_is_what_stat_says() {
    both(|root, at| {
        rustix::fs::mknodat(
            rustix::fs::CWD,
            at.join("fifo"),
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let fifo = root.open_read(&rel("fifo"), Follow::Never).unwrap();
        assert_eq!(Metadata::of(&fifo).unwrap().kind, FileKind::Fifo);
        std::fs::write(at.join("file"), "12345").unwrap();
        std::fs::set_permissions(at.join("file"), std::fs::Permissions::from_mode(0o4751)).unwrap();
        let ours = root.stat(&rel("file"), Follow::Never).unwrap();
        let theirs = std::fs::metadata(at.join("file")).unwrap();
        assert_eq!((ours.size, ours.mode, ours.inode), (5, 0o4751, theirs.ino()));
        assert_eq!((ours.mtime.seconds, i64::from(ours.mtime.nanoseconds)), (theirs.mtime(), theirs.mtime_nsec()));
    });
}

#[test]
fn h19_a_root_is_not_confused_with_a_longer_name() {
    both(|root, at| {
        std::fs::create_dir(at.parent().unwrap().join("root_evil")).unwrap();
        symlink("../root_evil", at.join("evil")).unwrap();
        assert!(root.open_dir(Some(&rel("evil")), Follow::Beneath).is_err());
    });
}

#[test]
fn h02_inside_absolute_links_start_at_the_root_and_dots_end_there() {
    for open in [Root::open, Root::open_without_openat2] {
        let at = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(at.path().join("a/b")).unwrap();
        std::fs::write(at.path().join("a/file"), "inside").unwrap();
        for (name, target) in [("absolute", "/a/file"), ("up", "../../../../a/file"), ("out", "/etc/passwd")] {
            std::os::unix::fs::symlink(target, at.path().join("a/b").join(name)).unwrap();
        }
        let root = open(at.path()).unwrap();
        for name in ["a/b/absolute", "a/b/up"] {
            let path = RelPath::new(name).unwrap();
            let file = root.open_read(&path, Follow::Inside).unwrap();
            assert_eq!(root.path_of(&file).unwrap(), Some(RelPath::new("a/file").unwrap()), "{name}");
            assert!(root.open_read(&path, Follow::Beneath).is_err(), "{name}");
        }
        let out = root.open_read(&RelPath::new("a/b/out").unwrap(), Follow::Inside).unwrap_err();
        assert_eq!(out.kind(), std::io::ErrorKind::NotFound);
        let (holder, name) = root.holder(&RelPath::new("a/b/new").unwrap(), Follow::Inside).unwrap();
        assert_eq!(root.path_of_root(&holder).unwrap(), Some(RelPath::new("a/b").unwrap()));
        assert_eq!(name.as_bytes(), b"new");
    }
}

#[test]
fn h19_a_directory_whose_name_begins_alike_is_not_below() {
    let at = tempfile::tempdir().unwrap();
    std::fs::create_dir(at.path().join("data")).unwrap();
    std::fs::create_dir(at.path().join("data_evil")).unwrap();
    let root = Root::open(&at.path().join("data")).unwrap();
    assert!(root.path_of(&std::fs::File::open(at.path().join("data_evil")).unwrap()).is_err());
    assert_eq!(root.path_of(&std::fs::File::open(at.path().join("data")).unwrap()).unwrap(), None);
}
