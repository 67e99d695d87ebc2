"""Images whose every 4 KiB block says where it belongs, so that a wrong answer shows."""

import os
import random
import struct
import subprocess

BLOCK = 4096
STAMP = struct.Struct("<8sQ")
MARK = b"gipfel\0\1"


def tool(*args):
    """Runs a reference tool; its failure is ours."""
    done = subprocess.run(args, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(args)}: {done.stderr.strip() or done.stdout.strip()}")


def stamped_raw(path, size):
    """A raw image of `size` bytes: half noise, half zeros, each block stamped with its offset."""
    noise = random.Random(1)
    half = BLOCK // 2
    with open(path, "wb") as f:
        for start in range(0, size, 1 << 20):
            chunk = bytearray()
            for at in range(start, min(start + (1 << 20), size), BLOCK):
                chunk += STAMP.pack(MARK, at)
                chunk += noise.randbytes(half - STAMP.size)
                chunk += bytes(half)
            f.write(chunk)
        f.flush()
        os.fsync(f.fileno())


def check_stamps(client, size, count, seed):
    """Reads `count` random blocks and holds each against its stamp."""
    r = random.Random(seed)
    for _ in range(count):
        at = r.randrange(size // BLOCK) * BLOCK
        got = client.read(at, BLOCK)
        if STAMP.unpack_from(got) != (MARK, at):
            raise SystemExit(
                f"WRONG DATA: block at {at} begins with {got[:16].hex()} (seed {seed})")


def check_writes(client, size, count, seed):
    """Writes `count` random blocks in random order, flushes, and reads each back."""
    r = random.Random(seed)
    blocks = {r.randrange(size // BLOCK) * BLOCK: r.randbytes(BLOCK) for _ in range(count)}
    for at, data in blocks.items():
        client.write(at, data)
    client.flush()
    for at, data in blocks.items():
        if client.read(at, BLOCK) != data:
            raise SystemExit(f"WRONG DATA: block at {at} is not what was written (seed {seed})")
