"""What control commands cost: nodes added, looked at and deleted while nothing else happens."""

import os
import statistics
import time

import images
from nbdclient import Client
from peers import Peer, Qmp

#: What is measured: key and heading.
MEASURES = [
    ("add", "blockdev-add us"),
    ("query", "query nodes us"),
    ("delete", "blockdev-del us"),
    ("cpu", "CPU us/cycle"),
    ("rss", "peak MiB"),
]


def run_once(command, folder, cycles, seed):
    """Adds a file with a qcow2 node on it, queries, deletes both, many times over."""
    disk = os.path.join(folder, "disk0.qcow2")
    other = os.path.join(folder, "other.qcow2")
    for path in (disk, other):
        images.tool("qemu-img", "create", "-q", "-f", "qcow2", path, "1G")
    peer = Peer(command, folder, [f"driver=file,node-name=file0,filename={disk}",
                                  "driver=qcow2,node-name=top,file=file0"])
    spent = {"add": [], "query": [], "delete": []}
    try:
        qmp = Qmp(peer.control)

        def timed(key, name, **arguments):
            begin = time.monotonic()
            answer = qmp(name, **arguments)
            spent[key].append((time.monotonic() - begin) * 1e6)
            return answer

        before = peer.cpu_seconds()
        for _ in range(cycles):
            timed("add", "blockdev-add", driver="file", filename=other,
                  **{"node-name": "file1"})
            timed("add", "blockdev-add", driver="qcow2", file="file1",
                  **{"node-name": "node1"})
            nodes = timed("query", "query-named-block-nodes")
            names = sorted(n["node-name"] for n in nodes)
            if names != ["file0", "file1", "node1", "top"]:
                raise SystemExit(f"{command[0]}: wrong nodes in the answer: {names}")
            timed("delete", "blockdev-del", **{"node-name": "node1"})
            timed("delete", "blockdev-del", **{"node-name": "file1"})
        cpu = (peer.cpu_seconds() - before) * 1e6 / cycles
        qmp.close()
        client = Client(peer.nbd, "x")
        images.check_writes(client, client.size, 16, seed)
        client.close()
        rss = peer.peak_mib()
        peer.stop()
    finally:
        peer.kill()
    result = {key: statistics.median(v) for key, v in spent.items()}
    return {**result, "cpu": cpu, "rss": rss}
