//! Workload certificates: requests, rotation, verification, TLS configurations.
