// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whole disks on a real ring.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use ebbtide_iothread::{Local, run};

use crate::fault::{Fault, Order, Point, Rule};
use crate::{Buffer, Cache, Discard, Disk, DiskSpec, Faults, LocalDisk, Op, OpKind, OwnedBuffer};

const MIB: u64 = 1 << 20;

fn image(bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

pub(crate) fn on_ring<T>(main: impl AsyncFnOnce(Local) -> T) -> T {
    run("disk-test", |local| async move { main(local).await }).unwrap()
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8)
        .collect()
}

async fn read(disk: &LocalDisk, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let (result, buf) = disk
        .submit(Op::Read { offset }, OwnedBuffer::zeroed(len))
        .await;
    result.map(|()| buf.into_bytes().into_vec())
}

async fn write(disk: &LocalDisk, offset: u64, bytes: Vec<u8>) -> io::Result<()> {
    disk.submit(Op::Write { offset }, OwnedBuffer::new(bytes))
        .await
        .0
}

async fn without_data(disk: &LocalDisk, op: Op) -> io::Result<()> {
    disk.submit(op, OwnedBuffer::zeroed(0)).await.0
}

/// A buffer in many odd pieces.
pub(crate) struct Scattered {
    bytes: Box<[u8]>,
    iovecs: Vec<libc::iovec>,
}

impl Scattered {
    pub(crate) fn new(bytes: Vec<u8>, piece: usize) -> Scattered {
        let mut bytes = bytes.into_boxed_slice();
        let iovecs = bytes
            .chunks_mut(piece)
            .map(|chunk| libc::iovec {
                iov_base: chunk.as_mut_ptr().cast(),
                iov_len: chunk.len(),
            })
            .collect();
        Scattered { bytes, iovecs }
    }
}

// SAFETY: the pieces point into `bytes`, which is on the heap and reached through the value only.
unsafe impl Buffer for Scattered {
    fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }
    fn total_len(&self) -> usize {
        self.bytes.len()
    }
    fn copy_to(&self, offset: usize, to: &mut [u8]) -> io::Result<()> {
        to.copy_from_slice(&self.bytes[offset..offset + to.len()]);
        Ok(())
    }
    fn copy_from(&mut self, offset: usize, from: &[u8]) -> io::Result<()> {
        self.bytes[offset..offset + from.len()].copy_from_slice(from);
        Ok(())
    }
}

#[test]
fn what_is_written_is_read() {
    let file = image(4 * MIB);
    let disk = Disk::open(&DiskSpec::new(file.path())).unwrap();
    on_ring(async |local| {
        let disk = disk.attach(&local);
        let bytes = pattern(3 * 4096, 1);
        write(&disk, 512, bytes.clone()).await.unwrap();
        without_data(&disk, Op::Flush).await.unwrap();
        assert_eq!(read(&disk, 512, bytes.len()).await.unwrap(), bytes);
        assert_eq!(read(&disk, 0, 512).await.unwrap(), vec![0; 512]);
        let mut on_file = vec![0; bytes.len()];
        file.as_file().read_exact_at(&mut on_file, 512).unwrap();
        assert_eq!(on_file, bytes);
    });
}

#[test]
fn more_pieces_than_one_call_takes() {
    let file = image(4 * MIB);
    let disk = Disk::open(&DiskSpec::new(file.path())).unwrap();
    on_ring(async |local| {
        let disk = disk.attach(&local);
        let bytes = pattern(512 * 1024, 2);
        let scattered = Scattered::new(bytes.clone(), 100);
        assert!(scattered.iovecs.len() > 5000);
        disk.submit(Op::Write { offset: 1024 }, scattered)
            .await
            .0
            .unwrap();
        let back = Scattered::new(vec![0; bytes.len()], 77);
        let (result, back) = disk.submit(Op::Read { offset: 1024 }, back).await;
        result.unwrap();
        assert_eq!(back.bytes.as_ref(), bytes);
    });
}

#[test]
fn many_at_once() {
    let file = image(8 * MIB);
    let disk = Disk::open(&DiskSpec::new(file.path())).unwrap();
    on_ring(async |local| {
        let disk = disk.attach(&local);
        let tasks: Vec<_> = (0..500_u64)
            .map(|i| {
                let disk = disk.clone();
                local.spawn(async move { write(&disk, i * 4096, pattern(4096, i as u8)).await })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        for i in 0..500_u64 {
            assert_eq!(
                read(&disk, i * 4096, 4096).await.unwrap(),
                pattern(4096, i as u8)
            );
        }
    });
}

#[test]
fn ranges_outside_the_disk() {
    let file = image(MIB);
    let disk = Disk::open(&DiskSpec::new(file.path())).unwrap();
    on_ring(async |local| {
        let disk = disk.attach(&local);
        assert_eq!(
            read(&disk, MIB - 512, 1024).await.unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
        assert_eq!(
            write(&disk, u64::MAX, vec![0; 512])
                .await
                .unwrap_err()
                .kind(),
            ErrorKind::InvalidInput
        );
        let beyond = Op::WriteZeroes {
            offset: 0,
            len: MIB + 1,
            may_unmap: true,
        };
        assert_eq!(
            without_data(&disk, beyond).await.unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
        let wraps = Op::Discard {
            offset: 512,
            len: u64::MAX,
        };
        assert_eq!(
            without_data(&disk, wraps).await.unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
        assert_eq!(read(&disk, MIB, 0).await.unwrap(), Vec::<u8>::new());
    });
    assert_eq!(file.as_file().metadata().unwrap().len(), MIB);
}

#[test]
fn an_image_that_shrank_is_an_error() {
    let file = image(MIB);
    let disk = Disk::open(&DiskSpec::new(file.path())).unwrap();
    file.as_file().set_len(MIB / 2).unwrap();
    on_ring(async |local| {
        let disk = disk.attach(&local);
        assert_eq!(
            read(&disk, MIB / 2, 512).await.unwrap_err().kind(),
            ErrorKind::UnexpectedEof
        );
        // The first half of this one is there.
        assert_eq!(
            read(&disk, MIB / 2 - 512, 1024).await.unwrap_err().kind(),
            ErrorKind::UnexpectedEof
        );
        assert_eq!(read(&disk, MIB / 2 - 512, 512).await.unwrap(), vec![0; 512]);
    });
}

#[test]
fn readonly_refuses_changes() {
    let file = image(MIB);
    let disk = Disk::open(&DiskSpec::new(file.path()).readonly()).unwrap();
    assert!(disk.readonly());
    assert!(!disk.features().discard && !disk.features().write_zeroes);
    on_ring(async |local| {
        let disk = disk.attach(&local);
        for op in [
            Op::Write { offset: 0 },
            Op::Discard {
                offset: 0,
                len: 512,
            },
            Op::WriteZeroes {
                offset: 0,
                len: 512,
                may_unmap: false,
            },
        ] {
            assert_eq!(
                without_data(&disk, op).await.unwrap_err().kind(),
                ErrorKind::PermissionDenied
            );
        }
        read(&disk, 0, 512).await.unwrap();
        without_data(&disk, Op::Flush).await.unwrap();
    });
}

fn host_bytes(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

#[test]
fn discard_gives_space_back() {
    let file = image(4 * MIB);
    let disk = Disk::open(&DiskSpec::new(file.path())).unwrap();
    assert!(disk.features().discard);
    on_ring(async |local| {
        let disk = disk.attach(&local);
        write(&disk, 0, pattern(2 << 20, 3)).await.unwrap();
        without_data(&disk, Op::Flush).await.unwrap();
        let before = host_bytes(file.as_file());
        assert!(before >= 2 * MIB);
        without_data(
            &disk,
            Op::Discard {
                offset: MIB,
                len: MIB,
            },
        )
        .await
        .unwrap();
        assert!(host_bytes(file.as_file()) <= before - MIB + 64 * 1024);
        assert_eq!(
            read(&disk, 0, 1 << 20).await.unwrap(),
            pattern(2 << 20, 3)[..1 << 20]
        );
    });
    let spec = DiskSpec {
        discard: Discard::Ignore,
        ..DiskSpec::new(file.path())
    };
    drop(disk);
    assert!(!Disk::open(&spec).unwrap().features().discard);
}

#[test]
fn zeroes_with_and_without_giving_space_back() {
    let file = image(4 * MIB);
    let disk = Disk::open(&DiskSpec::new(file.path())).unwrap();
    on_ring(async |local| {
        let disk = disk.attach(&local);
        let bytes = pattern(4 << 20, 4);
        write(&disk, 0, bytes.clone()).await.unwrap();
        without_data(&disk, Op::Flush).await.unwrap();
        let before = host_bytes(file.as_file());
        for (offset, len, may_unmap) in [
            (512, 3 << 20, false),
            (MIB, MIB, true),
            (512, 512, true),
            (0, 0, true),
        ] {
            without_data(
                &disk,
                Op::WriteZeroes {
                    offset,
                    len,
                    may_unmap,
                },
            )
            .await
            .unwrap();
            let zeroed = read(&disk, offset, len as usize).await.unwrap();
            assert!(zeroed.iter().all(|byte| *byte == 0));
            if !may_unmap {
                assert!(
                    host_bytes(file.as_file()) >= before - 64 * 1024,
                    "space must be kept"
                );
            }
        }
        assert_eq!(read(&disk, 0, 512).await.unwrap(), bytes[..512]);
        let end = 512 + (3 << 20);
        assert_eq!(
            read(&disk, end as u64, 512).await.unwrap(),
            bytes[end..end + 512]
        );
    });
}

/// A file system that cannot zero ranges: a memfd is on one.
#[test]
fn zeroes_are_written_where_the_host_cannot() {
    let memfd = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(memfd);
    file.set_len(4 * MIB).unwrap();
    file.write_all_at(&[0xff; 3 << 20], 0).unwrap();
    use std::os::fd::AsRawFd;
    let disk = Disk::open(&DiskSpec::new(format!(
        "/proc/self/fd/{}",
        file.as_raw_fd()
    )))
    .unwrap();
    on_ring(async |local| {
        let disk = disk.attach(&local);
        let op = Op::WriteZeroes {
            offset: 512,
            len: (2 << 20) + 512,
            may_unmap: false,
        };
        without_data(&disk, op).await.unwrap();
        without_data(&disk, op).await.unwrap();
    });
    let mut bytes = vec![0; 3 << 20];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let zeroed = 512..512 + (2 << 20) + 512;
    for (at, byte) in bytes.iter().enumerate() {
        assert_eq!(*byte == 0, zeroed.contains(&at), "byte {at}");
    }
}

#[test]
fn direct_io_takes_memory_of_any_alignment() {
    let file = image(8 * MIB);
    let spec = DiskSpec {
        cache: Cache::None,
        ..DiskSpec::new(file.path())
    };
    let disk = match Disk::open(&spec) {
        Ok(disk) => disk,
        // The rest of this test needs a file system that can; that this is said is all there is to see otherwise.
        Err(error) => {
            return assert!(
                matches!(error, crate::Error::DirectUnsupported { .. }),
                "{error}"
            );
        }
    };
    let block = u64::from(disk.logical_block_bytes());
    on_ring(async |local| {
        let disk = disk.attach(&local);
        let bytes = pattern(3 << 20, 5);
        for piece in [1000, 4096, 1 << 21] {
            let out = Scattered::new(bytes.clone(), piece);
            disk.submit(Op::Write { offset: block }, out)
                .await
                .0
                .unwrap();
            let back = Scattered::new(vec![0; bytes.len()], piece + 3);
            let (result, back) = disk.submit(Op::Read { offset: block }, back).await;
            result.unwrap();
            assert_eq!(back.bytes.as_ref(), bytes);
        }
        let aligned = crate::aligned::AlignedBuffer::new(1 << 20, 4096).unwrap();
        let (result, aligned) = disk.submit(Op::Read { offset: block }, aligned).await;
        result.unwrap();
        assert_eq!(aligned.bytes(), &bytes[..1 << 20]);
        let odd = read(&disk, block / 2, block as usize).await;
        assert_eq!(odd.unwrap_err().kind(), ErrorKind::InvalidInput);
    });
}

#[test]
fn no_space_is_the_guests_error() {
    let file = image(MIB);
    let faults = Faults::new();
    let disk = Disk::open(&DiskSpec::new(file.path()))
        .unwrap()
        .with_faults(&faults)
        .unwrap();
    on_ring(async |local| {
        let disk = disk.attach(&local);
        faults.inject(Rule::once(Fault::Fail(libc::ENOSPC)).only(OpKind::Write));
        let full = write(&disk, 0, vec![1; 512]).await.unwrap_err();
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
        write(&disk, 0, vec![1; 512]).await.unwrap();
    });
}

/// The first half of the transfer succeeds, its continuation finds nothing.
#[test]
fn a_transfer_that_fails_half_way_is_an_error() {
    let file = image(MIB);
    let disk = Disk::open(&DiskSpec::new(file.path())).unwrap();
    file.as_file().set_len(6000).unwrap();
    on_ring(async |local| {
        let disk = disk.attach(&local);
        let scattered = Scattered::new(vec![0xff; 8192], 1000);
        let (result, buf) = disk.submit(Op::Read { offset: 0 }, scattered).await;
        assert_eq!(result.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert!(buf.bytes[..6000].iter().all(|byte| *byte == 0));
        assert!(buf.bytes[6000..].iter().all(|byte| *byte == 0xff));
    });
}

#[test]
fn null_reads_zeroes() {
    let disk = Disk::null(MIB + 100);
    assert_eq!(disk.size_bytes(), MIB);
    on_ring(async |local| {
        let disk = disk.attach(&local);
        write(&disk, 0, vec![1; 10_000]).await.unwrap();
        let (result, buf) = disk
            .submit(Op::Read { offset: 0 }, OwnedBuffer::new(vec![7; 10_000]))
            .await;
        result.unwrap();
        assert!(buf.into_bytes().iter().all(|byte| *byte == 0));
        without_data(&disk, Op::Flush).await.unwrap();
        assert!(read(&disk, MIB, 1).await.is_err());
    });
}

#[test]
fn delays() {
    let faults = Faults::new();
    let disk = Disk::null(MIB).with_faults(&faults).unwrap();
    on_ring(async |local| {
        let disk = disk.attach(&local);
        faults.inject(Rule::once(Fault::Delay(Duration::from_millis(30))));
        let start = Instant::now();
        read(&disk, 0, 512).await.unwrap();
        assert!(start.elapsed() >= Duration::from_millis(30));
    });
}

#[test]
fn held_before_touches_nothing_yet_and_after_has_done_all() {
    let file = image(MIB);
    let faults = Faults::new();
    let disk = Disk::open(&DiskSpec::new(file.path()))
        .unwrap()
        .with_faults(&faults)
        .unwrap();
    on_ring(async |local| {
        let disk = disk.attach(&local);
        let byte_on_file = || {
            let mut byte = [0];
            file.as_file().read_exact_at(&mut byte, 0).unwrap();
            byte[0]
        };
        let cases = [
            (Point::Before, 1, 0),
            (Point::Begun, 2, 1),
            (Point::After, 3, 3),
        ];
        for (point, value, seen_while_held) in cases {
            faults.inject(Rule::once(Fault::Hold).at(point));
            let task = local.spawn({
                let disk = disk.clone();
                async move { write(&disk, 0, vec![value; 512]).await }
            });
            while faults.held() == 0 {
                local.sleep(Duration::from_millis(1)).await;
            }
            assert_eq!(byte_on_file(), seen_while_held);
            assert!(!task.is_finished());
            assert!(faults.release_one());
            task.await.unwrap();
            assert_eq!(byte_on_file(), value);
        }
    });
}

/// What the medium has is carried out; what it has not is not any more.
#[test]
fn giving_up_takes_back_what_the_medium_has_not() {
    let faults = Faults::new();
    let file = image(MIB);
    let disk = Disk::open(&DiskSpec::new(file.path())).unwrap();
    let disk = disk.with_faults(&faults).unwrap();
    on_ring(async |local| {
        let attached = disk.attach(&local);
        let mut tasks = Vec::new();
        for (sector, point) in [(0, Point::Before), (1, Point::Begun)] {
            faults.inject(Rule::once(Fault::Hold).at(point));
            let disk = attached.clone();
            tasks.push(local.spawn(async move { write(&disk, sector * 512, vec![7; 512]).await }));
            local.yield_now().await;
        }
        while faults.held() < 2 {
            local.sleep(Duration::from_millis(1)).await;
        }
        let _ = disk.abandon();
        assert_eq!(faults.release(Order::Arrival), 2);
        let mut ended = Vec::new();
        for task in tasks {
            ended.push(task.await.is_ok());
        }
        assert_eq!(ended, [false, true]);
        let mut bytes = [0; 1024];
        file.as_file().read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!((bytes[0], bytes[512]), (0, 7));
    });
}

async fn answers_in(order: Order, local: &Local) -> Vec<usize> {
    let faults = Faults::new();
    let disk = Disk::null(MIB).with_faults(&faults).unwrap().attach(local);
    faults.inject(Rule::always(Fault::Hold));
    let (answers, mut order_seen) = ebbtide_iothread::channel();
    for i in 0..16 {
        let (disk, answers) = (disk.clone(), answers.clone());
        let task = async move {
            read(&disk, 0, 512).await.unwrap();
            answers.send(i);
        };
        local.spawn(task).detach();
    }
    while faults.held() < 16 {
        local.yield_now().await;
    }
    assert_eq!(faults.release(order), 16);
    let mut seen = Vec::new();
    while seen.len() < 16 {
        seen.extend(order_seen.recv().await);
    }
    seen
}

#[test]
fn answers_come_in_the_order_that_was_ordered() {
    on_ring(async |local| {
        let forward: Vec<_> = (0..16).collect();
        let backward: Vec<_> = (0..16).rev().collect();
        assert_eq!(answers_in(Order::Arrival, &local).await, forward);
        assert_eq!(answers_in(Order::Reverse, &local).await, backward);
        let mut shuffled = answers_in(Order::Shuffled { seed: 3 }, &local).await;
        assert_ne!(shuffled, forward);
        shuffled.sort_unstable();
        assert_eq!(shuffled, forward);
    });
}

#[test]
fn what_is_never_answered_can_be_given_up() {
    let faults = Faults::new();
    let disk = Disk::null(MIB).with_faults(&faults).unwrap();
    on_ring(async |local| {
        let disk = disk.attach(&local);
        faults.inject(Rule::always(Fault::Hold));
        let waited = local
            .timeout(Duration::from_millis(20), read(&disk, 0, 512))
            .await;
        assert!(waited.is_err());
        assert_eq!(faults.held(), 0);
    });
}

#[test]
fn an_attached_disk_gets_no_faults() {
    let disk = Disk::null(MIB);
    on_ring(async |local| {
        let _local = disk.attach(&local);
        assert!(disk.with_faults(&Faults::new()).is_err());
    });
}

#[test]
fn the_lock_lasts_as_long_as_any_user() {
    let file = image(MIB);
    let disk = Disk::open(&DiskSpec::new(file.path())).unwrap();
    on_ring(async |local| {
        let local_disk = disk.attach(&local);
        drop(disk);
        assert!(Disk::open(&DiskSpec::new(file.path())).is_err());
        drop(local_disk);
        Disk::open(&DiskSpec::new(file.path())).unwrap();
    });
}
