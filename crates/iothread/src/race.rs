// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiting for the first of two futures.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

/// Which of two it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Either<A, B> {
    /// The first.
    Left(A),
    /// The second.
    Right(B),
}

/// Waits for whichever is ready first and drops the other; the left one wins a tie.
pub async fn race<A, B>(
    left: impl Future<Output = A>,
    right: impl Future<Output = B>,
) -> Either<A, B> {
    let mut left = pin!(left);
    let mut right = pin!(right);
    poll_fn(|cx| {
        if let Poll::Ready(result) = left.as_mut().poll(cx) {
            return Poll::Ready(Either::Left(result));
        }
        right.as_mut().poll(cx).map(Either::Right)
    })
    .await
}
