// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Packs a linked `vmlinux` into the image that VMMs load: what the kernel needs in memory, and nothing else.
//!
//! The linker aligns segments, and the text for the system call entry, to 2 MiB and fills the gaps. In the image each
//! run of filler pages is left out: a VMM neither reads nor touches it, so it costs no guest memory. Pages are at
//! offsets that are multiples of the page size, so an image can also be mapped. Symbols and sections are gone.
//!
//! The format is ELF-64, System V gABI chapters 4 and 5.

use anyhow::{Context as _, Result, ensure};

const PAGE: usize = 4096;
/// Shorter runs of filler stay in the image: a segment for each would cost more than it saves.
const MIN_FILLER: usize = 8 * PAGE;
/// What the kernel's linker script puts between functions, `int3`.
const TEXT_FILLER: u8 = 0xcc;

const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// A program header, without the fields that the image does not keep.
#[derive(Clone, Copy)]
struct Segment {
    kind: u32,
    flags: u32,
    offset: usize,
    virtual_address: u64,
    physical_address: u64,
    file_size: usize,
    memory_size: u64,
}

/// Returns the image for a linked kernel.
///
/// # Errors
/// Bytes that are not an ELF-64 executable with page-aligned segments, or are cut short.
pub(crate) fn pack(linked: &[u8]) -> Result<Vec<u8>> {
    ensure!(
        linked.starts_with(b"\x7fELF\x02\x01\x01"),
        "not a little-endian ELF-64 file"
    );
    let mut pieces = Vec::new();
    for segment in segments(linked)? {
        match segment.kind {
            PT_LOAD => split(linked, segment, &mut pieces)?,
            PT_NOTE => pieces.push(segment),
            _ => {}
        }
    }
    write(linked, &pieces)
}

/// Reads the program headers.
fn segments(linked: &[u8]) -> Result<Vec<Segment>> {
    let table = size(linked, 32)?;
    let count = usize::from(u16::from_le_bytes(array(linked, 56)?));
    let segment = |index: usize| {
        let at = index * PROGRAM_HEADER_SIZE + table;
        Ok(Segment {
            kind: u32::from_le_bytes(array(linked, at)?),
            flags: u32::from_le_bytes(array(linked, at + 4)?),
            offset: size(linked, at + 8)?,
            virtual_address: u64::from_le_bytes(array(linked, at + 16)?),
            physical_address: u64::from_le_bytes(array(linked, at + 24)?),
            file_size: size(linked, at + 32)?,
            memory_size: u64::from_le_bytes(array(linked, at + 40)?),
        })
    };
    (0..count).map(segment).collect()
}

/// Cuts a segment at its runs of filler; each piece's memory reaches over the filler that follows it.
fn split(linked: &[u8], segment: Segment, pieces: &mut Vec<Segment>) -> Result<()> {
    ensure!(
        segment.physical_address.is_multiple_of(PAGE as u64),
        "a segment does not start on a page"
    );
    let bss = segment
        .memory_size
        .checked_sub(segment.file_size as u64)
        .context("a segment that memory cannot hold")?;
    let content = bytes(linked, segment.offset, segment.file_size)?;
    let is_filler: Vec<bool> = content.chunks(PAGE).map(filler).collect();
    let mut at = 0;
    for run in is_filler.chunk_by(|a, b| a == b) {
        let length = (run.len() * PAGE).min(segment.file_size - at);
        let left_out = run.first() == Some(&true) && length >= MIN_FILLER && at > 0;
        match pieces.last_mut() {
            // The run follows a piece of the same segment: either its memory grows, or it does as a whole.
            Some(piece) if at > 0 && (left_out || piece.file_size as u64 == piece.memory_size) => {
                piece.memory_size += length as u64;
                if !left_out {
                    piece.file_size += length;
                }
            }
            _ => pieces.push(Segment {
                offset: segment.offset + at,
                virtual_address: segment.virtual_address + at as u64,
                physical_address: segment.physical_address + at as u64,
                file_size: length,
                memory_size: length as u64,
                ..segment
            }),
        }
        at += length;
    }
    // What the segment has in memory only.
    pieces.last_mut().context("an empty segment")?.memory_size += bss;
    Ok(())
}

/// Whether a page holds one byte only, which is zero or the text filler.
fn filler(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0) || page.iter().all(|byte| *byte == TEXT_FILLER)
}

/// Lays out header, program headers and pieces.
fn write(linked: &[u8], pieces: &[Segment]) -> Result<Vec<u8>> {
    let mut image = bytes(linked, 0, HEADER_SIZE)?.to_vec();
    let mut patch = |at: usize, value: &[u8]| {
        image
            .splice(at..at + value.len(), value.iter().copied())
            .count()
    };
    patch(32, &(HEADER_SIZE as u64).to_le_bytes());
    patch(40, &0_u64.to_le_bytes());
    patch(56, &u16::try_from(pieces.len())?.to_le_bytes());
    // No section headers: their count and the index of their names.
    patch(60, &[0; 4]);

    let mut contents = Vec::new();
    let first = (HEADER_SIZE + pieces.len() * PROGRAM_HEADER_SIZE).next_multiple_of(PAGE);
    for piece in pieces {
        let offset = first + contents.len();
        let align = if piece.kind == PT_LOAD { PAGE } else { 4 };
        image.extend(piece.kind.to_le_bytes());
        image.extend(piece.flags.to_le_bytes());
        let fields = [
            offset as u64,
            piece.virtual_address,
            piece.physical_address,
            piece.file_size as u64,
            piece.memory_size,
            align as u64,
        ];
        fields
            .iter()
            .for_each(|field| image.extend(field.to_le_bytes()));
        contents.extend(bytes(linked, piece.offset, piece.file_size)?);
        contents.resize(contents.len().next_multiple_of(PAGE), 0);
    }
    image.resize(first, 0);
    image.extend(contents);
    Ok(image)
}

fn bytes(linked: &[u8], at: usize, length: usize) -> Result<&[u8]> {
    linked
        .get(at..)
        .and_then(|rest| rest.get(..length))
        .context("the ELF file is cut short")
}

fn array<const N: usize>(linked: &[u8], at: usize) -> Result<[u8; N]> {
    Ok(*bytes(linked, at, N)?
        .first_chunk()
        .context("the ELF file is cut short")?)
}

/// A 64-bit field that says where in the file something is, or how long.
fn size(linked: &[u8], at: usize) -> Result<usize> {
    Ok(usize::try_from(u64::from_le_bytes(array(linked, at)?))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x100_0000;

    /// An ELF file with one segment of `content` and `bss` bytes in memory only, and a note.
    fn linked(content: &[u8], bss: u64) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(32, 0);
        file.extend(64_u64.to_le_bytes());
        file.resize(56, 0);
        file.extend(2_u16.to_le_bytes());
        file.resize(64, 0);
        let sizes = (content.len() as u64, content.len() as u64 + bss);
        for (kind, offset, size) in [(PT_LOAD, 0x2000_u64, sizes), (PT_NOTE, 0x2000, (16, 16))] {
            file.extend(kind.to_le_bytes());
            file.extend(5_u32.to_le_bytes());
            for field in [offset, BASE, BASE, size.0, size.1, 0x20_0000] {
                file.extend(field.to_le_bytes());
            }
        }
        file.resize(0x2000, 0);
        file.extend(content);
        file
    }

    /// What a loader puts at `BASE`, in zeroed memory.
    fn load(image: &[u8]) -> Vec<u8> {
        let mut memory = Vec::new();
        for segment in segments(image)
            .unwrap()
            .iter()
            .filter(|segment| segment.kind == PT_LOAD)
        {
            let start = usize::try_from(segment.physical_address - BASE).unwrap();
            memory.resize(start + usize::try_from(segment.memory_size).unwrap(), 0);
            let content = bytes(image, segment.offset, segment.file_size).unwrap();
            memory[start..start + content.len()].copy_from_slice(content);
        }
        memory
    }

    fn sample(filler: u8) -> Vec<u8> {
        [
            vec![1; PAGE + 5],
            vec![filler; 2 * MIN_FILLER - 5],
            vec![2; 3 * PAGE],
            vec![0; MIN_FILLER / 2],
            vec![3; 100],
        ]
        .concat()
    }

    #[test]
    fn zero_filler_is_left_out_and_comes_back_in_memory() {
        let content = sample(0);
        let image = pack(&linked(&content, 10_000)).unwrap();
        assert!(
            image.len() < content.len(),
            "{} of {}",
            image.len(),
            content.len()
        );
        let memory = load(&image);
        assert_eq!(memory[..content.len()], content);
        assert_eq!(memory.len(), content.len() + 10_000);
    }

    #[test]
    fn text_filler_is_left_out_and_reads_as_zero() {
        let content = sample(TEXT_FILLER);
        let memory = load(&pack(&linked(&content, 0)).unwrap());
        let filled = 2 * PAGE..PAGE + 2 * MIN_FILLER;
        assert!(memory[filled.clone()].iter().all(|byte| *byte == 0));
        assert_eq!(memory[filled.end..], content[filled.end..]);
    }

    #[test]
    fn pieces_are_on_pages_and_the_note_is_kept() {
        let content = sample(0);
        let image = pack(&linked(&content, 0)).unwrap();
        let segments = segments(&image).unwrap();
        assert!(segments.iter().all(|segment| segment.offset % PAGE == 0));
        let note = segments
            .iter()
            .find(|segment| segment.kind == PT_NOTE)
            .unwrap();
        assert_eq!(
            bytes(&image, note.offset, note.file_size).unwrap(),
            &content[..16]
        );
    }

    #[test]
    fn file_without_filler_keeps_its_segments() {
        let content = vec![7; 5 * PAGE];
        let image = pack(&linked(&content, 3)).unwrap();
        assert_eq!(segments(&image).unwrap().len(), 2);
        assert_eq!(load(&image), [content, vec![0; 3]].concat());
    }

    #[test]
    fn cut_file_is_an_error() {
        let whole = linked(&sample(0), 0);
        for length in [0, 7, 63, 100, 0x2000, whole.len() - 1] {
            assert!(pack(&whole[..length]).is_err(), "{length}");
        }
    }
}
