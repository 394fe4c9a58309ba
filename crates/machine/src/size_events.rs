// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory devices' news, as QMP events.

use ebbtide_iothread::Receiver;
use ebbtide_qmp::types::events::{MEMORY_DEVICE_SIZE_CHANGE, MemoryDeviceSizeChange};
use ebbtide_qmp::{EventSink, sizes};
use ebbtide_virtio::mem::MemEvent;

/// Forwards until the last device is gone.
pub async fn report_sizes(mut news: Receiver<MemEvent>, events: EventSink) {
    while let Some(event) = news.recv().await {
        match event {
            MemEvent::SizeChanged { id, plugged_bytes } => {
                events.emit(MEMORY_DEVICE_SIZE_CHANGE.with(MemoryDeviceSizeChange {
                    id: Some(id.to_string()),
                    size: plugged_bytes,
                    qom_path: format!("/machine/peripheral/{id}"),
                }));
            }
            MemEvent::TargetReached { id, plugged_bytes } => {
                tracing::info!(
                    "{id}: {} plugged, as requested",
                    sizes::human(plugged_bytes)
                );
            }
            MemEvent::Stalled {
                id,
                requested_bytes,
                plugged_bytes,
                reason,
                ..
            } => tracing::warn!(
                "{id}: {} of {} plugged: {reason}",
                sizes::human(plugged_bytes),
                sizes::human(requested_bytes)
            ),
        }
    }
}
