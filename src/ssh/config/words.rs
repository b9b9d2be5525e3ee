//! A line of `ssh_config`, taken apart as OpenSSH takes it apart: `Keyword arguments` or `Keyword=arguments`, with
//! quotes and backslashes, up to a comment.

/// The keyword, and the rest of the line as it stands. `None` for a line that says nothing.
pub(super) fn keyword(line: &str) -> Option<(&str, &str)> {
    let line = line.trim_matches([' ', '\t', '\r', '\u{c}']);
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    let blank = |c: char| c == ' ' || c == '\t';
    let end = line.find(|c| blank(c) || c == '=').unwrap_or(line.len());
    let (keyword, rest) = line.split_at(end);
    let rest = rest.trim_start_matches(blank);
    // One '=' at most belongs to the keyword.
    let rest = rest.strip_prefix('=').unwrap_or(rest).trim_start_matches(blank);
    Some((keyword.trim_matches('"'), rest))
}

/// The arguments; a comment ends them.
///
/// # Errors
/// A quote that is not closed.
pub(super) fn split(text: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(&first) = chars.peek() {
        if first == ' ' || first == '\t' {
            chars.next();
            continue;
        }
        if first == '#' {
            break;
        }
        let (mut word, mut quote) = (String::new(), None);
        while let Some(c) = chars.next() {
            match (c, quote) {
                ('\\', _) => match chars.peek() {
                    Some(&next) if "\"'\\".contains(next) || (quote.is_none() && next == ' ') => {
                        word.push(next);
                        chars.next();
                    }
                    _ => word.push('\\'),
                },
                (' ' | '\t', None) => break,
                ('"' | '\'', None) => quote = Some(c),
                (c, Some(open)) if c == open => quote = None,
                (c, _) => word.push(c),
            }
        }
        if quote.is_some() {
            return Err("a quote is not closed".into());
        }
        words.push(word);
    }
    Ok(words)
}

/// The first character that means something to a shell alone, where a command has one.
pub(super) fn of_a_shell(command: &str) -> Option<char> {
    let mut quote = None;
    let mut chars = command.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            // Within these a shell leaves every backslash, and ssh_config does not.
            ('\\', Some('\'')) if chars.clone().next().is_some_and(|next| "\"'\\".contains(next)) => return Some(c),
            // Others it would take the backslash from.
            ('\\', None | Some('"')) if chars.clone().next().is_some_and(|next| !"\"'\\ ".contains(next)) => {
                return Some(c);
            }
            ('\\', None | Some('"')) => drop(chars.next()),
            ('"' | '\'', None) => quote = Some(c),
            (c, Some(open)) if c == open => quote = None,
            ('$' | '`', None | Some('"')) => return Some(c),
            ('|' | '&' | ';' | '<' | '>' | '(' | ')' | '*', None) => return Some(c),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_a_keyword_and_arguments() {
        for (line, expected) in [
            ("Port 22", Some(("Port", "22"))),
            ("  Port=22\r", Some(("Port", "22"))),
            ("Port = 22", Some(("Port", "22"))),
            ("Port==22", Some(("Port", "=22"))),
            ("Port", Some(("Port", ""))),
            ("# Port 22", None),
            ("   ", None),
        ] {
            assert_eq!(keyword(line), expected, "{line}");
        }
    }

    #[test]
    fn what_only_a_shell_understands_is_found() {
        for (command, found) in [
            ("nc -X connect %h %p", None),
            ("nc 'a|b' \"c;d\" e\\ f", None),
            ("nc e\\&f", Some('\\')),
            ("nc 'e\\\\f'", Some('\\')),
            ("nc %h %p 2>/dev/null", Some('>')),
            ("a | b", Some('|')),
            ("a \"$HOME\"", Some('$')),
            ("a '$HOME'", None),
            ("a `id`", Some('`')),
            ("a 'it'$x", Some('$')),
        ] {
            assert_eq!(of_a_shell(command), found, "{command}");
        }
    }

    #[test]
    fn words_are_quoted_as_for_openssh() {
        for (text, expected) in [
            ("a  b\tc", &["a", "b", "c"][..]),
            ("\"a b\" c", &["a b", "c"]),
            ("'a \"b'", &["a \"b"]),
            ("a\\ b \\\"c \\d", &["a b", "\"c", "\\d"]),
            ("a # b", &["a"]),
            ("a#b", &["a#b"]),
            ("x\"y z\"w", &["xy zw"]),
            ("\"\"", &[""]),
        ] {
            assert_eq!(split(text).unwrap(), expected, "{text}");
        }
        assert!(split("a \"b").is_err());
    }
}
