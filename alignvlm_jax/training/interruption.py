"""Turns signals and preemption notices into a flag, which the training loop reads at every step.

The loop then finishes the step and saves the run. The flag is set by:

- SIGINT (Ctrl-C).
- SIGTERM, which Slurm, Kubernetes, systemd and `docker stop` send before they end a job. It may be sent to one process
  of the job or to all.
- Google's notice that a spot machine will be reclaimed in half a minute. Google's metadata server publishes the notice,
  and not every launcher turns it into a signal in time.

JAX's preemption service (`multihost_utils.reached_preemption_sync_point`) also makes the processes agree on a step, but
only reacts to SIGTERM. Here the processes agree through a sum that they compute in every step anyway.
"""

import contextlib
import os
import signal
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tqdm import tqdm

_HOST_VARIABLE = "GCE_METADATA_HOST"  # overrides the server's address, as in Google's own libraries
_HOST = "metadata.google.internal"
_PATH = "/computeMetadata/v1/instance/preempted?wait_for_change=true&timeout_sec=60&last_etag="
_PRODUCT = Path("/sys/class/dmi/id/product_name")
_TIMEOUT_SECONDS = 90  # the server answers after a minute if nothing changes
_RETRY_SECONDS = 5


class Interruption:
    """Context manager that records signals and preemption notices.

    A second Ctrl-C ends the run at once. A second SIGTERM does not: if it is sent to a whole job, some processes
    receive it twice.

    Attributes:
      interrupted: True once the run should end.
      preempted: True if the machine is about to be reclaimed.
    """

    def __init__(self):
        self.interrupted = self.preempted = False
        self._old_handlers: dict[int, Any] = {}
        self._closed = threading.Event()

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            signals = (signal.SIGINT, signal.SIGTERM)
            self._old_handlers = {number: signal.signal(number, self._handle_signal) for number in signals}
        if is_google_cloud():
            threading.Thread(target=self._watch_google, name="preemption", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, frame: Any) -> None:
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupt(preempted=number == signal.SIGTERM)

    def _interrupt(self, preempted: bool) -> None:
        if self.interrupted:
            return
        self.interrupted, self.preempted = True, preempted
        hint = "" if preempted else " (once more to stop at once)"
        # Buffered output is not reentrant, so printing fails if the signal arrived in the middle of another print.
        with contextlib.suppress(RuntimeError):
            tqdm.write(f"interrupted: finishing this step and saving{hint}")

    def _watch_google(self) -> None:
        """Polls Google's metadata server until the notice of a preemption arrives."""
        # The server answers as soon as the notice differs from the state that `etag` names, so polling costs little.
        host, etag = os.environ.get(_HOST_VARIABLE, _HOST), "0"
        # No proxy: only the machine itself can reach its metadata server.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while not self._closed.is_set():
            request = urllib.request.Request(f"http://{host}{_PATH}{etag}", headers={"Metadata-Flavor": "Google"})
            try:
                with opener.open(request, timeout=_TIMEOUT_SECONDS) as answer:
                    etag, text = answer.headers.get("ETag", "0"), answer.read().decode()
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                    return  # not Google's server
                self._closed.wait(_RETRY_SECONDS)
                continue
            if text.strip() == "TRUE" and not self._closed.is_set():
                return self._interrupt(preempted=True)
            if etag == "0":  # this server does not wait for a change
                self._closed.wait(_RETRY_SECONDS)


def is_google_cloud() -> bool:
    """Returns whether this machine is in Google's cloud."""
    try:
        return _HOST_VARIABLE in os.environ or _PRODUCT.read_text(encoding="utf-8").startswith("Google")
    except OSError:
        return False
