//! Lists with a bound, so that no text from outside can make one grow.

use std::ops::Deref;

use serde::{Deserialize, Serialize};

use super::Rejected;

/// At most `MOST` values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    try_from = "Vec<T>",
    into = "Vec<T>",
    bound(serialize = "T: Clone + Serialize", deserialize = "T: Deserialize<'de>")
)]
pub struct List<T, const MOST: usize>(Vec<T>);

impl<T, const MOST: usize> Default for List<T, MOST> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T, const MOST: usize> TryFrom<Vec<T>> for List<T, MOST> {
    type Error = Rejected;

    fn try_from(values: Vec<T>) -> Result<Self, Rejected> {
        if values.len() > MOST { Err(Rejected(format!("more than {MOST} entries"))) } else { Ok(Self(values)) }
    }
}

impl<T, const MOST: usize> From<List<T, MOST>> for Vec<T> {
    fn from(list: List<T, MOST>) -> Self {
        list.0
    }
}

impl<T, const MOST: usize> Deref for List<T, MOST> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}
