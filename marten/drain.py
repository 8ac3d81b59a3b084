"""Let the requests in flight be answered before TorchServe ends, which itself drops every one of them.

TorchServe cannot be told to stop accepting, and counts nothing that says how many requests are open. The kernel can
do both: the listening socket is shut down from outside (new connections are refused, open ones live on), and each
connection knows when it last received and last sent: received later than sent means that an answer is owed.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 0.05
_SETTLED_TICKS = 3
_SYS_PIDFD_GETFD = 438  # the same number on every Linux architecture
# linux/sock_diag.h, linux/inet_diag.h, linux/tcp.h
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, _INET_DIAG_INFO = 4, 20, 0x301, 2
_ESTABLISHED, _CLOSE_WAIT = 1, 8
# offsets in struct tcp_info
_LAST_DATA_SENT, _LAST_DATA_RECEIVED, _SEGMENTS_RECEIVED, _SEGMENTS_SENT = 44, 52, 152, 156
_SAME_TICK_TRUST_MS = 10_000


def drain(pid: int, port: int, patience_s: float) -> int:
    """Refuse new connections and wait until no answer is owed on a port.

    Where the kernel refuses the first (another user's process, a container without ptrace), new requests are still
    taken, and the wait is for a moment without any.

    Args:
        pid: process that listens on the port.
        port: TCP port.
        patience_s: longest wait.

    Returns:
        Requests still unanswered when the patience ended; 0 when drained.
    """
    close_listener(pid, port)
    deadline = time.monotonic() + patience_s
    quiet = 0
    while True:
        owed = unanswered(port)
        quiet = 0 if owed else quiet + 1
        if quiet >= _SETTLED_TICKS or time.monotonic() > deadline:
            return owed
        time.sleep(_TICK_S)


def close_listener(pid: int, port: int) -> bool:
    """Shut down another process's listening socket, so that connecting is refused from now on.

    Returns:
        Whether that was possible: Linux 5.6 or newer, and a process that we may trace.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    closed = False
    try:
        for number in [int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir() if _is_socket(entry)]:
            copy = ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_GETFD, handle, number, 0)
            if copy < 0:
                return closed
            with socket.socket(fileno=copy) as ours:
                is_tcp = ours.family in (socket.AF_INET, socket.AF_INET6) and ours.type == socket.SOCK_STREAM
                if (
                    is_tcp
                    and ours.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                    and ours.getsockname()[1] == port
                ):
                    ours.shutdown(socket.SHUT_RD)
                    closed = True
    except OSError:
        return closed
    finally:
        os.close(handle)
    return closed


def _is_socket(entry: Path) -> bool:
    try:
        return os.readlink(entry).startswith("socket:")
    except OSError:  # closed meanwhile
        return False


@dataclass(frozen=True)
class _Connection:
    """What the kernel remembers of one open connection: milliseconds since its last data, and packets of data."""

    sent_ms_ago: int
    received_ms_ago: int
    segments_received: int
    segments_sent: int

    @property
    def owes_answer(self) -> bool:
        if self.segments_received == 0 or self.segments_sent == 0:
            return self.segments_received > 0
        if self.received_ms_ago == self.sent_ms_ago:
            # within one tick of the kernel's clock, some 4 ms: most likely an answer and, at once, the next request;
            # else a /ping answered within that tick, which must not hold up the end for ever
            return self.received_ms_ago < _SAME_TICK_TRUST_MS
        return self.received_ms_ago < self.sent_ms_ago


def unanswered(port: int) -> int:
    """Connections to a local TCP port on which something came in after the last answer went out; 0 beyond Linux."""
    if not sys.platform.startswith("linux"):
        return 0
    families = (socket.AF_INET, socket.AF_INET6)
    return sum(connection.owes_answer for family in families for connection in _connections(family, port))


def _connections(family: int, port: int) -> list[_Connection]:
    """Ask the kernel, by netlink, for each open connection whose local port this is."""
    states = 1 << _ESTABLISHED | 1 << _CLOSE_WAIT
    query = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), 0, states) + bytes(48)
    header = struct.pack("=IHHII", 16 + len(query), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
    found: list[_Connection] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(2)
        netlink.sendto(header + query, (0, 0))
        while True:
            reply = netlink.recv(1 << 16)
            while len(reply) >= 16:
                length, kind = struct.unpack_from("=IH", reply)
                if kind != _SOCK_DIAG_BY_FAMILY:  # the end of the list, or an error
                    return found
                message = reply[16:length]
                if struct.unpack_from("!H", message, 4)[0] == port:
                    found += _read_info(message[72:])
                reply = reply[(length + 3) & ~3 :]


def _read_info(attributes: bytes) -> list[_Connection]:
    """The connection that a netlink message's attributes describe, if they do."""
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("=HH", attributes)
        info = attributes[4:length]
        if kind == _INET_DIAG_INFO and len(info) >= _SEGMENTS_SENT + 4:
            places = (_LAST_DATA_SENT, _LAST_DATA_RECEIVED, _SEGMENTS_RECEIVED, _SEGMENTS_SENT)
            return [_Connection(*(struct.unpack_from("=I", info, place)[0] for place in places))]
        attributes = attributes[max(4, (length + 3) & ~3) :]
    return []
