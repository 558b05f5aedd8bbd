//! fairway: the command line and the multi-call binary.
