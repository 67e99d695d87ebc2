//! Error classes of the wire protocol, and which of them an error gets.

use gipfel_base::ErrorKind;

use crate::schema::Command;

/// The class member of an error answer (QMP wire protocol, error responses).
///
/// Clients are asked to look at the class only where it is not `GenericError`; few commands have
/// such cases, and the schema says which (`@not-found`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Everything without a class of its own.
    GenericError,
    /// The command is unknown, or unknown in this mode.
    CommandNotFound,
    /// A device, object or job named in the command is not there.
    DeviceNotFound,
    /// The device or job is there and not in the state that the command needs.
    DeviceNotActive,
}

impl ErrorClass {
    /// The word on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotFound => "DeviceNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
        }
    }

    /// The class of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::GenericError, Self::CommandNotFound, Self::DeviceNotFound, Self::DeviceNotActive]
            .into_iter()
            .find(|class| class.name() == name)
    }

    /// The class that an error of `kind` has when `command` fails with it.
    pub fn of(kind: ErrorKind, command: Option<&Command>) -> Self {
        match (kind, command) {
            (ErrorKind::NotFound, Some(command)) => command.not_found,
            _ => Self::GenericError,
        }
    }
}
