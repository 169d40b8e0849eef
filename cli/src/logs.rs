//! `logs`.

use futures_util::StreamExt as _;
use proxyvpn_dbus::types::LogRecord;
use serde::Serialize;

use crate::agent::Agent;
use crate::args::Logs;
use crate::bus::{AUTHENTICATED, Bus, bounded, failure, vanished};
use crate::exit::{Exit, Failure, Outcome};
use crate::text;

/// A record as one line.
pub(crate) fn line(record: &LogRecord) -> String {
    let message = text::line(&record.message);
    format!("{} {:<5} {}: {message}\n", text::time(record.time), text::line(&record.level), text::line(&record.target))
}

fn print(record: &LogRecord, json: bool) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Output<'a> {
        version: u32,
        #[serde(flatten)]
        record: &'a LogRecord,
    }
    if json { text::json(&Output { version: 1, record }) } else { text::out(&line(record)) }
}

/// `logs`.
pub(crate) async fn logs(args: &Logs) -> Outcome {
    of(args, None).await
}

/// The log, or the part of it that one `target` wrote. With `--json`: one object, or with `--follow` one a record.
pub(crate) async fn of(args: &Logs, target: Option<&str>) -> Outcome {
    #[derive(Serialize)]
    struct Output<'a> {
        version: u32,
        records: &'a [LogRecord],
    }
    let bus = Bus::open().await?;
    let fail = |error: zbus::Error| failure(error.into());
    // Subscribed before the call: its reply is where the signals go on.
    let mut owner = bus.manager.inner().receive_owner_changed().await.map_err(fail)?;
    let mut entries = bus.manager.receive_log_entry().await.map_err(fail)?;
    let count = args.lines.unwrap_or(if args.follow { 10 } else { 0 });
    let wanted = |record: &LogRecord| target.is_none_or(|target| record.target == target);
    let agent = Agent::start();
    // The daemon counts all records, whoever wrote them.
    let asked = if target.is_some() { 0 } else { count };
    let mut records = bounded(AUTHENTICATED, bus.manager.get_log(asked)).await?;
    records.retain(wanted);
    if target.is_some() && count > 0 {
        let newest = usize::try_from(count).unwrap_or(usize::MAX);
        records.drain(..records.len().saturating_sub(newest));
    }
    drop(agent);
    if !args.follow {
        if args.output.json {
            text::json(&Output { version: 1, records: &records })?;
        } else {
            text::out(&records.iter().map(line).collect::<String>())?;
        }
        return Ok(Exit::Ok);
    }
    for record in &records {
        print(record, args.output.json)?;
    }
    loop {
        tokio::select! {
            entry = entries.next() => {
                let Some(entry) = entry else { return Err(vanished()) };
                let entry = entry.args().map_err(fail)?;
                // One that came between the subscription and the reply is in both.
                if wanted(&entry.record) && !records.contains(&entry.record) {
                    print(&entry.record, args.output.json)?;
                }
            }
            new = owner.next() => {
                if new.flatten().is_none() {
                    return Err(vanished());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line() {
        let record = LogRecord {
            time: 1_000,
            level: "warn".to_owned(),
            target: "net".to_owned(),
            message: "a\nproxyctl: ok\x1b[0m".to_owned(),
        };
        assert_eq!(line(&record), "1970-01-01T00:00:00.001Z warn  net: a\\x0aproxyctl: ok\\x1b[0m\n");
    }
}
