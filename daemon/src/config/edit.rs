//! Changes of single keys in a profile's text, which leave the rest and its comments as they are.

use proxyvpn_torvm::config::{Bridge, Transport};
use toml_edit::{Array, DocumentMut, Item, Table, TomlError, value};

use super::error::{ConfigError, Rejected, Source};

/// `text` with these bridges. Without any both keys go.
///
/// # Errors
/// The text is not TOML, or `torvm` in it is no section.
pub(super) fn bridges(file: &str, text: &str, bridges: &[Bridge], transport: Transport) -> Result<String, ConfigError> {
    let source = Source { file, text };
    let wrong = |error: TomlError| source.error(error.span(), Rejected::new(error.message()));
    let mut document: DocumentMut = text.parse().map_err(wrong)?;
    let section = document.entry("torvm").or_insert_with(|| Item::Table(Table::new())).as_table_like_mut();
    let section = section.ok_or_else(|| source.error(None, Rejected::new("torvm is no section")))?;
    if bridges.is_empty() {
        section.remove("transport");
        section.remove("bridges");
    } else {
        let mut lines: Array = bridges.iter().map(Bridge::to_string).collect();
        lines.iter_mut().for_each(|line| line.decor_mut().set_prefix("\n    "));
        lines.set_trailing_comma(true);
        lines.set_trailing("\n");
        section.insert("transport", value(transport.as_str()));
        section.insert("bridges", value(lines));
    }
    Ok(document.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proxyvpn_torvm::config::TorSettings;

    use super::*;

    const OBFS4: &str = "obfs4 192.0.2.1:443 cert=abc iat-mode=0";

    fn edited(text: &str, lines: &[&str]) -> (String, TorSettings) {
        let list: Vec<Bridge> = lines.iter().map(|line| line.parse().unwrap()).collect();
        let transport = list.first().map_or(Transport::None, Bridge::transport);
        let text = bridges("tor.toml", text, &list, transport).unwrap();
        let profile = crate::config::parse::profile("tor", "tor.toml", &text).unwrap();
        (text, profile.torvm.unwrap().tor)
    }

    #[test]
    fn only_the_two_keys_change() {
        let text = "backend = \"torvm\" # Tor\n\n[torvm]\nmemory-mib = 512\nbridges = [\"192.0.2.9:1\"] # old\nexit-country = \"de\"\n";
        let (with, tor) = edited(text, &[OBFS4, OBFS4]);
        assert!(with.starts_with("backend = \"torvm\" # Tor\n\n[torvm]\nmemory-mib = 512\n"), "{with}");
        assert!(with.contains("exit-country = \"de\"\n") && !with.contains("192.0.2.9"), "{with}");
        assert_eq!(
            (tor.bridges().len(), tor.transport()),
            (1, Transport::Obfs4),
            "what stands there twice counts once"
        );
        let (without, tor) = edited(&with, &[]);
        assert!(tor.bridges().is_empty() && !without.contains("transport"), "{without}");
        assert_eq!(without, "backend = \"torvm\" # Tor\n\n[torvm]\nmemory-mib = 512\nexit-country = \"de\"\n");
    }

    #[test]
    fn the_section_is_made_where_there_is_none_and_may_be_inline() {
        let (text, tor) = edited("backend = \"torvm\"\n", &["192.0.2.1:443"]);
        assert_eq!(tor.bridges().len(), 1, "{text}");
        let (text, tor) = edited("backend = \"torvm\"\ntorvm = { memory-mib = 512 }\n", &["192.0.2.1:443"]);
        assert_eq!(tor.bridges().len(), 1, "{text}");
        assert!(bridges("f", "torvm = 1\n", &[], Transport::None).unwrap_err().to_string().contains("no section"));
        assert!(bridges("f", "torvm = \n", &[], Transport::None).unwrap_err().to_string().starts_with("f:1:"));
    }
}
