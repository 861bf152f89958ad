"""Watches over the processes of a run, so that none waits for ever for one that is gone, and all can say which.

A process that waits in a collective hears nothing, and JAX's own runtime aborts it after a while with the number of a
task. So each process starts a *watcher* beside it: this file, run by itself, in nothing but the standard library. It
notices how its process ends (the pipe between them closes, even if that process is killed), and the watchers tell each
other over TCP, all of them through the one of process 0:

    process 2 killed -> its watcher -> watcher of 0 -> watchers of 1 and 3: say so on stderr, then end their process

A machine that vanishes without a word is noticed by its silence. The watcher prints the message itself: its own process
may be stuck in C++, or have been aborted by JAX in the same moment.

Lines between a process and its watcher, and between watchers, are JSON lists of a word and what belongs to it:

    process -> watcher   ["watch", whom]   ["left"] done, in peace   ["failed", text] ends, by an error
    watcher -> process   ["port", number] where it listens   ["lost"] end now   ["alone"] all others are gone
    watcher -> watcher   ["hello", token, process]   ["left", process]   ["lost", process, text]   ["beat"]
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

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 20.0
"""After so long without a beat a machine counts as gone: well under the minute that others may wait, well over a hiccup
of the network."""
GRACE_SECONDS = 2.0
"""A process whose peer failed may be about to fail of the same, and says it better itself."""
CRASH_SECONDS = 0.5
"""A process that crashes may do so because another did: that news travels first."""
EXIT_CODE = 4
"""Of a process that ended because another one did."""


class Watch:
    """This process's watcher, as seen from the process."""

    def __init__(self, on_lost: Callable[[], Any]):
        """Starts it. `on_lost` is called, from a thread, when this process must end: the reason has been printed."""
        # A session of its own: Ctrl-C on the terminal must not end it before its process.
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
        """Begins to watch.

        Args:
          process: the number of this one.
          hosts: the machine of each process.
          addresses: under which process 0 may be reached, the likeliest first.
          port: where its watcher listens.
          token: what the watchers of this run know each other by.
        """
        plan = dict(process=process, hosts=list(hosts), addresses=list(addresses), port=port, token=token)
        self._say("watch", plan)
        threading.Thread(target=self._listen, daemon=True).start()

    def left(self) -> None:
        """This process is done: that it is gone from now on is no loss."""
        self._leaving = True
        self._say("left")

    def failed(self, text: str, *, wait_seconds: float) -> None:
        """This process ends by an error, and the others with it; waits until they have, if it has to be last."""
        self._leaving = True
        self._say("failed", text)
        self._alone.wait(wait_seconds)

    def _say(self, *words: Any) -> None:
        try:
            self._watcher.stdin.write(json.dumps(words).encode() + b"\n")
            self._watcher.stdin.flush()
        except OSError:  # somebody ended the watcher, as `_listen` has noticed
            self._alone.set()

    def _listen(self) -> None:
        for line in self._watcher.stdout:
            if json.loads(line)[0] == "alone":
                self._alone.set()
            else:
                self._on_lost()
        if not self._leaving:  # to the others this process is lost: it must not go on
            _print("error: the watcher of this process was killed; ending")
            self._on_lost()


class _Link:
    """A connection to another watcher, or the pipe to the own process."""

    def __init__(self, read: Callable[[int], bytes], write: Callable[[bytes], Any] | None = None):
        self._read, self._write = read, write
        self._rest = b""
        self.process: int | None = None  # who is at the other end, once known
        self.heard = time.monotonic()

    def lines(self) -> list[list[Any]] | None:
        """What has come in; None if the other end is gone."""
        try:
            data = self._read(65536)
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def say(self, *words: Any) -> None:
        try:
            self._write(json.dumps(words).encode() + b"\n")
        except OSError:
            pass  # noticed when reading


class Watcher:
    """The watcher of one process."""

    def __init__(self, parent: int):
        self._parent = parent
        self._parent_is: Literal["running", "leaving", "gone"] = "running"
        self._process, self._hosts, self._token = 0, [""], ""
        self._failure = ""  # how the own process says that it ended
        self._departed: set[int] = set()  # processes that left in peace
        self._next_beat = 0.0
        self._lost = False  # whether any was lost: the first is the one to name
        self._listener = socket.create_server(("", 0), backlog=1024)
        self._pipe = _Link(lambda size: os.read(0, size))
        self._links: dict[socket.socket, _Link] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ, self._pipe)

    def run(self) -> None:
        """Watches until its own process is gone, or has been ended; then exits."""
        self._tell_parent("port", self._listener.getsockname()[1])
        while True:
            self._turn(BEAT_SECONDS / 2)

    def _turn(self, seconds: float) -> None:
        """Hears what comes in within so many seconds; now and then says that it is there."""
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._add(self._listener.accept()[0], process=None)
            elif key.data is self._pipe:
                self._hear_parent()
            elif key.fileobj in self._links:
                self._hear(key.fileobj, key.data)
        if time.monotonic() < self._next_beat:
            return  # not at every turn: a beat that answered a beat would be answered in turn
        self._next_beat = time.monotonic() + BEAT_SECONDS
        for connection, link in list(self._links.items()):
            link.say("beat")
            if time.monotonic() - link.heard > SILENCE_SECONDS:
                self._drop(connection, f"has not been heard of for {SILENCE_SECONDS:.0f} s")

    def _listen_for(self, seconds: float, *, while_parent_is: str) -> None:
        deadline = time.monotonic() + seconds
        while self._parent_is == while_parent_is and (left := deadline - time.monotonic()) > 0:
            self._turn(min(left, BEAT_SECONDS / 2))

    # The own process

    def _hear_parent(self) -> None:
        lines = self._pipe.lines()
        for word, *rest in lines or []:
            if word == "watch":
                self._begin(**rest[0])
            else:
                self._parent_is = "leaving"
                if word == "left":
                    self._tell_all("left", self._process)
                else:
                    self._hear_parent_failed(rest[0])
        if lines is not None:
            return
        self._selector.unregister(0)
        if self._parent_is == "running":
            self._parent_is = "gone"
            if self._process != 0:  # JAX aborts processes when 0 is gone: then it is that one's loss
                self._listen_for(CRASH_SECONDS, while_parent_is="gone")
            self._tell_all("lost", self._process, "was killed or crashed")
        sys.exit()

    def _hear_parent_failed(self, text: str) -> None:
        self._failure = f"ended with an error: {text}"
        # It may have failed because another was lost, whose own watcher is about to say so.
        self._selector.unregister(0)
        self._listen_for(2 * CRASH_SECONDS, while_parent_is="leaving")
        self._selector.register(0, selectors.EVENT_READ, self._pipe)
        if not self._lost:
            self._tell_all("lost", self._process, self._failure)
        self._tell_parent_if_alone()

    def _tell_parent(self, *words: Any) -> None:
        try:
            os.write(1, json.dumps(words).encode() + b"\n")
        except OSError:
            pass  # it is gone, as the closed pipe will show

    def _tell_parent_if_alone(self) -> None:
        if self._parent_is == "leaving" and not self._links:
            self._tell_parent("alone")

    # The other watchers

    def _begin(self, process: int, hosts: list[str], addresses: list[str], port: int, token: str) -> None:
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
            self._add(connection, process=0).say("hello", token, process)
            return
        _print(
            f"warning: process {process} on {hosts[process]} cannot reach {hosts[0]}, port {port}: should another "
            "process die, JAX will notice, later, and give its number only"
        )

    def _add(self, connection: socket.socket, process: int | None) -> _Link:
        connection.settimeout(5)
        link = _Link(connection.recv, connection.sendall)
        link.process = process
        self._links[connection] = link
        self._selector.register(connection, selectors.EVENT_READ, link)
        return link

    def _hear(self, connection: socket.socket, link: _Link) -> None:
        try:
            lines = link.lines()
            if lines is None:
                return self._drop(connection, "is gone with its watcher, or its machine is")
            for word, *rest in lines:
                if word == "hello" and rest[0] == self._token:
                    link.process = rest[1]
                elif link.process is None:
                    return self._drop(connection, "")
                elif word == "left":
                    self._departed.add(rest[0])
                elif word == "lost":
                    self._lose(*rest)
        except ValueError:  # no JSON: a stranger has knocked
            self._drop(connection, "sent nonsense")

    def _drop(self, connection: socket.socket, reason: str) -> None:
        link = self._links.pop(connection)
        self._selector.unregister(connection)
        connection.close()
        self._tell_parent_if_alone()
        if link.process is not None:
            self._lose(link.process, reason)

    def _lose(self, process: int, reason: str) -> None:
        """Passes on who is lost, says so, and ends the own process, unless that is about to end anyway."""
        if process in self._departed or self._lost:
            return
        self._lost = True
        self._tell_all("lost", process, reason)
        if "error" in reason:
            self._listen_for(GRACE_SECONDS, while_parent_is="running")
        if self._parent_is == "leaving" and self._failure in ("", reason):
            return
        _print(
            f"error: {self._hosts[process]} (process {process} of {len(self._hosts)}) {reason}; "
            f"process {self._process} on {self._hosts[self._process]} ends with it"
        )
        if self._parent_is == "leaving":
            return
        if self._parent_is == "running":
            self._tell_parent("lost")
            if not _is_readable(0, GRACE_SECONDS) and os.getppid() == self._parent:  # stuck in C++
                os.kill(self._parent, signal.SIGKILL)
        sys.exit()

    def _tell_all(self, *words: Any) -> None:
        for link in self._links.values():
            link.say(*words)


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
    # Slurm signals every process of a job: this one ends when its own process does, which may have to save first.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Watcher(int(sys.argv[1])).run()
