//! Sockets, namespaces, netlink, byte copy: the one home of unsafe.
