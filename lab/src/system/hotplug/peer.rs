// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A station at the other end of a network backend: 10.0.0.1, which answers ARP and echo requests.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const IP: [u8; 4] = [10, 0, 0, 1];

/// Longer no frame is without offloads.
const FRAME_BYTES_MAX: usize = 1518;

/// Serves the first to connect until it closes the connection, on a thread of its own.
pub fn serve(listener: UnixListener) {
    std::thread::spawn(move || {
        if let Ok((mut stream, _)) = listener.accept() {
            // The end of the stream is how it ends.
            while answer_one(&mut stream).is_ok() {}
        }
    });
}

/// Frames come with their length before them, four bytes, big-endian.
fn answer_one(stream: &mut UnixStream) -> io::Result<()> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length_bytes = u32::from_be_bytes(length) as usize;
    let mut frame = vec![0; length_bytes];
    stream.read_exact(&mut frame)?;
    if length_bytes <= FRAME_BYTES_MAX
        && let Some(answer) = answer(&frame)
    {
        stream.write_all(&[&length[..], &answer].concat())?;
    }
    Ok(())
}

/// The answer to a frame, which is as long as the frame.
fn answer(frame: &[u8]) -> Option<Vec<u8>> {
    let mut answer = frame.to_vec();
    let sender: [u8; 6] = frame.get(6..12)?.try_into().ok()?;
    answer[..6].copy_from_slice(&sender);
    answer[6..12].copy_from_slice(&MAC);
    match frame.get(12..14)? {
        [0x08, 0x06] => arp(&mut answer, frame.get(14..42)?)?,
        [0x08, 0x00] => echo(&mut answer, frame.get(14..42)?)?,
        _ => return None,
    }
    Some(answer)
}

/// RFC 826: the addresses change places, and ours is filled in.
fn arp(answer: &mut [u8], packet: &[u8]) -> Option<()> {
    const REQUEST: [u8; 2] = [0, 1];
    const REPLY: [u8; 2] = [0, 2];
    if packet[6..8] != REQUEST || packet[24..28] != IP {
        return None;
    }
    answer[20..22].copy_from_slice(&REPLY);
    answer[22..28].copy_from_slice(&MAC);
    answer[28..32].copy_from_slice(&IP);
    answer[32..42].copy_from_slice(&packet[8..18]);
    Some(())
}

/// RFC 792: the addresses change places, which no checksum notices, and type 8 becomes 0.
fn echo(answer: &mut [u8], packet: &[u8]) -> Option<()> {
    const NO_OPTIONS: u8 = 0x45;
    const ICMP: u8 = 1;
    const REQUEST: u8 = 8;
    let request = packet[0] == NO_OPTIONS && packet[9] == ICMP && packet[20] == REQUEST;
    if !request || packet[16..20] != IP {
        return None;
    }
    answer[26..30].copy_from_slice(&packet[16..20]);
    answer[30..34].copy_from_slice(&packet[12..16]);
    answer[34] = 0;
    // Ones' complement: 0x0800 less in the data is as much more in the sum.
    let sum = u32::from(u16::from_be_bytes([packet[22], packet[23]])) + 0x0800;
    let sum = (sum & 0xffff) + (sum >> 16);
    answer[36..38].copy_from_slice(&sum.to_be_bytes()[2..]);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071.
    fn sum(bytes: &[u8]) -> u16 {
        let mut sum: u32 = bytes
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
            .sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn an_echo_has_its_checksum() {
        let mut frame = vec![0xff; 14];
        frame[12..].copy_from_slice(&[8, 0]);
        frame.extend([0x45, 0, 0, 32, 0, 0, 0, 0, 64, 1, 0, 0]);
        frame.extend([10, 0, 0, 2, 10, 0, 0, 1]);
        frame.extend([8, 0, 0, 0, 0x12, 0x34, 0, 1, 0xab, 0xcd, 0xf7, 0xff]);
        let checksum = !sum(&frame[34..]);
        frame[36..38].copy_from_slice(&checksum.to_be_bytes());
        let answer = answer(&frame).unwrap();
        assert_eq!((answer[34], sum(&answer[34..])), (0, 0xffff));
        assert_eq!(answer[26..34], [10, 0, 0, 1, 10, 0, 0, 2]);
        assert_eq!(answer[38..], frame[38..]);
    }

    #[test]
    fn others_are_not_answered() {
        let mut arp = vec![0; 42];
        arp[12..14].copy_from_slice(&[8, 6]);
        arp[21] = 1;
        arp[38..42].copy_from_slice(&[10, 0, 0, 3]);
        assert_eq!(answer(&arp), None);
        arp[41] = 1;
        assert_eq!(answer(&arp).unwrap()[28..32], IP);
        assert_eq!(answer(&[0; 13]), None);
    }
}
