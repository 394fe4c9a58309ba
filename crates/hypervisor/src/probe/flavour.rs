// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which kind of KVM this is. For the report's wording only: what it can do is found out by running.

use std::path::Path;

/// The kernel module behind a KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Flavour {
    /// AMD's processor extension.
    Svm,
    /// Intel's processor extension.
    Vmx,
    /// No processor extension: guests that know of it run in user mode; all others are emulated.
    Pvm,
}

impl Flavour {
    const MODULES: [(Flavour, &str); 3] = [
        (Flavour::Svm, "kvm_amd"),
        (Flavour::Vmx, "kvm_intel"),
        (Flavour::Pvm, "kvm_pvm"),
    ];

    /// Looks at the modules under `modules` (`/sys/module`). `None` if none or several are there.
    pub fn detect(modules: &Path) -> Option<Self> {
        let mut found = Self::MODULES
            .iter()
            .filter(|(_, module)| modules.join(module).is_dir());
        let (flavour, _) = found.next()?;
        found.next().is_none().then_some(*flavour)
    }
}

impl std::fmt::Display for Flavour {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Svm => "AMD SVM",
            Self::Vmx => "Intel VMX",
            Self::Pvm => "PVM",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_module_there_is_decides() {
        let modules = std::env::temp_dir().join(format!("ebbtide-flavour-{}", std::process::id()));
        std::fs::create_dir_all(modules.join("kvm")).unwrap();
        assert_eq!(Flavour::detect(&modules), None);
        std::fs::create_dir_all(modules.join("kvm_pvm")).unwrap();
        assert_eq!(Flavour::detect(&modules), Some(Flavour::Pvm));
        std::fs::create_dir_all(modules.join("kvm_amd")).unwrap();
        assert_eq!(Flavour::detect(&modules), None);
        std::fs::remove_dir_all(&modules).unwrap();
    }
}
