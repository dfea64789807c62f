//! Against a registry on the loopback that misbehaves on demand.
