//! Is the upstream there, and is it what the profile says?

use std::net::SocketAddr;

use tokio::time::Instant;

use super::error::no_connect;
use super::{ConnectError, Connector, Upstream, connect};

/// The port asked for: the one that proxies allow CONNECT to where they allow few.
const HTTPS: u16 = 443;

impl Connector {
    /// Is the upstream there, does it speak HTTP, does it take the credentials?
    ///
    /// Asks the proxy for a connection to its own address, so neither a third party nor the proxy's resolver is involved. Any
    /// answer will do, since many proxies refuse that destination, but not one that web servers give to CONNECT. Always `Ok`
    /// for [`Upstream::Direct`].
    ///
    /// # Errors
    /// See [`ConnectError`]; [`Refused`](ConnectError::Refused) means that it does not do CONNECT. All but
    /// [`Local`](ConnectError::Local) are about the upstream.
    pub async fn probe(&self) -> Result<(), ConnectError> {
        let Upstream::HttpConnect(proxy) = &self.upstream else { return Ok(()) };
        let deadline = Instant::now() + self.timeout;
        let stream = self.reach(proxy, &proxy.addresses, deadline).await?;
        let peer =
            stream.peer_addr().map_err(|source| ConnectError::Unreachable { upstream: proxy.name.clone(), source })?;
        let target = SocketAddr::new(peer.ip(), HTTPS).to_string();
        let (_stream, answer) = self.ask(proxy, stream, &target, deadline).await?;
        match answer.status {
            400 | 401 | 407 => {}
            status if no_connect(status) => {}
            _ => return Ok(()),
        }
        connect::judge(proxy, target, answer).map(drop)
    }
}
