//! The node proxy: captured pod traffic in and out of mutual-TLS tunnels.
