// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Models that exist elsewhere and not here: by name, with the reason, and what there is instead.

const NO_MMIO: &str = "there is no virtio-mmio bus: its model on PCI is called ...-pci";
const SOUND: &str = "there is no sound hardware yet";
const IDE: &str =
    "there are no IDE or SATA disks yet: disks are virtio-blk-pci, or scsi-hd on virtio-scsi-pci";
const SCSI: &str = "the only SCSI adapter yet is virtio-scsi-pci";
const SCSI_UNIT: &str = "SCSI units are disks: use scsi-hd";
const NET: &str = "network cards are virtio-net-pci";
const BRIDGE: &str =
    "bridges to conventional PCI are pci-bridge and i82801b11-bridge, ports are pcie-root-port";
const USB: &str = "there is no USB yet";
const TPM: &str = "there is no TPM yet";
const ASSIGNED: &str = "KVM's device assignment is gone from Linux: it was superseded by VFIO";

/// The reasons, each of several models. Names are QEMU's, aliases among them.
const REFUSED: &[(&str, &[&str])] = &[
    (NO_MMIO, &["virtio-blk-device", "virtio-net-device"]),
    (
        SOUND,
        &[
            "AC97",
            "ac97",
            "ES1370",
            "es1370",
            "intel-hda",
            "ich9-intel-hda",
        ],
    ),
    (
        IDE,
        &[
            "ich9-ahci",
            "ahci",
            "cmd646-ide",
            "piix3-ide",
            "piix4-ide",
            "via-ide",
            "ide-hd",
            "ide-cd",
            "nvme",
        ],
    ),
    (
        SCSI,
        &[
            "am53c974",
            "dc390",
            "lsi53c810",
            "lsi53c895a",
            "lsi",
            "pvscsi",
            "mptsas1068",
            "megasas",
        ],
    ),
    (SCSI_UNIT, &["scsi-cd", "scsi-block", "scsi-generic"]),
    (
        NET,
        &[
            "e1000",
            "e1000-82540em",
            "e1000-82544gc",
            "e1000-82545em",
            "e1000e",
            "igb",
            "i82550",
            "i82551",
            "i82557a",
            "i82557b",
            "i82557c",
            "i82558a",
            "i82558b",
            "i82559a",
            "i82559b",
            "i82559c",
            "i82559er",
            "i82562",
            "i82801",
            "ne2k_pci",
            "pcnet",
            "rtl8139",
            "vmxnet3",
        ],
    ),
    (BRIDGE, &["pcie-pci-bridge"]),
    (
        USB,
        &[
            "piix3-usb-uhci",
            "piix4-usb-uhci",
            "vt82c686b-usb-uhci",
            "ich9-usb-uhci1",
            "ich9-usb-uhci2",
            "ich9-usb-uhci3",
            "ich9-usb-uhci4",
            "ich9-usb-uhci5",
            "ich9-usb-uhci6",
            "qemu-xhci",
            "nec-usb-xhci",
        ],
    ),
    (TPM, &["tpm-tis", "tpm-crb"]),
    (ASSIGNED, &["pci-assign", "kvm-pci-assign"]),
    (
        "devices of the host cannot be given to a guest yet",
        &["vfio-pci"],
    ),
    ("it needs a Xen host", &["xen-pci-passthrough"]),
    (
        "it carries IndustryPack modules, and there are none",
        &["tpci200"],
    ),
    (
        "a serial port on PCI is one port: use pci-serial as often as there are ports",
        &["pci-serial-2x", "pci-serial-4x"],
    ),
];

/// Why there is no model of this name; None when nothing is known of it.
pub(super) fn reason(name: &str) -> Option<&'static str> {
    let of = |(_, names): &&(&str, &[&str])| names.contains(&name);
    REFUSED.iter().find(of).map(|(reason, _)| *reason)
}

#[cfg(test)]
mod tests {
    use super::super::find;
    use super::*;

    #[test]
    fn each_is_refused_by_name_and_with_its_reason() {
        for (reason, names) in REFUSED {
            for name in *names {
                let said = find(name).err().map(|error| error.desc);
                let expected = format!("'{name}' is not a valid device model name: {reason}");
                assert_eq!(said.as_deref(), Some(&*expected));
            }
        }
        let said = find("nope").err().map(|error| error.desc);
        assert_eq!(
            said.as_deref(),
            Some("'nope' is not a valid device model name")
        );
    }

    /// Every kind of PCI hardware that guests of other machines have had for long is here, or refused with a reason.
    #[test]
    fn no_old_model_is_unknown() {
        for name in [
            "AC97",
            "ES1370",
            "intel-hda",
            "pci-serial",
            "tpci200",
            "pci-assign",
            "ich9-ahci",
            "cmd646-ide",
            "piix3-ide",
            "via-ide",
            "ivshmem-plain",
            "pci-testdev",
            "vfio-pci",
            "e1000",
            "i82559er",
            "ne2k_pci",
            "pcnet",
            "rtl8139",
            "vmxnet3",
            "i82801b11-bridge",
            "ioh3420",
            "pci-bridge",
            "xio3130-downstream",
            "x3130-upstream",
            "am53c974",
            "lsi53c895a",
            "pvscsi",
            "piix3-usb-uhci",
            "i6300esb",
            "xen-pci-passthrough",
            "tpm-tis",
        ] {
            let known = find(name).is_ok() || reason(name).is_some();
            assert!(known, "{name}");
        }
    }
}
