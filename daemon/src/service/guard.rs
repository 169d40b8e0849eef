//! The door of every interface. A wrapper, so that no method or property can be added without passing it, and so that one
//! `GetAll` is one question to polkit. zbus calls the trait below unstable: the lock file holds its version.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;

use async_trait::async_trait;
use zbus::message::{Header, Message};
use zbus::names::{InterfaceName, MemberName};
use zbus::object_server::{DispatchResult, Interface, SignalEmitter};
use zbus::{BoxDBusError, Connection, ObjectServer, OwnedVariant, Variant, fdo};

use crate::authority::{Authority, Need, method_need, property_action};

/// Most bytes of a call's arguments. Texts and passwords travel as descriptors, so nothing is larger; and what waits for a
/// person must not hold memory.
const MAX_BODY: u32 = 64 * 1024;

/// `inner` behind the door.
pub(super) struct Guarded<I> {
    pub(super) inner: I,
    pub(super) authority: Arc<Authority>,
}

impl<I> Guarded<I> {
    /// For the reading of properties. Without a header zbus itself asks: for a signal, or for `GetManagedObjects`, whose
    /// caller was asked about already. The object tree is locked meanwhile, so no person is waited for.
    async fn may_read(&self, header: Option<&Header<'_>>) -> fdo::Result<()> {
        let Some(header) = header else { return Ok(()) };
        self.authority.check_read(header).await.map_err(|error| {
            let text = zbus::DBusError::description(&error).unwrap_or_default().to_owned();
            fdo::Error::AccessDenied(text)
        })
    }
}

fn boxed(error: proxyvpn_dbus::Error) -> BoxDBusError {
    Box::new(error)
}

#[async_trait]
impl<I: Interface> Interface for Guarded<I> {
    fn name() -> InterfaceName<'static> {
        I::name()
    }

    async fn get(
        &self,
        property: &str,
        server: &ObjectServer,
        connection: &Connection,
        header: Option<&Header<'_>>,
        emitter: &SignalEmitter<'_>,
    ) -> Option<Result<OwnedVariant, BoxDBusError>> {
        property_action(I::name().as_str(), property)?;
        if let Err(error) = self.may_read(header).await {
            return Some(Err(Box::new(error)));
        }
        self.inner.get(property, server, connection, header, emitter).await
    }

    async fn get_all(
        &self,
        server: &ObjectServer,
        connection: &Connection,
        header: Option<&Header<'_>>,
        emitter: &SignalEmitter<'_>,
    ) -> fdo::Result<HashMap<String, OwnedVariant>> {
        self.may_read(header).await?;
        let mut values = self.inner.get_all(server, connection, header, emitter).await?;
        values.retain(|property, _| property_action(I::name().as_str(), property).is_some());
        Ok(values)
    }

    /// All properties are read-only. Answered here, because zbus would lock the interface against its other callers.
    fn set<'call>(
        &'call self,
        property: &'call str,
        _: &'call Variant<'_>,
        _: &'call ObjectServer,
        _: &'call Connection,
        _: Option<&'call Header<'_>>,
        _: &'call SignalEmitter<'_>,
    ) -> DispatchResult<'call> {
        match property_action(I::name().as_str(), property) {
            None => DispatchResult::NotFound,
            Some(_) => DispatchResult::Async(Box::pin(async move {
                Err(fdo::Error::PropertyReadOnly(format!("{property} cannot be set")).into())
            })),
        }
    }

    async fn set_mut(
        &mut self,
        _: &str,
        _: &Variant<'_>,
        _: &ObjectServer,
        _: &Connection,
        _: Option<&Header<'_>>,
        _: &SignalEmitter<'_>,
    ) -> Option<Result<(), BoxDBusError>> {
        None
    }

    fn call<'call>(
        &'call self,
        server: &'call ObjectServer,
        connection: &'call Connection,
        message: &'call Message,
        method: MemberName<'call>,
    ) -> DispatchResult<'call> {
        let Some(need) = method_need(I::name().as_str(), method.as_str()) else { return DispatchResult::NotFound };
        DispatchResult::Async(Box::pin(async move {
            let header = message.header();
            if header.primary().body_len() > MAX_BODY {
                let text = format!("the arguments are longer than {} KiB", MAX_BODY / 1024);
                return Err(boxed(proxyvpn_dbus::Error::LimitExceeded(text)));
            }
            match need {
                Need::Action(action) => {
                    self.authority.check(&header, action, &HashMap::new()).await.map_err(boxed)?;
                }
                Need::Arguments => {}
            }
            match self.inner.call(server, connection, message, method) {
                DispatchResult::Async(reply) => reply.await,
                DispatchResult::NotFound | DispatchResult::RequiresMut => {
                    Err(fdo::Error::UnknownMethod("there is no such method".to_owned()).into())
                }
            }
        }))
    }

    fn call_mut<'call>(
        &'call mut self,
        _: &'call ObjectServer,
        _: &'call Connection,
        _: &'call Message,
        _: MemberName<'call>,
    ) -> DispatchResult<'call> {
        DispatchResult::NotFound
    }

    fn introspect_to_writer(&self, writer: &mut dyn Write, level: usize) {
        self.inner.introspect_to_writer(writer, level);
    }
}
