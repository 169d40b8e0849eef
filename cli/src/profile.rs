//! `profile list | show | import | remove`.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use proxyvpn_dbus::options::import as key;
use serde::Serialize;
use zbus::{Fd, OwnedVariant, Variant};

use crate::agent::Agent;
use crate::args::Profile as Verb;
use crate::bus::{AUTHENTICATED, Bus, bounded, take};
use crate::exit::{Exit, Failure, Outcome};
use crate::secret::sealed;
use crate::{text, torvm};

/// A profile file is at most so long, in bytes.
const LIMIT: u64 = 1 << 20;

/// A profile as the daemon shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Profile {
    name: String,
    backend: String,
    upstream: String,
    autoconnect: bool,
    origin: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

impl Profile {
    fn new(name: String, mut map: HashMap<String, OwnedVariant>) -> Result<Self, Failure> {
        Ok(Self {
            name,
            backend: take(&mut map, "Backend")?,
            upstream: take(&mut map, "Upstream")?,
            autoconnect: take(&mut map, "Autoconnect")?,
            origin: take(&mut map, "Origin")?,
            text: Some(take(&mut map, "Text")?),
        })
    }
}

/// `profile`.
pub(crate) async fn profile(verb: &Verb) -> Outcome {
    match verb {
        Verb::List(output) => list(output.json).await,
        Verb::Show { name, output } => show(name, output.json).await,
        Verb::Import { file, name, replace } => import(file, name.as_deref(), *replace).await,
        Verb::Remove { names } => remove(names).await,
    }
}

async fn list(json: bool) -> Outcome {
    #[derive(Serialize)]
    struct Output {
        version: u32,
        profiles: Vec<Profile>,
    }
    let bus = Bus::open().await?;
    let mut profiles: Vec<Profile> =
        bus.profiles().await?.into_iter().map(|(name, map)| Profile::new(name, map)).collect::<Result<_, _>>()?;
    if json {
        profiles.iter_mut().for_each(|profile| profile.text = None);
        text::json(&Output { version: 1, profiles })?;
    } else if profiles.is_empty() {
        text::note(
            "there is no profile yet, or none without an error; proxyctl profile import FILE makes one, proxyctl doctor NAME \
             tells an error",
        );
    } else {
        let row = |profile: Profile| {
            let autoconnect = if profile.autoconnect { "yes" } else { "no" }.to_owned();
            vec![profile.name, profile.backend, autoconnect, profile.origin, profile.upstream]
        };
        let rows: Vec<_> = profiles.into_iter().map(row).collect();
        text::out(&text::table(&["NAME", "BACKEND", "AUTOCONNECT", "ORIGIN", "UPSTREAM"], &rows))?;
    }
    Ok(Exit::Ok)
}

async fn show(name: &str, json: bool) -> Outcome {
    #[derive(Serialize)]
    struct Output {
        version: u32,
        profile: Profile,
    }
    let bus = Bus::open().await?;
    let Some((name, map)) = bus.profiles().await?.into_iter().find(|(known, _)| known == name) else {
        return Err(Failure::new(Exit::Failure, format!("there is no profile \"{name}\""))
            .advise("proxyctl profile list shows those that exist."));
    };
    let profile = Profile::new(name, map)?;
    if json {
        text::json(&Output { version: 1, profile })?;
    } else {
        let toml = profile.text.unwrap_or_default();
        text::out(&format!("{}\n", text::lines(toml.trim_end())))?;
    }
    Ok(Exit::Ok)
}

async fn import(file: &Path, name: Option<&str>, replace: bool) -> Outcome {
    let stdin = file == Path::new("-");
    let name = match name {
        Some(name) => name.to_owned(),
        None if stdin => return Err(Failure::new(Exit::Usage, "a profile from standard input needs a --name")),
        None => file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default(),
    };
    let fail = |error: io::Error| Failure::new(Exit::Failure, format!("cannot read {}: {error}", file.display()));
    let mut content = Vec::new();
    let reader: Box<dyn io::Read> =
        if stdin { Box::new(io::stdin().lock()) } else { Box::new(File::open(file).map_err(fail)?) };
    reader.take(LIMIT + 1).read_to_end(&mut content).map_err(fail)?;
    if content.len() as u64 > LIMIT {
        return Err(Failure::new(Exit::Failure, format!("{} is longer than 1 MiB: not a profile", file.display())));
    }
    if torvm::import::is_json(&content) {
        let fail = |cause| Failure::new(Exit::Failure, format!("{}: {cause}", file.display()));
        let converted = torvm::import::convert(&content, &name).map_err(fail)?;
        text::out(&text::lines(&converted.text))?;
        for note in converted.notes {
            text::note(&format!("proxyctl: note: {}", text::line(&note)));
        }
        content = converted.text.into_bytes();
    }
    // The daemon reads a copy in memory, so that no slow file can hold it up.
    let fd = sealed(&content).map_err(fail)?;
    let bus = Bus::open().await?;
    let options = HashMap::from([(key::NAME, Variant::from(name.clone())), (key::REPLACE, Variant::from(replace))]);
    let agent = Agent::start();
    bounded(AUTHENTICATED, bus.manager.import_profile(Fd::from(fd), options)).await?;
    drop(agent);
    text::out(&format!("imported {}\n", text::line(&name)))?;
    Ok(Exit::Ok)
}

async fn remove(names: &[String]) -> Outcome {
    let bus = Bus::open().await?;
    let _agent = Agent::start();
    for name in names {
        bounded(AUTHENTICATED, bus.manager.remove_profile(name)).await?;
        text::out(&format!("removed {}\n", text::line(name)))?;
    }
    Ok(Exit::Ok)
}
