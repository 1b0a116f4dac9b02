// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What containerd says to `start` and `-info` on standard input, and the reply in the form of the question.
//!
//! | containerd | standard input | reply |
//! |---|---|---|
//! | 1.6 to 2.2 | `google.protobuf.Any` of runtime options, or nothing | the address as text |
//! | 2.3 and later | `BootstrapParams` | `BootstrapResult` |
//!
//! The two messages are alike on the wire (fields 1 and 2 are length-delimited in both), so a message is
//! `BootstrapParams` only if it names the very id and namespace of the command line. Pure.

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use protobuf::rt::WireType;
use protobuf::{CodedInputStream, Message};

/// The most that containerd may say, in bytes: its options are a path or a small config file.
pub(crate) const MAX_INPUT_BYTES: u64 = 1 << 20;

/// The version of the Task API that a reply of its own form announces: v3, with which containerd asks once per pod.
const TASK_API_VERSION: i32 = 3;

/// The log levels of `BootstrapParams` at and below which debug lines are wanted (`LOG_LEVEL_DEBUG`).
const LOG_LEVEL_DEBUG: i32 = -4;

/// What containerd wants from `start`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Request {
    /// containerd up to 2.2.
    Legacy {
        /// The runtime options of the runtime's entry in containerd's config.
        options: Option<Any>,
    },
    /// containerd from 2.3.
    Bootstrap(Box<BootstrapParams>),
}

/// Standard input that is neither.
#[derive(Debug, thiserror::Error)]
#[error("standard input is neither runtime options nor bootstrap parameters: is this containerd?")]
pub(crate) struct NotARequest(#[source] protobuf::Error);

/// A runtime option that nobody knows.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OptionsError {
    /// Options of another runtime.
    #[error(
        "runtime options of type {0:?} are another runtime's: use runtimeoptions.v1.Options with ConfigPath, or none"
    )]
    Type(String),
    /// Not what the type says.
    #[error("the runtime options cannot be decoded")]
    Decode(#[source] protobuf::Error),
    /// A path that depends on where one stands, which is in a bundle.
    #[error(
        "ConfigPath {0:?} in the runtime options is not absolute: name the file by its whole path"
    )]
    Relative(String),
    /// A config file in containerd's own config.
    #[error(
        "the runtime options hold a config body: put it into a file and name that as ConfigPath"
    )]
    Body,
}

impl Request {
    /// What `input`, the whole of standard input, asks for, given the command line's id and namespace.
    ///
    /// # Errors
    /// [`NotARequest`] if it is neither message.
    pub(crate) fn decode(input: &[u8], id: &str, namespace: &str) -> Result<Self, NotARequest> {
        if input.is_empty() {
            return Ok(Self::Legacy { options: None });
        }
        if let Ok(params) = BootstrapParams::parse_from_bytes(input)
            && params.instance_id == id
            && params.namespace == namespace
        {
            return Ok(Self::Bootstrap(Box::new(params)));
        }
        let options = Any::parse_from_bytes(input).map_err(NotARequest)?;
        Ok(Self::Legacy {
            options: Some(options),
        })
    }

    /// Whether debug lines are wanted, besides what the command line says.
    pub(crate) fn debug(&self) -> bool {
        match self {
            Self::Legacy { .. } => false,
            Self::Bootstrap(params) => params.log_level.value() <= LOG_LEVEL_DEBUG,
        }
    }

    /// The directory where the shim's socket must be; `None` leaves it to the shim.
    pub(crate) fn socket_dir(&self) -> Option<&str> {
        match self {
            Self::Legacy { .. } => None,
            Self::Bootstrap(params) => params.socket_dir.as_deref().filter(|dir| !dir.is_empty()),
        }
    }

    /// containerd's gRPC address, if it is told here.
    pub(crate) fn grpc_address(&self) -> Option<&str> {
        match self {
            Self::Legacy { .. } => None,
            Self::Bootstrap(params) => {
                Some(params.containerd_grpc_address.as_str()).filter(|text| !text.is_empty())
            }
        }
    }

    /// Where events go, if it is told here.
    pub(crate) fn ttrpc_address(&self) -> Option<&str> {
        match self {
            Self::Legacy { .. } => None,
            Self::Bootstrap(params) => {
                Some(params.containerd_ttrpc_address.as_str()).filter(|text| !text.is_empty())
            }
        }
    }

    /// The config file that the runtime options name.
    ///
    /// # Errors
    /// [`OptionsError`] if there are options that are not Coffer's. Extensions of other types are for others.
    pub(crate) fn config_path(&self) -> Result<Option<String>, OptionsError> {
        match self {
            Self::Legacy { options: None } => Ok(None),
            Self::Legacy { options: Some(any) }
                if any.type_url.is_empty() && any.value.is_empty() =>
            {
                Ok(None)
            }
            Self::Legacy { options: Some(any) } if is_runtime_options(any) => {
                decode_options(&any.value)
            }
            Self::Legacy { options: Some(any) } => Err(OptionsError::Type(any.type_url.clone())),
            Self::Bootstrap(params) => {
                let mut values = params
                    .extensions
                    .iter()
                    .filter_map(|extension| extension.value.as_ref());
                values
                    .find(|any| is_runtime_options(any))
                    .map_or(Ok(None), |any| decode_options(&any.value))
            }
        }
    }

    /// The reply on standard output for a shim that listens at `address`. `max_shim_version` is what containerd's
    /// environment says (`MAX_SHIM_VERSION`): from 3 on it reads JSON and speaks v3; 2.0 to 2.2 still say 2.
    pub(crate) fn reply(
        &self,
        address: &str,
        max_shim_version: Option<&str>,
    ) -> Result<Vec<u8>, protobuf::Error> {
        match self {
            Self::Legacy { .. } => {
                let version = max_shim_version
                    .and_then(|text| text.parse::<u32>().ok())
                    .unwrap_or(2);
                let reply = if version < 3 {
                    address.to_owned()
                } else {
                    serde_json::json!({"version": TASK_API_VERSION, "address": address, "protocol": "ttrpc"}).to_string()
                };
                Ok(reply.into_bytes())
            }
            Self::Bootstrap(_) => {
                let mut result = BootstrapResult::new();
                result.version = TASK_API_VERSION;
                address.clone_into(&mut result.address);
                "ttrpc".clone_into(&mut result.protocol);
                result.write_to_bytes()
            }
        }
    }
}

/// `runtimeoptions.v1.Options`, which containerd up to 1.7 calls `cri.runtimeoptions.v1.Options` in places, with or
/// without a host before the slash.
fn is_runtime_options(any: &Any) -> bool {
    any.type_url.ends_with("runtimeoptions.v1.Options")
}

/// The config path of `runtimeoptions.v1.Options{type_url = 1, config_path = 2, config_body = 3}`.
fn decode_options(bytes: &[u8]) -> Result<Option<String>, OptionsError> {
    let decode = OptionsError::Decode;
    let mut input = CodedInputStream::from_bytes(bytes);
    let mut path = None;
    while let Some(tag) = input.read_raw_tag_or_eof().map_err(decode)? {
        let (field, wire_type) = (tag >> 3, WireType::new(tag & 7));
        match (field, wire_type) {
            (2, Some(WireType::LengthDelimited)) => {
                path = Some(input.read_string().map_err(decode)?)
            }
            (3, Some(WireType::LengthDelimited)) => {
                if !input.read_bytes().map_err(decode)?.is_empty() {
                    return Err(OptionsError::Body);
                }
            }
            (_, Some(wire_type)) => input.skip_field(wire_type).map_err(decode)?,
            (_, None) => {
                return Err(decode(protobuf::Error::from(std::io::Error::from(
                    std::io::ErrorKind::InvalidData,
                ))));
            }
        }
    }
    match path.filter(|path| !path.is_empty()) {
        Some(path) if !path.starts_with('/') => Err(OptionsError::Relative(path)),
        path => Ok(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::bootstrap_api::{Extension, LogLevel};

    const ADDRESS: &str = "unix:///run/containerd/s/0f";

    fn options(type_url: &str, path: &str) -> Any {
        let mut value = vec![0x0a, 1, b'x', 0x12, u8::try_from(path.len()).unwrap()];
        value.extend_from_slice(path.as_bytes());
        Any {
            type_url: type_url.to_owned(),
            value,
            ..Any::default()
        }
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "abc".to_owned(),
            namespace: "k8s.io".to_owned(),
            log_level: LogLevel::LOG_LEVEL_DEBUG.into(),
            containerd_ttrpc_address: "/run/containerd/containerd.sock.ttrpc".to_owned(),
            socket_dir: Some("/run/s".to_owned()),
            ..BootstrapParams::default()
        }
    }

    fn decode(message: &impl Message) -> Request {
        Request::decode(&message.write_to_bytes().unwrap(), "abc", "k8s.io").unwrap()
    }

    #[test]
    fn empty_input_is_answered_with_the_address() {
        let request = Request::decode(b"", "abc", "k8s.io").unwrap();
        assert_eq!(request, Request::Legacy { options: None });
        assert_eq!(request.reply(ADDRESS, None).unwrap(), ADDRESS.as_bytes());
        assert_eq!(
            request.reply(ADDRESS, Some("2")).unwrap(),
            ADDRESS.as_bytes()
        );
        assert_eq!(request.config_path().unwrap(), None);
    }

    #[test]
    fn containerd_that_announces_version_3_is_answered_with_json() {
        let request = Request::Legacy { options: None };
        let reply = String::from_utf8(request.reply(ADDRESS, Some("3")).unwrap()).unwrap();
        assert_eq!(
            reply,
            r#"{"address":"unix:///run/containerd/s/0f","protocol":"ttrpc","version":3}"#
        );
    }

    #[test]
    fn options_are_told_from_bootstrap_params() {
        let any = options("runtimeoptions.v1.Options", "/etc/c.toml");
        let request = decode(&any);
        assert_eq!(request, Request::Legacy { options: Some(any) });
        assert_eq!(
            request.config_path().unwrap().as_deref(),
            Some("/etc/c.toml")
        );
        assert_eq!(
            request.reply(ADDRESS, Some("2")).unwrap(),
            ADDRESS.as_bytes()
        );
    }

    #[test]
    fn bootstrap_params_are_answered_with_a_bootstrap_result() {
        let request = decode(&params());
        assert!(request.debug());
        assert_eq!(request.socket_dir(), Some("/run/s"));
        assert_eq!(
            request.ttrpc_address(),
            Some("/run/containerd/containerd.sock.ttrpc")
        );
        let result =
            BootstrapResult::parse_from_bytes(&request.reply(ADDRESS, Some("2")).unwrap()).unwrap();
        assert_eq!(
            (
                result.version,
                result.address.as_str(),
                result.protocol.as_str()
            ),
            (3, ADDRESS, "ttrpc")
        );
    }

    #[test]
    fn bootstrap_params_of_another_container_are_no_bootstrap_params() {
        let bytes = params().write_to_bytes().unwrap();
        let request = Request::decode(&bytes, "other", "k8s.io").unwrap();
        assert!(matches!(request.config_path(), Err(OptionsError::Type(url)) if url == "abc"));
    }

    #[test]
    fn extensions_name_the_config_and_others_are_left_alone() {
        let mut params = params();
        for any in [
            options("containerd.io/other", "/no"),
            options("runtimeoptions.v1.Options", "/yes"),
        ] {
            params.extensions.push(Extension {
                value: Some(any).into(),
                ..Extension::default()
            });
        }
        assert_eq!(
            decode(&params).config_path().unwrap().as_deref(),
            Some("/yes")
        );
    }

    #[test]
    fn options_of_another_runtime_are_refused() {
        let error = decode(&options("containerd.runc.v1.Options", "x"))
            .config_path()
            .unwrap_err();
        assert!(
            error.to_string().contains("containerd.runc.v1.Options"),
            "{error}"
        );
    }

    #[test]
    fn path_that_a_bundle_could_hold_is_refused() {
        let error = decode(&options("runtimeoptions.v1.Options", "c.toml"))
            .config_path()
            .unwrap_err();
        assert!(matches!(error, OptionsError::Relative(path) if path == "c.toml"));
    }

    #[test]
    fn config_in_the_options_themselves_is_refused() {
        let value = vec![0x1a, 1, b'x'];
        let any = Any {
            type_url: "runtimeoptions.v1.Options".to_owned(),
            value,
            ..Any::default()
        };
        assert!(matches!(
            decode(&any).config_path(),
            Err(OptionsError::Body)
        ));
    }

    #[test]
    fn garbage_is_refused() {
        assert!(Request::decode(&[0xff; 16], "abc", "k8s.io").is_err());
    }
}
