//! How every program here starts, reports, and stops.
