// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The parts of an ELF kernel that loading it needs. Pure: bytes in, values out.
//!
//! References: System V ABI, chapter 4 and 5; Xen `public/elfnote.h` for the PVH entry.

use crate::VmmError;

/// Bytes of the file header.
pub const HEADER_BYTES: usize = 64;
/// Bytes of a program header.
pub const PROGRAM_HEADER_BYTES: usize = 56;
/// The most program headers: a kernel has about six.
pub const MAX_PROGRAM_HEADERS: u16 = 64;
/// The most bytes of notes that are searched for the PVH entry.
pub const MAX_NOTE_BYTES: u64 = 4096;

const MAGIC: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1]; // 64-bit, little-endian
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const PF_W: u32 = 2;
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const NOTE_PHYS32_ENTRY: u32 = 18;

/// What the file header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The 64-bit entry.
    pub entry: u64,
    /// Where the program headers are in the file.
    pub table_offset: u64,
    /// How many there are.
    pub table_entries: u16,
}

/// A program header that matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segment {
    /// Bytes to load.
    Load {
        /// Where in the file.
        offset: u64,
        /// Where in guest memory.
        address: u64,
        /// How many bytes come from the file.
        file_bytes: u64,
        /// How many bytes it takes in memory, zeros at the end.
        memory_bytes: u64,
        /// Whether the kernel writes to it as it is; it patches the rest too, but not every page.
        writable: bool,
    },
    /// Notes to search for the PVH entry.
    Note {
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        bytes: u64,
    },
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Reads the file header.
///
/// # Errors
/// [`VmmError::NotAKernel`] if it is not that of an x86-64 program.
pub fn parse_header(bytes: &[u8; HEADER_BYTES]) -> Result<Header, VmmError> {
    let bad = |reason| VmmError::NotAKernel { reason };
    if !bytes.starts_with(&MAGIC) {
        return Err(bad("it is not a little-endian 64-bit ELF file"));
    }
    if u16_at(bytes, 18) != Some(MACHINE_X86_64) {
        return Err(bad("it is not for x86-64"));
    }
    if u16_at(bytes, 54).map(usize::from) != Some(PROGRAM_HEADER_BYTES) {
        return Err(bad("its program headers have the wrong size"));
    }
    let header = || {
        Some(Header {
            entry: u64_at(bytes, 24)?,
            table_offset: u64_at(bytes, 32)?,
            table_entries: u16_at(bytes, 56)?,
        })
    };
    match header() {
        Some(header) if (1..=MAX_PROGRAM_HEADERS).contains(&header.table_entries) => Ok(header),
        _ => Err(bad("it has no program headers, or too many")),
    }
}

/// Reads one program header; `None` if it does not matter for loading.
#[must_use]
pub fn parse_program_header(bytes: &[u8]) -> Option<Segment> {
    let offset = u64_at(bytes, 8)?;
    let file_bytes = u64_at(bytes, 32)?;
    match u32_at(bytes, 0)? {
        PT_LOAD => Some(Segment::Load {
            offset,
            address: u64_at(bytes, 24)?,
            file_bytes,
            memory_bytes: u64_at(bytes, 40)?,
            writable: u32_at(bytes, 4)? & PF_W != 0,
        }),
        PT_NOTE => Some(Segment::Note {
            offset,
            bytes: file_bytes,
        }),
        _ => None,
    }
}

/// Finds the PVH entry in a note segment.
#[must_use]
pub fn find_pvh_entry(mut notes: &[u8]) -> Option<u32> {
    loop {
        let name_bytes = usize::try_from(u32_at(notes, 0)?).ok()?;
        let descriptor_bytes = usize::try_from(u32_at(notes, 4)?).ok()?;
        let kind = u32_at(notes, 8)?;
        let rest = notes.get(12..)?;
        let name = rest.get(..name_bytes)?;
        let rest = rest.get(name_bytes.checked_next_multiple_of(4)?..)?;
        let descriptor = rest.get(..descriptor_bytes)?;
        if kind == NOTE_PHYS32_ENTRY && name == b"Xen\0" {
            // 4 bytes, or 8 of which the upper half is zero.
            return u32_at(descriptor, 0);
        }
        notes = rest.get(descriptor_bytes.checked_next_multiple_of(4)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    use crate::pvh_kernel::pvh_kernel;

    fn note(name: &[u8], descriptor: &[u8], kind: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&u32::try_from(name.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(descriptor.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(&kind.to_le_bytes());
        for part in [name, descriptor] {
            bytes.extend_from_slice(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn small_kernel_parses() {
        let file = pvh_kernel(&[0xf4]);
        let header = parse_header(file.first_chunk().unwrap()).unwrap();
        assert_eq!((header.entry, header.table_entries), (0x10_0000, 2));
        assert_eq!(
            parse_program_header(&file[64..120]),
            Some(Segment::Load {
                offset: 0x1000,
                address: 0x10_0000,
                file_bytes: 1,
                memory_bytes: 0x101,
                writable: false,
            })
        );
        assert_eq!(
            parse_program_header(&file[120..176]),
            Some(Segment::Note {
                offset: 0x200,
                bytes: 20
            })
        );
    }

    #[test]
    fn pvh_entry_is_found_behind_other_notes() {
        let mut notes = note(b"GNU\0", &[1; 20], 3);
        notes.extend(note(b"Linux\0", &[2; 3], 18));
        assert_eq!(find_pvh_entry(&notes), None);
        notes.extend(note(b"Xen\0", &0x100_0000u64.to_le_bytes(), 18));
        assert_eq!(find_pvh_entry(&notes), Some(0x100_0000));
    }

    #[test]
    fn other_files_are_refused_with_a_reason() {
        let mut file = pvh_kernel(&[]);
        let reason = |file: &[u8]| {
            parse_header(file.first_chunk().unwrap())
                .unwrap_err()
                .to_string()
        };
        file[18] = 40;
        assert!(reason(&file).contains("not for x86-64"));
        file[4] = 1;
        assert!(reason(&file).contains("64-bit ELF"));
        let mut file = pvh_kernel(&[]);
        file[56..58].copy_from_slice(&(MAX_PROGRAM_HEADERS + 1).to_le_bytes());
        assert!(reason(&file).contains("too many"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = find_pvh_entry(&bytes);
            let _ = parse_program_header(&bytes);
        }
    }
}
