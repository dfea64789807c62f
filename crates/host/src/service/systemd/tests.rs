//! Against what systemd printed.
