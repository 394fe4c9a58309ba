// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The task that gives a resize its sense of time: kicks idle drivers and reports stalls.

use std::sync::Weak;

use ebbtide_iothread::{Local, Receiver, race};

use super::shared::Shared;

/// Runs until the device is gone. `news`: something happened that the resize was told of.
pub(super) async fn pace(local: Local, device: Weak<Shared>, mut news: Receiver<()>) {
    loop {
        while news.try_recv().is_some() {}
        let wake_at = match device.upgrade() {
            Some(device) => device.act(),
            None => return,
        };
        match wake_at {
            Some(at) => {
                race(news.recv(), local.sleep_until(at)).await;
            }
            None => {
                if news.recv().await.is_none() {
                    return;
                }
            }
        }
    }
}
