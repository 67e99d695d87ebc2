//! QMP: one definition of commands, events and options; the monitor.
