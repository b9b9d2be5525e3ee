//! Plans and lists on their way to a client, in pieces.

use super::{Control, Failure, Veil};
use crate::monitor::Severity;
use crate::wire::extension::{self, CHUNK_BYTES};

impl Control {
    pub(super) fn plan_chunk(&self, action: usize, removal: usize) -> Result<Vec<u8>, Failure> {
        let plan = self.plan.as_ref().ok_or_else(|| Failure::order("there is no plan"))?;
        let (mut raw, mut actions, mut removals) = (Vec::new(), 0_u32, 0_u32);
        for action in plan.actions.iter().skip(action) {
            if raw.len() >= CHUNK_BYTES {
                break;
            }
            let alike = plan.alike.binary_search(&action.index).is_ok();
            extension::put_action(&mut raw, action, alike);
            actions += 1;
        }
        for removal in plan.removals.iter().skip(removal) {
            if raw.len() >= CHUNK_BYTES {
                break;
            }
            extension::put_removal(&mut raw, removal);
            removals += 1;
        }
        let mut body = actions.to_be_bytes().to_vec();
        body.extend_from_slice(&removals.to_be_bytes());
        extension::put_frame(&mut body, &raw, Some(1));
        Ok(body)
    }

    pub(super) fn list_chunk(&mut self, from: usize, veil: &Veil) -> Result<Vec<u8>, Failure> {
        let run = self.run()?;
        let (Some(tree), true) = (run.tree.get(), self.own) else { return Err(Failure::order("nothing was scanned")) };
        let mut raw = Vec::new();
        let Some(rest) = tree.entries().get(from..).filter(|rest| !rest.is_empty()) else {
            // After the entries come the problems.
            while let Some(problem) = self.scan_problems.get(self.problems).filter(|_| raw.len() < CHUNK_BYTES) {
                extension::put_string(&mut raw, problem.path.as_ref().map_or(b"", |path| path.as_bytes()));
                extension::put_string(&mut raw, veil.cover(&problem.message).as_bytes());
                raw.push(u8::from(problem.severity == Severity::Failed));
                self.problems += 1;
            }
            let mut body = Vec::new();
            extension::put_frame(&mut body, &raw, Some(1));
            return Ok(body);
        };
        for entry in rest {
            if raw.len() >= CHUNK_BYTES {
                break;
            }
            extension::put_entry(&mut raw, entry);
        }
        let mut body = Vec::new();
        extension::put_frame(&mut body, &raw, Some(1));
        Ok(body)
    }
}
