//! A sample of a large file: some of its blocks, held against their checksums.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Output};

use lockstep::root::Metadata;
use lockstep::scan::cache::DigestTable;

use crate::kit::area::lockstep;
use crate::kit::pair::{Pair, options};
use crate::kit::{done, ends};

const SIZE: u64 = 70 << 20;
const BLOCK: u64 = 4 << 20;

fn check(target: &Path, arguments: &[&str]) -> Output {
    Command::new(lockstep()).args(["check", "--json"]).args(arguments).arg(target).output().unwrap()
}

fn verdict(output: &Output) -> serde_json::Value {
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    serde_json::from_str(said.lines().last().unwrap()).unwrap()
}

fn metadata(file: &Path) -> Metadata {
    Metadata::of(&fs::File::open(file).unwrap()).unwrap()
}

#[test]
fn blocks_of_large_files_are_sampled_and_what_the_disk_lost_is_found_in_them() {
    let pair = Pair::new();
    let noise: Vec<u8> = (0..SIZE).map(|at| ((at * 2_654_435_761) >> 13) as u8).collect();
    pair.write("large.bin", &noise);
    pair.write("small.txt", b"small");
    assert!(pair.push(&options()).is_complete());
    std::thread::sleep(std::time::Duration::from_millis(50));
    // Nobody has made a list of blocks yet: files are sampled whole.
    let sampled = verdict(&check(&pair.target, &["--sample=100%"]));
    assert_eq!((&sampled["hashed_files"], &sampled["sampled_files"]), (&2.into(), &0.into()), "{sampled}");
    // That reading made it.
    for (share, blocks) in [("--sample=1%", 1), ("--sample=50%", 9)] {
        let sampled = verdict(&check(&pair.target, &[share]));
        let expected = (sampled["sampled_files"].as_u64().unwrap(), sampled["hashed_files"].as_u64().unwrap());
        assert_eq!(expected, (1, 1), "{sampled}");
        let bytes = sampled["sampled_bytes"].as_u64().unwrap();
        assert!(bytes <= blocks * BLOCK && bytes > (blocks - 1) * BLOCK, "{sampled}");
    }
    // A run that leaves the file as it is leaves the list too.
    pair.write("another", b"comes later");
    assert!(pair.push(&options()).is_complete());
    assert_eq!(verdict(&check(&pair.target, &["--sample=100%"]))["sampled_bytes"], SIZE);

    // A table that knows the file with its new times stands for a disk that lost bits without any time moving.
    let (large, table) = (pair.target.join("large.bin"), pair.target.join(".lockstep/digests"));
    let before = metadata(&large);
    let mut digests = DigestTable::from_bytes(&fs::read(&table).unwrap()).unwrap();
    let (known, blocks) = (digests.known(&before).unwrap(), digests.blocks(&before).unwrap().to_vec());
    let open = fs::File::options().write(true).open(&large).unwrap();
    open.write_all_at(&[noise[SIZE as usize - 1] ^ 1], SIZE - 1).unwrap();
    open.set_times(
        fs::FileTimes::new().set_modified(fs::metadata(pair.source.join("large.bin")).unwrap().modified().unwrap()),
    )
    .unwrap();
    digests.insert_as_of(&metadata(&large), known);
    digests.set_blocks(&metadata(&large), blocks.into());
    fs::write(&table, digests.to_bytes()).unwrap();
    done(&check(&pair.target, &["--quick"]));
    done(&check(&pair.target, &[]));
    let found = check(&pair.target, &["--sample=100%"]);
    ends(&found, 1, &["bytes 71303168 to 73400320 are not what they were when it was hashed"]);
    ends(&check(&pair.target, &["--full"]), 1, &["its SHA-256 is"]);
    // Now it is known as what it is.
    ends(&check(&pair.target, &["--quick"]), 1, &["its SHA-256 is"]);
}
