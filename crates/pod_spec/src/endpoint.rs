// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Where telemetry goes: an HTTP server that is named by its address, so that nothing is looked up to reach it.

use std::net::SocketAddr;

/// What an endpoint must be.
pub(crate) const EXPECTED: &str =
    "a URL like \"http://127.0.0.1:4318/v1/traces\", with an IP address and a port";

/// The path that OTLP over HTTP has by default (OpenTelemetry Protocol 1.9, "OTLP/HTTP Request").
const DEFAULT_PATH: &str = "/v1/traces";

/// A collector of OpenTelemetry's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it listens.
    pub address: SocketAddr,
    /// What is posted to, from its first slash on.
    pub path: String,
}

impl Endpoint {
    /// The endpoint that a URL names; `None` if it is not `http://ADDRESS:PORT[/PATH]`.
    pub(crate) fn parse(url: &str) -> Option<Self> {
        let rest = url.strip_prefix("http://")?;
        let (address, path) = match rest.find('/') {
            Some(slash) => rest.split_at(slash),
            None => (rest, ""),
        };
        // It stands in a request's first line.
        if !path.bytes().all(|byte| byte.is_ascii_graphic()) {
            return None;
        }
        Some(Self {
            address: address.parse().ok()?,
            path: match path {
                "" | "/" => DEFAULT_PATH.to_owned(),
                path => path.to_owned(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_is_address_and_path() {
        let parsed = |url| Endpoint::parse(url).map(|it| (it.address.to_string(), it.path));
        let local = |path: &str| Some(("127.0.0.1:4318".to_owned(), path.to_owned()));
        assert_eq!(parsed("http://127.0.0.1:4318"), local("/v1/traces"));
        assert_eq!(parsed("http://127.0.0.1:4318/"), local("/v1/traces"));
        assert_eq!(parsed("http://127.0.0.1:4318/a/b"), local("/a/b"));
        assert_eq!(
            parsed("http://[::1]:1/x"),
            Some(("[::1]:1".to_owned(), "/x".to_owned()))
        );
        for url in [
            "127.0.0.1:4318",
            "https://127.0.0.1:4318",
            "http://collector:4318",
            "http://127.0.0.1",
            "http://127.0.0.1:4318/a b",
            "http://127.0.0.1:4318/a\r\nb",
        ] {
            assert_eq!(parsed(url), None, "{url}");
        }
    }
}
