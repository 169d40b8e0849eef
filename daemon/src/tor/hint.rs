//! What a person can do when Tor's start stalls.

use super::event::Bootstrap;

/// Tor takes a consensus as valid from three hours before; an hour already breaks onion services (`NETWORKSTATUS_ALLOW_SKEW`).
const SKEW: u64 = 30 * 60;

/// How Tor gets out, as far as it matters here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Way {
    /// Through bridges.
    pub bridges: bool,
    /// By snowflake, which says nothing of what fails: Tor waits for the first answer of the bridge behind a volunteer.
    pub snowflake: bool,
    /// Through a proxy.
    pub proxy: bool,
}

/// One sentence that helps, for a start that does not go on. `skew`: seconds that the clock is ahead, if Tor said so.
#[must_use]
pub fn hint(bootstrap: &Bootstrap, skew: Option<i64>, way: Way) -> String {
    if let Some(skew) = skew.filter(|skew| skew.unsigned_abs() >= SKEW) {
        let side = if skew < 0 { "behind" } else { "ahead" };
        return format!(
            "The clock of this machine is about {} {side}, and Tor needs it right: set it, as with `timedatectl set-ntp true`.",
            span(skew.unsigned_abs())
        );
    }
    let proxy = matches!(&*bootstrap.tag, "conn_proxy" | "conn_done_proxy" | "ap_conn_proxy" | "ap_conn_done_proxy");
    let transport = matches!(&*bootstrap.tag, "conn_pt" | "conn_done_pt" | "ap_conn_pt" | "ap_conn_done_pt");
    let sentence = match (&*bootstrap.reason, bootstrap.percent) {
        (_, 100) => "Tor has started.",
        ("PT_MISSING", _) => {
            "The pluggable transport of the bridges does not run: look at `proxyctl torvm log`, or use another transport."
        }
        ("IDENTITY", _) if way.bridges => {
            "A bridge has another key than its line says: check the bridge lines, or get new ones."
        }
        ("IDENTITY", _) => {
            "A relay has another key than it should: something on the way answers in its place, so try bridges."
        }
        _ if proxy => {
            "The proxy on Tor's way out refuses or does not answer: check its address, its port and that it lets CONNECT through."
        }
        ("NOROUTE", _) => "There is no way to the network: check that this machine is online.",
        (_, ..=14) if way.snowflake => {
            "No volunteer of snowflake is reached yet: look at `proxyctl torvm log`; if this lasts, this network may block its broker or UDP, so use obfs4 or meek bridges."
        }
        ("CONNECTREFUSED" | "CONNECTRESET" | "TIMEOUT" | "IOERROR" | "TLSERROR" | "DONE" | "MISC", ..75)
            if way.bridges || transport =>
        {
            "The bridges can't be reached: they may be blocked or gone, so get new lines or use another transport."
        }
        ("CONNECTREFUSED" | "CONNECTRESET" | "TLSERROR", ..75) if way.proxy => {
            "The proxy on Tor's way out lets no connection to Tor's relays through: check its rules and ports, or use bridges on port 443."
        }
        ("CONNECTREFUSED" | "CONNECTRESET" | "TLSERROR", ..75) => {
            "This network seems to block Tor's relays: try bridges."
        }
        ("TIMEOUT" | "IOERROR" | "DONE" | "MISC", ..75) => {
            "Tor's relays don't answer: check that this machine is online; if it is, its network may block Tor, so try bridges."
        }
        ("RESOURCELIMIT", _) => "The virtual machine is short of something: give it more memory.",
        (_, ..=10) if way.bridges || transport => {
            "The bridges don't answer yet: if this lasts, get new lines or use another transport."
        }
        (_, ..=10) => {
            "Tor's relays don't answer yet: check that this machine is online; if it is, its network may block Tor, so try bridges."
        }
        (_, ..75) => "Tor is loading its directory; on a slow network this can take minutes.",
        _ => "Tor is looking for relays that answer; this can take a minute.",
    };
    sentence.to_owned()
}

/// The same for a line of Tor's log by which the time is not within a certificate's: then Tor refuses a relay before it could notice
/// its clock. It warns so of directory authorities alone (`channel_tls_process_certs_cell`).
#[must_use]
pub fn of_certificate(line: &str) -> Option<&'static str> {
    if line.contains("certificate expired") || line.contains("Certificate already expired") {
        Some(
            "By the clock of this machine the certificates of Tor's relays have expired, so it seems to be ahead: set it, as with \
             `timedatectl set-ntp true`.",
        )
    } else if line.contains("Certificate not yet valid") {
        Some(
            "By the clock of this machine the certificates of Tor's relays are not valid yet, so it seems to be behind: set it, as with \
             `timedatectl set-ntp true`.",
        )
    } else {
        None
    }
}

fn span(seconds: u64) -> String {
    match seconds {
        ..5400 => format!("{} minutes", seconds / 60),
        5400..172_800 => format!("{} hours", (seconds + 1800) / 3600),
        _ => format!("{} days", (seconds + 43_200) / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_of_another_time_tell_of_the_clock() {
        let cases = [
            ("Received a bad CERTS cell: At least one certificate expired.", Some("ahead")),
            ("Certificate already expired. Either their clock is set wrong, or your clock is wrong.", Some("ahead")),
            ("Certificate not yet valid. Either their clock is set wrong, or your clock is wrong.", Some("behind")),
            ("Received a bad CERTS cell: The legacy RSA ID certificate was not valid", None),
            ("Bootstrapped 14% (handshake): Handshaking with a relay", None),
        ];
        for (line, side) in cases {
            let told = of_certificate(line);
            assert_eq!(told.map(|told| told.contains(side.unwrap_or("?"))), side.map(|_| true), "{line}: {told:?}");
        }
    }

    #[test]
    fn each_trouble_has_its_sentence() {
        let direct = Way::default();
        let bridges = Way { bridges: true, ..direct };
        let snowflake = Way { snowflake: true, ..bridges };
        let proxy = Way { proxy: true, ..direct };
        let cases = [
            (5, "conn", "TIMEOUT", Some(-7300), direct, "about 2 hours behind"),
            (50, "loading_descriptors", "", Some(86_400 * 3), direct, "about 3 days ahead"),
            (5, "conn", "TIMEOUT", Some(1860), bridges, "31 minutes ahead"),
            (5, "conn", "NOROUTE", Some(60), direct, "is online"),
            (5, "conn", "CONNECTREFUSED", None, direct, "seems to block Tor's relays: try bridges"),
            (14, "handshake", "TLSERROR", None, direct, "try bridges"),
            (5, "conn", "TIMEOUT", None, direct, "is online; if it is"),
            (5, "conn", "TIMEOUT", None, bridges, "get new lines"),
            (2, "conn_done_pt", "CONNECTREFUSED", None, bridges, "get new lines"),
            (10, "conn_done", "IDENTITY", None, bridges, "check the bridge lines"),
            (10, "conn_done", "IDENTITY", None, direct, "answers in its place"),
            (1, "conn_pt", "PT_MISSING", None, bridges, "does not run"),
            (3, "conn_proxy", "TIMEOUT", None, proxy, "The proxy"),
            (4, "conn_done_proxy", "", None, proxy, "lets CONNECT through"),
            (5, "conn", "CONNECTRESET", None, proxy, "check its rules"),
            (0, "starting", "", None, direct, "don't answer yet"),
            (1, "conn_pt", "", None, bridges, "bridges don't answer yet"),
            (1, "conn_pt", "PT_MISSING", None, snowflake, "does not run"),
            (2, "conn_done_pt", "", None, snowflake, "block its broker or UDP"),
            (14, "handshake", "TIMEOUT", None, snowflake, "use obfs4 or meek"),
            (14, "handshake", "TIMEOUT", Some(-7300), snowflake, "about 2 hours behind"),
            (30, "loading_status", "", None, snowflake, "can take minutes"),
            (30, "loading_status", "TIMEOUT", None, snowflake, "bridges can't be reached"),
            (55, "loading_descriptors", "", None, direct, "can take minutes"),
            (80, "ap_conn", "", None, direct, "relays that answer"),
            (80, "ap_conn", "CONNECTREFUSED", None, direct, "relays that answer"),
            (100, "done", "", None, direct, "has started"),
            (90, "ap_handshake_done", "RESOURCELIMIT", None, direct, "more memory"),
            (5, "made_up", "made_up", None, direct, "don't answer yet"),
        ];
        for (percent, tag, reason, skew, way, words) in cases {
            let bootstrap = Bootstrap { percent, tag: tag.into(), reason: reason.into(), ..Bootstrap::default() };
            let told = hint(&bootstrap, skew, way);
            assert!(told.contains(words) && told.ends_with('.'), "{percent} {tag} {reason} {skew:?} {way:?}: {told}");
        }
    }
}
