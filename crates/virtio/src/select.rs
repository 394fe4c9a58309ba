// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiting for one of two things.

use std::future::Future;
use std::pin::pin;
use std::task::Poll;

/// The value of `wanted`, or `None` when `end` is ready first. `end` is looked at first, so that a flood of the other
/// cannot keep it out. The loser is dropped.
pub(crate) async fn first<T>(
    wanted: impl Future<Output = T>,
    end: impl Future<Output = ()>,
) -> Option<T> {
    let (mut wanted, mut end) = (pin!(wanted), pin!(end));
    std::future::poll_fn(move |cx| {
        if end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        wanted.as_mut().poll(cx).map(Some)
    })
    .await
}
