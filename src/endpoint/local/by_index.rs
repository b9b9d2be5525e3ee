//! [`ByIndex`]: what is known of single entries of a tree, by their index.

/// Neighbours that room is made for at once: a run that has to do with all of a large tree needs no more than what is kept of
/// each entry, and one that has to do with few of them not much more.
const PAGE: usize = 1024;

/// A map from the index of an entry, for entries that lie together.
#[derive(Debug)]
pub(super) struct ByIndex<T> {
    pages: Vec<Option<Box<[Option<T>]>>>,
}

impl<T> Default for ByIndex<T> {
    fn default() -> Self {
        ByIndex { pages: Vec::new() }
    }
}

fn place(index: u32) -> (usize, usize) {
    (index as usize / PAGE, index as usize % PAGE)
}

impl<T> ByIndex<T> {
    pub(super) fn get(&self, index: u32) -> Option<&T> {
        let (page, at) = place(index);
        self.pages.get(page)?.as_ref()?.get(at)?.as_ref()
    }

    pub(super) fn contains(&self, index: u32) -> bool {
        self.get(index).is_some()
    }

    pub(super) fn insert(&mut self, index: u32, value: T) {
        let (page, at) = place(index);
        if self.pages.len() <= page {
            self.pages.resize_with(page + 1, || None);
        }
        let page = self.pages[page].get_or_insert_with(|| (0..PAGE).map(|_| None).collect());
        page[at] = Some(value);
    }

    pub(super) fn remove(&mut self, index: u32) {
        let (page, at) = place(index);
        if let Some(value) = self.pages.get_mut(page).and_then(Option::as_mut).and_then(|page| page.get_mut(at)) {
            *value = None;
        }
    }

    /// Gives up what is known of entries that lie a page before `index`, so that the memory serves others.
    pub(super) fn forget_before(&mut self, index: u32) {
        let (page, at) = place(index);
        if at == 0 {
            self.pages.iter_mut().take(page).for_each(|page| *page = None);
        }
    }

    /// All of them in ascending order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let pages = self.pages.iter().enumerate().filter_map(|(page, values)| Some((page, values.as_ref()?)));
        pages.flat_map(|(page, values)| {
            let values = values.iter().enumerate();
            values.filter_map(move |(at, value)| Some(((page * PAGE + at) as u32, value.as_ref()?)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_found_at_its_index_and_nowhere_else() {
        let mut map = ByIndex::default();
        let kept = [0, 1, 1023, 1024, 70_000, 5];
        kept.iter().for_each(|&index| map.insert(index, index * 2));
        map.insert(5, 11);
        let all: Vec<_> = map.iter().map(|(index, &value)| (index, value)).collect();
        assert_eq!(all, [(0, 0), (1, 2), (5, 11), (1023, 2046), (1024, 2048), (70_000, 140_000)]);
        for index in [2, 1025, 69_999, 70_001, u32::MAX] {
            assert!(!map.contains(index), "{index}");
        }
    }
}
