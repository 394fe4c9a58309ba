// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What devices stand on: block nodes, network and character backends, objects. Each has a name of its kind; it can be
//! taken away only when it has no user. Most have one user at most, some are shared.

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
    users: Users,
}

/// Who uses a backend.
type Users = Rc<RefCell<Vec<String>>>;

/// The right to use a backend, which stays as long as this exists.
pub(crate) struct Use<T> {
    value: Rc<T>,
    users: Users,
    user: String,
}

impl<T> Use<T> {
    /// The backend.
    pub(crate) fn value(&self) -> &Rc<T> {
        &self.value
    }
}

impl<T> Drop for Use<T> {
    fn drop(&mut self) {
        let mut users = self.users.borrow_mut();
        if let Some(at) = users.iter().position(|user| *user == self.user) {
            users.remove(at);
        }
    }
}

impl<T> fmt::Debug for Use<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Use({:?})", self.user)
    }
}

/// A backend that may take part in its user's work on another thread.
pub(crate) trait Released {
    /// Whether no work of a user that is gone is left.
    fn is_released(&self) -> bool {
        true
    }
}

/// A use of whatever kind, to be kept until its user is gone.
pub(crate) trait AnyUse {
    /// See [`Released`].
    fn is_released(&self) -> bool;
}

impl<T: Released> AnyUse for Use<T> {
    fn is_released(&self) -> bool {
        self.value.is_released()
    }
}

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
            users: Users::default(),
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
        Ok(item.use_by(user))
    }

    /// Gives the backend to `user`, besides others it may have.
    ///
    /// # Errors
    /// There is none of this name.
    pub(crate) fn share(&self, name: &str, user: &str) -> Result<Use<T>, QmpError> {
        let items = self.items.borrow();
        let item = items.get(name).ok_or_else(|| self.not_found(name))?;
        Ok(item.use_by(user))
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

    /// All of them in order of their names, each with its first user.
    pub(crate) fn list(&self) -> Vec<(String, Rc<T>, Option<String>)> {
        let items = self.items.borrow();
        let each = |(name, item): (&String, &Item<T>)| {
            let user = item.users.borrow().first().cloned();
            (name.clone(), Rc::clone(&item.value), user)
        };
        items.iter().map(each).collect()
    }

    fn not_found(&self, name: &str) -> QmpError {
        QmpError::generic(format!("{} '{name}' not found", self.kind))
    }

    fn check_unused(&self, name: &str, item: &Item<T>) -> Result<(), QmpError> {
        match item.users.borrow().first() {
            Some(user) => Err(QmpError::generic(format!(
                "{} '{name}' is in use by '{user}'",
                self.kind
            ))),
            None => Ok(()),
        }
    }
}

impl<T> Item<T> {
    fn use_by(&self, user: &str) -> Use<T> {
        self.users.borrow_mut().push(user.to_owned());
        Use {
            value: Rc::clone(&self.value),
            users: Rc::clone(&self.users),
            user: user.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_until_the_last_user_is_gone() {
        let shelf = Shelf::new("object");
        shelf.add("io", 7).unwrap();
        let first = shelf.share("io", "disk0").unwrap();
        let second = shelf.share("io", "disk1").unwrap();
        drop(first);
        let refused = shelf.remove("io").unwrap_err();
        assert!(refused.desc.contains("in use by 'disk1'"), "{refused}");
        drop(second);
        assert_eq!(*shelf.remove("io").unwrap(), 7);
        assert!(shelf.share("io", "disk0").is_err());
    }

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
