//! The ACPI power button, by which the host asks the guest to power off.

use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::OFlags;

use crate::error::{Error, While as _};

/// Its name in the kernel (drivers/acpi/button.c).
const NAME: &str = "Power Button";
/// Bytes of `struct input_event` on a 64-bit machine (linux/input.h): time 16, type 2, code 2, value 4.
const EVENT: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Opens it.
pub(crate) fn open() -> Result<File, Error> {
    for entry in fs::read_dir("/sys/class/input").during("list the input devices")? {
        let path = entry.during("list the input devices")?.path();
        let Some(event) = path.file_name().and_then(|name| name.to_str()).filter(|name| name.starts_with("event"))
        else {
            continue;
        };
        if fs::read_to_string(path.join("device/name")).is_ok_and(|name| name.trim_end() == NAME) {
            let flags = OFlags::NONBLOCK.bits().cast_signed();
            return OpenOptions::new()
                .read(true)
                .custom_flags(flags)
                .open(Path::new("/dev/input").join(event))
                .during("open the power button");
        }
    }
    Err(Error::Wrong("the machine has no power button".to_owned()))
}

/// Reads what happened: was it pressed?
pub(crate) fn is_pressed(button: &mut File) -> bool {
    // The kernel gives whole events only.
    let mut events = [0; EVENT * 16];
    button.read(&mut events).is_ok_and(|count| pressed(&events[..count]))
}

fn pressed(events: &[u8]) -> bool {
    events.chunks_exact(EVENT).any(|event| {
        let word = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
        word(16) == EV_KEY && word(18) == KEY_POWER && event[20..] != [0; 4]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: u32) -> Vec<u8> {
        [&[0; 16], &kind.to_ne_bytes()[..], &code.to_ne_bytes()[..], &value.to_ne_bytes()[..]].concat()
    }

    #[test]
    fn only_the_press_of_the_power_key_counts() {
        assert!(pressed(&[event(0, 0, 0), event(EV_KEY, KEY_POWER, 1)].concat()));
        for other in [event(EV_KEY, KEY_POWER, 0), event(EV_KEY, 30, 1), event(0, KEY_POWER, 1), Vec::new()] {
            assert!(!pressed(&other));
        }
        assert!(!pressed(&event(EV_KEY, KEY_POWER, 1)[..23]), "half an event");
    }
}
