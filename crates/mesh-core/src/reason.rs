//! The closed list of why a connection did not go as asked. Logs, metric labels, HTTP statuses and `fairway why` share it.

use std::fmt;

/// Whose doing a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The client, or its connection.
    Downstream,
    /// This proxy, its node or its control plane.
    Local,
    /// A rule the operator wrote (or has not finished delivering).
    Policy,
    /// The destination, or the way to it.
    Upstream,
}

/// Why. Bounded on purpose: a new cause needs a new variant, and the matches below ask its three questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// The peer asked for an address that is not this pod's.
    BadTarget,
    /// The peer broke HBONE, HTTP/2 or SOCKS.
    BadRequest,
    /// TCP connect to the destination was refused or unreachable.
    Connect,
    /// TCP connect to the destination timed out.
    ConnectTimeout,
    /// A policy denies, or none of the allowing ones matches.
    Denied,
    /// This process is shutting down.
    Drain,
    /// No certificate for the local identity.
    Identity,
    /// An internal error; a bug or an exhausted resource.
    Internal,
    /// A connect to port 15008 timed out: a NetworkPolicy may block it.
    NetworkPolicy,
    /// The destination is known by a name that could not be looked up.
    Lookup,
    /// The service has no healthy endpoint.
    NoEndpoint,
    /// A referenced waypoint or gateway does not resolve.
    NoRoute,
    /// The destination is not in the registry, and the source may call nothing else.
    NotInRegistry,
    /// The workload referenced a policy that has not arrived: denied until it does.
    PolicyUnknown,
    /// A socket was reset mid-flow.
    Reset,
    /// A certificate of the peer's chain is on a revocation list.
    Revoked,
    /// The peer's certificate or handshake was not acceptable.
    Tls,
    /// The tunnel's HTTP/2 failed or its CONNECT was refused.
    Tunnel,
    /// This pod's own record has not arrived from the control plane.
    UnknownWorkload,
}

impl Reason {
    pub const ALL: [Self; 19] = [
        Self::BadTarget,
        Self::BadRequest,
        Self::Connect,
        Self::ConnectTimeout,
        Self::Denied,
        Self::Drain,
        Self::Identity,
        Self::Internal,
        Self::Lookup,
        Self::NetworkPolicy,
        Self::NoEndpoint,
        Self::NoRoute,
        Self::NotInRegistry,
        Self::PolicyUnknown,
        Self::Reset,
        Self::Revoked,
        Self::Tls,
        Self::Tunnel,
        Self::UnknownWorkload,
    ];

    pub fn fault(self) -> Fault {
        match self {
            Self::BadRequest | Self::BadTarget | Self::Reset => Fault::Downstream,
            Self::Denied | Self::NotInRegistry | Self::PolicyUnknown | Self::Revoked => Fault::Policy,
            Self::Drain | Self::Identity | Self::Internal | Self::UnknownWorkload => Fault::Local,
            Self::Connect
            | Self::ConnectTimeout
            | Self::Lookup
            | Self::NetworkPolicy
            | Self::NoEndpoint
            | Self::NoRoute
            | Self::Tls
            | Self::Tunnel => Fault::Upstream,
        }
    }

    /// The label value and log field.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::BadTarget => "bad_target",
            Self::Connect => "connect",
            Self::ConnectTimeout => "connect_timeout",
            Self::Denied => "denied",
            Self::Drain => "drain",
            Self::Identity => "identity",
            Self::Internal => "internal",
            Self::Lookup => "lookup",
            Self::NetworkPolicy => "network_policy",
            Self::NoEndpoint => "no_endpoint",
            Self::NoRoute => "no_route",
            Self::NotInRegistry => "not_in_registry",
            Self::PolicyUnknown => "policy_unknown",
            Self::Reset => "reset",
            Self::Revoked => "revoked",
            Self::Tls => "tls",
            Self::Tunnel => "tunnel",
            Self::UnknownWorkload => "unknown_workload",
        }
    }

    /// The `response_flags` label of Istio's TCP metrics.
    pub fn response_flag(self) -> &'static str {
        match self {
            Self::Denied | Self::NotInRegistry | Self::PolicyUnknown => "DENY",
            Self::Tls => "TLS_FAILURE",
            Self::Tunnel => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::Identity => "IDENTITY_ERROR",
            Self::Revoked => "CERT_REVOKED",
            Self::BadRequest
            | Self::BadTarget
            | Self::Connect
            | Self::ConnectTimeout
            | Self::Drain
            | Self::Internal
            | Self::Lookup
            | Self::NoEndpoint
            | Self::NoRoute
            | Self::Reset
            | Self::UnknownWorkload => "CONNECT",
        }
    }

    /// What an operator can do about it.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::BadRequest => "the peer does not speak HBONE as specified; check its version",
            Self::BadTarget => "the peer's view of this pod's address is stale, or its CONNECT was forged",
            Self::Connect => "check that the application listens on the target port",
            Self::ConnectTimeout => "check that the destination's node and pod are reachable",
            Self::Denied => "change the named policy, or the caller's identity",
            Self::Drain => "retry: the connection reached a proxy that was going away",
            Self::Identity => "check the CA's address and logs; this node may not be allowed the identity",
            Self::Internal => "see this proxy's log; report it if it repeats",
            Self::Lookup => "check the destination's host name, and this proxy's DNS",
            Self::NetworkPolicy => "allow TCP port 15008 between the pods in NetworkPolicies and firewalls",
            Self::NoEndpoint => "check the service's selector, ports and the readiness of its pods",
            Self::NoRoute => "check that the waypoint or gateway named exists and is ready",
            Self::NotInRegistry => "add a ServiceEntry for the destination, or set outboundTrafficPolicy to ALLOW_ANY",
            Self::PolicyUnknown => "wait for the control plane, or check its log for the policy's rejection",
            Self::Reset => "the application or its peer closed abruptly; see its own log",
            Self::Revoked => "issue the peer a new certificate, or take its serial off the revocation list",
            Self::Tls => "check both certificates' trust roots, validity and identities",
            Self::Tunnel => "see the far ztunnel's log for the refusal",
            Self::UnknownWorkload => {
                "check that the control plane knows this pod and this node's ztunnel is connected to it"
            }
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
