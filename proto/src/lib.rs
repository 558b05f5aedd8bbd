//! Wire schemas: one module per protobuf package, generated at build time from `proto/*.proto`.
//!
//! Nothing here decides anything. `mesh-xds::convert` turns these messages into `mesh-core`'s nouns at the border; past it no
//! protobuf type is named.

#![allow(
    clippy::all,
    unreachable_pub,
    unused_qualifications,
    elided_lifetimes_in_paths,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]

/// Protobuf package `envoy`: the delta discovery transport.
pub mod envoy {
    pub mod config {
        pub mod core {
            pub mod v3 {
                tonic::include_proto!("envoy.config.core.v3");
            }
        }
    }
    pub mod service {
        pub mod discovery {
            pub mod v3 {
                tonic::include_proto!("envoy.service.discovery.v3");
            }
        }
    }
}

/// Protobuf package `google.rpc`.
pub mod google {
    pub mod rpc {
        tonic::include_proto!("google.rpc");
    }
}

/// Protobuf package `istio`: workloads, policies, ZDS, the certificate service.
pub mod istio {
    pub mod security {
        tonic::include_proto!("istio.security");
    }
    pub mod workload {
        tonic::include_proto!("istio.workload");

        pub mod zds {
            tonic::include_proto!("istio.workload.zds");
        }
    }
    pub mod v1 {
        pub mod auth {
            tonic::include_proto!("istio.v1.auth");
        }
    }
}

/// Protobuf package `fairway.v1`.
pub mod fairway {
    pub mod v1 {
        tonic::include_proto!("fairway.v1");
    }
}

pub use istio::{security, workload, workload::zds};

/// Shorter paths for the packages that are used most.
pub use envoy::config::core::v3 as core;
pub use envoy::service::discovery::v3 as discovery;
pub use istio::v1::auth as ca;

/// Type URL of `istio.workload.Address` resources.
pub const ADDRESS_TYPE_URL: &str = "type.googleapis.com/istio.workload.Address";

/// Type URL of `istio.security.Authorization` resources.
pub const AUTHORIZATION_TYPE_URL: &str = "type.googleapis.com/istio.security.Authorization";
