//! The io_uring executor, files, sockets, timers and buffers, and their seeded simulation.
