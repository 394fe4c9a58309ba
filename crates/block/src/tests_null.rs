// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks without a medium, faults in layers, disks that are given up.

use std::fs::File;
use std::future::{Future, poll_fn};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use ebbtide_iothread::{Config, Local, ManualClock, run_with};

use crate::fault::{Fault, Point, Rule};
use crate::tests::{Scattered, on_ring};
use crate::{Buffer, Disk, Faults, LocalDisk, NullSpec, Op, OpKind, OwnedBuffer};

const MIB: u64 = 1 << 20;

async fn read(disk: &LocalDisk, byte: u8) -> std::io::Result<u8> {
    let buf = OwnedBuffer::new(vec![byte; 4096]);
    let (result, buf) = disk.submit(Op::Read { offset: 0 }, buf).await;
    result.map(|()| buf.into_bytes()[4095])
}

#[test]
fn reads_zeroes_only_where_that_was_asked_for() {
    let spec = NullSpec {
        size_bytes: MIB + 511,
        ..NullSpec::default()
    };
    let plain = Disk::null_co(&spec).unwrap();
    assert_eq!(plain.size_bytes(), MIB);
    let zeroes = Disk::null_co(&NullSpec {
        read_zeroes: true,
        ..spec
    });
    on_ring(async |local| {
        assert_eq!(read(&plain.attach(&local), 7).await.unwrap(), 7);
        assert_eq!(read(&zeroes.unwrap().attach(&local), 7).await.unwrap(), 0);
    });
}

#[test]
fn a_size_that_cannot_be_is_named() {
    let spec = NullSpec {
        size_bytes: 1 << 63,
        ..NullSpec::default()
    };
    let error = Disk::null_co(&spec).unwrap_err().to_string();
    assert!(error.contains("9223372036854775808"), "{error}");
}

/// Lets all tasks do what they can do now.
async fn settle(local: &Local) {
    for _ in 0..64 {
        local.yield_now().await;
    }
}

#[test]
fn latencies_run_side_by_side() {
    let spec = NullSpec {
        latency: Duration::from_millis(200),
        ..NullSpec::default()
    };
    let disk = Disk::null_co(&spec).unwrap();
    let clock = ManualClock::new();
    let config = Config {
        clock: clock.clock(),
        ..Config::default()
    };
    run_with("test", config, |local| async move {
        let tasks: Vec<_> = (0..128)
            .map(|_| {
                let disk = disk.attach(&local);
                local.spawn(async move { read(&disk, 1).await })
            })
            .collect();
        while disk.in_flight().reads < 128 {
            local.yield_now().await;
        }
        let moment = Duration::from_millis(1);
        clock.advance(spec.latency - moment);
        settle(&local).await;
        assert_eq!(disk.in_flight().reads, 128);
        // All of them in the time of one.
        clock.advance(moment);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(disk.in_flight().total(), 0);
        let attached = disk.attach(&local);
        let flush = local.spawn(async move {
            let flush = attached.submit(Op::Flush, OwnedBuffer::zeroed(0));
            flush.await.0.unwrap();
        });
        settle(&local).await;
        clock.advance(spec.latency - moment);
        settle(&local).await;
        assert!(!flush.is_finished());
        clock.advance(moment);
        flush.await;
    })
    .unwrap();
}

#[test]
fn a_layer_of_faults_is_for_its_users_only() {
    let below = Faults::new();
    let disk = Disk::null(MIB).with_faults(&below).unwrap();
    let above = Faults::new();
    let layered = disk.behind(&above);
    assert_eq!(layered.size_bytes(), MIB);
    on_ring(async |local| {
        let (disk, layered) = (disk.attach(&local), layered.attach(&local));
        above.inject("fault=fail,errno=5,op=read".parse().unwrap());
        assert_eq!(read(&layered, 0).await.unwrap_err().raw_os_error(), Some(5));
        read(&disk, 0).await.unwrap();
        above.clear();
        below.inject(Rule::once(Fault::Fail(28)).only(OpKind::Read));
        assert_eq!(
            read(&layered, 0).await.unwrap_err().raw_os_error(),
            Some(28)
        );
        read(&layered, 0).await.unwrap();
    });
}

/// What a layer fails is an answer to those above it: it takes their time.
#[test]
fn a_failure_comes_through_the_layers_above() {
    for point in [Point::Begun, Point::After] {
        let (below, above) = (Faults::new(), Faults::new());
        let disk = Disk::null(MIB).with_faults(&below).unwrap();
        let layered = disk.behind(&above);
        on_ring(async |local| {
            above.inject(Rule::once(Fault::Hold).at(point));
            below.inject(Rule::once(Fault::Fail(5)));
            let attached = layered.attach(&local);
            let task = local.spawn(async move { read(&attached, 0).await });
            while above.held() == 0 && !task.is_finished() {
                local.sleep(Duration::from_millis(1)).await;
            }
            assert_eq!((above.held(), task.is_finished()), (1, false), "{point:?}");
            above.release_one();
            assert_eq!(task.await.unwrap_err().raw_os_error(), Some(5));
        });
    }
}

#[test]
fn a_disk_given_up_begins_nothing_and_ends_nothing() {
    let faults = Faults::new();
    let disk = Disk::null(MIB).with_faults(&faults).unwrap();
    let second = disk.behind(&Faults::new());
    on_ring(async |local| {
        faults.inject(Rule::once(Fault::Hold));
        let attached = disk.attach(&local);
        let task = local.spawn(async move { read(&attached, 3).await });
        while faults.held() == 0 {
            local.yield_now().await;
        }
        let abandoned = disk.abandon();
        assert!(!abandoned.is_answered());
        assert_eq!(abandoned.in_flight().to_string(), "1 reads");
        for disk in [&disk, &second] {
            let refused = read(&disk.attach(&local), 0).await.unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::NotConnected);
        }
        assert!(!task.is_finished(), "nothing under way is taken back");
        faults.release_one();
        // It had not reached the medium, and does not any more.
        assert_eq!(task.await.unwrap_err().kind(), ErrorKind::NotConnected);
        assert!(abandoned.is_answered());
        assert_eq!(abandoned.in_flight().to_string(), "nothing");
    });
}

/// Polls an operation once, gives its disk up, and waits for its end.
async fn ends_given_up<B: Buffer>(disk: &Disk, local: &Local, op: Op, buf: B) {
    let mut operation = disk.attach(local).submit(op, buf);
    let first = poll_fn(|cx| Poll::Ready(Pin::new(&mut operation).poll(cx).is_pending())).await;
    assert!(first, "it takes time");
    let abandoned = disk.abandon();
    let error = operation.await.0.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotConnected);
    assert!(abandoned.is_answered());
}

/// Of what takes several calls of the kernel the one it has is waited for, and none is made after that.
#[test]
fn a_disk_given_up_goes_on_with_nothing() {
    let bytes = |file: &File| {
        let mut bytes = vec![0; 8 << 20];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let file = tempfile::tempfile().unwrap();
    file.set_len(8 * MIB).unwrap();
    let open = |file: &File| {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        Disk::open(&crate::DiskSpec::new(path)).unwrap()
    };
    on_ring(async |local| {
        let scattered = Scattered::new(vec![7; 4 << 20], 1024);
        ends_given_up(&open(&file), &local, Op::Write { offset: 0 }, scattered).await;
    });
    let written = bytes(&file).iter().filter(|byte| **byte == 7).count();
    assert_eq!(written, 1024 * 1024, "one call");

    // A file system that cannot zero ranges.
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("image", flags).unwrap());
    file.write_all_at(&[0xff; 8 << 20], 0).unwrap();
    on_ring(async |local| {
        let op = Op::WriteZeroes {
            offset: 0,
            len: 8 * MIB,
            may_unmap: false,
        };
        ends_given_up(&open(&file), &local, op, OwnedBuffer::zeroed(0)).await;
    });
    let zeroed = bytes(&file).iter().filter(|byte| **byte == 0).count();
    assert_eq!(zeroed, 1 << 20, "one step");
}

#[test]
fn disks_grow() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(MIB).unwrap();
    let disk = Disk::open(&crate::DiskSpec::new(file.path())).unwrap();
    for wrong in [MIB, MIB - 512, MIB + 1, u64::MAX - 511] {
        let error = disk.grow(wrong).unwrap_err().to_string();
        assert!(error.contains(&wrong.to_string()), "{error}");
    }
    let layered = disk.behind(&Faults::new());
    disk.grow(2 * MIB).unwrap();
    assert_eq!(
        (disk.size_bytes(), layered.size_bytes()),
        (2 * MIB, 2 * MIB)
    );
    assert_eq!(file.as_file().metadata().unwrap().len(), 2 * MIB);
    on_ring(async |local| {
        let buf = OwnedBuffer::new(vec![9; 512]);
        let offset = 2 * MIB - 512;
        let attached = layered.attach(&local);
        attached.submit(Op::Write { offset }, buf).await.0.unwrap();
    });
    drop(disk);
    drop(layered);
    let readonly = Disk::open(&crate::DiskSpec::new(file.path()).readonly()).unwrap();
    assert!(
        readonly
            .grow(4 * MIB)
            .unwrap_err()
            .to_string()
            .contains("read-only")
    );
}
