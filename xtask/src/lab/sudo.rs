//! The ways in which sudo fails on real hosts: each puts a host into one of them, for real, and takes it back.
//!
//! What `sudo -n true` does in each is written beside it and proven by the scenario `sudo-gates`.

use super::host::Host;

/// A broken sudo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// The user is in no rule.
    NotPermitted,
    /// `/etc/sudoers` is gone.
    SudoersMissing,
    /// Everybody may write it.
    SudoersWritable,
    /// A line of it is no rule. This one only warns: sudo works on.
    SyntaxError,
    /// The program has lost its setuid bit.
    SetuidLost,
    /// The program belongs to somebody else.
    OwnerLost,
    /// The program is gone.
    Gone,
    /// The file system it lies on is mounted nosuid.
    Nosuid,
    /// The caller may gain no privileges, as under `NoNewPrivileges=`.
    NoNewPrivileges,
    /// A terminal is required.
    RequireTty,
    /// The caller's account has expired.
    Expired,
    /// A password is asked for. With `-n` that is a refusal, without it sudo waits at a terminal for ever.
    Password,
    /// A PAM module never returns.
    StuckPam,
}

/// All of them.
pub(crate) const ALL: [Broken; 13] = [
    Broken::NotPermitted,
    Broken::SudoersMissing,
    Broken::SudoersWritable,
    Broken::SyntaxError,
    Broken::SetuidLost,
    Broken::OwnerLost,
    Broken::Gone,
    Broken::Nosuid,
    Broken::NoNewPrivileges,
    Broken::RequireTty,
    Broken::Expired,
    Broken::Password,
    Broken::StuckPam,
];

/// What `sudo -n` comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Comes {
    /// It works all the same.
    Works,
    /// It refuses at once, with these words somewhere in what it says.
    Refuses(&'static str),
    /// It never ends.
    Hangs,
}

impl Broken {
    /// Breaks it.
    pub(crate) fn set(self, host: &Host) -> Result<(), String> {
        host.must(self.script().0).map(drop).map_err(|e| format!("{self:?}: {e}"))
    }

    /// Takes it back.
    pub(crate) fn mend(self, host: &Host) -> Result<(), String> {
        host.must(self.script().1).map(drop).map_err(|e| format!("mending {self:?}: {e}"))
    }

    /// What comes of it.
    pub(crate) fn comes(self) -> Comes {
        match self {
            Broken::SyntaxError => Comes::Works,
            Broken::NotPermitted | Broken::Password => Comes::Refuses("password is required"),
            Broken::SudoersMissing => Comes::Refuses("unable to open /etc/sudoers"),
            Broken::SudoersWritable => Comes::Refuses("world writable"),
            Broken::SetuidLost | Broken::OwnerLost => Comes::Refuses("must be owned by uid 0"),
            Broken::Gone => Comes::Refuses("sudo"),
            Broken::Nosuid => Comes::Refuses("nosuid"),
            Broken::NoNewPrivileges => Comes::Refuses("no new privileges"),
            Broken::RequireTty => Comes::Refuses("must have a tty"),
            Broken::Expired => Comes::Refuses("account"),
            Broken::StuckPam => Comes::Hangs,
        }
    }

    /// How the node's user calls it in this state.
    pub(crate) fn call(self) -> &'static str {
        match self {
            Broken::NoNewPrivileges => "setpriv --no-new-privs sudo -n true",
            Broken::NotPermitted
            | Broken::SudoersMissing
            | Broken::SudoersWritable
            | Broken::SyntaxError
            | Broken::SetuidLost
            | Broken::OwnerLost
            | Broken::Gone
            | Broken::Nosuid
            | Broken::RequireTty
            | Broken::Expired
            | Broken::Password
            | Broken::StuckPam => "sudo -n true",
        }
    }

    /// The script that breaks it, and the one that takes it back.
    fn script(self) -> (&'static str, &'static str) {
        match self {
            Broken::NotPermitted => {
                ("mv /etc/sudoers.d/claw /root/claw.sudoers", "mv /root/claw.sudoers /etc/sudoers.d/claw")
            }
            Broken::SudoersMissing => ("mv /etc/sudoers /root/sudoers", "mv /root/sudoers /etc/sudoers"),
            Broken::SudoersWritable => ("chmod 666 /etc/sudoers", "chmod 440 /etc/sudoers"),
            Broken::SyntaxError => (
                "cp -p /etc/sudoers /root/sudoers && echo 'this is no rule' >> /etc/sudoers",
                "mv /root/sudoers /etc/sudoers",
            ),
            Broken::SetuidLost => ("chmod u-s /usr/bin/sudo", "chmod 4755 /usr/bin/sudo"),
            Broken::OwnerLost => {
                // A change of owner takes the bit away; both come back.
                (
                    "chown claw /usr/bin/sudo && chmod 4755 /usr/bin/sudo",
                    "chown root /usr/bin/sudo && chmod 4755 /usr/bin/sudo",
                )
            }
            Broken::Gone => ("mv /usr/bin/sudo /root/sudo.gone", "mv /root/sudo.gone /usr/bin/sudo"),
            Broken::Nosuid => (
                "mount --bind /usr/bin /usr/bin && mount -o remount,bind,nosuid /usr/bin",
                "umount --lazy /usr/bin",
            ),
            // Nothing on the host changes: the caller is made so; a unit is by `NoNewPrivileges=yes`.
            Broken::NoNewPrivileges => ("true", "true"),
            Broken::RequireTty => (
                "echo 'Defaults requiretty' > /etc/sudoers.d/tty && chmod 440 /etc/sudoers.d/tty",
                "rm /etc/sudoers.d/tty",
            ),
            Broken::Expired => ("chage -E 2000-01-01 claw", "chage -E -1 claw"),
            Broken::Password => (
                "cp -p /etc/sudoers.d/claw /root/claw.sudoers && sed -i 's/NOPASSWD: //' /etc/sudoers.d/claw",
                "mv /root/claw.sudoers /etc/sudoers.d/claw",
            ),
            Broken::StuckPam => (
                "cp -p /etc/pam.d/sudo /root/pam.sudo && \
                 sed -i '1i account required pam_exec.so quiet /bin/sleep infinity' /etc/pam.d/sudo",
                "mv /root/pam.sudo /etc/pam.d/sudo",
            ),
        }
    }
}
