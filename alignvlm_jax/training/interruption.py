"""What ends a run before its time, as a flag that the loop looks at after every step: the step is finished and saved.

- SIGINT (Ctrl-C).
- SIGTERM: what Slurm, Kubernetes, systemd and `docker stop` send before they take a machine away, to one process of the
  job or to all.
- Google's notice that a spot machine is about to be taken, half a minute ahead. Its metadata server holds it, and not
  everything that starts a process there turns it into a signal in time.

JAX's own preemption service (`multihost_utils.reached_preemption_sync_point`) agrees on a step to save as well, but
hears SIGTERM only; here the processes agree by a sum that they take with every step anyway.
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

_HOST_VARIABLE = "GCE_METADATA_HOST"  # by which Google's own libraries find the server elsewhere
_HOST = "metadata.google.internal"
_PATH = "/computeMetadata/v1/instance/preempted?wait_for_change=true&timeout_sec=60&last_etag="
_PRODUCT = Path("/sys/class/dmi/id/product_name")
_PATIENCE_SECONDS = 90  # for an answer, which comes after a minute if nothing changes
_RETRY_SECONDS = 5


class Interruption:
    """While in force, what is to end the run raises a flag. A second Ctrl-C ends it at once.

    A second SIGTERM does not: where it goes to a whole job, some processes are sent it twice.

    Attributes:
      interrupted: the run is to end.
      preempted: because the machine is wanted elsewhere.
    """

    def __init__(self):
        self.interrupted = self.preempted = False
        self._before: dict[int, Any] = {}
        self._over = threading.Event()

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        if on_google():
            threading.Thread(target=self._ask_google, name="preemption", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._come(preempted=number == signal.SIGTERM)

    def _come(self, preempted: bool) -> None:
        if self.interrupted:
            return
        self.interrupted, self.preempted = True, preempted
        more = "" if preempted else " (once more to stop at once)"
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of a print
            tqdm.write(f"interrupted: finishing this step and saving{more}")

    def _ask_google(self) -> None:
        """In the background: asks again and again; an answer comes when there is something new."""
        host, etag = os.environ.get(_HOST_VARIABLE, _HOST), "0"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while not self._over.is_set():
            request = urllib.request.Request(f"http://{host}{_PATH}{etag}", headers={"Metadata-Flavor": "Google"})
            try:
                with opener.open(request, timeout=_PATIENCE_SECONDS) as answer:
                    etag, text = answer.headers.get("ETag", "0"), answer.read().decode()
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                    return  # no server of Google's
                self._over.wait(_RETRY_SECONDS)
                continue
            if text.strip() == "TRUE" and not self._over.is_set():
                return self._come(preempted=True)
            if etag == "0":  # a server that does not wait
                self._over.wait(_RETRY_SECONDS)


def on_google() -> bool:
    """Whether this is a machine of Google's cloud."""
    try:
        return _HOST_VARIABLE in os.environ or _PRODUCT.read_text().startswith("Google")
    except OSError:
        return False
