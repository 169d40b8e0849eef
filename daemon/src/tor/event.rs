//! What Tor tells by itself: status events (control-spec section 4.1.10).

use super::reply::{Reply, keywords};
use crate::lines::clean;

/// Characters of a text for people.
pub(super) const MAX_TEXT: usize = 256;
/// Characters of a word: a tag, a reason, an address.
pub(super) const MAX_WORD: usize = 128;

/// How far Tor's start is. What Tor does not say is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bootstrap {
    /// 0 to 100.
    pub percent: u8,
    /// The step that is done next, as in `loading_descriptors` (control-spec appendix A.2).
    pub tag: String,
    /// The step in Tor's words.
    pub summary: String,
    /// What went wrong, in Tor's words.
    pub warning: String,
    /// What went wrong, as in `CONNECTREFUSED`.
    pub reason: String,
    /// How often something went wrong in this step.
    pub count: u32,
    /// What Tor thinks of it: `ignore`, or `warn` when a person should know.
    pub recommendation: String,
    /// Address and port of the relay that it was about.
    pub host: String,
}

impl Bootstrap {
    /// From `NOTICE BOOTSTRAP PROGRESS=…`, as event or as the value of `status/bootstrap-phase`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut bootstrap = Self::default();
        let mut progress = None;
        for (key, value) in keywords(text) {
            match key {
                "PROGRESS" => progress = value.parse().ok(),
                "TAG" => bootstrap.tag = clean(&value, MAX_WORD),
                "SUMMARY" => bootstrap.summary = clean(&value, MAX_TEXT),
                "WARNING" => bootstrap.warning = clean(&value, MAX_TEXT),
                "REASON" => bootstrap.reason = clean(&value, MAX_WORD),
                "COUNT" => bootstrap.count = value.parse().unwrap_or(0),
                "RECOMMENDATION" => bootstrap.recommendation = clean(&value, MAX_WORD),
                "HOSTADDR" => bootstrap.host = clean(&value, MAX_WORD),
                _ => {}
            }
        }
        bootstrap.percent = progress.filter(|percent| *percent <= 100)?;
        Some(bootstrap)
    }
}

/// What Tor tells by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The start went on, or something went wrong with it.
    Bootstrap(Bootstrap),
    /// The guest's clock is off.
    ClockSkew {
        /// Seconds that it is ahead; negative when it is behind.
        seconds: i64,
        /// Who says so, as in `DIRSERV:198.51.100.1:80`.
        source: String,
    },
    /// Connections can be made.
    CircuitEstablished,
    /// They no longer can.
    CircuitNotEstablished {
        /// Tor's word for it, as in `CLOCK_JUMPED`.
        reason: String,
    },
    /// New connections take new circuits from now on.
    NewIdentity,
    /// The connection to the control port is over, and nothing comes any more.
    Closed(String),
}

impl Event {
    /// `None` for what nobody needs.
    pub(super) fn parse(reply: &Reply) -> Option<Self> {
        let (kind, rest) = reply.parts.first()?.text.split_once(' ')?;
        if kind == "SIGNAL" {
            return (rest == "NEWNYM").then_some(Self::NewIdentity);
        }
        let (_severity, rest) = rest.split_once(' ')?;
        let (action, arguments) = rest.split_once(' ').unwrap_or((rest, ""));
        let argument = |name| keywords(arguments).find(|(key, _)| *key == name).map(|(_, value)| value);
        match (kind, action) {
            ("STATUS_CLIENT", "BOOTSTRAP") => Bootstrap::parse(arguments).map(Self::Bootstrap),
            ("STATUS_CLIENT", "CIRCUIT_ESTABLISHED") => Some(Self::CircuitEstablished),
            ("STATUS_CLIENT", "CIRCUIT_NOT_ESTABLISHED") => {
                Some(Self::CircuitNotEstablished { reason: clean(&argument("REASON").unwrap_or_default(), MAX_WORD) })
            }
            ("STATUS_GENERAL", "CLOCK_SKEW") => Some(Self::ClockSkew {
                seconds: argument("SKEW")?.parse().ok()?,
                source: clean(&argument("SOURCE").unwrap_or_default(), MAX_WORD),
            }),
            _ => None,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::tor::reply::Part;

    fn event(text: &str) -> Option<Event> {
        Event::parse(&Reply { code: 650, parts: vec![Part { text: text.to_owned(), data: vec![] }] })
    }

    #[test]
    fn status_events_are_understood() {
        let warning = "STATUS_CLIENT WARN BOOTSTRAP PROGRESS=5 TAG=conn SUMMARY=\"Connecting to a relay\" WARNING=\"Connection refused\" \
                       REASON=CONNECTREFUSED COUNT=3 RECOMMENDATION=warn HOSTID=\"ABC\" HOSTADDR=\"192.0.2.1:443\"";
        let bootstrap = Bootstrap {
            percent: 5,
            tag: "conn".into(),
            summary: "Connecting to a relay".into(),
            warning: "Connection refused".into(),
            reason: "CONNECTREFUSED".into(),
            count: 3,
            recommendation: "warn".into(),
            host: "192.0.2.1:443".into(),
        };
        let skew = |seconds| Some(Event::ClockSkew { seconds, source: "OR:192.0.2.1:443".into() });
        let cases = [
            (warning, Some(Event::Bootstrap(bootstrap))),
            ("STATUS_GENERAL WARN CLOCK_SKEW SKEW=-3600 SOURCE=OR:192.0.2.1:443", skew(-3600)),
            ("STATUS_GENERAL WARN CLOCK_SKEW SKEW=+60 SOURCE=OR:192.0.2.1:443", skew(60)),
            ("STATUS_GENERAL WARN CLOCK_SKEW SKEW=much SOURCE=OR:192.0.2.1:443", None),
            ("STATUS_CLIENT NOTICE CIRCUIT_ESTABLISHED", Some(Event::CircuitEstablished)),
            (
                "STATUS_CLIENT NOTICE CIRCUIT_NOT_ESTABLISHED REASON=CLOCK_JUMPED",
                Some(Event::CircuitNotEstablished { reason: "CLOCK_JUMPED".into() }),
            ),
            ("STATUS_CLIENT NOTICE BOOTSTRAP PROGRESS=101 TAG=done SUMMARY=\"Done\"", None),
            ("STATUS_CLIENT NOTICE BOOTSTRAP TAG=done", None),
            ("STATUS_CLIENT", None),
            ("SIGNAL NEWNYM", Some(Event::NewIdentity)),
            ("SIGNAL RELOAD", None),
        ];
        for (text, expected) in cases {
            assert_eq!(event(text), expected, "{text}");
        }
    }

    #[test]
    fn text_is_bounded_and_harmless() {
        let Some(Event::Bootstrap(bootstrap)) =
            event(&format!("STATUS_CLIENT NOTICE BOOTSTRAP PROGRESS=1 TAG=\u{1b}c SUMMARY=\"{}\"", "x".repeat(5000)))
        else {
            unreachable!("it is one")
        };
        assert_eq!(bootstrap.tag, " c");
        assert_eq!(bootstrap.summary.chars().count(), MAX_TEXT + 1);
    }
}
