// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A limit on the size of files (ulimit -f) kills whoever writes behind it: no guest may be able to do that.

use std::process::Command;

use ebbtide_block::{Disk, DiskSpec, Op, OwnedBuffer};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Set in the child that lives under the limit.
const LIMITED: &str = "EBBTIDE_TEST_FILE_LIMIT";
const LIMIT_BYTES: u64 = 1 << 20;

fn image(bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

/// Writes the last sector of an image of `bytes` bytes.
fn write_at_the_end(spec: &DiskSpec, bytes: u64) -> Result<(), String> {
    let disk = Disk::open(spec).map_err(|error| error.to_string())?;
    let written = ebbtide_iothread::run("test", |local| async move {
        let offset = bytes - 512;
        let buffer = OwnedBuffer::zeroed(512);
        disk.attach(&local)
            .submit(Op::Write { offset }, buffer)
            .await
            .0
    });
    written.unwrap().map_err(|error| error.to_string())
}

fn under_the_limit() {
    let (fits, large) = (image(LIMIT_BYTES), image(LIMIT_BYTES + 512));
    let limit = Rlimit {
        current: Some(LIMIT_BYTES),
        maximum: None,
    };
    setrlimit(Resource::Fsize, limit).unwrap();
    write_at_the_end(&DiskSpec::new(fits.path()), LIMIT_BYTES).unwrap();
    let refused = write_at_the_end(&DiskSpec::new(large.path()), LIMIT_BYTES + 512).unwrap_err();
    assert!(
        refused.contains("1049088 bytes is more than this process may write (ulimit -f: 1048576)"),
        "{refused}"
    );
    // Nothing is written to it.
    Disk::open(&DiskSpec::new(large.path()).readonly()).unwrap();
}

#[test]
fn an_image_behind_the_limit_is_not_opened_for_writing() {
    if std::env::var_os(LIMITED).is_some() {
        under_the_limit();
        return;
    }
    let name = "an_image_behind_the_limit_is_not_opened_for_writing";
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(LIMITED, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}
