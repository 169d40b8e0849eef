//! `torvm`: what only the torvm backend has.
//!
//! - [`import`]: profiles from TorVM's JSON

use std::io::{self, Read as _};

use proxyvpn_dbus::client::TorVmProxy;
use proxyvpn_dbus::types::{Circuit, Relay};
use proxyvpn_torvm::config::{Bridge, MAX_BRIDGES, Transport};
use serde::Serialize;
use zbus::proxy::CacheProperties;

use crate::agent::Agent;
use crate::args::{Bridges, TorVm};
use crate::bus::{AUTHENTICATED, Bus, bounded, failure, take};
use crate::exit::{Exit, Failure, Outcome};
use crate::{logs, text};

pub(crate) mod import;

/// Standard input for bridges is at most so long, in bytes.
const LIMIT: u64 = 64 * 1024;

/// `torvm`.
pub(crate) async fn torvm(verb: &TorVm) -> Outcome {
    match verb {
        TorVm::NewIdentity => new_identity().await,
        TorVm::Circuits(output) => circuits(output.json).await,
        TorVm::Bridges(Bridges::Set { profile, lines, transport }) => set(profile, lines, transport.as_deref()).await,
        TorVm::Bridges(Bridges::List { profile, output }) => list(profile.as_deref(), output.json).await,
        TorVm::Log(args) => logs::of(args, Some(proxyvpn_dbus::names::TOR_LOG)).await,
    }
}

async fn proxy(bus: &Bus) -> Result<TorVmProxy<'static>, Failure> {
    let proxy = TorVmProxy::builder(&bus.connection).cache_properties(CacheProperties::No).build().await;
    proxy.map_err(|error| failure(error.into()))
}

async fn new_identity() -> Outcome {
    let bus = Bus::open().await?;
    let agent = Agent::start();
    bounded(AUTHENTICATED, proxy(&bus).await?.new_identity()).await?;
    drop(agent);
    text::out("new connections take other ways through the Tor network; those that are there stay\n")?;
    Ok(Exit::Ok)
}

async fn circuits(json: bool) -> Outcome {
    #[derive(Serialize)]
    struct Output<'a> {
        version: u32,
        circuits: &'a [Circuit],
    }
    let bus = Bus::open().await?;
    let agent = Agent::start();
    let circuits = bounded(AUTHENTICATED, proxy(&bus).await?.circuits()).await?;
    drop(agent);
    if json {
        text::json(&Output { version: 1, circuits: &circuits })?;
        return Ok(Exit::Ok);
    }
    let relay = |relay: &Relay| match (relay.nickname.as_str(), relay.address.as_str()) {
        ("", "") => relay.fingerprint.chars().take(8).collect(),
        ("", address) => address.to_owned(),
        (nickname, "") => nickname.to_owned(),
        (nickname, address) => format!("{nickname} ({address})"),
    };
    let row = |circuit: &Circuit| {
        let way: Vec<String> = circuit.relays.iter().map(relay).collect();
        vec![circuit.id.clone(), circuit.purpose.clone(), way.join(" > ")]
    };
    text::out(&text::table(&["ID", "PURPOSE", "FROM GUARD TO EXIT"], &circuits.iter().map(row).collect::<Vec<_>>()))?;
    Ok(Exit::Ok)
}

async fn set(profile: &str, lines: &[String], transport: Option<&str>) -> Outcome {
    let wrong = |cause: String| Failure::new(Exit::Usage, cause);
    let lines = if lines == ["-"] { read().map_err(wrong)? } else { lines.to_vec() };
    // As torrc has them, and as people copy them.
    let lines: Vec<&str> = lines
        .iter()
        .map(|line| line.trim())
        .filter(|line| !line.is_empty())
        .map(|line| line.strip_prefix("Bridge ").unwrap_or(line))
        .collect();
    if lines.len() > MAX_BRIDGES {
        return Err(wrong(format!("there are more than {MAX_BRIDGES} bridges")));
    }
    let first = lines.first().map(|line| line.parse::<Bridge>()).transpose().map_err(|error| wrong(error.0))?;
    let transport = match (transport, &first) {
        (Some(word), _) => word.parse().map_err(|error: proxyvpn_torvm::config::Rejected| wrong(error.0))?,
        (None, Some(bridge)) => bridge.transport(),
        (None, None) => return Err(wrong("give bridges, or --transport none to go without".to_owned())),
    };
    let bus = Bus::open().await?;
    let agent = Agent::start();
    bounded(AUTHENTICATED, proxy(&bus).await?.set_bridges(profile, transport.as_str(), &lines)).await?;
    drop(agent);
    for note in lines.iter().filter_map(|line| line.parse::<Bridge>().ok()?.note()) {
        text::note(&format!("proxyctl: warning: {}", text::line(&note)));
    }
    let what = match (lines.len(), transport) {
        (0, _) => "has no bridges now".to_owned(),
        (count, Transport::None) => format!("has {count} bridges now"),
        (count, transport) => format!("has {count} bridges now, by {transport}"),
    };
    text::out(&format!("{} {what}; they count from its next connection on\n", text::line(profile)))?;
    Ok(Exit::Ok)
}

fn read() -> Result<Vec<String>, String> {
    let mut content = String::new();
    io::stdin()
        .lock()
        .take(LIMIT + 1)
        .read_to_string(&mut content)
        .map_err(|error| format!("cannot read bridges from standard input: {error}"))?;
    if content.len() as u64 > LIMIT {
        return Err("standard input is longer than 64 KiB: not bridges".to_owned());
    }
    Ok(content.lines().map(str::to_owned).collect())
}

/// What a profile's text says about bridges.
#[derive(Debug, Serialize)]
struct Listed {
    name: String,
    transport: String,
    bridges: Vec<String>,
}

impl Listed {
    fn new(name: String, profile: &str) -> Self {
        let table: toml::Table = profile.parse().unwrap_or_default();
        let torvm = table.get("torvm").and_then(toml::Value::as_table);
        let bridges = torvm.and_then(|torvm| torvm.get("bridges")?.as_array()).map(Vec::as_slice).unwrap_or_default();
        let bridges: Vec<String> = bridges.iter().filter_map(|line| line.as_str().map(str::to_owned)).collect();
        let transport = bridges.first().and_then(|line| line.parse::<Bridge>().ok()).map(|bridge| bridge.transport());
        Self { name, transport: transport.unwrap_or_default().to_string(), bridges }
    }
}

async fn list(profile: Option<&str>, json: bool) -> Outcome {
    #[derive(Serialize)]
    struct Output {
        version: u32,
        profiles: Vec<Listed>,
    }
    let bus = Bus::open().await?;
    let mut profiles = Vec::new();
    for (name, mut map) in bus.profiles().await? {
        let backend: String = take(&mut map, "Backend")?;
        if backend == "torvm" && profile.is_none_or(|wanted| wanted == name) {
            profiles.push(Listed::new(name, &take::<String>(&mut map, "Text")?));
        }
    }
    if let (Some(name), true) = (profile, profiles.is_empty()) {
        return Err(Failure::new(Exit::Failure, format!("there is no profile \"{name}\" with backend = \"torvm\""))
            .advise("proxyctl profile list shows those that exist."));
    }
    if json {
        text::json(&Output { version: 1, profiles })?;
        return Ok(Exit::Ok);
    }
    let rows: Vec<_> = profiles
        .into_iter()
        .flat_map(|profile| {
            let name = profile.name;
            profile.bridges.into_iter().map(move |line| vec![name.clone(), line])
        })
        .collect();
    if rows.is_empty() {
        text::note("there are no bridges; proxyctl torvm bridges set PROFILE LINE... sets them");
    } else {
        text::out(&text::table(&["PROFILE", "BRIDGE"], &rows))?;
    }
    Ok(Exit::Ok)
}
