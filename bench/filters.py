#!/usr/bin/env python3
"""What filters cost: CPU of the server for each 4 KiB random read of a qcow2 image, depth 32.

  bench/filters.py                  5 rounds of 3 s
  bench/filters.py --rounds 9 --check

Two tables. The first is of gipfel alone: a drive without filters, with each of throttle (limits
that are never reached), copy-on-read and detect-zeroes, and with all three, as a ratio to the
drive without. The second has explicit nodes throttle and copy-on-read over the same image, in
gipfel and in qemu-storage-daemon. All run in turns in every round; ratios are of a round's pair,
their median, lowest and highest. With --check a missed goal ends the program with status 1.

Needs fio with its nbd engine, qemu-img and qemu-storage-daemon.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import images  # noqa: E402
import load  # noqa: E402
from peers import Peer, PeerError  # noqa: E402

REFERENCE = "qemu-storage-daemon"
CASE = load.Case("filters", "qcow2", "randread", "4k", 32)
LIMITS = "bps=100000000000,iops=100000000"
#: Options of the drive, and the highest ratio to the drive without any.
DRIVES = {
    "none": ("", None),
    "throttle": (f",{LIMITS}", 1.05),
    "copy-on-read": (",copy-on-read=on", 1.05),
    "detect-zeroes": (",detect-zeroes=on", 1.05),
    "all three": (f",{LIMITS},copy-on-read=on,detect-zeroes=on", 1.10),
}
#: Highest ratio to the reference with the same explicit nodes.
EXPLICIT_GOAL = 0.5


def explicit_nodes(image):
    """A throttle node over a copy-on-read node over the image: --blockdev arguments."""
    chain = load.blockdevs("qcow2", image, False)
    chain[-1] = chain[-1].replace("node-name=top", "node-name=disk")
    return [*chain, "driver=copy-on-read,node-name=reading,file=disk",
            "driver=throttle,node-name=top,throttle-group=group0,file=reading"]


def measure(command, folder, options, blockdevs, more):
    """CPU of one server for each I/O, in microseconds."""
    peer = Peer(command, folder, blockdevs, more)
    try:
        before = peer.cpu_seconds()
        ios, _, _ = load.fio(peer.nbd, CASE, options.seconds, options.size)
        cpu = (peer.cpu_seconds() - before) * 1e6 / max(ios, 1)
        peer.stop()
    finally:
        peer.kill()
    return cpu


def line(name, cpu, base, goal):
    """Prints one row; says whether its goal is met."""
    r = sorted(a / b for a, b in zip(cpu, base))
    middle = statistics.median(r)
    good = goal is None or middle <= goal
    verdict = "" if goal is None else f"  <= {goal}: {'met' if good else 'MISSED'}"
    print(f"  {name:22}{statistics.median(cpu):7.2f} us   x{middle:.3f} ({r[0]:.3f}-{r[-1]:.3f})"
          f"{verdict}", flush=True)
    return good


def main():
    """Runs both tables; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    p.add_argument("--gipfel", default=os.path.join(root, "target", "release", "gipfel"))
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=int, default=3, help="length of one fio run")
    p.add_argument("--size", default="1G", help="size of the image that is read")
    p.add_argument("--dir", default=os.environ.get("BENCH_DIR", "/var/tmp"))
    p.add_argument("--check", action="store_true", help="status 1 if a goal was missed")
    options = p.parse_args()
    folder = tempfile.mkdtemp(prefix="gipfel-bench.", dir=options.dir)
    ours = [options.gipfel, "storage-daemon"]
    group = ["--object", "throttle-group,id=group0,x-bps-total=100000000000,"
                         "x-iops-total=100000000"]
    drives = {name: [] for name in DRIVES}
    explicit = {"gipfel": [], REFERENCE: []}
    try:
        raw, image = os.path.join(folder, "disk.raw"), os.path.join(folder, "disk.qcow2")
        images.stamped_raw(raw, int(options.size[:-1]) << {"M": 20, "G": 30}[options.size[-1]])
        images.tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
        for r in range(options.rounds):
            for i in range(len(DRIVES)):
                name = list(DRIVES)[(i + r) % len(DRIVES)]
                drive = f"file={image},format=qcow2,id=top,discard=unmap{DRIVES[name][0]}"
                cpu = measure(ours, folder, options, [], ["--drive", drive])
                drives[name].append(cpu)
            for name, command in {"gipfel": ours, REFERENCE: [REFERENCE]}.items():
                cpu = measure(command, folder, options, explicit_nodes(image), group)
                explicit[name].append(cpu)
    except PeerError as e:
        raise SystemExit(str(e)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("a drive with filters, CPU for each read, against the drive without")
    met = [line(n, cpu, drives["none"], DRIVES[n][1]) for n, cpu in drives.items()]
    print("explicit nodes throttle and copy-on-read, against the reference")
    met.append(line(REFERENCE, explicit[REFERENCE], explicit[REFERENCE], None))
    met.append(line("gipfel", explicit["gipfel"], explicit[REFERENCE], EXPLICIT_GOAL))
    return 1 if options.check and not all(met) else 0


if __name__ == "__main__":
    sys.exit(main())
