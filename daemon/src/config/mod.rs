//! Files of the administrator.
//!
//! - [`profile`]: one profile, checked

pub mod profile;
