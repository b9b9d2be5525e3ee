//! Files that tell by themselves whether they are whole: safetensors, and the zip files of `torch.save`.

use super::tree::{Item, Items, Open, below};
use super::{Kind, Look, safetensors, zip};
use crate::path::RelPath;

const AGAIN: &str = "bring it again from where it is whole; what was trained on it is not to be trusted";

/// What a look into a file came to.
enum Content {
    Whole,
    /// Nothing can be told.
    Untold,
    /// It is not of a format that is looked into.
    Foreign,
}

/// Why a file is not whole, or could not be read.
enum Bad {
    Damaged(String),
    Unreadable(String),
}

impl Look<'_> {
    /// Looks into the files of a directory.
    pub(super) fn contents(&mut self, directory: Option<&RelPath>, items: &Items) {
        for (name, item) in items {
            let look: fn(&Open) -> Result<Content, Bad> = if name.ends_with(b".safetensors") {
                tensors
            } else if name.starts_with(b"pytorch_model") && name.ends_with(b".bin")
                || [&b".pt"[..], b".pth", b".ckpt"].iter().any(|suffix| name.ends_with(suffix))
            {
                torch
            } else if name.ends_with(b".bin") {
                perhaps_torch
            } else if name.ends_with(b".distcp") {
                parts
            } else {
                continue;
            };
            let Some(path) = below(directory, name) else { continue };
            match item {
                Item::File { .. } => {}
                Item::Astray => {
                    let why = "it is a symbolic link out of the tree or to nothing, and nothing outside is read";
                    let hint = "look at the directory that the link leads to, or bring the files themselves (cp -L)";
                    self.report.add(Kind::Unfinished, Some(path), "is not in the tree", why, hint);
                    continue;
                }
                _ => continue,
            }
            let found = Open::new(self.root, &path).map_err(Bad::Unreadable).and_then(|file| look(&file));
            match found {
                Ok(Content::Whole) => self.report.files_checked += 1,
                Ok(Content::Untold) => self.report.files_untold += 1,
                Ok(Content::Foreign) => {}
                Err(Bad::Unreadable(why)) => self.report.cannot_read(Some(path), &why),
                Err(Bad::Damaged(why)) => self.report.add(Kind::Damaged, Some(path), "is damaged", why, AGAIN),
            }
        }
    }
}

fn read(file: &Open, at: u64, length: u64) -> Result<Vec<u8>, Bad> {
    file.read(at, length).map_err(Bad::Unreadable)
}

fn tensors(file: &Open) -> Result<Content, Bad> {
    if file.size < 8 {
        return Err(Bad::Damaged(format!("it is cut off: {} bytes hold no header", file.size)));
    }
    let mut first = [0; 8];
    first.copy_from_slice(&read(file, 0, 8)?);
    let length = safetensors::header_length(first, file.size).map_err(Bad::Damaged)?;
    let header = read(file, 8, length)?;
    safetensors::check(&header, file.size - 8 - length).map_err(Bad::Damaged)?;
    Ok(Content::Whole)
}

/// A file that `torch.save` wrote, by its name.
fn torch(file: &Open) -> Result<Content, Bad> {
    let first = read(file, 0, file.size.min(4))?;
    if first.is_empty() {
        return Err(Bad::Damaged("it is empty".into()));
    }
    if first == zip::MAGIC {
        return archive(file);
    }
    if first.iter().all(|&byte| byte == 0) {
        return Err(Bad::Damaged("it begins with zeros, as a file whose content never reached the disk".into()));
    }
    Ok(Content::Untold)
}

/// Many programs write `.bin`: what is not a zip file is none of `torch.save`'s, or of its old format.
fn perhaps_torch(file: &Open) -> Result<Content, Bad> {
    if read(file, 0, file.size.min(4))? == zip::MAGIC { archive(file) } else { Ok(Content::Foreign) }
}

fn archive(file: &Open) -> Result<Content, Bad> {
    let directory = end(file)?;
    if directory.before > 0 {
        let why = format!("its directory is {} bytes behind where it should be", directory.before);
        return Err(Bad::Damaged(why));
    }
    Ok(Content::Whole)
}

/// A file of PyTorch DCP is many archives one behind the other, where it is written in the usual format.
fn parts(file: &Open) -> Result<Content, Bad> {
    if read(file, 0, file.size.min(4))? != zip::MAGIC {
        return Ok(Content::Untold);
    }
    end(file).map(|_| Content::Whole)
}

fn end(file: &Open) -> Result<zip::Directory, Bad> {
    let length = file.size.min(zip::TAIL);
    let tail = read(file, file.size - length, length)?;
    let directory = zip::directory(&tail, file.size).map_err(Bad::Damaged)?;
    if directory.entries && read(file, directory.start, 4)? != zip::ENTRY {
        return Err(Bad::Damaged("its directory is not where the end of the file says".into()));
    }
    Ok(directory)
}
