"""Runs one process of a session, like `alignvlm train`, and writes a journal of the batches it trains on.

    python session.py '{"config": "config.json", "workdir": "run", "journal": "journal.jsonl", "sitting": 3}'

It appends a line per step to the journal: {"sitting": 3, "step": 12, "rows": {"0": hash of row 0, ...}, "refused":
[ids]}, where "sitting" is the number of the session. Each process of a session writes the rows that it made to the same
file.
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


class _RecordingFeed:
    """Wrapper of a `BatchIterator` that keeps the hashes and the refusals of the newest batch."""

    def __init__(self, feed, rows):
        self._feed, self._rows = feed, rows
        self.hashes: dict[str, str] = {}
        self.refusals: list[str] = []

    def __next__(self):
        batch = next(self._feed)
        for index, row in enumerate(self._rows):
            content = b"".join(batch[name][:, index].tobytes() for name in sorted(batch))
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
    feeds: list[_RecordingFeed] = []
    journal = os.open(arguments["journal"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    class Data(ExperimentData):
        def batches(self, stage_index, stage, plan, state, rows):
            feeds.append(_RecordingFeed(super().batches(stage_index, stage, plan, state, rows), rows))
            return feeds[-1]

    def on_step(step):
        note = {
            "sitting": arguments["sitting"],
            "step": step,
            "time": time.monotonic(),
            "rows": feeds[-1].hashes,
            "refused": feeds[-1].refusals,
        }
        os.write(journal, json.dumps(note).encode() + b"\n")  # a single write, which a kill cannot split

    config = config_from_dict(read_config_json(Path(arguments["config"])))
    try:
        with distributed.initialized(*arguments.get("distributed", ())):
            loop.train(config, arguments["workdir"], open_data=Data, on_step=on_step)
    except UserError as error:
        print(f"alignvlm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return getattr(error, "exit_code", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
