"""Load by fio over NBD: throughput, CPU for each I/O, tail latency, memory."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field

import images
from nbdclient import Client
from peers import Peer


@dataclass
class Case:
    """One load: which image, which pattern, and what is wanted in comparison."""

    name: str
    fmt: str
    pattern: str
    block: str
    depth: int
    fresh: str = ""
    direct: bool = False
    goals: dict = field(default_factory=dict)


READ_GOALS = {"iops": (">=", 1.5), "cpu": ("<=", 0.5), "rss": ("<=", 2.0)}
ALLOCATE_GOALS = {"iops": (">=", 1.2), "cpu": ("<=", 1.0), "rss": ("<=", 2.0)}

CASES = [
    Case("raw-randread-4k-qd32", "raw", "randread", "4k", 32, goals=READ_GOALS),
    Case("raw-randread-4k-qd1", "raw", "randread", "4k", 1),
    Case("qcow2-randread-4k-qd32", "qcow2", "randread", "4k", 32, goals=READ_GOALS),
    Case("qcow2-randwrite-4k-qd32", "qcow2", "randwrite", "4k", 32),
    Case("qcow2-alloc-64k-qd16", "qcow2", "write", "64k", 16, fresh="16G", goals=ALLOCATE_GOALS),
    Case("qcow2-alloc-4k-rand", "qcow2", "randwrite", "4k", 32, fresh="4G", goals=ALLOCATE_GOALS),
    Case("qcow2-read-1m-qd8", "qcow2", "read", "1m", 8),
    Case("raw-direct-randread-4k-qd32", "raw", "randread", "4k", 32, direct=True),
]

#: What is measured: key and heading.
MEASURES = [("iops", "IOPS"), ("cpu", "CPU us/IO"), ("p99", "p99 us"), ("rss", "peak MiB")]


def blockdevs(fmt, image, direct):
    """The node chain whose top is called `top`, as --blockdev arguments."""
    cache = "on" if direct else "off"
    name = "top" if fmt == "raw" else "file0"
    chain = [f"driver=file,node-name={name},filename={image},cache.direct={cache},"
             "aio=io_uring,discard=unmap"]
    if fmt != "raw":
        chain.append(f"driver={fmt},node-name=top,file=file0,discard=unmap")
    return chain


def fio(socket, case, seconds, size):
    """One fio run; returns its number of I/Os, IOPS and p99 in microseconds."""
    args = ["fio", "--name=load", "--ioengine=nbd", f"--uri=nbd+unix:///x?socket={socket}",
            f"--rw={case.pattern}", f"--bs={case.block}", f"--iodepth={case.depth}",
            "--time_based", f"--runtime={seconds}", f"--size={size}", "--randrepeat=0",
            "--output-format=json"]
    done = subprocess.run(args, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(args)}\n{done.stderr.strip()}")
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    side = job["read"] if "read" in case.pattern else job["write"]
    p99 = side["clat_ns"]["percentile"]["99.000000"] / 1000
    return side["total_ios"], side["iops"], p99


def run_once(case, command, folder, stock, size_text, size, seconds, seed):
    """Serves the case's image with one server, loads it, checks it; returns the measures."""
    image = stock[case.fmt]
    if case.fresh:
        image = os.path.join(folder, "fresh.qcow2")
        images.tool("qemu-img", "create", "-q", "-f", "qcow2", image, case.fresh)
    elif "write" in case.pattern:
        # The stock image keeps its stamps: writes go to a copy.
        image = os.path.join(folder, f"scratch.{case.fmt}")
        if not os.path.exists(image):
            shutil.copyfile(stock[case.fmt], image)
    peer = Peer(command, folder, blockdevs(case.fmt, image, case.direct))
    try:
        client = Client(peer.nbd, "x")
        if "read" in case.pattern:
            images.check_stamps(client, size, 64, seed)
        before = peer.cpu_seconds()
        ios, iops, p99 = fio(peer.nbd, case, seconds, case.fresh or size_text)
        cpu = (peer.cpu_seconds() - before) * 1e6 / max(ios, 1)
        rss = peer.peak_mib()
        if "write" in case.pattern:
            images.check_writes(client, client.size, 64, seed)
        client.close()
        peer.stop()
    finally:
        peer.kill()
    if case.fmt == "qcow2" and "write" in case.pattern:
        images.tool("qemu-img", "check", "-q", image)
    return {"iops": iops, "cpu": cpu, "p99": p99, "rss": rss}
