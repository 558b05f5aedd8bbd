//! Capture of pod traffic: the CNI plugin and the node agent.
