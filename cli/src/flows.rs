//! `flows`.

use proxyvpn_dbus::types::Flow;
use serde::Serialize;

use crate::agent::Agent;
use crate::args::Json;
use crate::bus::{AUTHENTICATED, Bus, bounded};
use crate::exit::{Exit, Outcome};
use crate::text;

/// `flows`.
pub(crate) async fn flows(args: &Json) -> Outcome {
    #[derive(Serialize)]
    struct Output<'a> {
        version: u32,
        flows: &'a [Flow],
    }
    let bus = Bus::open().await?;
    let agent = Agent::start();
    let flows = bounded(AUTHENTICATED, bus.manager.list_flows()).await?;
    drop(agent);
    if args.json {
        text::json(&Output { version: 1, flows: &flows })?;
        return Ok(Exit::Ok);
    }
    let row = |flow: Flow| {
        let age = text::span(flow.age / 1000);
        vec![
            flow.id.to_string(),
            age,
            text::bytes(flow.sent),
            text::bytes(flow.received),
            flow.state,
            flow.source,
            flow.destination,
        ]
    };
    let rows: Vec<_> = flows.into_iter().map(row).collect();
    text::out(&text::table(&["ID", "AGE", "SENT", "RECEIVED", "STATE", "SOURCE", "DESTINATION"], &rows))?;
    Ok(Exit::Ok)
}
