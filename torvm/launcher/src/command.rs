//! QEMU's command line. Of the request it holds a number and one of two words; everything else is a constant or the number of a
//! descriptor.

use std::fmt::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::Path;

use proxyvpn_torvm::channel::PORT;
use proxyvpn_torvm::config::FW_CFG;
use proxyvpn_torvm::launch::{Accelerator, CMDLINE, Descriptor, Request};
use proxyvpn_torvm::link::{GUEST_MAC, UPLINK_GUEST_MAC, UPLINK_MTU};

/// QEMU's cache of translated instructions, in MiB: by default it takes an eighth of the machine's memory.
const TRANSLATED_MIB: u32 = 128;

/// Firmware that starts a Linux kernel and does nothing else. QEMU's own looks for disks first, which takes 0.3 s by emulation.
const QBOOT: &str = "/usr/share/qemu/qboot.rom";

/// The arguments, and the descriptors that they name.
pub(crate) fn arguments(request: &Request, fds: &[OwnedFd; Descriptor::ALL.len()]) -> (Vec<String>, Vec<RawFd>) {
    let numbers: [RawFd; Descriptor::ALL.len()] = fds.each_ref().map(OwnedFd::as_raw_fd);
    let [tap, link, qmp, channel, kernel, initramfs, state, config] = numbers;
    let accelerator = match request.accelerator {
        Accelerator::Kvm => "kvm".to_owned(),
        Accelerator::Tcg => format!("tcg,thread=multi,tb-size={TRANSLATED_MIB}"),
    };
    let options = [
        // As few devices as can be: each is code that a guest can reach.
        ("name", "torvm".to_owned()),
        ("machine", "q35,vmport=off,smm=off,hpet=off,usb=off,graphics=off,i8042=off,sata=off,smbus=off".to_owned()),
        ("accel", accelerator),
        ("cpu", "max".to_owned()),
        ("smp", "1".to_owned()),
        ("m", format!("{}M", request.memory_mib)),
        ("rtc", "base=utc".to_owned()),
        ("kernel", format!("/proc/self/fd/{kernel}")),
        ("initrd", format!("/proc/self/fd/{initramfs}")),
        ("append", CMDLINE.to_owned()),
        ("fw_cfg", format!("name={FW_CFG},file=/proc/self/fd/{config}")),
        ("netdev", format!("tap,id=host,fd={tap},vhost=off")),
        ("device", format!("virtio-net-pci,netdev=host,mac={},romfile=", mac(GUEST_MAC))),
        // A SOCK_SEQPACKET socket under `dgram`: one packet is one frame, and the end of the other side is seen.
        ("netdev", format!("dgram,id=uplink,local.type=fd,local.str={link}")),
        (
            "device",
            format!("virtio-net-pci,netdev=uplink,mac={},romfile=,host_mtu={UPLINK_MTU}", mac(UPLINK_GUEST_MAC)),
        ),
        // The file belongs to the daemon, so QEMU could not open it anew.
        ("add-fd", format!("fd={state},set=1")),
        ("blockdev", "driver=raw,node-name=state,file.driver=file,file.filename=/dev/fdset/1".to_owned()),
        ("device", "virtio-blk-pci,drive=state".to_owned()),
        ("object", "rng-builtin,id=entropy".to_owned()),
        ("device", "virtio-rng-pci,rng=entropy,max-bytes=1024,period=1000".to_owned()),
        ("device", "virtio-serial-pci,max_ports=2".to_owned()),
        ("chardev", format!("socket,id=channel,fd={channel}")),
        ("device", format!("virtserialport,chardev=channel,name={PORT}")),
        ("chardev", format!("socket,id=qmp,fd={qmp}")),
        ("mon", "chardev=qmp,mode=control".to_owned()),
        ("chardev", "stdio,id=console,signal=off".to_owned()),
        ("serial", "chardev:console".to_owned()),
        ("display", "none".to_owned()),
        ("monitor", "none".to_owned()),
        ("sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned()),
    ];
    let firmware =
        (request.accelerator == Accelerator::Tcg && Path::new(QBOOT).exists()).then(|| ("bios", QBOOT.to_owned()));
    let flags = ["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned);
    let options = options.into_iter().chain(firmware).flat_map(|(name, value)| [format!("-{name}"), value]);
    (flags.into_iter().chain(options).collect(), numbers.to_vec())
}

fn mac(address: [u8; 6]) -> String {
    address.iter().enumerate().fold(String::new(), |mut text, (index, byte)| {
        // A String takes everything.
        let _ = write!(text, "{}{byte:02x}", if index == 0 { "" } else { ":" });
        text
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs::File;

    use super::*;

    fn fds() -> [OwnedFd; Descriptor::ALL.len()] {
        std::array::from_fn(|_| File::open("/dev/null").unwrap().into())
    }

    #[test]
    fn the_request_changes_the_accelerator_and_the_memory_and_nothing_else() {
        let fds = fds();
        let line = |accelerator, memory_mib| arguments(&Request { accelerator, memory_mib }, &fds).0;
        let (tcg, kvm) = (line(Accelerator::Tcg, 256), line(Accelerator::Kvm, 4096));
        let changed: Vec<_> = tcg.iter().zip(&kvm).filter(|(one, other)| one != other).collect();
        assert_eq!(format!("{changed:?}"), r#"[("tcg,thread=multi,tb-size=128", "kvm"), ("256M", "4096M")]"#);
        let firmware = if Path::new(QBOOT).exists() { vec!["-bios", QBOOT] } else { vec![] };
        assert_eq!(tcg[kvm.len()..], firmware);
    }

    #[test]
    fn each_descriptor_has_its_place() {
        let fds = fds();
        let (line, numbers) = arguments(&Request { accelerator: Accelerator::Tcg, memory_mib: 256 }, &fds);
        let line = line.join(" ");
        let [tap, link, qmp, channel, kernel, initramfs, state, config] = numbers.try_into().unwrap();
        for place in [
            format!("-netdev tap,id=host,fd={tap},vhost=off"),
            format!("local.type=fd,local.str={link} "),
            format!("socket,id=qmp,fd={qmp} -mon chardev=qmp,mode=control"),
            format!("socket,id=channel,fd={channel} "),
            format!("-kernel /proc/self/fd/{kernel} "),
            format!("-initrd /proc/self/fd/{initramfs} "),
            format!("-add-fd fd={state},set=1 "),
            format!("name=opt/org.proxyvpn/config,file=/proc/self/fd/{config} "),
            "netdev=host,mac=52:54:00:10:10:01,".to_owned(),
            "netdev=uplink,mac=52:54:00:10:11:02,romfile=,host_mtu=65520 ".to_owned(),
            "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned(),
        ] {
            assert!(line.contains(&place), "{place}\n{line}");
        }
    }
}
