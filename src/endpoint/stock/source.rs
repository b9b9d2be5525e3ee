//! A directory of a stock server as a source. Nothing is ever written to it.

use std::sync::Arc;

use super::list::list;
use super::manifest_file::read_manifest;
use super::names::Names;
use super::reader::StockReader;
use super::vouch::vouched;
use super::{DIRECTORY, Lanes, kind_of, trail};
use crate::endpoint::{BEING_PUBLISHED, Crew, Error, Links, Reader, Scan, ScanOptions, Source};
use crate::filter::Filter;
use crate::manifest::{Digest, Tree};
use crate::monitor::{Event, Monitor};
use crate::plan::trail::Stop;
use crate::scan::{LinkRule, ScanRule};
use crate::wire::sftp::packet;

/// A directory of a stock server as a source.
pub struct StockSource {
    lanes: Lanes,
}

impl StockSource {
    /// The directory that `lanes` lead to.
    pub fn new(lanes: Lanes) -> StockSource {
        StockSource { lanes }
    }
}

impl Source for StockSource {
    fn describe(&self) -> String {
        self.lanes.describe()
    }

    fn scan(&self, options: &ScanOptions, monitor: &dyn Monitor) -> Result<Scan, Error> {
        let filter = Filter::compile(&options.filter).map_err(|error| Error::Usage(crate::error::chain(&error)))?;
        let links = match options.links {
            Links::Safe => LinkRule::Safe,
            Links::All => LinkRule::All,
            Links::Skip => LinkRule::Skip,
            Links::Refuse => LinkRule::Refuse,
        };
        monitor.event(Event::Detail(&format!("{}: {}", self.describe(), self.lanes.limits())));
        let session = self.lanes.control();
        match session.stat(packet::STAT, &self.lanes.root_path())? {
            Ok(found) if kind_of(&found).is_none_or(|kind| kind == DIRECTORY) => {}
            Ok(_) => return Err(Error::Usage(format!("{} is not a directory", self.describe()))),
            Err(refusal) => return Err(session.refused("look at", &self.lanes.root, &refusal)),
        }
        let busy = || Error::Refused { by: self.describe(), reason: BEING_PUBLISHED.to_owned() };
        if options.whole && trail::is_publishing(session, &self.lanes.root)? {
            return Err(busy());
        }
        let rule = ScanRule { filter, links, ignore_files: true, report_special: true, threads: options.threads };
        let listed = list(session, &self.lanes.root, &rule, &mut Names::default(), monitor)?;
        let wrong = |error: crate::manifest::InvalidTree| session.client.protocol(error.to_string());
        let mut tree = Tree::new(listed.entries).map_err(wrong)?;
        // RACE: a run that came and went meanwhile is not seen; what it changed does not fit the list when it is read.
        if options.whole && trail::is_publishing(session, &self.lanes.root)? {
            return Err(busy());
        }
        if !options.hash_all {
            let (manifest, _) = read_manifest(session, &self.lanes.root, monitor)?;
            tree = vouched(tree, &manifest, false).map_err(wrong)?;
        }
        let mut problems = listed.problems;
        problems.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Scan { tree, problems })
    }

    fn reader(&self, tree: Arc<Tree>) -> Result<Box<dyn Reader + '_>, Error> {
        Ok(Box::new(StockReader::new(self.lanes.spread(self.lanes.next()), &self.lanes.root, tree)))
    }

    /// The manifest at the source, where there is one, is the memory.
    fn remember(&self, _: &Tree, _: &[(u32, Digest)]) {}

    fn trail(&self) -> Result<Vec<Stop>, Error> {
        trail::load(self.lanes.control(), &self.lanes.root)
    }

    fn wire_bytes(&self) -> u64 {
        self.lanes.wire_bytes()
    }

    fn crew(&self) -> Crew {
        self.lanes.crew()
    }
}
