//! System tests by what they need.
