//! Delta discovery: one state machine, its client, its server, wire to model.
