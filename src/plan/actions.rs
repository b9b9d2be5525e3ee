//! [`Actions`]: what is to be done, for all who go by it.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use super::Action;

/// Actions, which a target and the engine have in common: a copy of them is made where one side changes something alone.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Actions(Arc<Vec<Action>>);

impl Deref for Actions {
    type Target = Vec<Action>;

    fn deref(&self) -> &Vec<Action> {
        &self.0
    }
}

impl DerefMut for Actions {
    fn deref_mut(&mut self) -> &mut Vec<Action> {
        Arc::make_mut(&mut self.0)
    }
}

impl From<Vec<Action>> for Actions {
    fn from(actions: Vec<Action>) -> Actions {
        Actions(Arc::new(actions))
    }
}

impl<'a> IntoIterator for &'a Actions {
    type Item = &'a Action;
    type IntoIter = std::slice::Iter<'a, Action>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl<'a> IntoIterator for &'a mut Actions {
    type Item = &'a mut Action;
    type IntoIter = std::slice::IterMut<'a, Action>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Change, Differences, Need};

    #[test]
    fn what_one_changes_the_other_does_not_see_and_what_is_only_read_is_there_once() {
        let action =
            |index| Action { index, change: Change::Added, differences: Differences::default(), need: Need::Nothing };
        let ours = Actions::from(vec![action(1), action(2)]);
        let mut theirs = ours.clone();
        assert!(Arc::ptr_eq(&ours.0, &theirs.0));
        theirs.push(action(3));
        assert_eq!((ours.len(), theirs.len()), (2, 3));
    }
}
