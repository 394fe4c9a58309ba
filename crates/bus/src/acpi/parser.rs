// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A reader of ACPI tables for the tests, written from the specification and sharing nothing with the writer.

use std::collections::BTreeMap;

/// A table found through the RSDP, its header checked.
pub struct Table<'a> {
    pub address: u64,
    pub revision: u8,
    pub bytes: &'a [u8],
}

pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}

/// All tables reachable from the RSDP at `address`, by signature, the DSDT included.
pub fn tables(address: u64, bytes: &[u8]) -> BTreeMap<String, Table<'_>> {
    assert_eq!(address % 16, 0);
    assert_eq!(&bytes[..8], b"RSD PTR ");
    assert_eq!(sum(&bytes[..20]), 0, "checksum of the ACPI 1.0 part");
    assert_eq!(sum(&bytes[..36]), 0, "extended checksum");
    assert_eq!(bytes[15], 2, "revision");
    assert_eq!(u32_at(bytes, 16), 0, "no RSDT");
    assert_eq!(u32_at(bytes, 20), 36, "length");
    let at = |physical: u64| usize::try_from(physical - address).unwrap();
    let xsdt = table(bytes, at(u64_at(bytes, 24)));
    assert_eq!(&xsdt[..4], b"XSDT");
    let mut found = BTreeMap::new();
    for entry in xsdt[36..].chunks_exact(8) {
        let physical = u64_at(entry, 0);
        add(&mut found, physical, table(bytes, at(physical)));
    }
    let dsdt = u64_at(found["FACP"].bytes, 140);
    add(&mut found, dsdt, table(bytes, at(dsdt)));
    found
}

fn add<'a>(found: &mut BTreeMap<String, Table<'a>>, address: u64, bytes: &'a [u8]) {
    let signature = String::from_utf8(bytes[..4].to_vec()).unwrap();
    let revision = bytes[8];
    let twice = found.insert(
        signature,
        Table {
            address,
            revision,
            bytes,
        },
    );
    assert!(twice.is_none());
}

fn table(bytes: &[u8], at: usize) -> &[u8] {
    let table = &bytes[at..at + u32_at(bytes, at + 4) as usize];
    assert_eq!(
        sum(table),
        0,
        "checksum of {:?}",
        std::str::from_utf8(&table[..4])
    );
    assert!(
        table[10..24]
            .iter()
            .all(|byte| byte.is_ascii_graphic() || *byte == b' '),
        "oem ids"
    );
    table
}

/// The sub-structures (type, bytes) of a table from `at` on.
pub fn structures(bytes: &[u8], mut at: usize) -> Vec<(u8, &[u8])> {
    let mut found = Vec::new();
    while at < bytes.len() {
        let length = usize::from(bytes[at + 1]);
        found.push((bytes[at], &bytes[at..at + length]));
        at += length;
    }
    found
}

/// An AML data object.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Integer(u64),
    Text(String),
    Buffer(Vec<u8>),
    Package(Vec<Value>),
}

/// What a namespace holds, by absolute path.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    Value(Value),
    Device,
    Method {
        arguments: u8,
        body: Vec<u8>,
    },
    Region {
        space: u8,
        offset: u64,
        length: u64,
    },
    /// The fields of an operation region: names and widths in bits. What is skipped has no name.
    Fields(Vec<(String, usize)>),
    /// Of a list of fields, the byte that says how they are accessed (20.2.5.2).
    FieldFlags(u8),
    Mutex,
}

/// Parses definitions as a DSDT may have them outside of methods.
pub fn namespace(aml: &[u8]) -> BTreeMap<String, Object> {
    let mut objects = BTreeMap::new();
    Reader { aml }.definitions("\\", &mut objects);
    objects
}

pub(super) struct Reader<'a> {
    pub(super) aml: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.aml.split_at(count);
        self.aml = rest;
        taken
    }

    pub(super) fn byte(&mut self) -> u8 {
        self.take(1)[0]
    }

    /// A package: its length covers the length's own encoding (20.2.4).
    pub(super) fn package(&mut self) -> Reader<'a> {
        let before = self.aml.len();
        let length = self.length();
        Reader {
            aml: self.take(length - (before - self.aml.len())),
        }
    }

    fn length(&mut self) -> usize {
        let lead = self.byte();
        let more = usize::from(lead >> 6);
        if more == 0 {
            return usize::from(lead & 0x3f);
        }
        assert_eq!(lead & 0x30, 0);
        let bytes = self.take(more);
        bytes
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | usize::from(byte))
            << 4
            | usize::from(lead & 0xf)
    }

    /// A name string relative to `scope`, made absolute.
    pub(super) fn name(&mut self, scope: &str) -> String {
        let absolute = self.aml[0] == b'\\';
        if absolute {
            self.byte();
        }
        let segments = match self.aml[0] {
            0x2e => {
                self.byte();
                2
            }
            0x2f => {
                self.byte();
                usize::from(self.byte())
            }
            _ => 1,
        };
        let names: Vec<_> = (0..segments).map(|_| self.segment()).collect();
        let prefix = if absolute || scope == "\\" {
            "\\".to_owned()
        } else {
            format!("{scope}.")
        };
        prefix + &names.join(".")
    }

    fn segment(&mut self) -> String {
        let name = self.take(4);
        assert!(name[0].is_ascii_uppercase() || name[0] == b'_', "{name:?}");
        assert!(
            name.iter()
                .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || *c == b'_'),
            "{name:?}"
        );
        String::from_utf8(name.to_vec()).unwrap()
    }

    pub(super) fn value(&mut self) -> Value {
        match self.byte() {
            0x00 => Value::Integer(0),
            0x01 => Value::Integer(1),
            0xff => Value::Integer(u64::MAX),
            0x0a => Value::Integer(self.byte().into()),
            0x0b => Value::Integer(u16_at(self.take(2), 0).into()),
            0x0c => Value::Integer(u32_at(self.take(4), 0).into()),
            0x0e => Value::Integer(u64_at(self.take(8), 0)),
            0x0d => {
                let end = self.aml.iter().position(|&byte| byte == 0).unwrap();
                let text = String::from_utf8(self.take(end).to_vec()).unwrap();
                self.byte();
                Value::Text(text)
            }
            0x11 => {
                let mut buffer = self.package();
                let Value::Integer(length) = buffer.value() else {
                    panic!("buffer length")
                };
                assert_eq!(length, buffer.aml.len() as u64);
                Value::Buffer(buffer.aml.to_vec())
            }
            0x12 => {
                let mut package = self.package();
                let count = package.byte();
                let values = (0..count).map(|_| package.value()).collect();
                assert!(package.aml.is_empty());
                Value::Package(values)
            }
            other => panic!("data object {other:#x}"),
        }
    }

    fn integer(&mut self) -> u64 {
        match self.value() {
            Value::Integer(value) => value,
            other => panic!("{other:?} is no integer"),
        }
    }

    fn definitions(&mut self, scope: &str, objects: &mut BTreeMap<String, Object>) {
        while !self.aml.is_empty() {
            let (path, object) = match self.byte() {
                0x08 => (self.name(scope), Object::Value(self.value())),
                0x10 => {
                    let mut inner = self.package();
                    let path = inner.name(scope);
                    inner.definitions(&path, objects);
                    continue;
                }
                0x14 => {
                    let mut inner = self.package();
                    let path = inner.name(scope);
                    let arguments = inner.byte() & 7;
                    (
                        path,
                        Object::Method {
                            arguments,
                            body: inner.aml.to_vec(),
                        },
                    )
                }
                0x5b => self.extended(scope, objects),
                other => panic!("definition {other:#x}"),
            };
            assert!(
                objects.insert(path.clone(), object).is_none(),
                "{path} twice"
            );
        }
    }

    fn extended(
        &mut self,
        scope: &str,
        objects: &mut BTreeMap<String, Object>,
    ) -> (String, Object) {
        match self.byte() {
            0x80 => {
                let path = self.name(scope);
                let space = self.byte();
                let (offset, length) = (self.integer(), self.integer());
                (
                    path,
                    Object::Region {
                        space,
                        offset,
                        length,
                    },
                )
            }
            0x81 => {
                let mut inner = self.package();
                // Further lists of the same region are told apart by a number.
                let first = inner.name(scope) + " fields";
                let numbered = (2..).map(|n| format!("{first} {n}"));
                let path = std::iter::once(first.clone())
                    .chain(numbered)
                    .find(|path| !objects.contains_key(path))
                    .unwrap();
                let flags = Object::FieldFlags(inner.byte());
                objects.insert(format!("{path}, flags"), flags);
                let mut fields = Vec::new();
                while !inner.aml.is_empty() {
                    let name = match inner.aml[0] {
                        0 => {
                            inner.byte();
                            String::new()
                        }
                        _ => inner.segment(),
                    };
                    fields.push((name, inner.length()));
                }
                (path, Object::Fields(fields))
            }
            0x01 => {
                let path = self.name(scope);
                assert_eq!(self.byte() & 0xf0, 0, "sync level");
                (path, Object::Mutex)
            }
            0x82 => {
                let mut inner = self.package();
                let path = inner.name(scope);
                inner.definitions(&path, objects);
                (path, Object::Device)
            }
            other => panic!("definition 0x5b {other:#x}"),
        }
    }
}

/// A resource descriptor (6.4).
#[derive(Clone, Debug, PartialEq)]
pub enum Resource {
    Io {
        first: u16,
        length: u8,
    },
    Memory32 {
        base: u32,
        length: u32,
    },
    /// Type 0 memory, 1 I/O, 2 bus numbers.
    Space {
        kind: u8,
        attributes: u8,
        first: u64,
        last: u64,
    },
    Interrupt {
        consumer: bool,
        edge: bool,
        active_low: bool,
        shared: bool,
        number: u32,
    },
}

/// The descriptors of a resource template.
pub fn resources(mut bytes: &[u8]) -> Vec<Resource> {
    let mut found = Vec::new();
    loop {
        let (tag, body, rest) = descriptor(bytes);
        match tag {
            0x79 => {
                assert!(rest.is_empty(), "descriptors after the end tag");
                return found;
            }
            0x47 => {
                assert_eq!(u16_at(body, 1), u16_at(body, 3), "fixed ports");
                found.push(Resource::Io {
                    first: u16_at(body, 1),
                    length: body[6],
                });
            }
            0x86 => found.push(Resource::Memory32 {
                base: u32_at(body, 1),
                length: u32_at(body, 5),
            }),
            0x88 => found.push(space(body, 2)),
            0x87 => found.push(space(body, 4)),
            0x8a => found.push(space(body, 8)),
            0x89 => {
                assert_eq!(body[1], 1, "one interrupt");
                let flag = |bit: u8| body[0] >> bit & 1 != 0;
                let number = u32_at(body, 2);
                let (consumer, edge, active_low, shared) = (flag(0), flag(1), flag(2), flag(3));
                found.push(Resource::Interrupt {
                    consumer,
                    edge,
                    active_low,
                    shared,
                    number,
                });
            }
            other => panic!("descriptor {other:#x}"),
        }
        bytes = rest;
    }
}

/// Tag, body and what follows.
fn descriptor(bytes: &[u8]) -> (u8, &[u8], &[u8]) {
    let tag = bytes[0];
    let (header, length) = match tag & 0x80 {
        0 => (1, usize::from(tag & 7)),
        _ => (3, usize::from(u16_at(bytes, 1))),
    };
    (
        tag,
        &bytes[header..header + length],
        &bytes[header + length..],
    )
}

fn space(body: &[u8], width: usize) -> Resource {
    let field = |index: usize| {
        let bytes = &body[3 + index * width..][..width];
        bytes
            .iter()
            .rev()
            .fold(0u64, |value, &byte| value << 8 | u64::from(byte))
    };
    let (first, last) = (field(1), field(2));
    assert_eq!(field(0), 0, "granularity");
    assert_eq!(field(3), 0, "translation");
    assert_eq!(field(4), last - first + 1, "length");
    assert_eq!(body[1] & 0xc, 0xc, "fixed ends");
    Resource::Space {
        kind: body[0],
        attributes: body[2],
        first,
        last,
    }
}
