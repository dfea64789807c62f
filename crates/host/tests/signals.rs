//! Signals come as words on a descriptor, none lost, however many at once. A process of its own: handlers are global.

use host::clock::Deadline;
use host::poll::readable;
use host::signals::{Got, Signals};
use rustix::process::{Signal, getpid, kill_process};
use std::os::fd::AsFd;
use std::time::Duration;

#[test]
fn each_signal_is_told_once_and_wakes() {
    let mut signals = Signals::new().unwrap();
    let soon = || Deadline::after(Duration::from_secs(10));
    assert_eq!(signals.take().unwrap(), []);
    assert_eq!(readable(&[signals.as_fd()], Deadline::after(Duration::from_millis(10))).unwrap(), [false]);
    for (signal, got) in
        [(Signal::TERM, Got::Terminate), (Signal::INT, Got::Interrupt), (Signal::HUP, Got::Hangup)]
    {
        kill_process(getpid(), signal).unwrap();
        assert_eq!(readable(&[signals.as_fd()], soon()).unwrap(), [true]);
        assert_eq!(signals.take().unwrap(), [got]);
        assert_eq!(signals.take().unwrap(), []);
    }
    // More than the socket holds: still told, and not stuck.
    for _ in 0..5_000 {
        kill_process(getpid(), Signal::HUP).unwrap();
    }
    kill_process(getpid(), Signal::TERM).unwrap();
    assert_eq!(readable(&[signals.as_fd()], soon()).unwrap(), [true]);
    let mut got = Vec::new();
    while !got.contains(&Got::Terminate) || !got.contains(&Got::Hangup) {
        assert!(readable(&[signals.as_fd()], soon()).unwrap()[0], "{got:?}");
        got.extend(signals.take().unwrap());
    }
    // A child's end.
    let out = host::run::run(&host::run::Cmd::new("/bin/true", [""; 0]), soon()).unwrap();
    assert!(out.ok());
    let mut got = signals.take().unwrap();
    while !got.contains(&Got::Child) {
        assert!(readable(&[signals.as_fd()], soon()).unwrap()[0]);
        got.extend(signals.take().unwrap());
    }
}
