//! Gives a device its DNS server through systemd-resolved, or takes it back, as the daemon does: for scripts/test-resolved.sh.
//!
//! `link-dns DEVICE [SERVER]`

use proxyvpnd::backend::resolved;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let device = arguments.next().ok_or("which device?")?;
    let bus = zbus::Connection::system().await?;
    match arguments.next() {
        Some(server) if !resolved::configure(&bus, &device, server.parse()?).await? => {
            Err("systemd-resolved does not run".into())
        }
        Some(_) => Ok(()),
        None => Ok(resolved::revert(&bus, &device).await?),
    }
}
