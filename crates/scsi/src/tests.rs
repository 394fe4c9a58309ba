// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands against the bytes of the standards.

use crate::*;

const DISK: Geometry = Geometry {
    blocks: 8192,
    block_bytes: 512,
    physical_block_bytes: 4096,
    readonly: false,
    unmap: true,
};

fn unit() -> LogicalUnit {
    let identity = Identity::new().serial("EBB-1").unwrap();
    let unit = LogicalUnit::new(identity.wwn(0x5000_1234_5678_9abc));
    assert_eq!(unit.attention().take(), Some(Condition::PowerOn.sense()));
    unit
}

fn luns() -> Vec<Lun> {
    [0, 5, 256].map(|number| Lun::new(number).unwrap()).to_vec()
}

fn begin(cdb: &[u8]) -> Result<Work, Sense> {
    unit().begin(cdb, &DISK, luns)
}

fn data(cdb: &[u8]) -> Vec<u8> {
    match begin(cdb) {
        Ok(Work::Reply { data, .. }) => data,
        other => panic!("{other:?}"),
    }
}

fn extent(lba: u64, blocks: u64) -> Extent {
    Extent {
        offset: lba * 512,
        len: blocks * 512,
    }
}

#[test]
fn standard_inquiry() {
    let data = data(&[0x12, 0, 0, 0, 255, 0]);
    assert_eq!(data[..8], [0, 0, 6, 0x12, 69, 0, 0, 2]);
    assert_eq!(&data[8..36], b"Ebbtide Disk            1   ");
    assert_eq!(data.len(), 74);
    assert_eq!(self::data(&[0x12, 0, 0, 0, 5, 0]), [0, 0, 6, 0x12, 69]);
    assert_eq!(begin(&[0x12, 0, 1, 0, 36, 0]), Err(Sense::INVALID_FIELD));
}

#[test]
fn vital_product_data() {
    let page = |page| data(&[0x12, 1, page, 1, 0, 0]);
    assert_eq!(page(0), [0, 0, 0, 6, 0, 0x80, 0x83, 0xb0, 0xb1, 0xb2]);
    assert_eq!(page(0x80), *b"\0\x80\0\x05EBB-1");
    let mut names = b"\0\x83\0\x1d\x02\x01\0\x0dEbbtide EBB-1\x01\x03\0\x08".to_vec();
    names.extend(0x5000_1234_5678_9abc_u64.to_be_bytes());
    assert_eq!(page(0x83), names);
    let limits = page(0xb0);
    assert_eq!(limits.len(), 64);
    assert_eq!(limits[..8], [0, 0xb0, 0, 60, 1, 0, 0, 8]);
    let blocks = (1_u32 << 30) / 512;
    assert_eq!(limits[20..24], blocks.to_be_bytes());
    assert_eq!(limits[24..36], [0, 0, 0, 32, 0, 0, 0, 8, 0x80, 0, 0, 0]);
    assert_eq!(limits[36..44], u64::from(blocks).to_be_bytes());
    assert_eq!(page(0xb1)[..6], [0, 0xb1, 0, 60, 0, 1]);
    assert_eq!(page(0xb2), [0, 0xb2, 0, 4, 0, 0xe0, 2, 0]);
    assert_eq!(begin(&[0x12, 1, 0x86, 1, 0, 0]), Err(Sense::INVALID_FIELD));
    let anonymous = LogicalUnit::new(Identity::new());
    let serial = anonymous.begin(&[0x12, 1, 0x80, 1, 0, 0], &DISK, luns);
    assert_eq!(serial, Err(Sense::INVALID_FIELD));
}

#[test]
fn identities_are_checked() {
    let error = Identity::new().serial(&"x".repeat(37)).unwrap_err();
    assert!(error.to_string().contains("serial='xxx"), "{error}");
    assert!(Identity::new().vendor("näm").is_err());
    assert!(Identity::new().revision("12345").is_err());
    assert!(Identity::new().product("a disk of 16 chr").is_ok());
}

#[test]
fn capacities() {
    assert_eq!(
        data(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        [0, 0, 0x1f, 0xff, 0, 0, 2, 0]
    );
    let mut cdb = [0; 16];
    cdb[..2].copy_from_slice(&[0x9e, 0x10]);
    cdb[13] = 32;
    let sixteen = data(&cdb);
    assert_eq!(sixteen.len(), 32);
    assert_eq!(
        sixteen[..16],
        [0, 0, 0, 0, 0, 0, 0x1f, 0xff, 0, 0, 2, 0, 0, 3, 0x80, 0]
    );
    let large = Geometry {
        blocks: 1 << 33,
        ..DISK
    };
    let reply = unit().begin(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &large, luns);
    let Ok(Work::Reply { data, .. }) = reply else {
        panic!("{reply:?}")
    };
    assert_eq!(data[..4], [0xff; 4]);
    cdb[1] = 0x11;
    assert_eq!(begin(&cdb), Err(Sense::INVALID_FIELD));
}

#[test]
fn transfers_of_every_length() {
    let read = |lba, blocks, fua| {
        Ok(Work::Read {
            extent: extent(lba, blocks),
            fua,
        })
    };
    assert_eq!(begin(&[8, 0, 1, 2, 3, 0]), read(0x102, 3, false));
    assert_eq!(begin(&[8, 0, 1, 2, 0, 0]), read(0x102, 256, false));
    assert_eq!(
        begin(&[0x28, 8, 0, 0, 0x10, 0, 0, 0, 9, 0]),
        read(0x1000, 9, true)
    );
    assert_eq!(
        begin(&[0xa8, 0, 0, 0, 0x10, 0, 0, 0, 0, 9, 0, 0]),
        read(0x1000, 9, false)
    );
    let mut cdb = [0x8a, 8, 0, 0, 0, 0, 0, 0, 0x1f, 0xff, 0, 0, 0, 1, 0, 0];
    let last = Ok(Work::Write {
        extent: extent(8191, 1),
        fua: true,
    });
    assert_eq!(begin(&cdb), last);
    cdb[13] = 2;
    assert_eq!(begin(&cdb), Err(Sense::LBA_OUT_OF_RANGE));
    cdb[2..10].fill(0xff);
    assert_eq!(begin(&cdb), Err(Sense::LBA_OUT_OF_RANGE));
    // No blocks behind the end are no blocks; protection and NACA there are none.
    assert_eq!(
        begin(&[0x28, 0, 0, 0, 0x20, 0, 0, 0, 0, 0]),
        read(8192, 0, false)
    );
    for cdb in [
        [0x28, 0x20, 0, 0, 0, 0, 0, 0, 1, 0],
        [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 4],
    ] {
        assert_eq!(begin(&cdb), Err(Sense::INVALID_FIELD));
    }
    assert_eq!(begin(&[0x28, 0, 0]), Err(Sense::INVALID_FIELD));
    assert_eq!(begin(&[]), Err(Sense::INVALID_FIELD));
}

#[test]
fn readonly_disks_are_protected() {
    let readonly = Geometry {
        readonly: true,
        ..DISK
    };
    let mut same = [0; 16];
    (same[0], same[13]) = (0x93, 1);
    let cdbs: [&[u8]; 4] = [
        &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        &[0x0a, 0, 0, 0, 1, 0],
        &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0],
        &same,
    ];
    for cdb in cdbs {
        let refused = unit().begin(cdb, &readonly, luns);
        assert_eq!(refused, Err(Sense::WRITE_PROTECTED));
    }
    let mode = unit().begin(&[0x1a, 8, 8, 0, 255, 0], &readonly, luns);
    assert!(matches!(mode, Ok(Work::Reply { data, .. }) if data[2] == 0x90));
}

#[test]
fn attention_comes_first_and_once() {
    let unit = LogicalUnit::new(Identity::new());
    let ready = [0; 6];
    unit.attention().establish(Condition::CapacityChanged);
    assert!(unit.begin(&[0x12, 0, 0, 0, 36, 0], &DISK, luns).is_ok());
    assert_eq!(
        unit.begin(&ready, &DISK, luns),
        Err(Condition::PowerOn.sense())
    );
    assert_eq!(
        unit.begin(&ready, &DISK, luns),
        Err(Sense::new(Key::UnitAttention, 0x2a, 9))
    );
    assert_eq!(unit.begin(&ready, &DISK, luns), Ok(Work::Done));
    unit.attention().establish(Condition::LunsChanged);
    let report = [0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    assert!(unit.begin(&report, &DISK, luns).is_ok());
    assert_eq!(unit.begin(&ready, &DISK, luns), Ok(Work::Done));
    // REQUEST SENSE tells it instead.
    unit.reset(Condition::UnitReset);
    let Ok(Work::Reply { data, .. }) = unit.begin(&[3, 0, 0, 0, 18, 0], &DISK, luns) else {
        panic!()
    };
    assert_eq!(
        data,
        [0x70, 0, 6, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x29, 3, 0, 0, 0, 0]
    );
    let Ok(Work::Reply { data, .. }) = unit.begin(&[3, 1, 0, 0, 18, 0], &DISK, luns) else {
        panic!()
    };
    assert_eq!(data, [0x72, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn stopped_units_are_not_ready() {
    let unit = unit();
    let begin = |cdb: &[u8]| unit.begin(cdb, &DISK, luns);
    assert_eq!(begin(&[0x1b, 0, 0, 0, 0, 0]), Ok(Work::Flush));
    assert_eq!(begin(&[0; 6]), Err(Sense::STOPPED));
    assert_eq!(
        begin(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0]),
        Err(Sense::STOPPED)
    );
    assert_eq!(begin(&[0xee, 0, 0, 0, 0, 0]), Err(Sense::INVALID_OPCODE));
    assert!(begin(&[0x1a, 0, 8, 0, 255, 0]).is_ok());
    assert_eq!(begin(&[0x1b, 0, 0, 0, 1, 0]), Ok(Work::Done));
    assert_eq!(begin(&[0; 6]), Ok(Work::Done));
    assert_eq!(begin(&[0x1b, 0, 0, 0, 2, 0]), Err(Sense::INVALID_FIELD));
    let empty = Geometry { blocks: 0, ..DISK };
    assert_eq!(unit.begin(&[0; 6], &empty, luns), Err(Sense::NO_MEDIUM));
}

#[test]
fn reported_luns() {
    let report = |select, length| begin(&[0xa0, 0, select, 0, 0, 0, 0, 0, 0, length, 0, 0]);
    let Ok(Work::Reply { data, allocation }) = report(0, 255) else {
        panic!()
    };
    assert_eq!((allocation, data.len()), (255, 32));
    assert_eq!(data[..8], [0, 0, 0, 24, 0, 0, 0, 0]);
    assert_eq!(
        (data[9], data[17], &data[24..26]),
        (0, 5, [0x41, 0].as_slice())
    );
    assert!(matches!(report(1, 255), Ok(Work::Reply { data, .. }) if data == [0; 8]));
    assert_eq!(report(0, 15), Err(Sense::INVALID_FIELD));
    assert_eq!(report(3, 255), Err(Sense::INVALID_FIELD));
}

#[test]
fn lun_forms() {
    for number in [0, 1, 255, 256, 0x3fff] {
        let lun = Lun::new(number).unwrap();
        assert_eq!(Lun::from_bytes(lun.to_bytes()), Some(lun));
    }
    assert_eq!(Lun::new(0x4000), None);
    assert_eq!(Lun::from_bytes([0x40, 7]), Lun::new(7));
    assert_eq!(Lun::from_bytes([0x01, 7]), None);
    assert_eq!(Lun::from_bytes([0x80, 7]), None);
    assert_eq!(Lun::from_bytes([0xc1, 1]), None);
}

#[test]
fn units_that_are_not_there() {
    let begin = |cdb: &[u8]| begin_absent(cdb, &luns());
    let inquiry = begin(&[0x12, 0, 0, 0, 1, 0]);
    assert!(matches!(inquiry, Ok(Work::Reply { data, .. }) if data == [0x7f]));
    assert!(begin(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]).is_ok());
    let sense = begin(&[3, 0, 0, 0, 18, 0]);
    assert!(matches!(sense, Ok(Work::Reply { data, .. }) if (data[2], data[12]) == (5, 0x25)));
    assert_eq!(begin(&[0; 6]), Err(Sense::LUN_NOT_SUPPORTED));
    assert_eq!(begin(&[]), Err(Sense::LUN_NOT_SUPPORTED));
}

#[test]
fn mode_pages() {
    assert_eq!(
        data(&[0x1a, 8, 8, 0, 255, 0]),
        [
            23, 0, 0x10, 0, 8, 18, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
        ]
    );
    let all = data(&[0x5a, 0, 0x3f, 0, 0, 0, 0, 1, 0, 0]);
    assert_eq!(all.len(), 8 + 8 + 12 + 20 + 12);
    assert_eq!(all[..8], [0, 58, 0, 0x10, 0, 0, 0, 8]);
    assert_eq!(all[8..16], [0, 0, 0x20, 0, 0, 0, 2, 0]);
    assert_eq!((all[16], all[28], all[48]), (1, 8, 10));
    // Changeable: write cache enable, nothing else.
    assert_eq!(data(&[0x1a, 8, 0x48, 0, 255, 0])[4..7], [8, 18, 4]);
    assert_eq!(data(&[0x1a, 8, 0x4a, 0, 255, 0])[4..8], [10, 10, 0, 0]);
    assert_eq!(
        begin(&[0x1a, 8, 0xc8, 0, 255, 0]),
        Err(Sense::SAVING_NOT_SUPPORTED)
    );
    assert_eq!(
        begin(&[0x1a, 8, 0x1c, 0, 255, 0]),
        Err(Sense::INVALID_FIELD)
    );
    assert_eq!(begin(&[0x1a, 8, 8, 1, 255, 0]), Err(Sense::INVALID_FIELD));
}

#[test]
fn the_cache_can_be_switched() {
    let unit = unit();
    let work = unit.begin(&[0x15, 0x10, 0, 0, 24, 0], &DISK, luns);
    let list = ParameterList::Mode { ten: false };
    assert_eq!(work, Ok(Work::Parameters { length: 24, list }));
    let select = |bytes: &[u8]| unit.parameters(list, bytes, &DISK);
    let mut page = vec![0, 0, 0, 0, 8, 18];
    page.resize(24, 0);
    assert_eq!(select(&page), Ok(Effect::Flush));
    assert!(!unit.writeback());
    page[6] = 4;
    assert_eq!(select(&page), Ok(Effect::None));
    assert!(unit.writeback());
    page[6] = 5;
    assert_eq!(select(&page), Err(Sense::INVALID_PARAMETER));
    assert_eq!(select(&page[..23]), Err(Sense::PARAMETER_LENGTH));
    assert_eq!(select(&page[..3]), Err(Sense::PARAMETER_LENGTH));
    assert_eq!(select(&page[..5]), Err(Sense::PARAMETER_LENGTH));
    assert_eq!(select(&[]), Ok(Effect::None));
    // Ten bytes, with a block descriptor that says what is.
    let ten = ParameterList::Mode { ten: true };
    let mut long = vec![0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 2, 0, 8, 18, 0];
    long.resize(36, 0);
    assert_eq!(unit.parameters(ten, &long, &DISK), Ok(Effect::Flush));
    long[14] = 4;
    assert_eq!(
        unit.parameters(ten, &long, &DISK),
        Err(Sense::INVALID_PARAMETER)
    );
    assert_eq!(
        unit.begin(&[0x15, 0x11, 0, 0, 24, 0], &DISK, luns),
        Err(Sense::INVALID_FIELD)
    );
}

fn unmap_list(descriptors: &[(u64, u32)]) -> Vec<u8> {
    let mut list = vec![0, 0, 0, (descriptors.len() * 16) as u8, 0, 0, 0, 0];
    let bytes = (descriptors.len() * 16) as u16;
    list[2..4].copy_from_slice(&bytes.to_be_bytes());
    for (lba, blocks) in descriptors {
        list.extend(lba.to_be_bytes());
        list.extend(blocks.to_be_bytes());
        list.extend([0; 4]);
    }
    list
}

#[test]
fn unmap_lists() {
    let length = 40;
    let list = ParameterList::Unmap;
    assert_eq!(
        begin(&[0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0]),
        Ok(Work::Parameters { length, list })
    );
    let unmap = |bytes: &[u8]| unit().parameters(list, bytes, &DISK);
    assert_eq!(
        unmap(&unmap_list(&[(8, 16), (100, 0), (8191, 1)])),
        Ok(Effect::Unmap(vec![extent(8, 16), extent(8191, 1)]))
    );
    assert_eq!(unmap(&[]), Ok(Effect::None));
    assert_eq!(unmap(&[0; 7]), Err(Sense::PARAMETER_LENGTH));
    assert_eq!(
        unmap(&unmap_list(&[(8191, 2)])),
        Err(Sense::LBA_OUT_OF_RANGE)
    );
    assert_eq!(
        unmap(&unmap_list(&[(u64::MAX, 1)])),
        Err(Sense::LBA_OUT_OF_RANGE)
    );
    assert_eq!(
        unmap(&unmap_list(&[(0, 1); 33])),
        Err(Sense::INVALID_PARAMETER)
    );
    let large = Geometry {
        blocks: 1 << 40,
        ..DISK
    };
    let too_long = unit().parameters(
        list,
        &unmap_list(&[(0, 1 << 21), (0, (1 << 21) + 1)]),
        &large,
    );
    assert_eq!(too_long, Err(Sense::INVALID_PARAMETER));
    assert_eq!(
        begin(&[0x42, 1, 0, 0, 0, 0, 0, 0, 40, 0]),
        Err(Sense::INVALID_FIELD)
    );
    let fixed = Geometry {
        unmap: false,
        ..DISK
    };
    let refused = unit().begin(&[0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0], &fixed, luns);
    assert_eq!(refused, Err(Sense::INVALID_OPCODE));
}

#[test]
fn write_same_and_verify() {
    let mut same = [0; 16];
    (same[0], same[1], same[9], same[13]) = (0x93, 8, 4, 2);
    let expected = |block_bytes, unmap| {
        Ok(Work::WriteSame {
            extent: extent(4, 2),
            block_bytes,
            unmap,
        })
    };
    assert_eq!(begin(&same), expected(Some(512), true));
    same[1] = 1;
    assert_eq!(begin(&same), expected(None, false));
    for (at, value) in [(1, 0x10), (1, 2), (13, 0)] {
        let mut wrong = same;
        wrong[at] = value;
        assert_eq!(begin(&wrong), Err(Sense::INVALID_FIELD));
    }
    assert_eq!(
        begin(&[0x41, 0, 0, 0, 0, 4, 0, 0, 2, 0]),
        expected(Some(512), false)
    );
    let verify = |flags| begin(&[0x2f, flags, 0, 0, 0, 4, 0, 0, 2, 0]);
    let work = |compare| {
        Ok(Work::Verify {
            extent: extent(4, 2),
            compare,
        })
    };
    assert_eq!((verify(0), verify(2)), (work(false), work(true)));
    assert_eq!(verify(6), Err(Sense::INVALID_FIELD));
}

#[test]
fn what_is_not_there_is_refused() {
    for opcode in [0x16, 0x17, 0x5e, 0x5f, 0x04, 0x1d, 0xa3, 0x7f, 0xc0, 0xff] {
        let mut cdb = [0; 32];
        cdb[0] = opcode;
        assert_eq!(begin(&cdb), Err(Sense::INVALID_OPCODE), "{opcode:#x}");
    }
}

/// All opcodes with all kinds of bytes behind: an answer, never a panic, and never more than is there.
#[test]
fn any_bytes_are_answered() {
    let mut seed = 1_u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as u8
    };
    let unit = unit();
    for round in 0..200_000_u32 {
        let mut cdb = [0_u8; 32];
        let length = usize::from(random() % 33);
        cdb[..length].fill_with(|| random() & random());
        cdb[0] = round as u8;
        match unit.begin(&cdb[..length], &DISK, luns) {
            Ok(Work::Reply { data, allocation }) => assert!(data.len() <= allocation as usize),
            Ok(
                Work::Read { extent, .. }
                | Work::Write { extent, .. }
                | Work::Verify { extent, .. }
                | Work::WriteSame { extent, .. },
            ) => assert!(extent.offset + extent.len <= DISK.blocks * 512),
            Ok(Work::Parameters { list, .. }) => {
                let bytes: Vec<_> = (0..random()).map(|_| random() & random()).collect();
                if let Ok(Effect::Unmap(extents)) = unit.parameters(list, &bytes, &DISK) {
                    assert!(
                        extents
                            .iter()
                            .all(|e| e.offset + e.len <= DISK.blocks * 512)
                    );
                }
            }
            Ok(Work::Done | Work::Flush) | Err(_) => {}
        }
    }
}
