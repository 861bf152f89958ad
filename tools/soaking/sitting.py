"""One sitting of a run, as a process: `alignvlm train` with a note of every batch that was trained on.

    python sitting.py '{"config": "config.json", "workdir": "run", "journal": "journal.jsonl", "sitting": 3}'

The journal gets a line a step: {"sitting": 3, "step": 12, "rows": {"0": hash of row 0, ...}, "refused": [ids]}. Several
processes of a sitting note the rows that each made, in the same file.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from alignvlm_jax.config.serialization import config_from_dict, read_config_json
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed
from alignvlm_jax.training import loop
from alignvlm_jax.training.experiment_data import ExperimentData


class _Noted:
    """A `BatchIterator` that remembers the batch it gave last."""

    def __init__(self, feed, rows):
        self._feed, self._rows = feed, rows
        self.hashes: dict[str, str] = {}
        self.refusals: list[str] = []

    def __next__(self):
        batch = next(self._feed)
        for place, row in enumerate(self._rows):
            content = b"".join(batch[name][:, place].tobytes() for name in sorted(batch))
            self.hashes[str(row)] = hashlib.sha256(content).hexdigest()[:16]
        return batch

    def refused(self):
        refused = self._feed.refused()
        self.refusals = sorted(f"{example.source}: {example.id}" for example in refused)
        return refused

    def __getattr__(self, name):
        return getattr(self._feed, name)


def main() -> int:
    arguments = json.loads(sys.argv[1])
    feeds: list[_Noted] = []
    journal = os.open(arguments["journal"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    class Data(ExperimentData):
        def batches(self, stage_index, stage, plan, state, rows):
            feeds.append(_Noted(super().batches(stage_index, stage, plan, state, rows), rows))
            return feeds[-1]

    def on_step(step):
        note = {
            "sitting": arguments["sitting"],
            "step": step,
            "time": time.monotonic(),
            "rows": feeds[-1].hashes,
            "refused": feeds[-1].refusals,
        }
        os.write(journal, json.dumps(note).encode() + b"\n")  # in one piece, whatever comes

    config = config_from_dict(read_config_json(Path(arguments["config"])))
    try:
        with distributed.initialized(*arguments.get("joins", ())):
            loop.train(config, arguments["workdir"], open_data=Data, on_step=on_step)
    except UserError as error:
        print(f"alignvlm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return getattr(error, "exit_code", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
