//! Which DNS servers the machine uses.
