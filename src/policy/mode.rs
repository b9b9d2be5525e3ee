//! Modes as chmod(1) takes them, octal and symbolic.

use std::fmt;
use std::str::FromStr;

/// Set-user-ID, set-group-ID and sticky bits.
pub const SPECIAL_BITS: u32 = 0o7000;

/// A text that chmod(1) would not take either.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a mode: {reason} (write it as chmod does: 600, 1774, u=rw,g=r,o=, +x)")]
pub struct InvalidMode {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// A change of permission bits.
///
/// An octal mode sets exactly those bits; unlike chmod(1) it does so for the set-group-ID bit of a directory too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mode {
    text: String,
    clauses: Vec<Clause>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Clause {
    /// The bits of those who are meant, 0o7777 for all; 0 where nobody was named, which means all but what the umask takes.
    who: u32,
    operator: Operator,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Add,
    Remove,
    Set,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// Permissions for all of those who are meant: r, w, x in each triad, and the special bits.
    Bits { bits: u32, execute_if_any: bool },
    /// What user, group or others have: the shift of that triad.
    Copy { shift: u32 },
    /// An octal number: exactly these bits.
    Exact { bits: u32 },
}

impl Mode {
    /// The mode that `current` becomes. `umask` limits clauses that name nobody (`+x`), as chmod(1) does.
    pub fn apply(&self, current: u32, directory: bool, umask: u32) -> u32 {
        self.clauses.iter().fold(current & 0o7777, |mode, clause| clause.apply(mode, directory, umask))
    }

    /// Whether the text itself names set-user-ID, set-group-ID or sticky: only then may they be given.
    pub fn names_special_bits(&self) -> bool {
        self.clauses.iter().any(|clause| match clause.what {
            What::Bits { bits, .. } | What::Exact { bits } => {
                bits & SPECIAL_BITS != 0 && clause.operator != Operator::Remove
            }
            What::Copy { .. } => false,
        })
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Clause {
    fn apply(self, mode: u32, directory: bool, umask: u32) -> u32 {
        let named = self.who != 0;
        let who = if named { self.who } else { 0o7777 & !umask };
        let bits = match self.what {
            What::Exact { bits } => bits & if named { who } else { 0o7777 },
            What::Bits { bits, execute_if_any } => {
                let execute = if execute_if_any && (directory || mode & 0o111 != 0) { 0o111 } else { 0 };
                (bits | execute) & who
            }
            What::Copy { shift } => ((mode >> shift & 7) * 0o111) & who,
        };
        match self.operator {
            Operator::Add => mode | bits,
            Operator::Remove => mode & !bits,
            Operator::Set if !named && matches!(self.what, What::Exact { .. }) => bits,
            Operator::Set => {
                let affected = if named { self.who } else { 0o7777 };
                // '=' leaves the special bits of a directory alone unless it names those that they belong to.
                let kept = if directory { mode & SPECIAL_BITS & !bits & !(affected & 0o1000) & 0o6000 } else { 0 };
                (mode & !affected) | bits | kept
            }
        }
    }
}

impl FromStr for Mode {
    type Err = InvalidMode;

    fn from_str(text: &str) -> Result<Mode, InvalidMode> {
        let clauses = parse(text).map_err(|reason| InvalidMode { text: text.to_owned(), reason })?;
        Ok(Mode { text: text.to_owned(), clauses })
    }
}

fn parse(text: &str) -> Result<Vec<Clause>, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(vec![Clause { who: 0, operator: Operator::Set, what: What::Exact { bits: octal(text)? } }]);
    }
    let mut clauses = Vec::new();
    for part in text.split(',') {
        symbolic(part, &mut clauses)?;
    }
    Ok(clauses)
}

fn octal(digits: &str) -> Result<u32, &'static str> {
    match u32::from_str_radix(digits, 8) {
        Ok(bits) if bits <= 0o7777 => Ok(bits),
        _ => Err("an octal mode has digits 0 to 7 and is at most 7777"),
    }
}

/// `[ugoa]*([-+=]([rwxXst]*|[ugo]|[0-7]+))+`
fn symbolic(part: &str, clauses: &mut Vec<Clause>) -> Result<(), &'static str> {
    let operators = ['+', '-', '='];
    let start = part.find(operators).ok_or("a clause needs one of + - =")?;
    let who = part[..start].chars().try_fold(0, |who, c| match c {
        'u' => Ok(who | 0o4700),
        'g' => Ok(who | 0o2070),
        'o' => Ok(who | 0o1007),
        'a' => Ok(0o7777),
        _ => Err("before + - = only the letters u g o a may stand"),
    })?;
    let mut rest = &part[start..];
    while let Some(sign) = rest.chars().next() {
        let operator = match sign {
            '+' => Operator::Add,
            '-' => Operator::Remove,
            _ => Operator::Set,
        };
        let end = rest[1..].find(operators).map_or(rest.len(), |at| at + 1);
        let what = permissions(&rest[1..end], who)?;
        clauses.push(Clause { who, operator, what });
        rest = &rest[end..];
    }
    Ok(())
}

fn permissions(text: &str, who: u32) -> Result<What, &'static str> {
    match text {
        "u" => return Ok(What::Copy { shift: 6 }),
        "g" => return Ok(What::Copy { shift: 3 }),
        "o" => return Ok(What::Copy { shift: 0 }),
        _ => {}
    }
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        if who != 0 {
            return Err("an octal number takes no letters before it");
        }
        return Ok(What::Exact { bits: octal(text)? });
    }
    let mut bits = 0;
    let mut execute_if_any = false;
    for c in text.chars() {
        match c {
            'r' => bits |= 0o444,
            'w' => bits |= 0o222,
            'x' => bits |= 0o111,
            'X' => execute_if_any = true,
            's' => bits |= 0o6000,
            't' => bits |= 0o1000,
            _ => return Err("after + - = stand letters of r w x X s t, or one of u g o"),
        }
    }
    Ok(What::Bits { bits, execute_if_any })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    #[test]
    fn s01_s02_every_mode_does_what_chmod_does() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        let dir = directory.path().join("dir");
        std::fs::write(&file, "").unwrap();
        std::fs::create_dir(&dir).unwrap();
        let texts = [
            "u+x",
            "g-w",
            "o=",
            "a+r",
            "+x",
            "+t",
            "u=rw,g=r,o=",
            "u+x,g-w,o-r",
            "a=r",
            "=rw",
            "go=u",
            "g=u",
            "u=g",
            "a+X",
            "u-x,a+X",
            "u+s",
            "g+s",
            "ug+s",
            "+s",
            "a-s",
            "o+t",
            "a+t",
            "-t",
            "a=",
            "u=rwx,go=rx",
            "ug=rw,o=r",
            "755",
            "0600",
            "1774",
            "600",
            "4755",
            "7777",
            "0",
            "=644",
            "+111",
            "-022",
            "u=rw-w",
            "a+r-w",
            "go-rwx",
            "u=rwxs",
            "g=s",
            "o=t",
            "u=o",
            "o+u",
            "ugo+rwx",
        ];
        let mut wrong = Vec::new();
        for text in texts {
            let mode: Mode = text.parse().unwrap();
            for before in [0o000, 0o644, 0o755, 0o600, 0o711, 0o4755, 0o1777, 0o2750] {
                for (path, is_directory) in [(&file, false), (&dir, true)] {
                    // Our octal modes are exact; chmod keeps the set-ID bits of a directory.
                    let exact = text.bytes().any(|byte| byte.is_ascii_digit());
                    if exact && is_directory {
                        continue;
                    }
                    std::fs::set_permissions(path, std::fs::Permissions::from_mode(before)).unwrap();
                    let script = "umask 022; exec chmod -- \"$0\" \"$1\"";
                    let output = Command::new("sh").args(["-c", script, text]).arg(path).output().unwrap();
                    // It exits 1 where the umask left a bit that the text named; the mode is set all the same.
                    assert!(output.status.code().is_some_and(|code| code <= 1), "{output:?}");
                    let theirs = std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
                    let ours = mode.apply(before, is_directory, 0o022);
                    if ours != theirs {
                        wrong
                            .push(format!("{text} on {before:04o} dir={is_directory}: {ours:04o}, chmod {theirs:04o}"));
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn octal_modes_are_exact_for_directories_too() {
        assert_eq!("755".parse::<Mode>().unwrap().apply(0o2755, true, 0o022), 0o755);
        assert_eq!("1774".parse::<Mode>().unwrap().apply(0o700, true, 0o022), 0o1774);
    }

    #[test]
    fn what_chmod_refuses_is_refused() {
        for text in
            ["", "8", "888", "77777", "u", "rw", "u+q", "z+x", ",u+x", "u+x,", "u+x,,g+x", "u+ug", "u=644", "+rwu"]
        {
            assert!(text.parse::<Mode>().is_err(), "{text:?}");
            let status = Command::new("chmod").args(["--", text, "/nonexistent"]).output().unwrap();
            assert!(String::from_utf8_lossy(&status.stderr).contains("invalid mode"), "chmod takes {text:?}");
        }
    }

    #[test]
    fn special_bits_are_known_to_be_named() {
        for (text, named) in
            [("1774", true), ("u+s", true), ("+t", true), ("755", false), ("a+x", false), ("a-s", false)]
        {
            assert_eq!(text.parse::<Mode>().unwrap().names_special_bits(), named, "{text}");
        }
    }
}
