//! Manifests to model to discovery, and the workload CA.
