//! An unordered set of shared things, each of which knows its place in it: adding and removing need no key and no search, and the set
//! gives memory back when it has become small.

use std::{
    ops::Deref,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// Below it, memory is not worth giving back.
const SMALL: usize = 64;

/// Where a member stands. Written by its set only.
#[derive(Debug, Default)]
pub(crate) struct Place(AtomicUsize);

/// A thing that can be in one set at a time.
pub(crate) trait Placed {
    fn place(&self) -> &Place;
}

#[derive(Debug)]
pub(crate) struct Dense<T>(Vec<T>);

impl<T> Default for Dense<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Deref<Target: Placed>> Dense<T> {
    pub(crate) fn add(&mut self, member: T) {
        member.place().0.store(self.0.len(), Relaxed);
        self.0.push(member);
    }

    /// Takes a member out, which must be in this set; another one moves to its place.
    pub(crate) fn remove(&mut self, member: &T::Target) {
        let at = member.place().0.load(Relaxed);
        self.0.swap_remove(at);
        if let Some(moved) = self.0.get(at) {
            moved.place().0.store(at, Relaxed);
        }
        if self.0.capacity() > SMALL && self.0.len() < self.0.capacity() / 4 {
            self.0.shrink_to(self.0.len() * 2);
        }
    }

    /// Puts `new` where a member stands, which must be in this set.
    pub(crate) fn replace(&mut self, member: &T::Target, new: T) {
        let at = member.place().0.load(Relaxed);
        new.place().0.store(at, Relaxed);
        self.0[at] = new;
    }
}

impl<T> Deref for Dense<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    #[derive(Debug, Default)]
    struct Member(Place, u32);

    impl Placed for Member {
        fn place(&self) -> &Place {
            &self.0
        }
    }

    fn names(set: &Dense<Rc<Member>>) -> Vec<u32> {
        let mut names: Vec<u32> = set.iter().map(|member| member.1).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn any_member_can_leave_in_any_order() {
        let members: Vec<Rc<Member>> = (0..5).map(|name| Rc::new(Member(Place::default(), name))).collect();
        let mut set = Dense::default();
        members.iter().for_each(|member| set.add(member.clone()));
        set.remove(&members[1]);
        set.remove(&members[4]);
        assert_eq!(names(&set), [0, 2, 3]);
        set.replace(&members[2], Rc::new(Member(Place::default(), 9)));
        set.remove(&members[0]);
        assert_eq!(names(&set), [3, 9]);
        set.remove(&members[3]);
        assert_eq!(names(&set), [9]);
    }

    #[test]
    fn a_set_that_has_become_small_is_small() {
        let members: Vec<Rc<Member>> = (0..10_000).map(|_| Rc::default()).collect();
        let mut set = Dense::default();
        members.iter().for_each(|member| set.add(member.clone()));
        members[10..].iter().for_each(|member| set.remove(member));
        assert_eq!(set.len(), 10);
        assert!(set.0.capacity() <= SMALL, "{}", set.0.capacity());
    }
}
