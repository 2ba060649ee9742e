"""uvicorn's HTTP/1.1, plus a deadline for a request to arrive and a bound on open connections.

The timeouts of uvicorn and hypercorn start again with every byte, and their bounds do not count connections whose
headers are incomplete.
"""

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_ARRIVES_SECONDS = 20.0  # headers and body
MOST_CONNECTIONS = 256  # or half of what this process may open

REFUSED = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def most_connections() -> int:
    if sys.platform == "win32":  # there is no such limit
        return MOST_CONNECTIONS
    import resource

    may_open, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if may_open == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, may_open // 2)


class BoundedProtocol(H11Protocol):
    """One connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        others = [other for other in self.connections if isinstance(other, BoundedProtocol) and other is not self]
        # those that are closing have been refused; of those that are unfinished no token has been checked
        num_open = sum(not other.transport.is_closing() for other in others)
        num_unfinished = sum(other._deadline is not None and other._address == self._address for other in others)
        most = most_connections()
        if num_open >= most or num_unfinished >= most // 2:
            transport.write(REFUSED)
            transport.close()
        else:
            self._watch()

    @property
    def _address(self) -> str | None:
        return self.client and self.client[0]

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._disarm()

    def _watch(self) -> None:
        """The time runs from the opening, or from the first byte of a later request, to the end of its body."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._disarm()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_ARRIVES_SECONDS, self.transport.abort)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
