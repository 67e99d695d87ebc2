"""What clients feel while snapshots are taken under them.

Writers and readers at depth 1, each in its own process and on its own part of the disk, keep the
time and the latency of every request, and hold every answer against what they wrote. Meanwhile
overlays are added and snapshots taken over QMP. A request counts for a snapshot if it was in
flight at any moment from just before the command to 2 ms after its answer.
"""

import multiprocessing
import os
import random
import statistics
import time

import images
from nbdclient import Client
from peers import Peer, Qmp

DISK = "2G"
SPAN = 512 << 20
#: After the answer of a snapshot, requests that start within this many seconds still count.
AFTERMATH = 0.002
FLUSH_EVERY = 64

#: What is measured: key and heading.
MEASURES = [
    ("median", "median us"),
    ("p999", "p99.9 us"),
    ("stall", "worst in a snapshot us"),
    ("worst", "worst us"),
    ("command", "command us"),
]


def writer(path, first, count, seed, flush, stop, out):
    """Alternates writes and checked reads on blocks `first` to `first + count`."""
    client = Client(path, "x")
    r = random.Random(seed)
    known = {}
    times = []
    data = r.randbytes(images.BLOCK)
    number = 0
    problem = None
    try:
        while not stop.is_set():
            number += 1
            block = first + r.randrange(count)
            at = block * images.BLOCK
            begin = time.monotonic()
            if flush and number % FLUSH_EVERY == 0:
                client.flush()
                times.append((begin, time.monotonic() - begin))
            elif number % 2:
                stamp = images.STAMP.pack(images.MARK, number) + data[images.STAMP.size:]
                begin = time.monotonic()
                client.write(at, stamp)
                times.append((begin, time.monotonic() - begin))
                known[block] = number
            else:
                got = client.read(at, images.BLOCK)
                times.append((begin, time.monotonic() - begin))
                if block in known and images.STAMP.unpack_from(got)[1] != known[block]:
                    problem = f"WRONG DATA: block {block}, seed {seed}"
                    break
        for block, number in known.items():
            got = client.read(block * images.BLOCK, images.BLOCK)
            if images.STAMP.unpack_from(got)[1] != number:
                problem = f"WRONG DATA at the end: block {block}, seed {seed}"
                break
        client.close()
    except Exception as e:
        problem = f"{type(e).__name__}: {e} (seed {seed})"
    out.put((times, problem))


def take_snapshots(peer, folder, count, gap):
    """Puts `count` overlays on the disk, one each `gap` seconds; returns when each command ran."""
    qmp = Qmp(peer.control)
    spans = []
    top = "top"
    for i in range(1, count + 1):
        qmp("blockdev-add", driver="file", filename=os.path.join(folder, f"{i}.qcow2"),
            **{"node-name": f"file{i}"})
        qmp("blockdev-add", driver="qcow2", file=f"file{i}", backing=None,
            **{"node-name": f"overlay{i}"})
        begin = time.monotonic()
        qmp("blockdev-snapshot", node=top, overlay=f"overlay{i}")
        spans.append((begin, time.monotonic()))
        top = f"overlay{i}"
        time.sleep(gap)
    qmp.close()
    return spans


def summary(times, spans):
    """Medians and tails inside and outside of the snapshots, in microseconds."""
    def within(start, latency, span):
        return start + latency >= span[0] and start <= span[1] + AFTERMATH

    worst = [max((lat for t, lat in times if within(t, lat, s)), default=0.0) for s in spans]
    outside = sorted(lat for t, lat in times if not any(within(t, lat, s) for s in spans))
    if not outside:
        raise SystemExit("no request outside of the snapshots: use a longer --gap")
    us = 1e6
    return {
        "median": statistics.median(outside) * us,
        "p999": outside[int(len(outside) * 0.999)] * us,
        "stall": statistics.median(worst) * us,
        "worst": max(worst) * us,
        "command": statistics.median(b - a for a, b in spans) * us,
    }


def run_once(command, folder, count, gap, writers, flush, seed):
    """Snapshots under load with one server; returns the measures."""
    chain = [os.path.join(folder, f"{i}.qcow2") for i in range(count + 1)]
    for path in chain:
        images.tool("qemu-img", "create", "-q", "-f", "qcow2", path, DISK)
    images.tool("qemu-io", "-c", f"write -P 1 0 {SPAN}", chain[0])
    peer = Peer(command, folder, [f"driver=file,node-name=file0,filename={chain[0]}",
                                  "driver=qcow2,node-name=top,file=file0"])
    stop, out = multiprocessing.Event(), multiprocessing.Queue()
    share = SPAN // images.BLOCK // writers
    clients = [
        multiprocessing.Process(
            target=writer, args=(peer.nbd, i * share, share, seed + i, flush, stop, out))
        for i in range(writers)
    ]
    try:
        for c in clients:
            c.start()
        time.sleep(1.0)
        spans = take_snapshots(peer, folder, count, gap)
        stop.set()
        results = [out.get(timeout=60) for _ in clients]
        for c in clients:
            c.join()
        peer.stop()
    finally:
        stop.set()
        peer.kill()
        for c in clients:
            if c.is_alive():
                c.terminate()
    for _, problem in results:
        if problem:
            raise SystemExit(f"{command[0]}: {problem}")
    for path in chain:
        images.tool("qemu-img", "check", "-q", "-U", path)
    return summary([t for times, _ in results for t in times], spans)
