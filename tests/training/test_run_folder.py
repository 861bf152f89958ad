"""The folder of a run that starts from a checkpoint."""

import dataclasses

import pytest

from alignvlm_jax.config.serialization import config_to_json
from alignvlm_jax.training import run_folder
from tests.interop.exported import tiny_config


class Data:
    """Data of a run, of which only process 0 writes something."""

    def save_tokenizer(self, folder):
        pytest.fail("process 1 writes nothing")


@pytest.mark.parametrize("is_resumed", [False, True])
def test_all_processes_read_the_history_of_the_start(tmp_path, monkeypatch, is_resumed):
    """They verify the files together: if process 0 did it alone, it would read what the others say at a barrier."""
    config, read = dataclasses.replace(tiny_config(), init_from="start"), []
    monkeypatch.setattr(run_folder.distributed, "is_primary", lambda: False)
    monkeypatch.setattr(run_folder, "history_of_run", lambda start: read.append(start) or [])
    monkeypatch.setattr(run_folder, "complete_steps", lambda folder: [1] if is_resumed else [])
    (tmp_path / "config.json").write_text(config_to_json(config))
    run_folder.prepare_workdir(tmp_path, config, Data(), [])
    assert read == ([] if is_resumed else ["start"])
