// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The block device from the driver's side.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ids::{Limit, Rate};
use proptest::prelude::*;
use virtio_testdriver::{Buffer, ChainBuilder, DESC_WRITE, TestDriver, TestMemory};
use virtio_wire::Features;
use virtio_wire::blk::{
    BlkRequest, RequestStatus, RequestType, SectorRange, Unmap, WRITE_FEATURES, feature,
};

use super::*;
use crate::testing::{Space, TestInterrupt, activation, counter, kick, queue_state};
use crate::{
    DeviceError, DeviceState, Event, IoSlices, Limiter, Progress, QueueState, VirtioDevice, Worker,
};

const SECTORS: u64 = 64;
const DISK: u64 = SECTORS * 512;
const ALL: Features = Features::COMMON.union(WRITE_FEATURES);

/// A disk in a temporary file that counts flushes and fails on demand.
struct TestDisk {
    inner: FileDisk,
    fail: AtomicBool,
    flushes: AtomicU64,
    calls: Mutex<Vec<String>>,
}

impl TestDisk {
    fn call(&self, name: String) -> io::Result<()> {
        self.calls.lock().unwrap().push(name);
        if self.fail.load(Ordering::Relaxed) {
            Err(io::Error::from_raw_os_error(5))
        } else {
            Ok(())
        }
    }
}

impl DiskIo for TestDisk {
    fn size(&self) -> io::Result<u64> {
        self.inner.size()
    }
    fn read(&self, to: IoSlices<'_>, offset: u64) -> io::Result<()> {
        self.call(format!("read {offset} {}", to.len()))?;
        self.inner.read(to, offset)
    }
    fn write(&self, from: IoSlices<'_>, offset: u64) -> io::Result<()> {
        self.call(format!("write {offset} {}", from.len()))?;
        self.inner.write(from, offset)
    }
    fn flush(&self) -> io::Result<()> {
        self.call("flush".into())?;
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.inner.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.call(format!("discard {offset} {len}"))?;
        self.inner.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: Unmap) -> io::Result<()> {
        self.call(format!("zero {offset} {len} {unmap:?}"))?;
        self.inner.write_zeroes(offset, len, unmap)
    }
}

struct Rig {
    mem: TestMemory,
    driver: TestDriver,
    file: File,
    disk: Arc<TestDisk>,
    block: Block,
    worker: Box<dyn Worker>,
    interrupt: Arc<TestInterrupt>,
    limiter: Arc<Limiter>,
}

fn options(disk: &Arc<TestDisk>, access: Access) -> BlockOptions {
    BlockOptions {
        disk: Arc::clone(disk) as _,
        access,
        serial: "scratch-0".into(),
        queues: 2,
        limiter: Default::default(),
    }
}

impl Rig {
    fn new(access: Access, features: Features) -> Self {
        let file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..DISK).map(|i| (i / 512 + 1).to_le_bytes()[0]).collect();
        file.write_all_at(&content, 0).unwrap();
        let disk = Arc::new(TestDisk {
            inner: FileDisk::new(file.try_clone().unwrap()),
            fail: AtomicBool::new(false),
            flushes: AtomicU64::new(0),
            calls: Mutex::default(),
        });
        let options = options(&disk, access);
        let limiter = Arc::clone(&options.limiter);
        let mut block = Block::new(options).unwrap();
        let mut mem = TestMemory::new(4 << 20);
        let driver = TestDriver::new(&mut mem, 64);
        let interrupt = Arc::new(TestInterrupt::default());
        let queues = vec![queue_state(&driver), QueueState::default()];
        let workers = block
            .activate(activation(&mem, queues, features, &interrupt))
            .unwrap();
        let [worker] = <[_; 1]>::try_from(workers)
            .ok()
            .expect("one worker for one ready queue");
        Self {
            mem,
            driver,
            file,
            disk,
            block,
            worker,
            interrupt,
            limiter,
        }
    }

    fn header(&mut self, kind: RequestType, sector: u64) -> ChainBuilder {
        ChainBuilder::new().readable(&mut self.mem, &BlkRequest { kind, sector }.to_bytes())
    }

    /// Adds a status byte, runs the request, and gives status, written bytes and the content of its
    /// first writable buffer.
    fn run(&mut self, chain: ChainBuilder) -> (RequestStatus, u32, Vec<u8>) {
        let chain = chain.writable(&mut self.mem, 1);
        let status = chain.buffers().last().unwrap().addr;
        let data = *chain
            .buffers()
            .iter()
            .find(|buffer| buffer.flags & DESC_WRITE != 0)
            .unwrap();
        self.mem.write(status, &[0xee]);
        let head = self.driver.add(&mut self.mem, &chain);
        kick(&mut *self.worker, 0).unwrap();
        let used = self.driver.pop_used().expect("the request is done");
        assert_eq!(used.head, u32::from(head));
        assert_eq!(self.interrupt.take_used(0), 1);
        let served = self.served();
        self.driver.set_used_event(served);
        let status = RequestStatus(self.mem.read(status, 1)[0]);
        (
            status,
            used.written,
            self.mem.read(data.addr, data.len as usize),
        )
    }

    fn served(&mut self) -> u16 {
        self.worker.pause()[0].1.next_used
    }

    fn read(&mut self, sector: u64, len: usize) -> (RequestStatus, u32, Vec<u8>) {
        let chain = self
            .header(RequestType::IN, sector)
            .writable(&mut self.mem, len);
        self.run(chain)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> RequestStatus {
        let chain = self
            .header(RequestType::OUT, sector)
            .readable(&mut self.mem, data);
        self.run(chain).0
    }

    fn ranges(&mut self, kind: RequestType, ranges: &[SectorRange]) -> RequestStatus {
        let bytes: Vec<u8> = ranges.iter().flat_map(|range| range.to_bytes()).collect();
        let chain = self.header(kind, 0).readable(&mut self.mem, &bytes);
        self.run(chain).0
    }

    fn counter(&self, name: &str) -> u64 {
        counter(&VirtioDevice::<Space>::metrics(&self.block), name)
    }

    fn sector(&self, sector: u64) -> [u8; 512] {
        let mut bytes = [0; 512];
        self.file.read_exact_at(&mut bytes, sector * 512).unwrap();
        bytes
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.disk.calls.lock().unwrap())
    }

    fn config(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xee; len];
        VirtioDevice::<Space>::read_config(&self.block, offset, &mut data);
        data
    }
}

fn rw() -> Rig {
    Rig::new(Access::ReadWrite, ALL)
}

#[test]
fn written_sectors_read_back() {
    let mut rig = rw();
    let data: Vec<u8> = (0..1024u32).map(|i| i.to_le_bytes()[0]).collect();
    assert_eq!(rig.write(3, &data), RequestStatus::OK);
    assert_eq!(rig.read(3, 1024), (RequestStatus::OK, 1025, data));
    assert_eq!(rig.sector(5), [6; 512], "the next sector is untouched");
    assert_eq!((rig.counter("reads"), rig.counter("writes")), (1, 1));
    assert_eq!(
        (rig.counter("read_bytes"), rig.counter("written_bytes")),
        (1024, 1024)
    );
}

proptest! {
    /// virtio v1.3 §2.7.4.1: the device makes no assumption on how a request is cut into buffers.
    #[test]
    fn framing_does_not_matter(cuts in prop::collection::vec(1usize..700, 0..6), write in any::<bool>(), sector in 0u64..60) {
        let mut rig = rw();
        let data: Vec<u8> = (0..1536u32).map(|i| i.to_le_bytes()[0] ^ 0x77).collect();
        let kind = if write { RequestType::OUT } else { RequestType::IN };
        let header = BlkRequest { kind, sector }.to_bytes();
        let mut out = header.to_vec();
        if write { out.extend(&data); }
        let mut chain = ChainBuilder::new();
        let mut rest = &out[..];
        for cut in &cuts {
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            if !now.is_empty() { chain = chain.readable(&mut rig.mem, now); }
            rest = later;
        }
        if !rest.is_empty() { chain = chain.readable(&mut rig.mem, rest); }
        let mut pieces: Vec<Buffer> = Vec::new();
        let mut room = if write { 1 } else { 1537 };
        for len in cuts.iter().copied().chain([usize::MAX]) {
            let len = len.min(room);
            if len == 0 { break; }
            chain = chain.writable(&mut rig.mem, len);
            pieces.push(*chain.buffers().last().unwrap());
            room -= len;
        }
        rig.driver.add(&mut rig.mem, &chain);
        kick(&mut *rig.worker, 0).unwrap();
        let written = rig.driver.pop_used().unwrap().written;
        let answer: Vec<u8> = pieces.iter().flat_map(|piece| rig.mem.read(piece.addr, piece.len as usize)).collect();
        prop_assert_eq!(*answer.last().unwrap(), RequestStatus::OK.0);
        prop_assert_eq!(written as usize, answer.len());
        if write {
            let mut back = vec![0; data.len()];
            rig.file.read_exact_at(&mut back, sector * 512).unwrap();
            prop_assert_eq!(back, data);
        } else {
            let expected: Vec<u8> = (0..3u64).flat_map(|i| rig.sector(sector + i)).collect();
            prop_assert_eq!(&answer[..1536], &expected[..]);
        }
    }

    /// Any header, any lengths: a status or a retired device, no byte outside the disk, no growth.
    #[test]
    fn random_request_never_leaves_the_disk(
        kind in prop_oneof![Just(0u32), Just(1), Just(11), Just(13), any::<u32>()],
        sector in prop_oneof![0u64..80, any::<u64>()],
        body in prop::collection::vec(any::<u8>(), 0..1100),
        room in 0usize..1100,
        header_len in prop_oneof![4 => Just(16usize), 1 => 0usize..16],
    ) {
        let mut rig = rw();
        let header = BlkRequest { kind: RequestType(kind), sector }.to_bytes();
        let chain = ChainBuilder::new()
            .readable(&mut rig.mem, &header[..header_len])
            .readable(&mut rig.mem, &body)
            .writable(&mut rig.mem, room);
        rig.driver.add(&mut rig.mem, &chain);
        let _ = kick(&mut *rig.worker, 0);
        prop_assert_eq!(rig.file.metadata().unwrap().len(), DISK);
    }

    #[test]
    fn any_bytes_as_state_are_refused_or_restored(bytes in prop::collection::vec(any::<u8>(), 0..80), version: u16, capacity: u64) {
        let mut rig = rw();
        if let Ok(state) = serde_json::from_slice::<DeviceState>(&bytes) {
            let _ = VirtioDevice::<Space>::restore(&mut rig.block, &state);
        }
        let text = format!(
            r#"{{"Block":{{"version":{version},"capacity":{capacity},"access":"ReadWrite","queues":2,"writeback":false}}}}"#
        );
        let state: DeviceState = serde_json::from_str(&text).unwrap();
        let restored = VirtioDevice::<Space>::restore(&mut rig.block, &state);
        prop_assert_eq!(restored.is_ok(), version == 1 && capacity == SECTORS);
    }
}

#[test]
fn request_at_the_end_is_done_and_one_past_is_refused() {
    let mut rig = rw();
    assert_eq!(rig.read(SECTORS - 1, 512).0, RequestStatus::OK);
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 1024),
    ] {
        assert_eq!(
            rig.read(sector, len).0,
            RequestStatus::IOERR,
            "read {sector}+{len}"
        );
        assert_eq!(
            rig.write(sector, &vec![0xaa; len]),
            RequestStatus::IOERR,
            "write {sector}+{len}"
        );
    }
    assert_eq!(rig.file.metadata().unwrap().len(), DISK);
    assert_eq!(rig.counter("refused"), 8);
}

#[test]
fn part_of_a_sector_is_refused() {
    let mut rig = rw();
    assert_eq!(rig.read(0, 511).0, RequestStatus::IOERR);
    assert_eq!(rig.write(0, &[1; 513]), RequestStatus::IOERR);
    assert_eq!(rig.sector(0), [1; 512]);
}

#[test]
fn read_only_disk_never_changes() {
    // virtio v1.3 §5.2.6.2; the driver "negotiates" everything against the rules.
    let mut rig = Rig::new(Access::ReadOnly, ALL);
    assert_eq!(rig.write(0, &[0xaa; 512]), RequestStatus::IOERR);
    let range = SectorRange {
        sector: 0,
        sectors: 1,
        flags: 0,
    };
    assert_eq!(
        rig.ranges(RequestType::DISCARD, &[range]),
        RequestStatus::UNSUPP
    );
    assert_eq!(
        rig.ranges(RequestType::WRITE_ZEROES, &[range]),
        RequestStatus::UNSUPP
    );
    assert_eq!(rig.sector(0), [1; 512]);
    assert_eq!(rig.calls(), Vec::<String>::new());
    let features = VirtioDevice::<Space>::features(&rig.block);
    assert!(features.contains(feature::RO) && !features.contains(feature::FLUSH));
}

#[test]
fn unknown_request_is_unsupported() {
    let mut rig = rw();
    let chain = rig.header(RequestType(0x55), 0);
    assert_eq!(rig.run(chain).0, RequestStatus::UNSUPP);
    assert_eq!(rig.counter("unsupported"), 1);
}

#[test]
fn feature_not_negotiated_is_unsupported() {
    let mut rig = Rig::new(Access::ReadWrite, Features::COMMON | feature::FLUSH);
    let range = SectorRange {
        sector: 0,
        sectors: 1,
        flags: 0,
    };
    assert_eq!(
        rig.ranges(RequestType::DISCARD, &[range]),
        RequestStatus::UNSUPP
    );
    assert_eq!(
        rig.ranges(RequestType::WRITE_ZEROES, &[range]),
        RequestStatus::UNSUPP
    );
}

#[test]
fn flush_reaches_the_disk() {
    let mut rig = rw();
    let chain = rig.header(RequestType::FLUSH, 0);
    assert_eq!(rig.run(chain).0, RequestStatus::OK);
    assert_eq!(rig.disk.flushes.load(Ordering::Relaxed), 1);
    assert_eq!(rig.counter("flushes"), 1);
}

#[test]
fn write_is_durable_when_done_unless_the_driver_has_a_cache() {
    // virtio v1.3 §5.2.6.2
    let mut no_flush = Rig::new(Access::ReadWrite, Features::COMMON);
    assert_eq!(no_flush.write(0, &[1; 512]), RequestStatus::OK);
    assert_eq!(no_flush.calls(), ["write 0 512", "flush"]);

    let mut cached = rw();
    cached.write(0, &[1; 512]);
    assert_eq!(cached.calls(), ["write 0 512"]);
    VirtioDevice::<Space>::write_config(&mut cached.block, 32, &[0]);
    cached.write(0, &[1; 512]);
    assert_eq!(
        cached.calls(),
        ["write 0 512", "flush"],
        "writeback is switched off while live"
    );
}

#[test]
fn serial_number_is_twenty_bytes() {
    let mut rig = rw();
    let chain = rig
        .header(RequestType::GET_ID, 0)
        .writable(&mut rig.mem, 20);
    assert_eq!(
        rig.run(chain),
        (
            RequestStatus::OK,
            21,
            b"scratch-0\0\0\0\0\0\0\0\0\0\0\0".to_vec()
        )
    );
    let chain = rig
        .header(RequestType::GET_ID, 0)
        .writable(&mut rig.mem, 19);
    assert_eq!(rig.run(chain).0, RequestStatus::IOERR);
}

#[test]
fn discard_gives_ranges_to_the_disk() {
    let mut rig = rw();
    let range = |sector, sectors| SectorRange {
        sector,
        sectors,
        flags: 0,
    };
    assert_eq!(
        rig.ranges(RequestType::DISCARD, &[range(0, 8), range(16, 8)]),
        RequestStatus::OK
    );
    assert_eq!(rig.calls(), ["discard 0 4096", "discard 8192 4096"]);
    assert_eq!(rig.sector(8), [9; 512], "what lies between stays");
    assert_eq!(rig.file.metadata().unwrap().len(), DISK);
    assert_eq!(rig.counter("discards"), 1);
    // §5.2.6.2: unmap has no meaning here.
    let unmap = SectorRange {
        sector: 0,
        sectors: 1,
        flags: 1,
    };
    assert_eq!(
        rig.ranges(RequestType::DISCARD, &[unmap]),
        RequestStatus::UNSUPP
    );
}

#[test]
fn write_zeroes_zeroes_with_and_without_unmap() {
    let mut rig = rw();
    let range = |sector, flags| SectorRange {
        sector,
        sectors: 2,
        flags,
    };
    assert_eq!(
        rig.ranges(RequestType::WRITE_ZEROES, &[range(1, 0), range(9, 1)]),
        RequestStatus::OK
    );
    assert_eq!(
        rig.calls(),
        ["zero 512 1024 Forbidden", "zero 4608 1024 Allowed"]
    );
    for sector in [1, 2, 9, 10] {
        assert_eq!(rig.sector(sector), [0; 512]);
    }
    assert_eq!(
        (rig.sector(0), rig.sector(3), rig.sector(11)),
        ([1; 512], [4; 512], [12; 512])
    );
    assert_eq!(
        rig.ranges(RequestType::WRITE_ZEROES, &[range(1, 2)]),
        RequestStatus::UNSUPP
    );
    assert_eq!(rig.counter("write_zeroes"), 1);
}

#[test]
fn ranges_at_the_caps_are_done_and_past_them_refused() {
    let mut rig = rw();
    let empty = SectorRange {
        sector: 0,
        sectors: 0,
        flags: 0,
    };
    let count = |n: u32| vec![empty; n as usize];
    assert_eq!(
        rig.ranges(RequestType::DISCARD, &count(MAX_RANGES)),
        RequestStatus::OK
    );
    assert_eq!(
        rig.ranges(RequestType::DISCARD, &count(MAX_RANGES + 1)),
        RequestStatus::IOERR
    );
    assert_eq!(rig.ranges(RequestType::DISCARD, &[]), RequestStatus::IOERR);
    let long = SectorRange {
        sector: 0,
        sectors: MAX_WRITE_ZEROES_SECTORS + 1,
        flags: 0,
    };
    assert_eq!(
        rig.ranges(RequestType::WRITE_ZEROES, &[long]),
        RequestStatus::IOERR
    );
    let past_end = SectorRange {
        sector: SECTORS - 1,
        sectors: 2,
        flags: 0,
    };
    assert_eq!(
        rig.ranges(RequestType::WRITE_ZEROES, &[past_end]),
        RequestStatus::IOERR
    );
    let chain = rig
        .header(RequestType::DISCARD, 0)
        .readable(&mut rig.mem, &[0; 15]);
    assert_eq!(rig.run(chain).0, RequestStatus::IOERR);
}

#[test]
fn range_at_the_cap_of_sectors_is_done_and_past_it_refused() {
    let mut rig = rw();
    rig.file.set_len(8 << 20).unwrap();
    rig.block = Block::new(options(&rig.disk, Access::ReadWrite)).unwrap();
    let queues = vec![queue_state(&rig.driver)];
    let activation = activation(&rig.mem, queues, ALL, &rig.interrupt);
    rig.worker = rig.block.activate(activation).unwrap().remove(0);
    let range = |sectors| SectorRange {
        sector: 1,
        sectors,
        flags: 1,
    };
    let at_cap = [range(MAX_WRITE_ZEROES_SECTORS)];
    assert_eq!(
        rig.ranges(RequestType::WRITE_ZEROES, &at_cap),
        RequestStatus::OK
    );
    let past = [range(MAX_WRITE_ZEROES_SECTORS + 1)];
    assert_eq!(
        rig.ranges(RequestType::WRITE_ZEROES, &past),
        RequestStatus::IOERR
    );
}

#[test]
fn zeroes_are_written_where_the_file_system_cannot_make_them() {
    // A memfd knows no FALLOC_FL_ZERO_RANGE.
    let file = nix::sys::memfd::memfd_create("disk", nix::sys::memfd::MFdFlags::empty()).unwrap();
    let file = File::from(file);
    file.write_all_at(&[7; 200_000], 0).unwrap();
    let disk = FileDisk::new(file.try_clone().unwrap());
    disk.write_zeroes(512, 150_000, Unmap::Forbidden).unwrap();
    let mut back = vec![0; 200_000];
    file.read_exact_at(&mut back, 0).unwrap();
    assert!(back[512..150_512].iter().all(|byte| *byte == 0));
    assert!(
        back[..512]
            .iter()
            .chain(&back[150_512..])
            .all(|byte| *byte == 7)
    );
}

#[test]
fn failing_disk_is_an_error_status_and_the_device_lives() {
    let mut rig = rw();
    rig.disk.fail.store(true, Ordering::Relaxed);
    assert_eq!(rig.read(0, 512).0, RequestStatus::IOERR);
    assert_eq!(rig.write(0, &[9; 512]), RequestStatus::IOERR);
    rig.disk.fail.store(false, Ordering::Relaxed);
    assert_eq!(rig.read(0, 512).0, RequestStatus::OK);
    assert_eq!(rig.counter("host_errors"), 2);
}

#[test]
fn disk_cut_short_on_the_host_is_an_error_status() {
    let mut rig = rw();
    rig.file.set_len(1024).unwrap();
    assert_eq!(rig.read(8, 512).0, RequestStatus::IOERR);
    assert_eq!(rig.counter("host_errors"), 1);
}

#[test]
fn request_without_a_status_byte_or_header_retires_the_device() {
    let header = BlkRequest {
        kind: RequestType::IN,
        sector: 0,
    }
    .to_bytes();
    let mut no_status = rw();
    let chain = ChainBuilder::new().readable(&mut no_status.mem, &header);
    no_status.driver.add(&mut no_status.mem, &chain);
    assert!(matches!(
        kick(&mut *no_status.worker, 0),
        Err(DeviceError::Chain { .. })
    ));

    let mut short = rw();
    let chain = ChainBuilder::new()
        .readable(&mut short.mem, &header[..15])
        .writable(&mut short.mem, 1);
    short.driver.add(&mut short.mem, &chain);
    assert!(matches!(
        kick(&mut *short.worker, 0),
        Err(DeviceError::Chain { .. })
    ));
}

#[test]
fn request_that_overlaps_itself_or_the_rings_harms_only_the_guest() {
    let mut rig = rw();
    let rings = rig.driver.rings();
    for addr in [rings.desc_table, rings.avail_ring, rings.used_ring] {
        let addr = addr & !0x1ff;
        let chain = rig
            .header(RequestType::IN, 0)
            .raw(addr, 512, DESC_WRITE)
            .raw(addr, 1, DESC_WRITE);
        rig.driver.add(&mut rig.mem, &chain);
        let _ = kick(&mut *rig.worker, 0);
    }
    assert_eq!(rig.file.metadata().unwrap().len(), DISK);
}

#[test]
fn config_has_capacity_limits_and_zeroes_past_its_end() {
    let rig = rw();
    assert_eq!(rig.config(0, 8), SECTORS.to_le_bytes());
    assert_eq!(rig.config(12, 4), SEG_MAX.to_le_bytes());
    assert_eq!(rig.config(34, 2), 2u16.to_le_bytes());
    assert_eq!(rig.config(59, 3), [0; 3]);
    assert_eq!(rig.config(u64::MAX, 2), [0; 2]);
}

#[test]
fn config_write_changes_writeback_only() {
    let mut rig = rw();
    let before = rig.config(0, 60);
    for (offset, data) in [(0, &[1][..]), (32, &[1, 1]), (33, &[1]), (u64::MAX, &[1])] {
        VirtioDevice::<Space>::write_config(&mut rig.block, offset, data);
    }
    assert_eq!(rig.config(0, 60), before);
    VirtioDevice::<Space>::write_config(&mut rig.block, 32, &[0]);
    assert_eq!(rig.config(32, 1), [0]);
    VirtioDevice::<Space>::reset(&mut rig.block);
    assert_eq!(rig.config(32, 1), [1]);
}

#[test]
fn reset_with_requests_waiting_leaves_them_and_starts_anew() {
    let mut rig = rw();
    let chain = rig
        .header(RequestType::OUT, 0)
        .readable(&mut rig.mem, &[9; 512]);
    let chain = chain.writable(&mut rig.mem, 1);
    rig.driver.add(&mut rig.mem, &chain); // never kicked
    drop(rig.worker.pause());
    VirtioDevice::<Space>::reset(&mut rig.block);
    assert_eq!(rig.sector(0), [1; 512]);
    assert!(rig.driver.pop_used().is_none());

    rig.driver = TestDriver::new(&mut rig.mem, 64);
    let queues = vec![queue_state(&rig.driver)];
    rig.worker = rig
        .block
        .activate(activation(&rig.mem, queues, ALL, &rig.interrupt))
        .unwrap()
        .remove(0);
    assert_eq!(rig.write(0, &[5; 512]), RequestStatus::OK);
}

#[test]
fn restored_device_goes_on_with_the_next_request() {
    let mut rig = rw();
    assert_eq!(rig.write(1, &[8; 512]), RequestStatus::OK);
    VirtioDevice::<Space>::write_config(&mut rig.block, 32, &[0]);
    let waiting = rig.header(RequestType::IN, 1).writable(&mut rig.mem, 512);
    let waiting = waiting.writable(&mut rig.mem, 1);
    rig.driver.add(&mut rig.mem, &waiting);
    let queues = rig
        .worker
        .pause()
        .into_iter()
        .map(|(_, state)| state)
        .collect();
    let saved = serde_json::to_string(&VirtioDevice::<Space>::save(&rig.block)).unwrap();

    let mut block = Block::new(options(&rig.disk, Access::ReadWrite)).unwrap();
    let state: DeviceState = serde_json::from_str(&saved).unwrap();
    VirtioDevice::<Space>::restore(&mut block, &state).unwrap();
    assert_eq!(VirtioDevice::<Space>::save(&block), state);
    let mut workers = block
        .activate(activation(&rig.mem, queues, ALL, &rig.interrupt))
        .unwrap();
    kick(&mut *workers[0], 0).unwrap();
    assert_eq!(rig.driver.pop_used().unwrap().written, 513);
    assert!(rig.driver.pop_used().is_none(), "nothing is done twice");
}

#[test]
fn state_of_another_disk_or_device_is_refused() {
    let rig = rw();
    let saved = VirtioDevice::<Space>::save(&rig.block);
    let mut read_only = Block::new(options(&rig.disk, Access::ReadOnly)).unwrap();
    assert!(VirtioDevice::<Space>::restore(&mut read_only, &saved).is_err());
    rig.file.set_len(DISK * 2).unwrap();
    let mut larger = Block::new(options(&rig.disk, Access::ReadWrite)).unwrap();
    assert!(VirtioDevice::<Space>::restore(&mut larger, &saved).is_err());
    let rng = crate::rng::Rng::new(Arc::new(crate::rng::HostEntropy));
    assert!(
        VirtioDevice::<Space>::restore(&mut larger, &VirtioDevice::<Space>::save(&rng)).is_err()
    );
}

#[test]
fn every_ready_queue_has_its_worker() {
    let mut rig = rw();
    let second = TestDriver::new(&mut rig.mem, 8);
    let queues = vec![queue_state(&rig.driver), queue_state(&second)];
    let workers = rig
        .block
        .activate(activation(&rig.mem, queues, ALL, &rig.interrupt))
        .unwrap();
    let indexes: Vec<&[u16]> = workers.iter().map(|worker| worker.queues()).collect();
    assert_eq!(indexes, [&[0][..], &[1]]);
}

#[test]
fn options_out_of_bounds_are_refused() {
    let rig = rw();
    let make = |serial: &str, queues| {
        Block::new(BlockOptions {
            serial: serial.into(),
            queues,
            ..options(&rig.disk, Access::ReadWrite)
        })
    };
    assert!(make("twenty bytes exactly", 64).is_ok());
    assert!(make("twenty-one bytes here", 1).is_err());
    assert!(make("", 0).is_err());
    assert!(make("", 65).is_err());
}

#[test]
fn requests_over_the_limit_wait_and_cost_what_they_move() {
    let mut rig = Rig::new(Access::ReadWrite, Features::NONE);
    let limit = |bytes| Limit {
        bytes: Rate::new(bytes).map(|rate| rate.with_burst(4096.try_into().unwrap())),
        operations: None,
    };
    rig.limiter.set(limit(1));
    assert_eq!(rig.read(0, 2048).0, RequestStatus::OK);
    assert_eq!(rig.limiter.wait(), None, "half of the burst is left");
    assert_eq!(rig.write(0, &[1; 2560]), RequestStatus::OK);
    assert!(rig.limiter.wait().is_some());
    let chain = rig
        .header(RequestType::IN, 0)
        .writable(&mut rig.mem, 512)
        .writable(&mut rig.mem, 1);
    rig.driver.add(&mut rig.mem, &chain);
    let progress = rig.worker.handle(Event::Queue(0)).unwrap();
    assert!(matches!(progress, Progress::Later(_)), "{progress:?}");
    assert!(rig.driver.pop_used().is_none());
    rig.limiter.set(Limit::default());
    assert_eq!(rig.worker.handle(Event::Queue(0)).unwrap(), Progress::Idle);
    assert!(rig.driver.pop_used().is_some());
}
