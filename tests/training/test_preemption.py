"""Preemption by SIGTERM to a whole job, or by Google Cloud's notice: the run is saved and exits with code 75."""

import dataclasses
import http.server
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import psutil
import pytest

from alignvlm_jax.checkpoints.workdir import find_undamaged
from alignvlm_jax.config.experiment import BackbonesConfig
from alignvlm_jax.config.serialization import config_to_json
from alignvlm_jax.config.stages import MixturePart
from alignvlm_jax.data import store
from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.data.synthetic.corpus import FEATURES
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.parallel import distributed
from alignvlm_jax.training import interruption
from tests.data.nano_tokenizer import write_chat_folder
from tests.data.pages import pages
from tests.parallel import processes, tiny

STEPS = 60  # enough that the run has not finished when the signal arrives
CONFIG_FILE = """
import json
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads({text!r}))
"""


def write_config(folder):
    """Writes a data set of pages and a config file that trains on them for a few seconds. Returns the config's path."""
    documents = [page | {"image": io.BytesIO(page["image"])} for page in pages(30)]
    store.write_dataset(folder / "documents", FEATURES, {"train": documents})
    experiment = tiny.config((2, 1, 1))
    packing = PackingConfig(tokens_per_bin=160, tiles_per_bin=8, bins_per_microbatch=2, examples_per_bin=8, window=6)
    (stage,) = experiment.stages
    experiment = dataclasses.replace(
        experiment,
        tokenizer=str(write_chat_folder(folder / "tokenizer")),
        model=dataclasses.replace(
            tiny.MODEL, language=dataclasses.replace(tiny.MODEL.language, vocab_size=352, max_position_embeddings=512)
        ),
        backbones=BackbonesConfig("random", "random"),
        data=DataConfig(str(folder), TilingConfig(tile_size=16, max_tiles=3), packing, workers=1),
        stages=(dataclasses.replace(stage, mixture=(MixturePart("documents", task="qa"),), steps=STEPS),),
        checkpoint=dataclasses.replace(experiment.checkpoint, every_steps=10 * STEPS),
    )
    (folder / "config.py").write_text(CONFIG_FILE.format(text=config_to_json(experiment)))
    return folder / "config.py"


def start(folder, config, output=None):
    """Starts `alignvlm train` as the leader of a process group.

    Args:
      folder: folder of the run and of its output.
      config: path of the config file.
      output: handle that receives the output, instead of FOLDER/output.txt.

    Returns:
      A `subprocess.Popen` if `output` is given, otherwise a `processes.Process`.
    """
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(processes.ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "alignvlm_jax", "train", "--config", config, "--workdir", folder / "run"]
    options = dict(stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True)
    if output is not None:
        return subprocess.Popen(command, stdout=output, **options)
    file = folder / "output.txt"
    with file.open("w") as out:
        return processes.Process(subprocess.Popen(command, stdout=out, **options), file)


def test_sigterm_saves_even_if_the_log_is_no_longer_read(tmp_path):
    """A signal to a whole job also ends the `tee` that reads its output."""
    config = write_config(tmp_path)
    read, write = os.pipe()
    run = start(tmp_path, config, output=write)
    os.close(write)  # the run has its own copy of this end
    # Leaving the block closes the only reader, so that from then on printing fails with a broken pipe.
    with os.fdopen(read, "rb", buffering=0) as pipe:
        output = b""
        while b"step 3 " not in output:
            output += pipe.read(4096)
    run.send_signal(signal.SIGTERM)
    assert run.wait(400) == 75
    assert 3 <= find_undamaged(tmp_path / "run")[1] < STEPS


def group_members(process):
    """Returns the running processes of the group that `process` leads."""
    members = []
    for other in psutil.process_iter():
        try:
            if os.getpgid(other.pid) == process.pid:
                members.append(other)
        except ProcessLookupError:
            pass
    return members


def test_sigterm_to_a_whole_job_saves_the_step_and_the_job_resumes_from_it(tmp_path):
    config = write_config(tmp_path)
    run = start(tmp_path, config)
    run.wait_for("step 3 ")
    workers = [other for other in group_members(run.process) if "spawn_main" in " ".join(other.cmdline())]
    assert len(workers) == 1
    signal_time = time.monotonic()
    os.killpg(run.process.pid, signal.SIGTERM)
    workers[0].send_signal(signal.SIGTERM)  # in real jobs, some processes receive the signal twice
    assert run.process.wait(400) == 75, run.text()
    seconds = time.monotonic() - signal_time
    while group_members(run.process):  # all processes of the group must end
        time.sleep(0.05)
        assert time.monotonic() - signal_time < 400
    (step,) = map(int, re.findall(r"saved after step (\d+)", run.text()))
    assert 3 <= step < STEPS and find_undamaged(tmp_path / "run")[1] == step
    print(f"saved and ended {seconds:.2f} s after SIGTERM")

    resumed = start(tmp_path, config)
    assert resumed.process.wait(400) == 0, resumed.text()
    steps = [int(number) for number in re.findall(r"step (\d+) tiny", resumed.text())]
    assert steps == list(range(step + 1, STEPS + 1)) and f"trained {STEPS} steps" in resumed.text()


class MetadataServer(http.server.BaseHTTPRequestHandler):
    """Fake of Google Cloud's metadata server. As there, a request waits until the preemption notice changes."""

    preempted, num_requests = threading.Event(), 0

    def do_GET(self):
        assert self.path.startswith("/computeMetadata/v1/instance/preempted?wait_for_change=true")
        assert self.headers["Metadata-Flavor"] == "Google"
        type(self).num_requests += 1
        # ETag 0 names no earlier notice, so the first request is answered at once.
        if "last_etag=0" not in self.path:
            assert "last_etag=first" in self.path
            self.preempted.wait(60)
        self.send_response(200)
        self.send_header("ETag", "second" if self.preempted.is_set() else "first")
        self.end_headers()
        self.wfile.write(b"TRUE" if self.preempted.is_set() else b"FALSE")

    def log_message(self, *_):
        pass


def test_googles_preemption_notice_saves_the_step(tmp_path, monkeypatch, capsys):
    server = http.server.ThreadingHTTPServer(("localhost", 0), MetadataServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
    output = []

    def on_step(step):
        if step == 2:
            MetadataServer.preempted.set()
            # The notice is published during step 2. Wait for it here, so that it arrives before the step ends.
            while not any("interrupted" in line for line in output):
                output.append(capsys.readouterr().out)
                time.sleep(0.01)

    with pytest.raises(distributed.Preempted) as error:
        tiny.train(tmp_path, tiny.config((8, 1, 1)), losses={}, examples=[], on_step=on_step)
    server.shutdown()
    assert error.value.exit_code == 75 and find_undamaged(tmp_path)[1] == 2 and MetadataServer.num_requests >= 2


def test_only_google_cloud_machines_poll_for_the_notice(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(interruption, "_PRODUCT", tmp_path / "product_name")
    assert not interruption.is_google_cloud()
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    assert interruption.is_google_cloud()


def test_a_second_sigterm_does_not_end_a_save_but_a_second_ctrl_c_does():
    with interruption.Interruption() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.interrupted and flag.preempted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
