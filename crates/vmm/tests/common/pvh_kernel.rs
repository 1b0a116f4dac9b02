// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Small kernels.

/// A PVH kernel of one segment that holds `code`, loaded and entered at 1 MiB in 32-bit protected mode.
pub(crate) fn pvh_kernel(code: &[u8]) -> Vec<u8> {
    let len = code.len() as u64;
    let mut file = Vec::new();
    file.extend([0x7f, b'E', b'L', b'F', 2, 1]);
    file.resize(16, 0);
    file.extend([2, 0, 62, 0]); // executable, x86-64
    file.resize(24, 0);
    file.extend(0x10_0000u64.to_le_bytes()); // entry
    file.extend(64u64.to_le_bytes()); // program headers
    file.resize(54, 0);
    file.extend([56, 0, 2, 0]); // their size and number
    file.resize(64, 0);
    file.extend(program_header(1, [0x1000, 0x10_0000, len, len + 0x100]));
    file.extend(program_header(4, [0x200, 0, 20, 20]));
    file.resize(0x200, 0);
    file.extend(
        [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000]
            .map(u32::to_le_bytes)
            .as_flattened(),
    );
    file.resize(0x1000, 0);
    file.extend(code);
    file
}

/// `fields`: offset, address, bytes in the file, bytes in memory.
fn program_header(kind: u32, fields: [u64; 4]) -> Vec<u8> {
    let [offset, address, file_bytes, memory_bytes] = fields;
    let mut header = u64::from(kind).to_le_bytes().to_vec();
    for field in [offset, 0, address, file_bytes, memory_bytes, 0] {
        header.extend(field.to_le_bytes());
    }
    header
}
