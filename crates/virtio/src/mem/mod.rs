// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory device (virtio 1.3, 5.15).
