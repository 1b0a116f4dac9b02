// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The kernel's command line.

use ids::VcpuCount;

use crate::{VmmError, layout};

/// What every guest gets, and why.
const ARGUMENTS: &[&str] = &[
    "console=hvc0",                              // the virtio console
    "quiet",                                     // each line of boot log is an exit
    "reboot=t",       // a triple fault ends the VM at once; nothing else is there to ask
    "panic=-1",       // reboot at once, so that a panic ends the VM too
    "acpi=off",       // no tables: the MP table names the CPUs, the next lines the devices
    "pci=off",        // probing for a bus that is not there costs exits
    "tsc=reliable",   // no watchdog of the clock against another one: there is none
    "no_timer_check", // there is no PIT to check
    "random.trust_cpu=on", // entropy from RDRAND before virtio-rng is up
    "8250.nr_uarts=0", // no probing for UARTs, where the driver is built in
    "i8042.noprobe=1", // nor for a keyboard
    "cryptomgr.notests", // no self tests
    "page_reporting.page_reporting_order=5", // free memory goes back to the host from 128 KiB on, not from 2 MiB
    "memory_hotplug.online_policy=auto-movable", // memory that was plugged can be unplugged: mostly user pages
    "noreplace-smp", // lock prefixes stay: with one vCPU the kernel would patch all of them away
];

/// Shows a panic before the virtio console is there; `quiet` keeps all else off it. Behind the arguments that say how much
/// is shown, for it shows at once what has been said so far, and the virtio console does not show that again.
const EARLY_CONSOLE: &str = "earlyprintk=serial,0x3f8,115200";

/// The command line of a guest with `devices` virtio windows that brings `vcpus` up at boot, with `extra` arguments, and a
/// zero.
///
/// # Errors
/// [`VmmError::Config`] if `extra` makes it too long or holds a character that the kernel would misread.
pub fn build(devices: u16, vcpus: VcpuCount, extra: &str) -> Result<Vec<u8>, VmmError> {
    if let Some(bad) = extra.chars().find(|c| !(' '..='~').contains(c)) {
        return Err(VmmError::Config {
            reason: format!("kernel arguments hold {bad:?}: only printable ASCII is allowed"),
        });
    }
    let mut line = ARGUMENTS.join(" ");
    line.push_str(&format!(" maxcpus={}", vcpus.get()));
    for index in 0..devices {
        let (window, gsi) = (layout::window(index), layout::gsi(index));
        line.push_str(&format!(" virtio_mmio.device=4K@{window:#x}:{gsi}:{index}"));
    }
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    line.push(' ');
    line.push_str(EARLY_CONSOLE);
    line.push('\0');
    if line.len() > layout::MAX_COMMAND_LINE_BYTES {
        return Err(VmmError::Config {
            reason: format!(
                "the kernel's command line would be {} bytes long, at most {} are allowed: use fewer kernel \
                 arguments or disk slots",
                line.len(),
                layout::MAX_COMMAND_LINE_BYTES
            ),
        });
    }
    Ok(line.into_bytes())
}

/// The name under which the guest's kernel knows the device in window `index`.
#[must_use]
pub fn platform_device(index: u16) -> String {
    format!("virtio-mmio.{index}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_window_is_declared_once_with_its_line() {
        let line = String::from_utf8(build(2, VcpuCount::ONE, "debug").unwrap()).unwrap();
        assert!(line.contains(" virtio_mmio.device=4K@0xd0000000:5:0 "));
        assert!(line.contains(" virtio_mmio.device=4K@0xd0001000:6:1 "));
        assert_eq!(line.matches("virtio_mmio.device=").count(), 2);
        assert!(line.contains(" maxcpus=1 ") && line.contains(" debug earlyprintk="));
    }

    #[test]
    fn most_devices_fit_and_a_line_past_the_cap_does_not() {
        let most = build(layout::MAX_DEVICES, VcpuCount::ONE, "")
            .unwrap()
            .len();
        let room = layout::MAX_COMMAND_LINE_BYTES - most - 1;
        assert_eq!(
            build(layout::MAX_DEVICES, VcpuCount::ONE, &"a".repeat(room))
                .unwrap()
                .len(),
            layout::MAX_COMMAND_LINE_BYTES
        );
        assert!(build(layout::MAX_DEVICES, VcpuCount::ONE, &"a".repeat(room + 1)).is_err());
    }

    #[test]
    fn control_characters_are_refused() {
        assert!(build(0, VcpuCount::ONE, "a\0b").is_err());
        assert!(build(0, VcpuCount::ONE, "a\nb").is_err());
    }
}
