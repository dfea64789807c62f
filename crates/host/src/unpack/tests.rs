//! Against archives made on the spot, honest and hostile.
