// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The MP table: CPUs, the IOAPIC and its interrupt lines (Intel MultiProcessor Specification 1.4, chapter 4).
//!
//! It says in a few hundred bytes what ACPI says in tables that the kernel interprets for milliseconds.

use ids::VcpuCount;

use crate::layout;

/// Bytes of the floating pointer, after which the table follows.
const POINTER_BYTES: u32 = 16;
const SPEC_REVISION: u8 = 4;
/// What the in-kernel APICs answer as their version register.
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;
const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_EXTINT: u8 = 3;
const INTERRUPT_NMI: u8 = 1;
/// Polarity and trigger as the bus has them: high and edge for ISA.
const FLAGS_AS_BUS: u8 = 0;
const ALL_LOCAL_APICS: u8 = 0xff;

/// Pointer and table, to be written at [`layout::MP_TABLE`].
#[must_use]
pub fn build(vcpus: VcpuCount) -> Vec<u8> {
    let ioapic_id = vcpus.get();
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count = count.saturating_add(1);
    };
    for id in 0..vcpus.get() {
        let flags = if id == 0 { 0b11 } else { 0b01 }; // enabled; the first is the boot processor
        // Signature and feature flags are for kernels that cannot ask CPUID.
        let mut entry = [0; 20];
        let [_, apic, version, state, ..] = &mut entry;
        (*apic, *version, *state) = (id, APIC_VERSION, flags);
        add(&entry);
    }
    add(&[1, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = layout::IOAPIC.to_le_bytes();
    add(&[2, ioapic_id, APIC_VERSION, 1, a, b, c, d]);
    for line in 0..=layout::LAST_GSI.to_le_bytes()[0] {
        add(&[
            3,
            INTERRUPT_VECTORED,
            FLAGS_AS_BUS,
            0,
            ISA_BUS,
            line,
            ioapic_id,
            line,
        ]);
    }
    add(&[4, INTERRUPT_EXTINT, FLAGS_AS_BUS, 0, ISA_BUS, 0, 0, 0]);
    add(&[
        4,
        INTERRUPT_NMI,
        FLAGS_AS_BUS,
        0,
        ISA_BUS,
        0,
        ALL_LOCAL_APICS,
        1,
    ]);

    let mut bytes = floating_pointer().to_vec();
    bytes.extend_from_slice(&table(&entries, count));
    bytes
}

fn floating_pointer() -> [u8; 16] {
    let table = u32::try_from(layout::MP_TABLE.0)
        .unwrap_or(0)
        .saturating_add(POINTER_BYTES);
    let [a, b, c, d] = table.to_le_bytes();
    let mut pointer = [
        b'_',
        b'M',
        b'P',
        b'_',
        a,
        b,
        c,
        d,
        1,
        SPEC_REVISION,
        0,
        0,
        0,
        0,
        0,
        0,
    ];
    let sum = checksum(&pointer);
    if let Some(byte) = pointer.get_mut(10) {
        *byte = sum;
    }
    pointer
}

fn table(entries: &[u8], count: u16) -> Vec<u8> {
    let mut table = Vec::new();
    let bytes = u16::try_from(entries.len().saturating_add(44)).unwrap_or(u16::MAX);
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&bytes.to_le_bytes());
    table.extend_from_slice(&[SPEC_REVISION, 0]); // the checksum comes last
    table.extend_from_slice(b"COFFER  MICROVM     ");
    table.extend_from_slice(&[0; 6]); // no OEM table
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]); // no extended table
    table.extend_from_slice(entries);
    let sum = checksum(&table);
    if let Some(byte) = table.get_mut(7) {
        *byte = sum;
    }
    table
}

/// The byte that makes all bytes add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn table_is_consistent_for_every_number_of_cpus() {
        for vcpus in 1..=u8::MAX {
            let bytes = build(VcpuCount::new(vcpus).unwrap());
            assert_eq!(&bytes[..4], b"_MP_");
            assert_eq!(sum(&bytes[..16]), 0);
            let table = &bytes[16..];
            assert_eq!(sum(table), 0);
            let length = usize::from(u16::from_le_bytes([table[4], table[5]]));
            assert_eq!(length, table.len());
            let count = usize::from(u16::from_le_bytes([table[34], table[35]]));
            assert_eq!(count, usize::from(vcpus) + 1 + 1 + 24 + 2);
            assert!(layout::MP_TABLE.0 + (bytes.len() as u64) < layout::HIGH_MEMORY);
        }
    }

    #[test]
    fn first_cpu_alone_is_the_boot_processor() {
        let bytes = build(VcpuCount::new(3).unwrap());
        let flags: Vec<u8> = (0..3).map(|cpu| bytes[16 + 44 + cpu * 20 + 3]).collect();
        assert_eq!(flags, [3, 1, 1]);
    }

    #[test]
    fn device_lines_are_edge_triggered_inputs_of_the_ioapic() {
        let bytes = build(VcpuCount::ONE);
        let lines = &bytes[16 + 44 + 20 + 8 + 8..];
        assert_eq!(&lines[23 * 8..24 * 8], &[3, 0, 0, 0, 0, 23, 1, 23]);
    }
}
