"""Each refused example is listed once, over all epochs and restarts."""

import json

from alignvlm_jax.data.packing import Refused
from alignvlm_jax.data.refusals import RefusalLog


def test_each_example_is_listed_once(tmp_path):
    path = tmp_path / "data_refused.jsonl"
    log = RefusalLog(path)
    log.add([])
    assert not path.exists()
    first, second = Refused("1", "a/train", "too large"), Refused("1", "b/train", "kein Bild: ä")
    log.add([first, second, first])
    log.add([second])
    with path.open("a") as file:
        file.write('{"id": "2", "sou')  # killed while writing
    third = Refused("2", "a/train", "damaged")
    for _ in range(2):
        again = RefusalLog(path)
        again.add([first, third])
    *lines, last = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines[:2]] == [
        {"id": "1", "source": "a/train", "reason": "too large"},
        {"id": "1", "source": "b/train", "reason": "kein Bild: ä"},
    ]
    assert json.loads(last) == {"id": "2", "source": "a/train", "reason": "damaged"} and len(lines) == 3
