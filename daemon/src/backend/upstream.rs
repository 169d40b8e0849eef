//! From a profile to a connector.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proxyvpn_dbus::ReasonCode;
use proxyvpn_engine::secret::Secret;
use proxyvpn_engine::upstream::{ConnectError, Connector, Credentials, Exhausted, HttpProxy, Upstream};

use crate::config::profile::{PasswordSource, Profile, Scheme, UpstreamSpec};
use crate::config::secret;
use crate::lookup;
use crate::machine::{Failure, Request};
use crate::net::desired::MARK;
use crate::net::sockets;

/// Bound on a look-up of the upstream's name.
pub(super) const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
/// Bound on TCP connect and handshake with the upstream.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Bound on the question whether the upstream is there.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// The way out that `request` asks for. `own` are this machine's addresses.
pub(super) async fn connector(request: &Request, resolvers: &[IpAddr], own: &[IpAddr]) -> Result<Connector, Failure> {
    let spec = &request.profile.upstream;
    let upstream = match spec.scheme {
        Scheme::Direct => Upstream::Direct,
        Scheme::Http => Upstream::HttpConnect(http_proxy(request, resolvers, own).await?),
    };
    let refused = match upstream {
        Upstream::Direct => own.iter().map(|address| (*address).into()).collect(),
        // What goes to this machine never comes into the device. What was its address when it connected may be a server's by now, that
        // only the proxy reaches.
        Upstream::HttpConnect(_) => Vec::new(),
    };
    Ok(Connector { upstream, mark: Some(MARK), timeout: CONNECT_TIMEOUT, refused, only: None })
}

async fn http_proxy(request: &Request, resolvers: &[IpAddr], own: &[IpAddr]) -> Result<HttpProxy, Failure> {
    let spec = &request.profile.upstream;
    let addresses = if spec.addresses.is_empty() {
        lookup::resolve(&spec.host, resolvers, Some(MARK), LOOKUP_TIMEOUT)
            .await
            .map_err(|error| Failure::from_error(ReasonCode::UpstreamUnresolvable, &error))?
    } else {
        spec.addresses.clone()
    };
    let addresses: Vec<_> = addresses.into_iter().map(|address| SocketAddr::new(address, spec.port)).collect();
    for address in &addresses {
        refuse_loop(*address, own, &request.profile).await?;
    }
    let credentials = credentials(request).await?;
    Ok(HttpProxy { name: authority(spec), addresses, credentials, exhausted: Exhausted::default() })
}

/// `host:port` as the user wrote it.
fn authority(spec: &UpstreamSpec) -> String {
    spec.to_string().trim_start_matches("http://").to_owned()
}

async fn credentials(request: &Request) -> Result<Option<Credentials>, Failure> {
    let spec = &request.profile.upstream;
    let Some(username) = spec.username.clone() else { return Ok(None) };
    let password = match (&request.password, &spec.password) {
        (Some(password), _) => password.clone(),
        (None, Some(source)) => stored(source).await?,
        (None, None) => Secret::new(String::new()),
    };
    let credentials = Credentials::new(username, password)
        .map_err(|error| Failure::from_error(ReasonCode::CredentialUnavailable, &error))?;
    Ok(Some(credentials))
}

/// A password from where the profile says.
pub(super) async fn stored(source: &PasswordSource) -> Result<Secret, Failure> {
    let source = source.clone();
    tokio::task::spawn_blocking(move || secret::read(&source))
        .await
        .map_err(|error| Failure::from_error(ReasonCode::CredentialUnavailable, &error))?
        .map_err(|error| Failure::from_error(ReasonCode::CredentialUnavailable, &error))
}

/// A proxy on this very machine sends its own traffic into the tunnel, and so back to itself, unless its user is exempt.
async fn refuse_loop(address: SocketAddr, own: &[IpAddr], profile: &Profile) -> Result<(), Failure> {
    if !address.ip().is_loopback() && !own.contains(&address.ip()) {
        return Ok(());
    }
    let uid = tokio::task::spawn_blocking(move || sockets::listener_uid(address)).await.ok().flatten();
    match uid {
        // Nobody listens, or who does cannot be told: the probe will say more.
        None => Ok(()),
        Some(uid) if profile.bypass_users.contains(&uid) => Ok(()),
        Some(0) => Err(Failure::new(
            ReasonCode::UpstreamLoops,
            format!(
                "The proxy {address} runs on this machine as root, so its own traffic would go into the tunnel and back to it. \
                 Run it as a user of its own and name that user in the profile: [bypass] users = [\"USER\"]"
            ),
        )),
        Some(uid) => Err(Failure::new(
            ReasonCode::UpstreamLoops,
            format!(
                "The proxy {address} runs on this machine as user {uid}, so its own traffic would go into the tunnel and back to \
                 it. Name that user in the profile: [bypass] users = [\"{uid}\"]"
            ),
        )),
    }
}

/// An error of the upstream in the user's words.
pub(super) fn failure(error: &ConnectError) -> Failure {
    let code = match error {
        ConnectError::Unreachable { .. } => ReasonCode::UpstreamUnreachable,
        ConnectError::Silent { .. } => ReasonCode::UpstreamSilent,
        ConnectError::Authentication { .. } => ReasonCode::UpstreamAuthentication,
        ConnectError::Refused { .. }
        | ConnectError::Destination { .. }
        | ConnectError::Forbidden(_)
        | ConnectError::Direct { .. }
        | ConnectError::Name { .. } => ReasonCode::UpstreamRefused,
        ConnectError::Protocol { .. } => ReasonCode::UpstreamProtocol,
        ConnectError::Local { .. } => ReasonCode::NetworkFailed,
    };
    Failure::from_error(code, error)
}
