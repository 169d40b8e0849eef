//! What is on the bus, held against the tables, the files and the documentation. On a connection without a bus between.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use proxyvpn_dbus::ReasonCode;
use proxyvpn_dbus::names::{MANAGER_PATH, PROFILE_PATH, TORVM_PATH, action};
use proxyvpn_dbus::types::State;
use zbus::connection::Builder;
use zbus::fdo::IntrospectableProxy;
use zbus::{Connection, Guid};

use super::Service;
use crate::authority::{METHODS, PROPERTIES};
use crate::config::store::{Importer, ProfileStore};
use crate::log::Log;
use crate::machine::intent::IntentFile;
use crate::machine::{Machine, Phase};
use crate::test_dir::TestDir;

/// Interfaces that zbus serves itself on every object: what they give away is in docs/dbus.md.
const STANDARD: [&str; 3] =
    ["org.freedesktop.DBus.Peer", "org.freedesktop.DBus.Introspectable", "org.freedesktop.DBus.Properties"];

/// The service with one profile, and a client's end.
async fn pair(profiles: &std::path::Path) -> (Service, Connection) {
    let (server, client) = UnixStream::pair().unwrap();
    let server = Builder::unix_stream(server).server(Guid::generate()).p2p().build();
    let client = Builder::unix_stream(client).p2p().build();
    let (server, client) = tokio::try_join!(server, client).unwrap();
    let (_, handle) = Machine::new(Vec::new(), IntentFile::new(profiles), None);
    let store = Arc::new(ProfileStore::open("/nonexistent", profiles));
    store.import("work", "[upstream]\nurl = \"http://proxy.example:8080\"\n", true, Importer::User).unwrap();
    (Service::register(server, handle, store, Log::new(10)).await.unwrap(), client)
}

async fn introspect(client: &Connection, path: &str) -> String {
    IntrospectableProxy::builder(client)
        .destination("x.y")
        .path(path)
        .build()
        .await
        .unwrap()
        .introspect()
        .await
        .unwrap()
}

/// `<interface name="NAME"> … </interface>` blocks by name; nested nodes have their interfaces deeper.
fn interfaces(xml: &str, indent: usize) -> Vec<(String, String)> {
    let open = format!("\n{:indent$}<interface name=\"", "");
    let close = format!("\n{:indent$}</interface>", "");
    xml.split(&open)
        .skip(1)
        .map(|rest| {
            let (name, _) = rest.split_once('"').unwrap();
            let (body, _) = rest.split_once(&close).unwrap();
            (name.to_owned(), format!("{}{body}{close}", open.trim_start_matches('\n')))
        })
        .collect()
}

/// Attribute `name` of every `<kind …>`.
fn members<'a>(xml: &'a str, kind: &str) -> BTreeSet<&'a str> {
    let open = format!("<{kind} name=\"");
    xml.split(open.as_str()).skip(1).map(|rest| rest.split('"').next().unwrap()).collect()
}

/// Every interface of ours, from the running service.
async fn served() -> Vec<(String, String)> {
    let dir = TestDir::new("service");
    let (_service, client) = pair(&dir.path("")).await;
    let mut all = interfaces(&introspect(&client, MANAGER_PATH).await, 2);
    all.extend(interfaces(&introspect(&client, TORVM_PATH).await, 2));
    all.extend(interfaces(&introspect(&client, &format!("{PROFILE_PATH}/work")).await, 2));
    all.retain(|(name, _)| !STANDARD.contains(&name.as_str()));
    all
}

#[tokio::test]
async fn the_installed_introspection_is_that_of_the_service() {
    let mut xml = String::from(
        "<!DOCTYPE node PUBLIC \"-//freedesktop//DTD D-BUS Object Introspection 1.0//EN\"\n \
         \"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd\">\n\
         <!-- Generated from the running service. To make it anew: PROXYVPN_WRITE_XML=1 cargo test -p proxyvpnd installed_introspection -->\n\
         <node>\n",
    );
    for (name, body) in served().await {
        if name.starts_with("org.proxyvpn1") {
            xml.push_str(&body);
            xml.push('\n');
        }
    }
    xml.push_str("</node>\n");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../dbus/org.proxyvpn1.xml");
    if std::env::var_os("PROXYVPN_WRITE_XML").is_some() {
        std::fs::write(path, &xml).unwrap();
    }
    let installed = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(
        installed, xml,
        "dbus/org.proxyvpn1.xml is not what the service serves; PROXYVPN_WRITE_XML=1 cargo test -p proxyvpnd installed_introspection writes it"
    );
}

#[tokio::test]
async fn every_member_has_an_action_and_no_action_is_without_member() {
    let served = served().await;
    let found = |kind: &str| -> BTreeSet<(&str, &str)> {
        served.iter().flat_map(|(i, xml)| members(xml, kind).into_iter().map(move |m| (i.as_str(), m))).collect()
    };
    let methods: BTreeSet<_> = METHODS.iter().map(|(i, m, _)| (*i, *m)).collect();
    let properties: BTreeSet<_> = PROPERTIES.iter().map(|(i, p, _)| (*i, *p)).collect();
    assert_eq!(found("method"), methods);
    assert_eq!(found("property"), properties);
    assert!(!methods.is_empty() && !properties.is_empty());
}

#[tokio::test]
async fn the_document_names_every_member_action_state_and_code() {
    let document = include_str!("../../../docs/dbus.md");
    let missing = |names: Vec<String>| -> Vec<String> {
        names.into_iter().filter(|name| !document.contains(&format!("`{name}`"))).collect()
    };
    let mut names: Vec<String> = State::ALL.iter().map(|state| state.as_str().to_owned()).collect();
    names.extend(ReasonCode::ALL.iter().map(|code| code.as_str().to_owned()));
    names.extend(Phase::TORVM.iter().map(|phase| phase.as_str().to_owned()));
    names.extend(Phase::PROXY.iter().map(|phase| phase.as_str().to_owned()));
    names.extend(action::ALL.iter().map(|action| (*action).to_owned()));
    let quoted = |line: &str| Some(line.split_once("&str = \"")?.1.split('"').next()?.to_owned());
    names.extend(include_str!("../../../dbus/src/options.rs").lines().filter_map(quoted));
    let variant = |line: &str| Some(line.trim().strip_suffix("(String),")?.to_owned());
    names.extend(include_str!("../../../dbus/src/error.rs").lines().filter_map(variant));
    for (interface, xml) in served().await {
        names.push(interface);
        for kind in ["method", "property", "signal"] {
            names.extend(members(&xml, kind).into_iter().map(str::to_owned));
        }
    }
    let none: Vec<String> = Vec::new();
    assert_eq!(missing(names), none);
}

#[tokio::test]
async fn a_call_without_a_bus_name_is_refused() {
    let dir = TestDir::new("service");
    let (_service, client) = pair(&dir.path("")).await;
    let call = |interface: &'static str, member: &'static str| {
        let client = client.clone();
        async move {
            client.call_method(Some("x.y"), MANAGER_PATH, Some(interface), member, &()).await.unwrap_err().to_string()
        }
    };
    for (interface, method) in [
        ("org.proxyvpn1.Manager", "Reconnect"),
        ("org.proxyvpn1.Manager", "Status"),
        ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects"),
    ] {
        let error = call(interface, method).await;
        assert!(error.contains("NotAuthorized"), "{method}: {error}");
    }
}
