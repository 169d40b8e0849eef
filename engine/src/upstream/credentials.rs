//! User name and password for Basic authentication (RFC 7617).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

use crate::secret::Secret;

/// Longest user name and longest password, in bytes: what proxies take in one header line with room to spare.
const LONGEST: usize = 1024;

/// A user name and password that were checked to fit Basic authentication.
#[derive(Debug, Clone)]
pub struct Credentials {
    user: String,
    password: Secret,
}

/// Why a user name or password cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CredentialsError {
    /// RFC 7617 section 2: the first colon ends the user name.
    #[error("the user name for the proxy contains a colon, which HTTP Basic authentication cannot send")]
    Colon,
    /// RFC 7617 section 2 excludes control characters.
    #[error(
        "the {0} for the proxy contains a control character; a line end at the end of a password file is a common cause"
    )]
    Control(&'static str),
    /// More than 1024 bytes.
    #[error("the {0} for the proxy is longer than {LONGEST} bytes")]
    TooLong(&'static str),
}

impl Credentials {
    /// Checks and takes over `user` and `password`; both may be empty.
    ///
    /// # Errors
    /// A colon in the user name, a control character or more than 1024 bytes in either.
    pub fn new(user: String, password: Secret) -> Result<Self, CredentialsError> {
        if user.contains(':') {
            return Err(CredentialsError::Colon);
        }
        for (what, text) in [("user name", user.as_str()), ("password", password.expose())] {
            if text.chars().any(char::is_control) {
                return Err(CredentialsError::Control(what));
            }
            if text.len() > LONGEST {
                return Err(CredentialsError::TooLong(what));
            }
        }
        Ok(Self { user, password })
    }

    /// The user name.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.user
    }

    /// Base64 of `user:password`, in UTF-8.
    pub(super) fn basic(&self) -> Zeroizing<String> {
        let (user, password) = (self.user.as_bytes(), self.password.expose().as_bytes());
        // Room for all at once: a string that grows leaves copies behind that are not wiped.
        let mut pair = Zeroizing::new(Vec::with_capacity(user.len() + 1 + password.len()));
        pair.extend_from_slice(user);
        pair.push(b':');
        pair.extend_from_slice(password);
        Zeroizing::new(STANDARD.encode(&*pair))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn make(user: &str, password: &str) -> Result<Credentials, CredentialsError> {
        Credentials::new(user.into(), Secret::new(password.into()))
    }

    #[test]
    fn the_rfc_examples() {
        assert_eq!(*make("Aladdin", "open sesame").unwrap().basic(), "QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert_eq!(*make("test", "123\u{a3}").unwrap().basic(), "dGVzdDoxMjPCow==");
    }

    #[test]
    fn what_basic_cannot_carry_is_refused() {
        let long = "x".repeat(LONGEST + 1);
        for (user, password, want) in [
            ("a:b", "c", CredentialsError::Colon),
            ("a\r\nX", "c", CredentialsError::Control("user name")),
            ("a", "c\n", CredentialsError::Control("password")),
            ("a", "\u{7f}", CredentialsError::Control("password")),
            (&long, "c", CredentialsError::TooLong("user name")),
            ("a", &long, CredentialsError::TooLong("password")),
        ] {
            assert_eq!(make(user, password).unwrap_err(), want, "{user:?} {password:?}");
        }
        for (user, password) in [("", ""), ("a", "b:c:d"), ("jörg", "pass wörd")] {
            assert!(make(user, password).is_ok(), "{user:?} {password:?}");
        }
    }

    #[test]
    fn the_password_is_not_printed() {
        assert!(!format!("{:?}", make("a", "sesame").unwrap()).contains("sesame"));
    }
}
