// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Evaluates the AML of the tables for the tests, against the real registers: the part of the language that is used here
//! (ACPI 6.5, 19.6 and 20.2.5), and a panic for everything else.

use std::collections::BTreeMap;

use ebbtide_memory::Mmio;

use super::parser::{Object, Reader, Value};

/// What AML computes with.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    Integer(u64),
    Buffer(Vec<u8>),
}

impl Data {
    pub fn integer(&self) -> u64 {
        match self {
            Data::Integer(value) => *value,
            Data::Buffer(bytes) => panic!("{bytes:?} is no integer"),
        }
    }
}

/// A guest's interpreter.
pub struct Interpreter<'a> {
    pub objects: BTreeMap<String, Object>,
    /// Registers by their first port.
    pub ports: Vec<(u64, &'a dyn Mmio)>,
    /// What was notified, and with which value.
    pub notified: Vec<(String, u64)>,
    /// Mutexes held.
    held: Vec<String>,
}

/// One evaluation of a method.
struct Frame {
    scope: String,
    arguments: Vec<Data>,
    locals: BTreeMap<u8, Data>,
    /// Names made by CreateQWordField: the local with the buffer, and where in it.
    buffer_fields: BTreeMap<String, (u8, usize)>,
    returned: Option<Data>,
}

/// Where a store goes.
enum Target {
    None,
    Local(u8),
    Name(String),
}

impl<'a> Interpreter<'a> {
    pub fn new(objects: BTreeMap<String, Object>, ports: Vec<(u64, &'a dyn Mmio)>) -> Self {
        Self {
            objects,
            ports,
            notified: Vec::new(),
            held: Vec::new(),
        }
    }

    /// Evaluates a method by its absolute path; what it does not return is 0.
    pub fn call(&mut self, path: &str, arguments: &[u64]) -> Data {
        let arguments = arguments.iter().copied().map(Data::Integer).collect();
        let result = self.evaluate(path, arguments);
        assert!(self.held.is_empty(), "{path} keeps {:?}", self.held);
        result
    }

    fn evaluate(&mut self, path: &str, arguments: Vec<Data>) -> Data {
        let Some(Object::Method {
            arguments: count,
            body,
        }) = self.objects.get(path).cloned()
        else {
            panic!("{path} is no method");
        };
        assert_eq!(arguments.len(), usize::from(count), "arguments of {path}");
        let mut frame = Frame {
            scope: path.to_owned(),
            arguments,
            locals: BTreeMap::new(),
            buffer_fields: BTreeMap::new(),
            returned: None,
        };
        self.statements(Reader { aml: &body }, &mut frame);
        frame.returned.unwrap_or(Data::Integer(0))
    }

    fn statements(&mut self, mut code: Reader<'_>, frame: &mut Frame) {
        // Of the If before an Else.
        let mut taken = false;
        while !code.aml.is_empty() && frame.returned.is_none() {
            match code.aml[0] {
                0xa0 => {
                    code.byte();
                    let mut body = code.package();
                    taken = self.term(&mut body, frame).integer() != 0;
                    if taken {
                        self.statements(body, frame);
                    }
                }
                0xa1 => {
                    code.byte();
                    let body = code.package();
                    if !taken {
                        self.statements(body, frame);
                    }
                }
                0xa2 => {
                    code.byte();
                    let body = code.package().aml;
                    loop {
                        let mut body = Reader { aml: body };
                        if self.term(&mut body, frame).integer() == 0 {
                            break;
                        }
                        self.statements(body, frame);
                    }
                }
                0xa4 => {
                    code.byte();
                    frame.returned = Some(self.term(&mut code, frame));
                }
                _ => {
                    self.term(&mut code, frame);
                }
            }
        }
    }

    fn term(&mut self, code: &mut Reader<'_>, frame: &mut Frame) -> Data {
        let opcode = code.aml[0];
        match opcode {
            0x00 | 0x01 | 0xff | 0x0a..=0x0c | 0x0e | 0x11 => match code.value() {
                Value::Integer(value) => Data::Integer(value),
                Value::Buffer(bytes) => Data::Buffer(bytes),
                other => panic!("{other:?}"),
            },
            b'\\' | b'A'..=b'Z' | b'_' | 0x2e | 0x2f => self.named(code, frame),
            0x60..=0x67 => {
                code.byte();
                frame.locals[&(opcode - 0x60)].clone()
            }
            0x68..=0x6e => {
                code.byte();
                frame.arguments[usize::from(opcode - 0x68)].clone()
            }
            _ => {
                code.byte();
                self.operator(opcode, code, frame)
            }
        }
    }

    fn operator(&mut self, opcode: u8, code: &mut Reader<'_>, frame: &mut Frame) -> Data {
        match opcode {
            0x70 => {
                let value = self.term(code, frame);
                let target = self.target(code, frame);
                self.store(target, value.clone(), frame);
                value
            }
            0x72 | 0x74 | 0x7b => {
                let left = self.term(code, frame).integer();
                let right = self.term(code, frame).integer();
                let value = Data::Integer(match opcode {
                    0x72 => left.wrapping_add(right),
                    0x74 => left.wrapping_sub(right),
                    _ => left & right,
                });
                let target = self.target(code, frame);
                self.store(target, value.clone(), frame);
                value
            }
            0x92 => Data::Integer(truth(self.term(code, frame).integer() == 0)),
            0x93 | 0x95 => {
                let left = self.term(code, frame).integer();
                let right = self.term(code, frame).integer();
                Data::Integer(truth(match opcode {
                    0x93 => left == right,
                    _ => left < right,
                }))
            }
            0x86 => {
                let name = code.name(&frame.scope);
                let device = self.resolve(&name).expect("a device to notify");
                assert_eq!(self.objects[&device], Object::Device);
                let value = self.term(code, frame).integer();
                self.notified.push((device, value));
                Data::Integer(0)
            }
            0x8f => {
                let local = code.byte() - 0x60;
                let at = self.term(code, frame).integer() as usize;
                let name = code.name(&frame.scope);
                frame.buffer_fields.insert(name, (local, at));
                Data::Integer(0)
            }
            0x5b => self.extended(code, frame),
            other => panic!("opcode {other:#x} in {}", frame.scope),
        }
    }

    fn extended(&mut self, code: &mut Reader<'_>, frame: &mut Frame) -> Data {
        let opcode = code.byte();
        let name = code.name(&frame.scope);
        let mutex = self.resolve(&name).expect("a mutex");
        assert_eq!(self.objects[&mutex], Object::Mutex);
        match opcode {
            0x23 => {
                assert_eq!(code.take(2), [0xff, 0xff], "waits without end");
                assert!(!self.held.contains(&mutex), "{mutex} twice");
                self.held.push(mutex);
                Data::Integer(0)
            }
            0x27 => {
                assert_eq!(self.held.pop(), Some(mutex), "held");
                Data::Integer(0)
            }
            other => panic!("opcode 0x5b {other:#x} in {}", frame.scope),
        }
    }

    /// A name where a value is wanted: a field, or a method with its arguments.
    fn named(&mut self, code: &mut Reader<'_>, frame: &mut Frame) -> Data {
        let name = code.name(&frame.scope);
        if let Some((local, at)) = frame.buffer_fields.get(&name) {
            let Data::Buffer(bytes) = &frame.locals[local] else {
                panic!("a buffer")
            };
            return Data::Integer(u64::from_le_bytes(bytes[*at..*at + 8].try_into().unwrap()));
        }
        if let Some(path) = self.resolve(&name)
            && let Object::Method { arguments, .. } = self.objects[&path]
        {
            let arguments = (0..arguments).map(|_| self.term(code, frame)).collect();
            return self.evaluate(&path, arguments);
        }
        Data::Integer(self.field(&name, None))
    }

    fn target(&mut self, code: &mut Reader<'_>, frame: &Frame) -> Target {
        match code.aml[0] {
            0x00 => {
                code.byte();
                Target::None
            }
            local @ 0x60..=0x67 => {
                code.byte();
                Target::Local(local - 0x60)
            }
            _ => Target::Name(code.name(&frame.scope)),
        }
    }

    fn store(&mut self, target: Target, value: Data, frame: &mut Frame) {
        match target {
            Target::None => {}
            Target::Local(local) => {
                frame.locals.insert(local, value);
            }
            Target::Name(name) => match frame.buffer_fields.get(&name) {
                Some(&(local, at)) => {
                    let Some(Data::Buffer(bytes)) = frame.locals.get_mut(&local) else {
                        panic!("a buffer")
                    };
                    bytes[at..at + 8].copy_from_slice(&value.integer().to_le_bytes());
                }
                None => {
                    self.field(&name, Some(value.integer()));
                }
            },
        }
    }

    /// Looks for a name of one segment in its scope and those around it (5.3).
    fn resolve(&self, name: &str) -> Option<String> {
        if self.objects.contains_key(name) {
            return Some(name.to_owned());
        }
        let (scope, segment) = name.rsplit_once('.')?;
        match scope.rsplit_once('.') {
            Some((outer, _)) => self.resolve(&format!("{outer}.{segment}")),
            None => None,
        }
    }

    /// Reads a field of an operation region, or writes it, unit by unit (19.6.48).
    fn field(&self, name: &str, write: Option<u64>) -> u64 {
        let (scope, segment) = name.rsplit_once('.').unwrap();
        let (list, at, bits) = self.find(scope, segment);
        let region = list.split(" fields").next().unwrap();
        let Object::Region { offset, .. } = self.objects[region] else {
            panic!("{region}")
        };
        let Object::FieldFlags(flags) = self.objects[&format!("{list}, flags")] else {
            panic!("{list}")
        };
        let unit = match flags & 0xf {
            1 => 1,
            2 => 2,
            3 => 4,
            other => panic!("access type {other}"),
        };
        let mut value = 0;
        let first = at / (8 * unit);
        let last = (at + bits - 1) / (8 * unit);
        for index in first..=last {
            let port = offset + (index * unit) as u64;
            // Bits of the field before and in this unit.
            let shift = at as i64 - (index * unit * 8) as i64;
            let mask = mask(bits, shift) & mask(8 * unit, 0);
            match write {
                None => {
                    let read = self.port(port, unit, None) & mask;
                    value |= shifted(read, -shift);
                }
                Some(value) => {
                    let mut out = shifted(value, shift) & mask;
                    match flags >> 5 & 3 {
                        0 if mask != self::mask(8 * unit, 0) => {
                            out |= self.port(port, unit, None) & !mask;
                        }
                        1 => out |= !mask & self::mask(8 * unit, 0),
                        _ => {}
                    }
                    self.port(port, unit, Some(out));
                }
            }
        }
        value
    }

    /// The list of fields a name is in, its first bit and its width.
    fn find(&self, scope: &str, segment: &str) -> (String, usize, usize) {
        for (list, object) in &self.objects {
            let Object::Fields(fields) = object else {
                continue;
            };
            let outer = list.rsplit_once('.').unwrap().0;
            let mut at = 0;
            for (name, bits) in fields {
                if name == segment && (scope == outer || scope.starts_with(&format!("{outer}."))) {
                    return (list.clone(), at, *bits);
                }
                at += bits;
            }
        }
        panic!("{segment} in {scope}");
    }

    fn port(&self, port: u64, size: usize, write: Option<u64>) -> u64 {
        let found = self.ports.iter().rev().find(|(first, _)| *first <= port);
        let (first, registers) = found.unwrap_or_else(|| panic!("port {port:#x}"));
        match write {
            None => registers.read(port - first, size as u8),
            Some(value) => {
                registers.write(port - first, size as u8, value);
                0
            }
        }
    }
}

fn truth(is: bool) -> u64 {
    if is { u64::MAX } else { 0 }
}

/// `bits` ones from bit `at` on, which may be before bit 0.
fn mask(bits: usize, at: i64) -> u64 {
    let ones = if bits >= 64 {
        u64::MAX
    } else {
        (1 << bits) - 1
    };
    shifted(ones, at)
}

fn shifted(value: u64, by: i64) -> u64 {
    match by {
        64.. | ..=-64 => 0,
        0.. => value << by,
        _ => value >> -by,
    }
}
