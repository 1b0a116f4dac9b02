// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Console structures (virtio v1.3 §5.3).

/// Index of the queue whose buffers the device fills: the driver's input (§5.3.2).
pub const RECEIVE_QUEUE: u16 = 0;
/// Index of the queue whose buffers the device reads: the driver's output (§5.3.2).
pub const TRANSMIT_QUEUE: u16 = 1;
/// Bytes of [`ConsoleConfig`] on the wire (§5.3.4).
pub const CONFIG_BYTES: usize = 12;

/// Feature bits (§5.3.3).
pub mod feature {
    use crate::Features;

    /// `cols` and `rows` are valid.
    pub const SIZE: Features = Features::bit(0);
}

/// Configuration space (§5.3.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsoleConfig {
    /// Width in characters.
    pub cols: u16,
    /// Height in characters.
    pub rows: u16,
}

impl ConsoleConfig {
    /// As a driver reads it; one port, no emergency write.
    #[must_use]
    pub fn to_bytes(self) -> [u8; CONFIG_BYTES] {
        let [c0, c1] = self.cols.to_le_bytes();
        let [r0, r1] = self.rows.to_le_bytes();
        [c0, c1, r0, r1, 1, 0, 0, 0, 0, 0, 0, 0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_is_cols_rows_and_one_port() {
        let bytes = ConsoleConfig {
            cols: 80,
            rows: 0x0102,
        }
        .to_bytes();
        assert_eq!(bytes, [80, 0, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0]);
    }
}
