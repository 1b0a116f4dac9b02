// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Small kernels.

/// A PVH kernel of one segment that holds `code`, loaded and entered at 1 MiB in 32-bit protected mode.
pub fn pvh_kernel(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
    file[16..20].copy_from_slice(&[2, 0, 62, 0]); // executable, x86-64
    file[24..32].copy_from_slice(&0x10_0000u64.to_le_bytes()); // entry
    file[32..40].copy_from_slice(&64u64.to_le_bytes()); // program headers
    file[54..56].copy_from_slice(&56u16.to_le_bytes());
    file[56..58].copy_from_slice(&2u16.to_le_bytes());
    let len = code.len() as u64;
    file[64..120].copy_from_slice(&program_header(1, 0x1000, 0x10_0000, len, len + 0x100));
    file[120..176].copy_from_slice(&program_header(4, 0x200, 0, 20, 20));
    let note = [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000];
    for (to, word) in file[0x200..0x214].chunks_exact_mut(4).zip(note) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(code);
    file
}

fn program_header(kind: u32, offset: u64, address: u64, file: u64, memory: u64) -> [u8; 56] {
    let mut header = [0; 56];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    for (at, value) in [(8, offset), (24, address), (32, file), (40, memory)] {
        header[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    header
}
