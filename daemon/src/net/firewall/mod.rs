//! The firewall.
