"""Ends all processes of a run when one of them dies, with a message that names the machine that was lost.

A process that waits in a collective cannot notice that a peer is gone. JAX's runtime aborts it after a while, but only
prints the number of a task. Each process therefore starts a *watcher*: a second process that runs this file and uses
only the standard library. The watcher notices the end of its own process, because the pipe between them closes even if
the process is killed. The watchers exchange messages over TCP, all of them through the watcher of process 0:

    process 2 killed -> its watcher -> watcher of 0 -> watchers of 1 and 3: each prints a message and ends its process

A machine that disappears without closing its connections is noticed by its missing heartbeats. The watcher itself
prints the message, because its process may be stuck in C++, or may be aborted by JAX at the same moment.

A message between a process and its watcher, or between watchers, is a line of JSON: a list of a word and its arguments.

    process -> watcher   ["watch", settings]   start watching
                         ["done"]              the process ends normally
                         ["failed", text]      the process ends with an error
    watcher -> process   ["port", number]      the port that the watcher listens on
                         ["lost"]              another process was lost, so this one must end
                         ["alone"]             all other watchers are gone
    watcher -> watcher   ["hello", token, process]   ["done", process]   ["lost", process, text]   ["heartbeat"]
"""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

HEARTBEAT_SECONDS = 2.0
SILENCE_SECONDS = 20.0
"""A machine that sends no heartbeat for this long counts as gone. It is well below the minute within which the other
processes must end, and well above a short interruption of the network."""
GRACE_SECONDS = 2.0
"""Time that a process may continue after a peer failed. It may fail for the same reason, with a better message."""
CRASH_SECONDS = 0.5
"""Delay before a crash is reported. If the process crashed because another one did, that one must be reported first."""
EXIT_CODE = 4
"""Exit code of a process that ended because another one did."""


class Watch:
    """The process's side of the connection to its watcher."""

    def __init__(self, on_lost: Callable[[], Any]):
        """Starts the watcher.

        Args:
          on_lost: called from a thread when this process must end; the reason has been printed by then.
        """
        # A session of its own, so that Ctrl-C on the terminal does not end the watcher before its process. The flags
        # -I and -S start a bare interpreter: fast, and independent of the user's packages and environment.
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._on_lost = on_lost
        self._alone = threading.Event()
        self._leaving = False
        self.port: int = json.loads(self._watcher.stdout.readline())[1]

    def start(self, *, process: int, hosts: Sequence[str], addresses: Sequence[str], port: int, token: str) -> None:
        """Starts watching.

        Args:
          process: index of this process.
          hosts: host name of each process.
          addresses: addresses of process 0, the most likely first.
          port: the port on which the watcher of process 0 listens.
          token: shared secret by which the watchers of this run recognize each other.
        """
        settings = dict(process=process, hosts=list(hosts), addresses=list(addresses), port=port, token=token)
        self._send("watch", settings)
        threading.Thread(target=self._listen, daemon=True).start()

    def report_done(self) -> None:
        """Reports that this process is done, so that its end does not count as a loss."""
        self._leaving = True
        self._send("done")

    def report_failure(self, text: str, *, wait_seconds: float) -> None:
        """Reports that this process ends with an error, which also ends the others.

        Args:
          text: the error.
          wait_seconds: time to wait for the other processes to end; more than 0 for a process that must end last.
        """
        self._leaving = True
        self._send("failed", text)
        self._alone.wait(wait_seconds)

    def _send(self, *message: Any) -> None:
        try:
            self._watcher.stdin.write(json.dumps(message).encode() + b"\n")
            self._watcher.stdin.flush()
        except OSError:  # the watcher was killed, which `_listen` notices, too
            self._alone.set()

    def _listen(self) -> None:
        for line in self._watcher.stdout:
            if json.loads(line)[0] == "alone":
                self._alone.set()
            else:
                self._on_lost()
        # The watcher is gone. The other processes count this one as lost and end, so it must not continue.
        if not self._leaving:
            _print("error: the watcher of this process was killed; ending")
            self._on_lost()


class _Link:
    """A connection to another watcher, or the pipe from the watcher's own process."""

    def __init__(self, read: Callable[[int], bytes], write: Callable[[bytes], Any] | None = None):
        self._read, self._write = read, write
        self._buffer = b""  # start of a line that has not arrived completely
        self.process: int | None = None  # process at the other end; None until its watcher sends "hello"
        self.last_received = time.monotonic()

    def receive(self) -> list[list[Any]] | None:
        """Returns the messages that have arrived, or None if the other end is gone."""
        try:
            data = self._read(65536)
        except OSError:
            return None
        if not data:
            return None
        self.last_received = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def send(self, *message: Any) -> None:
        try:
            self._write(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # the next `receive` returns None


class Watcher:
    """Watches one process, its parent, and exchanges messages with the other watchers."""

    def __init__(self, parent: int):
        self._parent = parent
        self._parent_state: Literal["running", "leaving", "gone"] = "running"
        self._process, self._hosts, self._token = 0, [""], ""
        self._failure = ""  # error that the parent ended with
        self._done: set[int] = set()  # processes that ended normally
        self._next_heartbeat = 0.0
        self._has_loss = False  # whether any process was lost; only the first one is reported
        self._listener = socket.create_server(("", 0), backlog=1024)
        self._pipe = _Link(lambda size: os.read(0, size))
        self._links: dict[socket.socket, _Link] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ, self._pipe)

    def run(self) -> None:
        """Watches until the parent has ended or was ended, then exits."""
        self._send_to_parent("port", self._listener.getsockname()[1])
        while True:
            self._poll(HEARTBEAT_SECONDS / 2)

    def _poll(self, seconds: float) -> None:
        """Handles the messages that arrive within `seconds`, and sends heartbeats when they are due."""
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._add_link(self._listener.accept()[0], process=None)
            elif key.data is self._pipe:
                self._receive_from_parent()
            elif key.fileobj in self._links:  # an earlier message of this loop may have dropped the connection
                self._receive(key.fileobj, key.data)
        # Heartbeats follow the clock. If each watcher answered those it receives, two watchers would flood each other.
        if time.monotonic() < self._next_heartbeat:
            return
        self._next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS
        for connection, link in list(self._links.items()):
            link.send("heartbeat")
            if time.monotonic() - link.last_received > SILENCE_SECONDS:
                self._drop(connection, f"has sent nothing for {SILENCE_SECONDS:.0f} s")

    def _poll_while(self, parent_state: str, seconds: float) -> None:
        """Handles messages for `seconds`, or until the parent leaves the given state."""
        deadline = time.monotonic() + seconds
        while self._parent_state == parent_state and (left := deadline - time.monotonic()) > 0:
            self._poll(min(left, HEARTBEAT_SECONDS / 2))

    # Messages from the parent.

    def _receive_from_parent(self) -> None:
        messages = self._pipe.receive()
        for word, *arguments in messages or []:
            if word == "watch":
                self._start(**arguments[0])
            else:
                self._parent_state = "leaving"
                if word == "done":
                    self._send_to_all("done", self._process)
                else:
                    self._handle_parent_failure(arguments[0])
        if messages is not None:
            return
        # The pipe is closed: the parent is gone. It counts as lost unless it announced its end.
        self._selector.unregister(0)
        if self._parent_state == "running":
            self._parent_state = "gone"
            if self._process != 0:
                # JAX may have aborted the parent because process 0 died. Then process 0 must be reported instead: its
                # watcher gets some time to do so.
                self._poll_while("gone", CRASH_SECONDS)
            self._send_to_all("lost", self._process, "was killed or crashed")
        sys.exit()

    def _handle_parent_failure(self, text: str) -> None:
        self._failure = f"ended with an error: {text}"
        # The parent may have failed because another process was lost. Give the watcher of that process time to report
        # first. The pipe is not read meanwhile, because the end of the parent must not be handled yet.
        self._selector.unregister(0)
        self._poll_while("leaving", 2 * CRASH_SECONDS)
        self._selector.register(0, selectors.EVENT_READ, self._pipe)
        if not self._has_loss:
            self._send_to_all("lost", self._process, self._failure)
        self._send_alone_if_alone()

    def _send_to_parent(self, *message: Any) -> None:
        try:
            os.write(1, json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # the parent is gone, which the closed pipe on stdin will show

    def _send_alone_if_alone(self) -> None:
        if self._parent_state == "leaving" and not self._links:
            self._send_to_parent("alone")

    # Messages from the other watchers.

    def _start(self, process: int, hosts: list[str], addresses: list[str], port: int, token: str) -> None:
        """Accepts connections in process 0, and connects to process 0 elsewhere."""
        self._process, self._hosts, self._token = process, hosts, token
        if process == 0:
            self._selector.register(self._listener, selectors.EVENT_READ, None)
            return
        self._listener.close()
        for address in addresses:
            try:
                connection = socket.create_connection((address, port), timeout=5)
            except OSError:
                continue
            self._add_link(connection, process=0).send("hello", token, process)
            return
        _print(
            f"warning: process {process} on {hosts[process]} cannot connect to {hosts[0]}, port {port}: if another "
            "process dies, only JAX will notice it, later, and report a task number instead of a machine"
        )

    def _add_link(self, connection: socket.socket, process: int | None) -> _Link:
        connection.settimeout(5)
        link = _Link(connection.recv, connection.sendall)
        link.process = process
        self._links[connection] = link
        self._selector.register(connection, selectors.EVENT_READ, link)
        return link

    def _receive(self, connection: socket.socket, link: _Link) -> None:
        try:
            messages = link.receive()
            if messages is None:
                return self._drop(connection, "is gone: its watcher or its machine closed the connection")
            for word, *arguments in messages:
                if word == "hello" and arguments[0] == self._token:
                    link.process = arguments[1]
                elif link.process is None:  # the first message is not a valid "hello": not a watcher of this run
                    return self._drop(connection, "")
                elif word == "done":
                    self._done.add(arguments[0])
                elif word == "lost":
                    self._handle_loss(*arguments)
        except ValueError:  # not JSON: some other program has connected to the port
            self._drop(connection, "sent an invalid message")

    def _drop(self, connection: socket.socket, reason: str) -> None:
        """Closes a connection. The process at its other end counts as lost."""
        link = self._links.pop(connection)
        self._selector.unregister(connection)
        connection.close()
        self._send_alone_if_alone()
        if link.process is not None:
            self._handle_loss(link.process, reason)

    def _handle_loss(self, process: int, reason: str) -> None:
        """Forwards and prints the loss of a process, then ends the parent unless it is already ending."""
        if process in self._done or self._has_loss:
            return
        self._has_loss = True
        self._send_to_all("lost", process, reason)
        if "error" in reason:
            # The parent may be about to fail with the same error. Give it time to print its own message.
            self._poll_while("running", GRACE_SECONDS)
        # Print nothing if the parent ends normally, or with the same error as the lost process.
        if self._parent_state == "leaving" and self._failure in ("", reason):
            return
        _print(
            f"error: {self._hosts[process]} (process {process} of {len(self._hosts)}) {reason}; "
            f"process {self._process} on {self._hosts[self._process]} ends with it"
        )
        if self._parent_state == "leaving":
            return
        if self._parent_state == "running":
            self._send_to_parent("lost")
            # A parent that is stuck in C++ cannot act on the message, so it is killed if its pipe does not close in
            # time. `getppid` changes when the parent ends; after that, its id may belong to another program.
            if not _is_readable(0, GRACE_SECONDS) and os.getppid() == self._parent:
                os.kill(self._parent, signal.SIGKILL)
        sys.exit()

    def _send_to_all(self, *message: Any) -> None:
        for link in self._links.values():
            link.send(*message)


def _is_readable(file: int, seconds: float) -> bool:
    selector = selectors.DefaultSelector()
    selector.register(file, selectors.EVENT_READ)
    return bool(selector.select(seconds))


def _print(text: str) -> None:
    try:
        os.write(2, f"\nalignvlm: {text}\n".encode())
    except OSError:
        pass


if __name__ == "__main__":
    # Slurm sends these signals to every process of a job. The watcher must outlive its process, which may still save.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Watcher(int(sys.argv[1])).run()
