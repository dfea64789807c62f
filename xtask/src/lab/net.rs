//! The network of a site: one switch in a network namespace of its own, a cable to each host, and the ways to cut it.
//!
//! The machine's own network is never touched, and nothing in a site can reach it: the switch has no uplink. The
//! services of the lab (registry, receiver of alerts) listen at the switch's own address.

use super::tool;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// `ip` and `nft` take milliseconds.
const TOOL_LIMIT: Duration = Duration::from_secs(60);
/// Where the lab's services listen.
pub(crate) const SERVICES: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The largest number of hosts of one site.
pub(crate) const HOSTS_LIMIT: u8 = 9;

/// A switch with its namespace.
pub(crate) struct Switch {
    name: String,
    scratch: PathBuf,
}

/// A way to cut a host off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// The cable is pulled: no route, no answer.
    Link,
    /// What arrives for the host and what it sends vanishes; connections hang.
    Drop,
    /// Connections to this port of others are answered with a reset.
    ResetTo(u16),
    /// After this many bytes from this port of others nothing more arrives; the connection stays open.
    StallFrom(u16, u64),
}

/// The address of the host with this index.
pub(crate) fn address(index: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, 10 + index)
}

impl Switch {
    pub(crate) fn new(name: &str, scratch: &Path) -> Result<Switch, String> {
        let switch = Switch { name: name.to_owned(), scratch: scratch.to_owned() };
        switch.must(&["ip", "netns", "add", name])?;
        switch.ip(name, &["link", "set", "lo", "up"])?;
        switch.ip(name, &["link", "add", "br0", "type", "bridge"])?;
        switch.ip(name, &["addr", "add", &format!("{SERVICES}/24"), "dev", "br0"])?;
        switch.ip(name, &["link", "set", "br0", "up"])?;
        Ok(switch)
    }

    /// A namespace for a host, with a cable to the switch.
    pub(crate) fn plug(&self, host: &str, index: u8) -> Result<String, String> {
        let netns = format!("{}-{host}", self.name);
        let cable = cable(host);
        self.must(&["ip", "netns", "add", &netns])?;
        self.ip(
            &self.name,
            &["link", "add", &cable, "type", "veth", "peer", "name", "eth0", "netns", &netns],
        )?;
        self.ip(&self.name, &["link", "set", &cable, "master", "br0", "up"])?;
        self.ip(&netns, &["link", "set", "lo", "up"])?;
        self.ip(&netns, &["addr", "add", &format!("{}/24", address(index)), "dev", "eth0"])?;
        self.ip(&netns, &["link", "set", "eth0", "up"])?;
        Ok(netns)
    }

    /// The namespace in which the lab's services listen.
    pub(crate) fn netns(&self) -> &str {
        &self.name
    }

    /// Cuts a host off in this way; cuts add up until [`Switch::mend`].
    pub(crate) fn cut(&self, host: &str, netns: &str, cut: Cut) -> Result<(), String> {
        let rules = match cut {
            Cut::Link => return self.ip(&self.name, &["link", "set", &cable(host), "down"]).map(drop),
            Cut::Drop => {
                "add rule inet lab in iifname eth0 drop\nadd rule inet lab out oifname eth0 drop\n".to_owned()
            }
            Cut::ResetTo(port) => {
                format!("add rule inet lab out oifname eth0 tcp dport {port} reject with tcp reset\n")
            }
            Cut::StallFrom(port, bytes) => {
                format!("add rule inet lab in iifname eth0 tcp sport {port} quota over {bytes} bytes drop\n")
            }
        };
        let table = "add table inet lab\n\
            add chain inet lab in { type filter hook input priority 0; }\n\
            add chain inet lab out { type filter hook output priority 0; }\n";
        self.nft(netns, &format!("{table}{rules}"))
    }

    /// Takes every cut of a host away.
    pub(crate) fn mend(&self, host: &str, netns: &str) -> Result<(), String> {
        self.ip(&self.name, &["link", "set", &cable(host), "up"])?;
        // Who could not be reached is remembered on both sides for seconds.
        self.ip(&self.name, &["neigh", "flush", "dev", "br0"])?;
        self.ip(netns, &["neigh", "flush", "dev", "eth0"])?;
        self.nft(netns, "add table inet lab\ndelete table inet lab\n")
    }

    fn nft(&self, netns: &str, text: &str) -> Result<(), String> {
        let file = self.scratch.join(format!("{netns}.nft"));
        std::fs::write(&file, text).map_err(|e| format!("write {}: {e}", file.display()))?;
        self.must(&["ip", "netns", "exec", netns, "nft", "-f", &file.to_string_lossy()]).map(drop)
    }

    fn ip(&self, netns: &str, args: &[&str]) -> Result<String, String> {
        self.must(&[&["ip", "-n", netns], args].concat())
    }

    fn must(&self, words: &[&str]) -> Result<String, String> {
        tool::must(words, &self.scratch, TOOL_LIMIT)
    }
}

fn cable(host: &str) -> String {
    format!("v-{host}")
}

/// Does something in a network namespace. Sockets that are made there stay there, whoever uses them later.
fn within<T: Send + 'static>(
    netns: &str,
    act: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, String> {
    let path = format!("/run/netns/{netns}");
    let file = File::open(&path).map_err(|e| format!("open {path}: {e}"))?;
    let thread = std::thread::spawn(move || {
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
        act()
    });
    let result = thread.join().map_err(|_| "the thread in the namespace died".to_owned())?;
    result.map_err(|e| format!("in the network {netns}: {e}"))
}

pub(crate) fn listen(netns: &str, address: SocketAddr) -> Result<TcpListener, String> {
    within(netns, move || TcpListener::bind(address))
}

pub(crate) fn connect(netns: &str, address: SocketAddr, limit: Duration) -> Result<TcpStream, String> {
    within(netns, move || {
        let stream = TcpStream::connect_timeout(&address, limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        Ok(stream)
    })
}
