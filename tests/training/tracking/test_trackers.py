"""Trackers: the same curves in each, resumed runs, runs that go back, and trackers that fail."""

import importlib.util
import json
import math
import struct
import sys

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from alignvlm_jax import cli
from alignvlm_jax.errors import UserError
from alignvlm_jax.training.tracking import trackers
from alignvlm_jax.training.tracking.tracker import ShownAnswer, Tracker

CONFIG = {"seed": 3, "model": {"connector": {"name": "align"}}}
ANSWERS = [
    ShownAnswer(np.full((40, 30, 3), 90, np.uint8), "What is the total?", "$5.00", "$7.00"),
    ShownAnswer(None, "Which date?", "1 May", "2 May"),
]
# What a reader of the curves should see: `write_sessions` repeats steps 3 to 5 with other values, and 4 and 5 again.
POINTS = {1: 1.0, 2: 2.0, 3: 103.0, 4: 204.0, 5: 205.0, 6: 206.0}


def open_trackers(names, workdir, first_step=0):
    workdir.mkdir(exist_ok=True)
    return trackers.open_trackers(names, workdir, CONFIG, first_step=first_step)


def write_sessions(name, workdir):
    """Logs a session that goes back from step 5 to step 2, and one that resumes from step 3."""
    with open_trackers([name], workdir) as tracked:
        for step in range(1, 6):
            tracked.log(step, {"train/loss": float(step), "train/words": math.nan})
        tracked.rewind(2)
        for step in range(3, 6):
            tracked.log(step, {"train/loss": 100.0 + step})
        tracked.log_answers(5, "validation", ANSWERS)
    with open_trackers([name], workdir, first_step=3) as tracked:
        for step in range(4, 7):
            tracked.log(step, {"train/loss": 200.0 + step})


def read_events(folder):
    """Returns the events in a folder as TensorBoard shows them: a start hides later steps of earlier events."""
    events = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("Q", data[:8])
            event, data = event_pb2.Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == event_pb2.SessionLog.START:
                events = [kept for kept in events if kept.step < event.step]
            events += [event] if event.summary.value else []
    return events


def test_tensorboard_shows_each_step_once(tmp_path):
    write_sessions("tensorboard", tmp_path / "run")
    values = [
        (event.step, value) for event in read_events(tmp_path / "run" / "tensorboard") for value in event.summary.value
    ]
    assert {step: value.simple_value for step, value in values if value.tag == "train/loss"} == POINTS
    assert sum(value.tag == "train/loss" for _, value in values) == len(POINTS)
    texts = {value.tag: value.tensor.string_val[0].decode() for _, value in values if value.tensor.string_val}
    assert '"name": "align"' in texts["config/text_summary"]
    # Step 5 was repeated, so its answers are hidden.
    assert not [value.tag for _, value in values if "answer" in value.tag] and "train/words" not in str(values)


def test_tensorboard_shows_pages_and_answers(tmp_path):
    with open_trackers(["tensorboard"], tmp_path) as tracked:
        tracked.log_answers(5, "validation", ANSWERS)
    values = {value.tag: value for event in read_events(tmp_path / "tensorboard") for value in event.summary.value}
    assert values["validation/answer_0"].image.encoded_image_string.startswith(b"\x89PNG")
    assert (
        b"What is the total? -> $7.00 (expected: $5.00)" in values["validation/answer_0/text_summary"].tensor.string_val
    )
    assert b"Which date? -> 2 May (expected: 1 May)" in values["validation/answer_1/text_summary"].tensor.string_val


def test_wandb_offline_continues_the_run(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(trackers, "git_revision", lambda: "1a2b3c4+changes")
    write_sessions("wandb", tmp_path / "mine")
    wandb.teardown()
    identifier = json.loads((tmp_path / "mine" / "trackers.json").read_text())["wandb"]
    sessions = sorted((tmp_path / "mine" / "wandb").glob("offline-run-*"))
    assert [session.name.rpartition("-")[2] for session in sessions] == [identifier] * 2
    first, second = (next(session.glob("run-*.wandb")).read_bytes() for session in sessions)
    for recorded in (first, second):
        # The name, the config and the commit.
        assert b"mine" in recorded and b'"align"' in recorded and b"1a2b3c4+changes" in recorded
        assert b"train/loss" in recorded and b"train/words" not in recorded
    # Points of repeated steps are kept, although the steps are smaller than the last one.
    assert b"103" in first and b"105" in first and b"204" in second
    assert b"What is the total? -> $7.00 (expected: $5.00)" in first and b"Which date?" in first
    (page,) = sessions[0].glob("files/media/images/validation/answer_0_*.png")
    assert page.read_bytes().startswith(b"\x89PNG")


def test_trackio_continues_the_run(tmp_path, monkeypatch, capsys):
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("the extra trackio is not installed: `pip install -e '.[trackio]'`, which replaces Pillow 13")
    # trackio reads the variable when it is imported.
    assert "trackio" not in sys.modules
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr(trackers, "git_revision", lambda: "1a2b3c4+changes")
    write_sessions("trackio", tmp_path / "mine")
    assert capsys.readouterr().out == ""
    identifier = json.loads((tmp_path / "mine" / "trackers.json").read_text())["trackio"]
    assert SQLiteStorage.get_runs("alignvlm") == [f"mine-{identifier}"]
    logs = SQLiteStorage.get_logs("alignvlm", f"mine-{identifier}")
    # Repeated steps have several points, of which the last one is from the run as it is.
    assert {log["step"]: log["train/loss"] for log in logs if "train/loss" in log} == POINTS
    (shown,) = (log for log in logs if "validation/answer_0" in log)
    assert shown["validation/answer_0"]["caption"] == ANSWERS[0].caption
    config = SQLiteStorage.get_run_config("alignvlm", f"mine-{identifier}")
    assert config["git_commit"] == "1a2b3c4+changes" and config["model"] == CONFIG["model"]


class Recorder(Tracker):
    """Stores what it is told, and fails at one call."""

    calls: list = []
    fails_at = ""

    def __init__(self, run):
        self._record("open", run.first_step, run.is_resumed)

    def _record(self, *call):
        if self.fails_at == call[0]:
            raise ConnectionError("no route to host.")
        self.calls.append(call)

    def log(self, step, values):
        self._record("log", step, dict(values))

    def log_answers(self, step, answers):
        self._record("log_answers", step, list(answers))

    def rewind(self, step):
        self._record("rewind", step)

    def close(self, exit_code):
        self._record("close", exit_code)


@pytest.fixture
def recorders(monkeypatch):
    """Two kinds of tracker that record their calls."""
    kinds = {name: type(name, (Recorder,), {"calls": []}) for name in ("good", "bad")}
    monkeypatch.setattr(trackers, "KINDS", {name: trackers._Kind(name.title(), kind) for name, kind in kinds.items()})
    return kinds


@pytest.mark.parametrize("moment", ["open", "log", "log_answers", "rewind", "close"])
def test_a_tracker_that_fails_is_dropped_with_one_warning(moment, recorders, tmp_path, capsys):
    recorders["bad"].fails_at = moment
    with open_trackers(["bad", "good"], tmp_path) as tracked:
        for step in range(2):
            tracked.log(step, {"loss": 1.0})
            tracked.log_answers(step, "validation", ANSWERS)
            tracked.rewind(0)
    error = capsys.readouterr().err
    assert error == "warning: Bad: no route to host. The run continues without it\n"
    repeated = [("log", {"loss": 1.0}), ("log_answers", ["validation/answer_0", "validation/answer_1"])]
    expected = [(name, step, content) for step in range(2) for name, content in repeated]
    assert [call for call in recorders["good"].calls if call[0].startswith("log")] == expected
    assert recorders["good"].calls[-1] == ("close", 0)


def test_a_run_that_ends_with_an_error_says_so(recorders, tmp_path):
    error = UserError("too many updates were skipped")
    with pytest.raises(UserError), open_trackers(["good"], tmp_path):
        raise error
    assert recorders["good"].calls == [("open", 0, False), ("close", 2)]
    with open_trackers(["good"], tmp_path, first_step=7):
        pass
    assert recorders["good"].calls[2:] == [("open", 7, True), ("close", 0)]


@pytest.mark.parametrize("content", ["{", "[]", '"x"'])
def test_damaged_identifiers_start_new_runs(content, recorders, tmp_path):
    (tmp_path / "trackers.json").write_text(content)
    with open_trackers(["good"], tmp_path):
        pass
    assert set(json.loads((tmp_path / "trackers.json").read_text())) == {"good"}


def test_event_files_that_cannot_be_written_are_one_warning(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("")
    with open_trackers(["tensorboard"], tmp_path) as tracked:
        tracked.log(1, {"loss": 1.0})
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("log_to", "message"),
    [
        ("tensorbord", "unknown tracker 'tensorbord': expected tensorboard, wandb, trackio or none"),
        ("wandb", "[wandb]"),
    ],
)
def test_a_tracker_that_is_not_there_is_reported_before_anything_starts(log_to, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    workdir = tmp_path / "run"
    argv = ["train", "--config", "configs/nano.py", "--workdir", str(workdir), "--log-to", log_to]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not workdir.exists()
