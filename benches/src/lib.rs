//! Benchmarks: `e2e` measures the mesh against plain TCP, `micro` the decisions and codecs on their own. See README.md.
#![forbid(unsafe_code)]
