//! Where objects come from: a folder of manifests, or a Kubernetes API server. Either is a set of objects that is always usable.
//!
//! Whatever is wrong is a [`Problem`](crate::problem::Problem) with its place; meanwhile an object that was once read keeps its last good
//! version, and a security policy that never was is replaced by a stand-in that denies. One object never harms another.

mod catalogue;
mod folder;
pub(crate) mod kubernetes;

use std::sync::Arc;

pub(crate) use catalogue::Catalogue;
pub(crate) use folder::{Folder, Version};

use crate::objects::{Object, ObjectKey};

/// An object that is new, different, or gone.
pub(crate) type ObjectChange = (ObjectKey, Option<Arc<Object>>);

#[cfg(test)]
mod tests;
