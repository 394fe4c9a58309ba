// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What devices stand on: block nodes, network and character backends, memory objects. Each has a name of its kind and,
//! at most, one user; it can be taken away only when it has none.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use ebbtide_qmp::QmpError;

/// The backends of one kind, by name.
pub(crate) struct Shelf<T> {
    /// What one is called in errors, such as `Node`.
    kind: &'static str,
    items: RefCell<BTreeMap<String, Item<T>>>,
}

struct Item<T> {
    value: Rc<T>,
    user: User,
}

/// Who uses a backend.
type User = Rc<RefCell<Option<String>>>;

/// The right to use a backend. As long as it exists the backend stays and has no other user.
pub(crate) struct Use<T> {
    value: Rc<T>,
    user: User,
}

impl<T> Use<T> {
    /// The backend.
    pub(crate) fn value(&self) -> &Rc<T> {
        &self.value
    }
}

impl<T> Drop for Use<T> {
    fn drop(&mut self) {
        *self.user.borrow_mut() = None;
    }
}

impl<T> fmt::Debug for Use<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Use({:?})", self.user.borrow())
    }
}

/// A use of whatever kind, to be kept until its user is gone.
pub(crate) trait AnyUse {}

impl<T> AnyUse for Use<T> {}

impl<T> Shelf<T> {
    /// An empty one.
    pub(crate) fn new(kind: &'static str) -> Shelf<T> {
        Shelf {
            kind,
            items: RefCell::default(),
        }
    }

    /// Whether `name` may be given to a new backend.
    ///
    /// # Errors
    /// Another has it.
    pub(crate) fn check_name(&self, name: &str) -> Result<(), QmpError> {
        match self.items.borrow().contains_key(name) {
            true => Err(QmpError::generic(format!(
                "{} '{name}' exists already",
                self.kind
            ))),
            false => Ok(()),
        }
    }

    /// Puts a backend in.
    ///
    /// # Errors
    /// Another has its name; this one is dropped.
    pub(crate) fn add(&self, name: &str, value: T) -> Result<(), QmpError> {
        self.check_name(name)?;
        let item = Item {
            value: Rc::new(value),
            user: User::default(),
        };
        self.items.borrow_mut().insert(name.to_owned(), item);
        Ok(())
    }

    /// Gives the backend to `user`, which has it alone.
    ///
    /// # Errors
    /// There is none of this name, or it is used.
    pub(crate) fn take(&self, name: &str, user: &str) -> Result<Use<T>, QmpError> {
        let items = self.items.borrow();
        let item = items.get(name).ok_or_else(|| self.not_found(name))?;
        self.check_unused(name, item)?;
        *item.user.borrow_mut() = Some(user.to_owned());
        Ok(Use {
            value: Rc::clone(&item.value),
            user: Rc::clone(&item.user),
        })
    }

    /// Takes a backend out for good.
    ///
    /// # Errors
    /// There is none of this name, or it is used.
    pub(crate) fn remove(&self, name: &str) -> Result<Rc<T>, QmpError> {
        let mut items = self.items.borrow_mut();
        let item = items.get(name).ok_or_else(|| self.not_found(name))?;
        self.check_unused(name, item)?;
        match items.remove(name) {
            Some(item) => Ok(item.value),
            None => Err(self.not_found(name)),
        }
    }

    /// One backend, to look at.
    pub(crate) fn get(&self, name: &str) -> Option<Rc<T>> {
        let items = self.items.borrow();
        items.get(name).map(|item| Rc::clone(&item.value))
    }

    /// All of them in order of their names, each with its user.
    pub(crate) fn list(&self) -> Vec<(String, Rc<T>, Option<String>)> {
        let items = self.items.borrow();
        let each = |(name, item): (&String, &Item<T>)| {
            let user = item.user.borrow().clone();
            (name.clone(), Rc::clone(&item.value), user)
        };
        items.iter().map(each).collect()
    }

    fn not_found(&self, name: &str) -> QmpError {
        QmpError::generic(format!("{} '{name}' not found", self.kind))
    }

    fn check_unused(&self, name: &str, item: &Item<T>) -> Result<(), QmpError> {
        match &*item.user.borrow() {
            Some(user) => Err(QmpError::generic(format!(
                "{} '{name}' is in use by '{user}'",
                self.kind
            ))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_at_a_time_and_none_while_it_goes() {
        let shelf = Shelf::new("Node");
        shelf.add("n", 7).unwrap();
        assert!(shelf.add("n", 8).unwrap_err().desc.contains("'n' exists"));
        let taken = shelf.take("n", "disk0").unwrap();
        assert_eq!(**taken.value(), 7);
        for refused in [
            shelf.take("n", "disk1").unwrap_err(),
            shelf.remove("n").unwrap_err(),
        ] {
            assert!(refused.desc.contains("in use by 'disk0'"), "{refused}");
        }
        assert_eq!(shelf.list()[0].2.as_deref(), Some("disk0"));
        drop(taken);
        drop(shelf.take("n", "disk1").unwrap());
        assert_eq!(*shelf.remove("n").unwrap(), 7);
        assert!(shelf.take("n", "x").unwrap_err().desc.contains("not found"));
        assert!(shelf.get("n").is_none());
    }
}
