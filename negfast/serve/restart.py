"""A server that restarts without losing a connection or a request.

A restart answers every request that has begun to arrive, then replaces the process by a new one (`exec`: same process
number, same command line) that is given the listening socket and all open connections. What clients send meanwhile
waits in the kernel. The sockets are passed as systemd passes them (LISTEN_FDS), so socket activation works too.
"""

import asyncio
import fcntl
import os
import signal
import socket
import sys
import time
from typing import Any, NoReturn

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from negfast.errors import InputError

SIGNALS = {signal.SIGHUP, signal.SIGUSR2}  # blocked, so that they wait, while a process starts
FIRST = 3  # descriptor of the first socket that is passed
CLOSE_HEADER = b"connection", b"close"
ANSWERING = 30  # seconds, at most, in which a stop or restart answers what has arrived
KEEP_ALIVE = 75  # seconds after which an idle connection is closed; clients close theirs earlier


class Connection(H11Protocol):
    """A client's connection that can pause between two requests."""

    pausing = False

    @property
    def idle(self) -> bool:
        """Whether no part of a request or an answer is in the process."""
        answered = self.cycle is None or self.cycle.response_complete
        read = self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
        return answered and not read and not self.transport.get_write_buffer_size()

    def pause(self) -> None:
        """Leaves the next request in the kernel, now or once this one is answered."""
        self.pausing = True
        if self.idle:
            self.transport.pause_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pausing:
            self.pause()


class Server(uvicorn.Server):
    """uvicorn's server, that SIGUSR2 restarts."""

    def __init__(self, app: Any, sockets: list[socket.socket]) -> None:
        """``sockets`` are one that listens and connections that the process before had."""
        config = uvicorn.Config(
            app,
            http=Connection,
            access_log=False,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=ANSWERING,
        )
        super().__init__(config)
        self.listener, *self.accepted = sockets
        self.passed: list[socket.socket] = []  # to the next process, once this one has answered
        self.restarting = False

    def restart(self) -> None:
        self.restarting = self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([self.listener])
        loop = asyncio.get_running_loop()
        for accepted in self.accepted:
            await loop.connect_accepted_socket(self._connection, accepted)
        host, port = self.listener.getsockname()[:2]
        print(f"serve: running on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.restarting:
            self.passed.append(self.listener.dup())
        else:
            self._announce()
        for server in self.servers:
            server.close()
        await asyncio.sleep(0.1)  # connections that were accepted a moment ago become known, and what they hold is read
        until = time.monotonic() + ANSWERING
        while True:
            connections = self._connections()
            if self.restarting:
                for connection in connections:
                    connection.pause()
            if all(connection.idle for connection in connections) or time.monotonic() > until:
                break
            await asyncio.sleep(0.01)
        if self.restarting:
            open_ones = [one.transport for one in connections if one.idle and not one.transport.is_closing()]
            self.passed += [one.get_extra_info("socket").dup() for one in open_ones]
        await super().shutdown()

    def _announce(self) -> None:
        """Answers say from now on that their connection closes."""
        headers = self.server_state.default_headers = [*self.server_state.default_headers, CLOSE_HEADER]
        for connection in self._connections():
            if connection.cycle is not None:
                connection.cycle.default_headers = headers

    def _connections(self) -> list[Connection]:
        return [one for one in self.server_state.connections if isinstance(one, Connection)]

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state)


def sockets_of(host: str, port: int) -> list[socket.socket]:
    """The sockets that this process was started with, or a new one that listens at an address. InputError where it
    cannot."""
    if os.environ.pop("LISTEN_PID", None) == str(os.getpid()):
        return [socket.socket(fileno=FIRST + number) for number in range(int(os.environ.pop("LISTEN_FDS")))]
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # Connections have it from their listener. Without it an answer may wait 40 ms for the client's acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return [listener]
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there: {error.strerror}") from error


def start_again(sockets: list[socket.socket]) -> NoReturn:
    """Replaces the process by a new one of the same command, which `sockets_of` gives these."""
    copies = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, FIRST + len(sockets)) for one in sockets]
    for place, copy in enumerate(copies, FIRST):
        os.dup2(copy, place)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(sockets)))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
