"""A small NBD client: fixed newstyle, simple replies, one request at a time.

Enough to check answers and to feel latency; load comes from fio. NBD protocol, "Fixed newstyle
negotiation", "Simple reply message".
"""

import socket
import struct

REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698
OPTION_MAGIC = b"IHAVEOPT"
OPT_GO = 7
REP_ACK, REP_INFO = 1, 3
READ, WRITE, DISCONNECT, FLUSH = 0, 1, 2, 3


class NbdError(Exception):
    """The server refused or broke the protocol."""


class Client:
    """One connection to one export."""

    def __init__(self, path, export):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.stream = self.sock.makefile("rb")
        self.cookie = 0
        self.size = self._negotiate(export.encode())

    def _exactly(self, n):
        data = self.stream.read(n)
        if len(data) != n:
            raise NbdError("the server closed the connection")
        return data

    def _negotiate(self, name):
        if self._exactly(16) != b"NBDMAGIC" + OPTION_MAGIC:
            raise NbdError("this is not a newstyle NBD server")
        self._exactly(2)
        self.sock.sendall(struct.pack(">I", 3))
        body = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self.sock.sendall(OPTION_MAGIC + struct.pack(">II", OPT_GO, len(body)) + body)
        size = None
        while True:
            _, _, kind, length = struct.unpack(">QIII", self._exactly(20))
            data = self._exactly(length)
            if kind == REP_INFO and data[:2] == b"\0\0":
                size = struct.unpack(">Q", data[2:10])[0]
            elif kind == REP_ACK:
                return size
            elif kind & 0x80000000:
                raise NbdError(f"export {name.decode()!r} refused: {data.decode(errors='replace')}")

    def request(self, kind, offset, length, data=b""):
        """Sends one request and waits for its answer; returns the data read."""
        self.cookie += 1
        header = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, kind, self.cookie, offset, length)
        self.sock.sendall(header + data)
        reply = self._exactly(16 + (length if kind == READ else 0))
        magic, error, cookie = struct.unpack(">IIQ", reply[:16])
        if magic != REPLY_MAGIC or cookie != self.cookie:
            raise NbdError("an answer that belongs to no request")
        if error:
            raise NbdError(f"request {kind} at {offset}: error {error}")
        return reply[16:]

    def read(self, offset, length):
        """`length` bytes from `offset`."""
        return self.request(READ, offset, length)

    def write(self, offset, data):
        """Writes `data` at `offset`."""
        self.request(WRITE, offset, len(data), data)

    def flush(self):
        """Returns when what was written is durable."""
        self.request(FLUSH, 0, 0)

    def close(self):
        """Says goodbye."""
        self.sock.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, DISCONNECT, 0, 0, 0))
        self.sock.close()
