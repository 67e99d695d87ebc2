"""The servers that are compared: started with the same options, measured from outside."""

import json
import os
import signal
import socket
import subprocess
import time

TICKS = os.sysconf("SC_CLK_TCK")


class PeerError(Exception):
    """A server that did not start, died, or refused a command."""


class Peer:
    """One running storage daemon that serves the node `top` as the NBD export `x`."""

    def __init__(self, command, folder, blockdevs, more=()):
        self.nbd = os.path.join(folder, "nbd.sock")
        self.control = os.path.join(folder, "qmp.sock")
        self.log = os.path.join(folder, "server.log")
        for path in (self.nbd, self.control):
            if os.path.exists(path):
                os.unlink(path)
        args = [*command, *more]
        for b in blockdevs:
            args += ["--blockdev", b]
        args += ["--nbd-server", f"addr.type=unix,addr.path={self.nbd},max-connections=0"]
        args += ["--export", "type=nbd,id=export0,node-name=top,name=x,writable=on"]
        args += ["--chardev", f"socket,id=control0,path={self.control},server=on,wait=off"]
        args += ["--monitor", "chardev=control0"]
        self.args = args
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(args, stdout=log, stderr=log)
        self._wait_until_it_listens()

    def _wait_until_it_listens(self):
        end = time.monotonic() + 10
        for path in (self.nbd, self.control):
            while True:
                try:
                    with socket.socket(socket.AF_UNIX) as s:
                        s.connect(path)
                    break
                except OSError:
                    if self.process.poll() is not None or time.monotonic() > end:
                        self.process.kill()
                        with open(self.log, encoding="utf-8") as log:
                            said = log.read().strip()
                        line = " ".join(self.args)
                        raise PeerError(f"does not serve: {line}\n{said}") from None
                    time.sleep(0.02)
        time.sleep(0.2)

    def cpu_seconds(self):
        """User and system time of the whole process so far, ended threads included."""
        with open(f"/proc/{self.process.pid}/stat", encoding="utf-8") as f:
            fields = f.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def peak_mib(self):
        """The most memory it ever had resident, in MiB."""
        with open(f"/proc/{self.process.pid}/status", encoding="utf-8") as f:
            for line in f:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
        return 0.0

    def stop(self):
        """Asks it to end; an end that is not clean is an error."""
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise PeerError(f"did not end within 30 s: {self.args[0]}") from None
        if status not in (0, -signal.SIGTERM):
            raise PeerError(f"ended with status {status}: {' '.join(self.args)}")

    def kill(self):
        """Ends it whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Qmp:
    """A QMP connection, past its greeting."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.stream = self.sock.makefile("r", encoding="utf-8")
        if "QMP" not in json.loads(self.stream.readline()):
            raise PeerError("no QMP greeting")
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        message = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        self.sock.sendall(json.dumps(message).encode() + b"\n")
        while True:
            line = self.stream.readline()
            if not line:
                raise PeerError(f"{command}: the monitor closed")
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise PeerError(f"{command}: {answer['error'].get('desc')}")

    def close(self):
        """Closes the connection."""
        self.sock.close()
