// SPDX-License-Identifier: GPL-2.0

//! VFIO: a device that is given to user space, and memory that is mapped for its DMA.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Map, PAGE};
use crate::check::skip;

const TYPE1: libc::c_int = 1;
const DMA_READ_WRITE: u32 = 1 | 2;
/// The bus address at which the memory would be.
const DMA_ADDRESS: u64 = 1 << 24;

/// `struct vfio_iommu_type1_dma_map` as the kernel lays it out.
#[repr(C)]
pub struct DmaMap {
    size_of_this: u32,
    flags: u32,
    address: u64,
    dma_address: u64,
    size: u64,
}

nix::ioctl_write_int_bad!(set_iommu, 0x3b66);
nix::ioctl_write_ptr_bad!(set_container, 0x3b68, libc::c_int);
nix::ioctl_write_ptr_bad!(map_dma, 0x3b71, DmaMap);

/// QEMU's teaching device, which no driver claims.
const EDU: (&str, &str) = ("0x1234", "0x11e8");

/// A container with the IOMMU group of one device in it.
pub struct Container {
    container: File,
    _group: File,
}

impl Container {
    /// Takes the test machine's device; a skip where there is none, or no IOMMU.
    pub fn new() -> Result<Container> {
        let device = find_device()?.ok_or_else(|| skip("no device that VFIO could have"))?;
        let Ok(group) = fs::read_link(device.join("iommu_group")) else {
            return Err(skip("the device is behind no IOMMU"));
        };
        let name = device.file_name().context("a device has a name")?;
        fs::write(device.join("driver_override"), "vfio-pci")?;
        if !device.join("driver").exists() {
            let probe = Path::new("/sys/bus/pci/drivers_probe");
            fs::write(probe, name.as_encoded_bytes()).context("probe the device")?;
        }
        if !device.join("driver").exists() {
            return Err(skip("vfio-pci is not loaded"));
        }
        let open = |path: &Path| {
            File::options()
                .read(true)
                .write(true)
                .open(path)
                .with_context(|| format!("open {}", path.display()))
        };
        let container = open(Path::new("/dev/vfio/vfio"))?;
        let number = group.file_name().context("a group has a number")?;
        let group = open(&Path::new("/dev/vfio").join(number))?;
        // SAFETY: the argument points to a descriptor's number.
        unsafe { set_container(group.as_raw_fd(), &container.as_raw_fd()) }
            .context("VFIO_GROUP_SET_CONTAINER")?;
        // SAFETY: the argument is a number.
        unsafe { set_iommu(container.as_raw_fd(), TYPE1) }.context("VFIO_SET_IOMMU")?;
        Ok(Container {
            container,
            _group: group,
        })
    }

    /// Maps all of `map` for the device, which pins it until the container goes.
    pub fn map(&self, map: &Map) -> nix::Result<()> {
        let request = DmaMap {
            size_of_this: size_of::<DmaMap>() as u32,
            flags: DMA_READ_WRITE,
            address: map.addr() as u64,
            dma_address: DMA_ADDRESS,
            size: (map.pages() * PAGE) as u64,
        };
        // SAFETY: the structure has the kernel's layout and describes a mapping, whose words are
        // atomics for everybody; no device is told to use it.
        unsafe { map_dma(self.container.as_raw_fd(), &request) }.map(drop)
    }
}

fn find_device() -> Result<Option<PathBuf>> {
    let Ok(devices) = fs::read_dir("/sys/bus/pci/devices") else {
        return Ok(None);
    };
    for entry in devices {
        let path = entry?.path();
        let value = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
        if (value("vendor").trim(), value("device").trim()) == EDU {
            return Ok(Some(path));
        }
    }
    Ok(None)
}
