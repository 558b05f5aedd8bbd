//! Virtual nodes and pods on one machine: plays kubelet and container runtime.
