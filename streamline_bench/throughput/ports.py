"""Finds a free port of this machine, and recognises a taken one."""

from __future__ import annotations

import re
import socket

from streamline_bench.errors import ThroughputError

__all__ = ["free_port", "is_port_conflict", "require_free"]

HOST = "127.0.0.1"


def free_port() -> int:
    """Return a port that was free a moment ago; another process may take it at any time."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def require_free(port: int) -> None:
    """Check a port that the user asked for.

    Raises:
        ThroughputError: something listens there, or it may not be used.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ThroughputError(
                f"Port {port} cannot be used ({error.strerror}); give another --port, or none to "
                "have a free one chosen."
            ) from None


def is_port_conflict(text: str) -> bool:
    """Whether a server's log says that its port was taken."""
    return re.search(r"address already in use|errno 98|errno 48", text, re.IGNORECASE) is not None
