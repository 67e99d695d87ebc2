//! Filter drivers: throttle, copy-on-read, detect-zeroes.
