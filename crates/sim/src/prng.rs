//! Chance from one seed: SplitMix64, ten lines that give the same schedule on every machine for ever.

/// A stream of numbers that its seed determines.
#[derive(Debug, Clone)]
pub struct Prng(u64);

impl Prng {
    /// The stream of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Prng {
        Prng(seed ^ 0x6B6F_626F_7368_6921)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A number in `from..=to`.
    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        let width = to.saturating_sub(from).saturating_add(1);
        from.saturating_add(self.draw() % width.max(1))
    }

    /// True in `permille` of 1000 cases. Draws nothing for 0, so that a fault that is off costs nothing.
    pub fn chance(&mut self, permille: u64) -> bool {
        permille > 0 && self.draw() % 1000 < permille
    }

    /// One of a few values.
    pub fn pick<T: Copy>(&mut self, of: &[T], default: T) -> T {
        let index = usize::try_from(self.draw() % (of.len().max(1) as u64)).unwrap_or(0);
        of.get(index).copied().unwrap_or(default)
    }
}

/// Spreads the bits of a number; also the fakes' hash.
#[must_use]
pub fn mix(seed: u64) -> u64 {
    let mut z = seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
