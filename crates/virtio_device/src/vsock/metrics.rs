// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the vsock device counts.

use crate::metrics::counters;

counters! {
    /// Counters of the vsock device.
    pub struct VsockMetrics {
        /// Connections that the guest opened.
        opened_by_guest,
        /// Connections that a host process opened.
        opened_by_host,
        /// Connection requests of the guest to a port that is not on the allow-list, or that nobody serves.
        refused,
        /// Connections of either side refused because there are too many.
        refused_full,
        /// Host processes that connected and did not ask for a port in the agreed form, or not in time.
        bad_greetings,
        /// Packets with data to the guest.
        packets_to_guest,
        /// Bytes of data to the guest.
        bytes_to_guest,
        /// Packets with data to the host.
        packets_to_host,
        /// Bytes of data to the host.
        bytes_to_host,
        /// Resets sent to the guest.
        resets_sent,
        /// Resets that the guest did not get because it left too many unread.
        resets_dropped,
        /// Connections that the guest reset or refused.
        aborted_by_guest,
        /// Connections whose host process hung up before the guest answered.
        aborted_by_host,
        /// Connections cut off because the guest did not answer in time.
        timeouts,
        /// Connections cut off because the guest sent what it may not send.
        protocol_violations,
        /// Connections cut off because the guest broke flow control.
        credit_violations,
        /// Packets of the guest to or from an address that is not its own or the host's.
        misaddressed,
        /// Packets of the guest of unknown type or operation, or with too few or too many bytes.
        malformed,
        /// Packets of the guest for a connection that does not exist.
        unknown_connection,
        /// Receive buffers of the guest too small for a packet.
        short_buffers,
    }
}
