//! HBONE tunnels: HTTP/2 CONNECT in mutual TLS.
