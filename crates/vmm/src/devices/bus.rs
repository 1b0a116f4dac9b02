// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The windows of all devices, and what happens in those without one.

use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_device::Counter;

use super::transport::{MAGIC, Transport, VERSION, registers};
use crate::layout;

/// All virtio-mmio windows of a VM, empty ones included.
///
/// Caller: vCPU threads for the guest's accesses, the control thread for everything else. A window has a lock of its own,
/// so two vCPUs wait for each other only at one device.
pub struct Bus {
    windows: Vec<Mutex<Option<Transport>>>,
    /// Accesses outside all windows, which are ignored.
    pub stray_accesses: Counter,
}

/// What an access falls on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A register of a device's window.
    Window,
    /// Nothing.
    Nowhere,
}

impl Bus {
    /// `count` empty windows, at most [`layout::MAX_DEVICES`].
    #[must_use]
    pub fn new(count: u16) -> Self {
        let count = count.min(layout::MAX_DEVICES);
        Self {
            windows: (0..count).map(|_| Mutex::new(None)).collect(),
            stray_accesses: Counter::default(),
        }
    }

    /// The window of device `index`, if it exists.
    pub fn window(&self, index: u16) -> Option<MutexGuard<'_, Option<Transport>>> {
        let window = self.windows.get(usize::from(index))?;
        Some(window.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Number of windows.
    #[must_use]
    pub fn len(&self) -> u16 {
        u16::try_from(self.windows.len()).unwrap_or(layout::MAX_DEVICES)
    }

    /// Whether there are no windows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.windows.is_empty()
    }

    /// A read by the guest; what belongs to nobody reads as all ones, as on a PC.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Place {
        let place = layout::device_at(address)
            .and_then(|(index, offset)| Some((self.window(index)?, offset)));
        match place {
            Some((window, offset)) => {
                match &*window {
                    Some(transport) => transport.read(offset, data),
                    None => read_empty(offset, data),
                }
                Place::Window
            }
            None => {
                data.fill(0xff);
                self.stray_accesses.increment();
                Place::Nowhere
            }
        }
    }

    /// A write by the guest; what belongs to nobody is dropped.
    pub fn write(&self, address: u64, data: &[u8]) -> Place {
        let place = layout::device_at(address)
            .and_then(|(index, offset)| Some((self.window(index)?, offset)));
        match place {
            Some((mut window, offset)) => {
                if let Some(transport) = &mut *window {
                    transport.write(offset, data);
                }
                Place::Window
            }
            None => {
                self.stray_accesses.increment();
                Place::Nowhere
            }
        }
    }
}

/// A window without a device: device id 0, which drivers skip (virtio v1.3 §4.2.2.1).
fn read_empty(offset: u64, data: &mut [u8]) {
    data.fill(0);
    if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
        let value = match offset {
            registers::MAGIC_VALUE => MAGIC,
            registers::VERSION => VERSION,
            _ => 0,
        };
        *data = value.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_window_has_magic_version_and_device_id_zero() {
        let bus = Bus::new(1);
        let read = |offset| {
            let mut data = [0xee; 4];
            bus.read(layout::window(0) + offset, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(read(registers::MAGIC_VALUE), 0x7472_6976);
        assert_eq!(read(registers::VERSION), 2);
        assert_eq!(read(registers::DEVICE_ID), 0);
        assert_eq!(
            bus.write(layout::window(0) + registers::STATUS, &[1, 0, 0, 0]),
            Place::Window
        );
        assert_eq!(read(registers::STATUS), 0);
    }

    #[test]
    fn stray_accesses_are_counted_and_read_as_ones() {
        let bus = Bus::new(1);
        let mut data = [0; 8];
        assert_eq!(bus.read(layout::window(1), &mut data), Place::Nowhere);
        assert_eq!(data, [0xff; 8]);
        assert_eq!(bus.write(0xfed0_0000, &[0]), Place::Nowhere);
        assert_eq!(bus.stray_accesses.get(), 2);
    }
}
