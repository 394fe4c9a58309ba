// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The block device (virtio 1.3, 5.2).
