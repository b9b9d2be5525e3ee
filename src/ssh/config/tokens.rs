//! `%h`, `~` and `${NAME}` in values of `ssh_config`.

use std::path::PathBuf;

use super::Environment;

/// What the tokens of one host stand for.
pub(super) struct Tokens<'a> {
    pub(super) environment: &'a Environment,
    /// As it was given.
    pub(super) original: &'a str,
    /// What is connected to.
    pub(super) host: &'a str,
    pub(super) alias: &'a str,
    pub(super) port: u16,
    pub(super) user: &'a str,
}

impl Tokens<'_> {
    fn value(&self, token: char) -> Option<String> {
        let Environment { home, user, uid, node, .. } = self.environment;
        Some(match token {
            '%' => "%".into(),
            'h' => self.host.into(),
            'n' => self.original.into(),
            'k' => self.alias.into(),
            'p' => self.port.to_string(),
            'r' => self.user.into(),
            'u' => user.clone(),
            'd' => home.to_string_lossy().into_owned(),
            'i' => uid.to_string(),
            'l' => node.clone(),
            'L' => node.split('.').next().unwrap_or_default().into(),
            _ => return None,
        })
    }

    /// Puts in those of `allowed`.
    ///
    /// # Errors
    /// A token that is not one of them.
    pub(super) fn percent(&self, text: &str, allowed: &str) -> Result<String, String> {
        percent(text, |token| self.value(token).filter(|_| allowed.contains(token)))
    }

    /// The path of a file, with all that may stand in one.
    ///
    /// # Errors
    /// An unknown token, variable or user.
    pub(super) fn path(&self, text: &str) -> Result<PathBuf, String> {
        let text = tilde(text, self.environment)?;
        let text = percent(&text, |token| self.value(token))?;
        variables(&text, self.environment).map(PathBuf::from)
    }
}

/// Puts in what `value` gives for each token.
pub(super) fn percent(text: &str, value: impl Fn(char) -> Option<String>) -> Result<String, String> {
    let mut expanded = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            expanded.push(c);
            continue;
        }
        let token = chars.next().ok_or_else(|| format!("'{text}' ends in a lone %; write %%"))?;
        expanded.push_str(&value(token).ok_or_else(|| format!("'{text}' has %{token}, which means nothing here"))?);
    }
    Ok(expanded)
}

/// `~` and `~user` at the start.
pub(super) fn tilde(text: &str, environment: &Environment) -> Result<String, String> {
    let Some(rest) = text.strip_prefix('~') else { return Ok(text.to_owned()) };
    let (user, rest) = rest.split_once('/').unwrap_or((rest, ""));
    let home = if user.is_empty() {
        environment.home.clone()
    } else {
        use uzers::os::unix::UserExt as _;
        let found = uzers::get_user_by_name(user).ok_or_else(|| format!("'{text}': there is no user '{user}'"))?;
        found.home_dir().to_owned()
    };
    Ok(home.join(rest).to_string_lossy().into_owned())
}

/// `${NAME}`.
fn variables(text: &str, environment: &Environment) -> Result<String, String> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        let (name, after) = after.split_once('}').ok_or_else(|| format!("'{text}' lacks a '}}'"))?;
        expanded.push_str(before);
        let value = (environment.variable)(name);
        expanded.push_str(&value.ok_or_else(|| format!("'{text}': the variable {name} is not set"))?);
        rest = after;
    }
    expanded.push_str(rest);
    Ok(expanded)
}
