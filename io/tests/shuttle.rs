//! Gates and epochs under the model checker, in every interleaving that it finds.
//!
//! Run with `RUSTFLAGS="--cfg shuttle" cargo test -p gipfel-io --test shuttle`.
#![allow(missing_docs)]
#![cfg(shuttle)]

use gipfel_io::{Epoch, Gate};
use shuttle::future::block_on;
use shuttle::sync::Arc;
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shuttle::thread;

const RUNS: usize = 20_000;

fn explore(f: impl Fn() + Send + Sync + 'static + Clone) {
    shuttle::check_random(f.clone(), RUNS);
    shuttle::check_pct(f, RUNS, 3);
}

#[test]
fn nobody_is_inside_while_the_value_changes() {
    explore(|| {
        let gate = Arc::new(Gate::new(0u64));
        // Stands for the memory that those inside use: set while the value is being replaced.
        let changing = Arc::new(AtomicBool::new(false));
        let inside: Vec<_> = (0..3)
            .map(|_| {
                let (gate, changing) = (gate.clone(), changing.clone());
                thread::spawn(move || {
                    block_on(async {
                        let e = gate.enter().await;
                        assert!(!changing.load(Ordering::SeqCst), "inside during the change");
                        let seen = *e;
                        thread::yield_now();
                        assert!(!changing.load(Ordering::SeqCst), "inside during the change");
                        assert_eq!(seen, *e);
                    });
                })
            })
            .collect();
        let closers: Vec<_> = (0..2)
            .map(|_| {
                let (gate, changing) = (gate.clone(), changing.clone());
                thread::spawn(move || {
                    block_on(async {
                        let mut d = gate.close().await;
                        assert!(!changing.swap(true, Ordering::SeqCst), "two closers at once");
                        thread::yield_now();
                        let old = *d.get();
                        d.replace(old + 1);
                        changing.store(false, Ordering::SeqCst);
                    });
                })
            })
            .collect();
        for t in inside.into_iter().chain(closers) {
            t.join().unwrap();
        }
        assert_eq!(block_on(async { *gate.enter().await }), 2);
    });
}

#[test]
fn what_was_retired_is_free_after_two_epochs() {
    explore(|| {
        let epoch = Arc::new(Epoch::default());
        // 0: in use and reachable; 1: retired; 2: given to others.
        let state = Arc::new(AtomicU64::new(0));
        let users: Vec<_> = (0..2)
            .map(|_| {
                let (epoch, state) = (epoch.clone(), state.clone());
                thread::spawn(move || {
                    let pin = epoch.pin();
                    if state.load(Ordering::SeqCst) == 0 {
                        thread::yield_now();
                        assert_ne!(state.load(Ordering::SeqCst), 2, "given away while in use");
                    }
                    drop(pin);
                })
            })
            .collect();
        state.store(1, Ordering::SeqCst);
        let retired = epoch.current();
        while epoch.advance() < retired + 2 {
            thread::yield_now();
        }
        state.store(2, Ordering::SeqCst);
        for u in users {
            u.join().unwrap();
        }
    });
}
