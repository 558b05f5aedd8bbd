//! What every fuzz target does with its parser: run it on the seeds, on mangled seeds and on noise. Under `cargo bolero` coverage
//! takes over. The targets themselves are the tests of this package.

#![forbid(unsafe_code)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use rand::{Rng, RngExt as _, SeedableRng as _, rngs::StdRng};

pub use bolero;

/// A test of one parser of bytes. Its seeds are the files of `corpus/<name>/`; `runs` scales how much is tried in an ordinary run,
/// 1,000 unless said otherwise.
#[macro_export]
macro_rules! target {
    ($(#[$doc:meta])* $name:ident, $check:expr) => {
        $crate::target!($(#[$doc])* $name, runs = 1_000, $check);
    };
    ($(#[$doc:meta])* $name:ident, runs = $runs:expr, $check:expr) => {
        $(#[$doc])*
        #[test]
        fn $name() {
            let check = $check;
            $crate::each_known_input(stringify!($name), $runs, |bytes| check(bytes));
            $crate::bolero::check!().with_iterations($runs).for_each(|bytes: &[u8]| check(bytes));
        }
    };
}

/// Gives `check` every seed of a target, then `runs` mangled ones, the same in every run. `BOLERO_RANDOM_ITERATIONS`, which bolero
/// obeys for its noise, overrides `runs` here too.
///
/// # Panics
/// When the target has no seeds: such a target has been misnamed.
pub fn each_known_input(target: &str, runs: usize, mut check: impl FnMut(&[u8])) {
    let seeds = seeds(target);
    for (path, seed) in &seeds {
        println!("seed {}", path.display());
        check(seed);
    }
    let wanted = std::env::var("BOLERO_RANDOM_ITERATIONS").ok().and_then(|text| text.parse().ok());
    let mut rng = StdRng::seed_from_u64(0);
    for run in 0..wanted.unwrap_or(runs) {
        let mut bytes = seeds[run % seeds.len()].1.clone();
        for _ in 0..rng.random_range(1..=4) {
            mangle(&mut bytes, &seeds[rng.random_range(0..seeds.len())].1, &mut rng);
        }
        check(&bytes);
    }
}

fn seeds(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} holds no seed", folder.display());
    let read = |path: PathBuf| fs::read(&path).map(|bytes| (path, bytes)).expect("seeds are readable");
    files.into_iter().map(read).collect()
}

/// One small change: what a damaged, cut or hostile message looks like to a parser that likes the original.
fn mangle(bytes: &mut Vec<u8>, other: &[u8], rng: &mut impl Rng) {
    const TELLING: &[u8] = b"\0\x01\x7f\x80\xff0:;,=/%*-\"'{}[]&!#|> \n\r\t";
    let at = rng.random_range(0..=bytes.len());
    let end = rng.random_range(at..=bytes.len().min(at + 16));
    match rng.random_range(0..7) {
        0 => bytes.truncate(at),
        1 => drop(bytes.drain(at..end)),
        2 => bytes.insert(at, rng.random()),
        3 => bytes.insert(at, TELLING[rng.random_range(0..TELLING.len())]),
        4 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
        5 => {
            let copy = bytes[at..end].to_vec();
            bytes.splice(end..end, copy);
        }
        _ => {
            let from = rng.random_range(0..=other.len());
            let to = rng.random_range(from..=other.len().min(from + 64));
            bytes.splice(at..end, other[from..to].iter().copied());
        }
    }
}
