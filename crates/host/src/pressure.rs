//! How hard the machine is pressed for memory or disk (PSI), so that quiet work can wait.

use std::path::Path;

/// A pressure file is two short lines.
const FILE_LIMIT_BYTES: u64 = 4 << 10;

/// What tasks may be waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Memory: reclaim, swap-in, refaults.
    Memory,
    /// Block I/O.
    Io,
    /// A free CPU.
    Cpu,
}

impl Resource {
    fn file(self) -> &'static str {
        match self {
            Resource::Memory => "/proc/pressure/memory",
            Resource::Io => "/proc/pressure/io",
            Resource::Cpu => "/proc/pressure/cpu",
        }
    }
}

/// Per cent of the last 10 s in which at least one task waited for it. `None` where the kernel does not measure:
/// then nobody may conclude that there is no pressure.
#[must_use]
pub fn some_avg10(resource: Resource) -> Option<f32> {
    let bytes = crate::files::read_bounded(Path::new(resource.file()), FILE_LIMIT_BYTES).ok()?;
    parse(&String::from_utf8_lossy(&bytes))
}

fn parse(text: &str) -> Option<f32> {
    let line = text.lines().find_map(|l| l.strip_prefix("some "))?;
    let value: f32 = line.split_whitespace().find_map(|w| w.strip_prefix("avg10="))?.parse().ok()?;
    (0.0..=100.0).contains(&value).then_some(value)
}

/// Memory that can be used without pushing out what works (`MemAvailable`); `None` where the kernel does not say.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    let text = crate::files::read_bounded(Path::new("/proc/meminfo"), 64 << 10).ok()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_form_is_read() {
        let text = "some avg10=12.34 avg60=5.00 avg300=1.00 total=123456\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=1\n";
        assert_eq!(parse(text), Some(12.34));
        for bad in
            ["", "full avg10=1.00", "some avg60=1.00", "some avg10=NaN", "some avg10=-1", "some avg10=x"]
        {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn this_kernels_answer_agrees_with_its_files() {
        for resource in [Resource::Memory, Resource::Io, Resource::Cpu] {
            // A kernel may have the file and still refuse to be read (psi=0).
            let readable = std::fs::read(resource.file()).is_ok();
            assert_eq!(some_avg10(resource).is_some(), readable, "{resource:?}");
        }
    }
}
