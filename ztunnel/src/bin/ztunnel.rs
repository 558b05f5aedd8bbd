//! Placeholder until its library is in place.
fn main() {}
