#!/usr/bin/env python3
"""gipfel and qemu-storage-daemon under the same load, interleaved in one run, as ratios.

  bench/run.py                          all cases, 3 rounds
  bench/run.py --case raw-randread-4k-qd32 stall --rounds 5
  bench/run.py --list

Each round runs every server once, in turns, on the same image. Reported are the medians over the
rounds and the ratio of each round's pair: median, lowest and highest. CPU is user and system time
of the whole server process for each I/O; memory is the server's peak. Answers are checked in every
run (stamped blocks, blocks written and read back, `qemu-img check`): wrong data ends the program
with status 1. With --check, so does a goal that was missed.

Needs fio with its nbd engine, qemu-img, qemu-io and qemu-storage-daemon; Python 3.9, nothing else.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import control  # noqa: E402
import images  # noqa: E402
import load  # noqa: E402
import stall  # noqa: E402
from peers import PeerError  # noqa: E402

REFERENCE = "qemu-storage-daemon"
STALL_GOAL_US = 2000.0


def parse_size(text):
    """512M, 1G and plain bytes."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def ratios(results, name, key):
    """Round by round, `name` divided by the reference: median, lowest, highest."""
    pairs = zip(results[name], results[REFERENCE])
    r = sorted(a[key] / b[key] for a, b in pairs if b[key] > 0)
    return (statistics.median(r), r[0], r[-1]) if r else None


def report(title, results, measures, goals):
    """Prints one case, a line for each measure; returns its medians and whether goals were met."""
    medians = {
        name: {key: statistics.median(r[key] for r in rounds) for key, _ in measures}
        for name, rounds in results.items()
    }
    print(f"\n{title}")
    print(" " * 26 + "".join(f"{name:>21}" for name in results))
    compared = len(results) > 1
    met = True
    for key, heading in measures:
        line = f"  {heading:24}" + "".join(f"{medians[name][key]:21.1f}" for name in results)
        r = ratios(results, "gipfel", key) if compared else None
        if r:
            line += f"   x{r[0]:.2f} ({r[1]:.2f}-{r[2]:.2f})"
            if key in goals:
                sign, bound = goals[key]
                good = r[0] >= bound if sign == ">=" else r[0] <= bound
                met &= good
                line += f"  {sign} {bound}: {'met' if good else 'MISSED'}"
        print(line, flush=True)
    return medians, met


def in_turns(peers, rounds, once):
    """Runs `once(name, command, round)` for every peer and round; who begins changes."""
    results = {name: [] for name in peers}
    names = list(peers)
    for r in range(rounds):
        for i in range(len(names)):
            name = names[(i + r) % len(names)]
            results[name].append(once(name, peers[name], r))
    return results


def run_load(case, peers, options, folder, stock):
    """One fio case."""
    size = parse_size(options.size)

    def once(_name, command, r):
        return load.run_once(case, command, folder, stock, options.size, size, options.seconds,
                             options.seed + r)

    results = in_turns(peers, options.rounds, once)
    return report(case.name, results, load.MEASURES, case.goals)


def run_stall(name, flush, peers, options, folder):
    """Snapshots under load."""
    def once(_name, command, r):
        return stall.run_once(command, folder, options.snapshots, options.gap, options.writers,
                              flush, options.seed + r * options.writers)

    results = in_turns(peers, options.rounds, once)
    title = f"{name}: {options.snapshots} snapshots under {options.writers} clients"
    medians, _ = report(title, results, stall.MEASURES, {})
    met = True
    if "gipfel" in medians:
        m = medians["gipfel"]
        met = m["stall"] < STALL_GOAL_US and m["stall"] <= m["p999"]
        print(f"  goal: worst I/O in a snapshot {m['stall']:.0f} us, under {STALL_GOAL_US:.0f} us "
              f"and not above p99.9 of {m['p999']:.0f} us: {'met' if met else 'MISSED'}")
    return medians, met


def run_control(peers, options, folder):
    """Control commands."""
    def once(_name, command, r):
        return control.run_once(command, folder, options.cycles, options.seed + r)

    results = in_turns(peers, options.rounds, once)
    return report(f"control: {options.cycles} cycles", results, control.MEASURES, {})


STALLS = {"stall": False, "stall-flush": True}


def arguments():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    p.add_argument("--gipfel", default=os.path.join(root, "target", "release", "gipfel"),
                   help="the binary (default: target/release/gipfel)")
    p.add_argument("--only", choices=["gipfel", REFERENCE], help="measure one server alone")
    p.add_argument("--case", nargs="*", help="which cases (default: all); see --list")
    p.add_argument("--list", action="store_true", help="name the cases and end")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=int, default=4, help="length of one fio run")
    p.add_argument("--size", default="1G", help="size of the image that is read")
    p.add_argument("--snapshots", type=int, default=20)
    p.add_argument("--gap", type=float, default=0.25, help="seconds between snapshots")
    p.add_argument("--writers", type=int, default=2)
    p.add_argument("--cycles", type=int, default=200, help="of adding and deleting nodes")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--dir", default=os.environ.get("BENCH_DIR", "/var/tmp"),
                   help="where images are made (default: $BENCH_DIR or /var/tmp)")
    p.add_argument("--json", help="also write the medians to this file")
    p.add_argument("--check", action="store_true", help="status 1 if a goal was missed")
    return p.parse_args()


def main():
    """Runs the cases asked for; returns the exit status."""
    options = arguments()
    known = [c.name for c in load.CASES] + [*STALLS, "control"]
    if options.list:
        print("\n".join(known))
        return 0
    wanted = options.case or known
    for name in wanted:
        if name not in known:
            raise SystemExit(f"no case is called '{name}'; --list names them")
    peers = {REFERENCE: [REFERENCE], "gipfel": [options.gipfel, "storage-daemon"]}
    if options.only:
        peers = {options.only: peers[options.only]}
    if "gipfel" in peers and not os.access(options.gipfel, os.X_OK):
        raise SystemExit(f"no binary at {options.gipfel}: run `cargo build --release` first")
    folder = tempfile.mkdtemp(prefix="gipfel-bench.", dir=options.dir)
    out, all_met = {}, True
    try:
        stock = {fmt: os.path.join(folder, f"disk.{fmt}") for fmt in ("raw", "qcow2")}
        if any(n in {c.name for c in load.CASES} for n in wanted):
            images.stamped_raw(stock["raw"], parse_size(options.size))
            images.tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", stock["raw"],
                        stock["qcow2"])
        for name in wanted:
            if name == "control":
                out[name], met = run_control(peers, options, folder)
            elif name in STALLS:
                out[name], met = run_stall(name, STALLS[name], peers, options, folder)
            else:
                case = next(c for c in load.CASES if c.name == name)
                out[name], met = run_load(case, peers, options, folder, stock)
            all_met &= met
    except PeerError as e:
        raise SystemExit(str(e)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as f:
            json.dump(out, f, indent=1)
    return 1 if options.check and not all_met else 0


if __name__ == "__main__":
    sys.exit(main())
