"""Conversion of every format to a data set that any reader opens; interruptions and errors lose nothing."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tensorflow_datasets as tfds

from alignvlm_jax.data import prepare as prepare_module
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.formats import FORMATS
from alignvlm_jax.data.formats.checks import Limits
from alignvlm_jax.data.formats.conversation import FormatOptions
from alignvlm_jax.data.prepare import Recipe, in_processes, prepare
from alignvlm_jax.data.store import open_dataset, read_metadata
from alignvlm_jax.errors import UserError
from alignvlm_jax.leases.lease import InUseError
from alignvlm_jax.leases.one_writer import one_writer
from alignvlm_jax.locations import open_location
from alignvlm_jax.storage.clients import file_system
from tests.data.formats.samples import image_bytes, llava_record, write_images, write_input, write_json, write_tar
from tests.data.nano_tokenizer import write_chat_folder

PREPARE = [sys.executable, "-m", "alignvlm_jax", "prepare"]
IN_PROCESS = in_processes(1)


def recipe_for(folder: Path, name: str = "llava", **options) -> Recipe:
    inputs = [str(path) for path in sorted(folder.iterdir()) if path.is_file()]
    return Recipe(
        name, tuple(inputs), options=FormatOptions(**options), limits=Limits(image_root=str(folder / "images"))
    )


def contents(folder: Path) -> dict[str, str]:
    """Returns the contents of a folder's files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def pages(tmp_path):
    folder = tmp_path / "in"
    write_images(folder / "images", 8)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_a_data_set(name, tmp_path):
    file = write_input(name, tmp_path, 9)
    recipe = Recipe(name, (str(file),), options=FormatOptions(4), limits=Limits(image_root=str(tmp_path / "images")))
    summary = prepare(recipe, tmp_path / "out", convert=IN_PROCESS, progress=False)
    assert (summary.accepted, summary.rejected) == (9, {})
    assert (tmp_path / "out" / "rejects.jsonl").read_text() == ""
    source = open_dataset(tmp_path / "out", "train")
    assert len(source) == 9
    encoding = "JPEG" if name == "webdataset" else "PNG"
    for i in range(9):
        record = source[i]
        assert record["images"] == [image_bytes(i, format=encoding)]  # byte for byte
        messages = json.loads(record["conversation"])
        assert messages[0]["content"][0] == {"type": "image"} and str(i) in messages[1]["content"]
        assert record["id"] and record["source"]
    chat = ChatTokenizer.from_folder(write_chat_folder(tmp_path / "tokenizer"))
    assert (chat.encode(messages, [3]).visual_index >= 0).sum() == 3


def test_locations_are_read_as_on_the_command_line(tmp_path, monkeypatch):
    """pathlib makes a folder `~` of "~/out", as its documentation of `expanduser` says, and `https:` of https://a/out."""
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = Recipe("llava", ("~/none.json",))
    with pytest.raises(UserError, match=f"input {tmp_path}/none.json: no such file"):
        prepare(recipe, "~/out")
    with pytest.raises(UserError, match="https://a/out is on the web"):
        prepare(recipe, "https://a/out")
    assert not list(tmp_path.iterdir())


def test_data_set_is_readable_without_tensorflow(pages, tmp_path):
    write_json(pages / "a.json", [llava_record(i) for i in range(8)])
    prepare(recipe_for(pages), tmp_path / "out", convert=IN_PROCESS, progress=False)
    program = (
        "import sys, tensorflow_datasets as tfds;"
        f"record = tfds.builder_from_directory({str(tmp_path / 'out')!r}).as_data_source('train')[5];"
        "print(record['id'], len(record['images'][0]), 'tensorflow' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["b'r5'", str(len(image_bytes(5))), "False"]
    builder = tfds.builder_from_directory(str(tmp_path / "out"))
    assert builder.info.file_format.value == "array_record" and builder.info.splits["train"].num_examples == 8


def test_every_record_is_in_the_data_set_or_refused_with_the_reason(pages, tmp_path):
    records = [llava_record(i) for i in range(8)]
    records[2] = llava_record(2, image="missing.png")
    records[5] = "not a record"
    write_json(pages / "a.json", records)
    summary = prepare(
        recipe_for(pages, records_per_shard=3), tmp_path / "out", max_rejects=0.3, convert=IN_PROCESS, progress=False
    )
    assert summary.accepted == 6 and summary.rejected == {"missing image": 1, "unreadable record": 1}
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(r["where"].rsplit(": ")[1], r["id"], r["kind"]) for r in rejects] == [
        ("record 3", "r2", "missing image"),
        ("record 6", "", "unreadable record"),
    ]
    assert "missing.png" in rejects[0]["why"] and "str" in rejects[1]["why"]
    ids = [open_dataset(tmp_path / "out", "train")[i]["id"] for i in range(6)]
    assert ids == ["r0", "r1", "r3", "r4", "r6", "r7"]


def test_too_many_rejects_stop_the_conversion_and_fixed_records_are_retried(pages, tmp_path):
    write_json(pages / "a.json", [llava_record(i) for i in range(10)])  # there are only 8 images
    recipe, out = recipe_for(pages, records_per_shard=2), tmp_path / "out"
    with pytest.raises(UserError, match=r"2 of 10 records.*limit of 1\.0%: 2 missing image.*rejects\.jsonl") as error:
        prepare(recipe, out, convert=IN_PROCESS, progress=False)
    assert str(out) in str(error.value) and len((out / "rejects.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError, match="not a data set"):
        open_dataset(out, "train")
    shard = out / "conversations-train.array_record-00000"
    written = shard.stat().st_mtime_ns
    write_images(pages / "images", 10)
    assert prepare(recipe, out, convert=IN_PROCESS, progress=False).accepted == 10
    assert shard.stat().st_mtime_ns == written  # finished work is not repeated
    assert (out / "rejects.jsonl").read_text() == "" and len(open_dataset(out, "train")) == 10


def test_higher_limit_accepts_more_rejects(pages, tmp_path):
    write_json(pages / "a.json", [llava_record(i) for i in range(10)])
    with pytest.raises(UserError, match="2 of 10"):
        prepare(recipe_for(pages), tmp_path / "out", max_rejects=0.19, convert=IN_PROCESS, progress=False)
    summary = prepare(recipe_for(pages), tmp_path / "out", max_rejects=0.2, convert=IN_PROCESS, progress=False)
    assert summary.accepted == 8


def test_conversion_stops_early_when_the_limit_is_certain_to_be_exceeded(pages, tmp_path):
    write_json(pages / "a.json", [llava_record(100 + i) for i in range(400)])
    with pytest.raises(UserError, match="10 of 10 records so far"):
        prepare(recipe_for(pages, records_per_shard=10), tmp_path / "out", convert=IN_PROCESS, progress=False)


def test_one_bad_shard_of_unknown_size_does_not_stop_early(tmp_path):
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "1.tar", range(40))
    (tmp_path / "in" / "0.tar").write_bytes(b"nothing")
    recipe = Recipe("webdataset", (str(tmp_path / "in"),))
    summary = prepare(recipe, tmp_path / "out", max_rejects=0.03, convert=IN_PROCESS, progress=False)
    assert summary.accepted == 40 and summary.rejected == {"damaged file": 1}


def test_processes_write_the_same_as_one(pages, tmp_path):
    write_json(pages / "a.json", [llava_record(i % 9) for i in range(24)])  # every ninth image is missing
    recipe = recipe_for(pages, records_per_shard=5)
    prepare(recipe, tmp_path / "one", max_rejects=0.2, convert=IN_PROCESS, progress=False)
    prepare(recipe, tmp_path / "two", max_rejects=0.2, convert=in_processes(2), progress=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_killed_and_restarted_conversion_writes_the_same_files(tmp_path):
    """The command is really killed, twice at different points, while its worker processes are at work."""
    file, killed = write_input("llava", tmp_path, 120), tmp_path / "killed"
    options, limits = FormatOptions(records_per_shard=3), Limits(image_root=str(tmp_path / "images"))
    recipe = Recipe("llava", (str(file),), options=options, limits=limits)
    prepare(recipe, tmp_path / "whole", convert=IN_PROCESS, progress=False)

    arguments = [*PREPARE, "--format", "llava", "--input", file, "--images", tmp_path / "images"]
    arguments += ["--records-per-shard", "3", "--processes", "2", "--out", killed]
    finished = []
    for shards_before_death in (1, 15):
        run = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while run.poll() is None and len(list(killed.glob("progress/0*.json"))) < shards_before_death:
            time.sleep(0.002)
        workers = psutil.Process(run.pid).children()
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=30)[1]  # none survives its parent
        finished.append(len(list(killed.glob("progress/0*.json"))))
        assert not (killed / "dataset_info.json").exists()
    assert 1 <= finished[0] <= finished[1] < 40
    prepare(recipe, killed, convert=IN_PROCESS, progress=False)
    assert contents(killed) == contents(tmp_path / "whole")


def test_bucket_to_bucket_writes_the_same_files(tmp_path, gcs_bucket):
    """Data sets in a bucket are read by ArrayRecord's own client, and written by fsspec's."""
    store = file_system(gcs_bucket)
    here, formats = tmp_path / "input", ("llava", "bigdocs", "webdataset")  # JSON and images, Parquet, archives
    for name in formats:
        (here / name).mkdir(parents=True)
        write_input(name, here / name, 5)
    lost = [llava_record(0, image="../../test/llava/images/0.png"), llava_record(1, image="/etc/hostname")]
    write_json(here / "lost.json", [*lost, llava_record(0), llava_record(9)])
    store.put(f"{here}/", f"{gcs_bucket}/", recursive=True)
    for name in formats:
        limits = Limits(image_root=f"{gcs_bucket}/{name}/images")
        recipe = Recipe(name, (f"{gcs_bucket}/{name}/data.*",), options=FormatOptions(2), limits=limits)
        out, local = f"{gcs_bucket}/out/{name}", tmp_path / "local" / name
        prepare(recipe, out, convert=IN_PROCESS, progress=False)
        prepare(recipe, local, convert=IN_PROCESS, progress=False)
        assert prepare(recipe, out, convert=IN_PROCESS, progress=False).accepted == 5
        assert list(open_dataset(out, "train")) == list(open_dataset(local, "train"))
    store.get(f"{gcs_bucket}/out/", f"{tmp_path}/out/", recursive=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    recipe = Recipe("llava", (f"{gcs_bucket}/lost.json",), limits=Limits(image_root=f"{gcs_bucket}/llava/images"))
    summary = prepare(recipe, tmp_path / "lost", max_rejects=1, convert=IN_PROCESS, progress=False)
    assert summary.accepted == 1 and summary.rejected == {"image path": 2, "missing image": 1}
    assert not (tmp_path / "gs:").exists()


def test_conversion_killed_during_cleanup_is_finished(pages, tmp_path):
    write_json(pages / "a.json", [llava_record(i) for i in range(8)])
    first = prepare(recipe_for(pages), tmp_path / "out", convert=IN_PROCESS, progress=False)
    (tmp_path / "out" / "progress").mkdir()
    (tmp_path / "out" / "progress" / "000000.json").write_text("{}")
    before = contents(tmp_path / "out")
    assert prepare(recipe_for(pages), tmp_path / "out", convert=IN_PROCESS, progress=False) == first
    del before["progress/000000.json"]
    assert contents(tmp_path / "out") == before


def test_a_folder_with_anything_else_is_left_alone(pages, tmp_path):
    write_json(pages / "a.json", [llava_record(i) for i in range(8)])
    recipe, out = recipe_for(pages), tmp_path / "out"
    prepare(recipe, out, convert=IN_PROCESS, progress=False)
    other = recipe_for(pages, records_per_shard=2)
    with pytest.raises(UserError, match="exists already"):
        prepare(other, out, convert=IN_PROCESS, progress=False)
    write_json(pages / "a.json", [llava_record(i) for i in range(7)])  # the same settings, other input
    with pytest.raises(UserError, match="exists already"):
        prepare(recipe, out, convert=IN_PROCESS, progress=False)


def test_unfinished_work_is_not_resumed_with_other_input(pages, tmp_path):
    write_json(pages / "a.json", [llava_record(i) for i in range(10)])
    with pytest.raises(UserError, match="limit"):
        prepare(recipe_for(pages, records_per_shard=2), tmp_path / "out", convert=IN_PROCESS, progress=False)
    write_json(pages / "a.json", [llava_record(i) for i in range(9)])
    with pytest.raises(UserError, match="other settings or input files"):
        prepare(recipe_for(pages, records_per_shard=2), tmp_path / "out", convert=IN_PROCESS, progress=False)


def test_full_disk_is_reported_and_work_resumes_after_freeing_space(tmp_path):
    file = write_input("llava", tmp_path, 60)
    limits = Limits(image_root=str(tmp_path / "images"))
    recipe = Recipe("llava", (str(file),), options=FormatOptions(records_per_shard=50), limits=limits)
    prepare(recipe, tmp_path / "whole", convert=IN_PROCESS, progress=False)
    command = f"{' '.join(PREPARE)} --format llava --input {file} --images {tmp_path}/images --processes 1 "
    command += f"--records-per-shard 50 --out {tmp_path}/full"
    run = subprocess.run(["bash", "-c", f"ulimit -f 20; {command}"], capture_output=True, text=True)  # 20 KiB per file
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "array_record-00000: cannot be written, the disk may be full" in run.stderr
    assert not list((tmp_path / "full").glob("*array_record*"))
    prepare(recipe, tmp_path / "full", convert=IN_PROCESS, progress=False)
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def die(job, task):
    signal.raise_signal(signal.SIGKILL)


def test_a_killed_worker_is_an_error_that_names_the_files(pages, tmp_path, monkeypatch):
    write_json(pages / "a.json", [llava_record(i) for i in range(8)])
    monkeypatch.setattr(prepare_module, "convert_slice", die)
    with pytest.raises(UserError, match="a process was killed.*a.json. Run the same command again to resume"):
        prepare(recipe_for(pages, records_per_shard=4), tmp_path / "out", convert=in_processes(2), progress=False)


def test_mistakes_are_named(pages, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="unknown format 'llama'.*llava, docdownstream"):
        prepare(Recipe("llama", ("a",)), out)
    with pytest.raises(UserError, match="nowhere.json: no such file, and no .json or .jsonl"):
        prepare(Recipe("llava", (str(tmp_path / "nowhere.json"),)), out)
    write_json(pages / "a.json", [])
    with pytest.raises(UserError, match="no usable records"):
        prepare(recipe_for(pages), out, progress=False)
    with pytest.raises(UserError, match="max_rejects: expected a share from 0 to 1, got 5"):
        prepare(recipe_for(pages), out, max_rejects=5)
    with pytest.raises(UserError, match="records_per_shard: expected at least 1, got 0"):
        prepare(recipe_for(pages, records_per_shard=0), out)
    with pytest.raises(UserError, match="split cannot be called 'all'"):
        prepare(Recipe("llava", (str(pages / "a.json"),), split="all"), out)
    with pytest.raises(UserError, match="image root .*lost is not a folder"):
        prepare(Recipe("llava", (str(pages / "a.json"),), limits=Limits(image_root=str(tmp_path / "lost"))), out)


def test_missing_shards_are_refused(tmp_path, capsys):
    """PKU-YuanGroup/ImgEdit#3 and rom1504/img2dataset#159: parts of a download are not there."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a-00000-of-00003-0123456789abcdef.tar", "a-00002-of-00003-fedcba9876543210.tar"):
        write_tar(folder / name, range(2))
    recipe = Recipe("webdataset", (str(folder),))
    with pytest.raises(UserError, match="1 of 3 shards is missing, a-00001-of-00003.tar.*--allow-partial"):
        prepare(recipe, tmp_path / "out", convert=IN_PROCESS, progress=False)
    assert not (tmp_path / "out").exists()
    prepare(recipe, tmp_path / "out", allow_partial=True, convert=IN_PROCESS, progress=False)
    assert len(open_dataset(tmp_path / "out", "train")) == 4
    assert "a-00001-of-00003.tar" in read_metadata(tmp_path / "out")["remarks"][0]
    assert "note: " in capsys.readouterr().err

    # A shard that exists and is not given was left out on purpose.
    write_tar(folder / "a-00001-of-00003-0000000000000000.tar", range(2))
    chosen = Recipe("webdataset", (str(folder / "a-0000[02]*"),))
    prepare(chosen, tmp_path / "chosen", convert=IN_PROCESS, progress=False)
    # Two downloads of one set: every record would be there twice.
    write_tar(folder / "a-00000-of-00001.tar", range(2))
    with pytest.raises(UserError, match="side by side, a-.-of-00001.tar and a-.-of-00003.tar; remove one of them"):
        prepare(recipe, tmp_path / "twice", convert=IN_PROCESS, progress=False)
    prepare(recipe, tmp_path / "twice", allow_partial=True, convert=IN_PROCESS, progress=False)
    assert len(open_dataset(tmp_path / "twice", "train")) == 6


def test_gaps_in_numbered_archives_are_stated(tmp_path, capsys):
    """rom1504/img2dataset#159: 2 of 12 million images arrived, without an error."""
    for number in (0, 1, 3):
        write_tar(tmp_path / f"{number:05}.tar", range(1))
    prepare(Recipe("webdataset", (str(tmp_path / "*.tar"),)), tmp_path / "out", convert=IN_PROCESS, progress=False)
    assert "note:" in (errors := capsys.readouterr().err) and "leave out 00002.tar" in errors


@pytest.mark.parametrize("place", ["tmp_path", "gcs_bucket"])
def test_two_conversions_to_one_folder_are_refused(place, pages, request):
    write_json(pages / "a.json", [llava_record(i) for i in range(8)])
    out = open_location(request.getfixturevalue(place)) / "out"
    with one_writer(out), pytest.raises(InUseError, match="another run is writing to it"):
        prepare(recipe_for(pages), out, progress=False, convert=IN_PROCESS)
    written = prepare(recipe_for(pages), out, progress=False, convert=IN_PROCESS)
    assert not list(out.glob(".writer*"))
    # A finished data set is found without writing anything, so it may be on storage that can only be read.
    with one_writer(out):
        assert prepare(recipe_for(pages), out, progress=False, convert=IN_PROCESS) == written
