"""Answers from stored programs and weights: the same as those of the loaded model, and never from outdated entries."""

import argparse
import os
import shutil

import pytest

import alignvlm_jax
from alignvlm_jax.backbones import NANO_MODEL
from alignvlm_jax.commands import ask
from alignvlm_jax.data.synthetic.document import draw_document
from alignvlm_jax.inference import prepared
from alignvlm_jax.inference.answers import AnswerText
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.interop.tokenizer import read_exported_tokenizer
from tests.interop.exported import random_params, tiny_config

QUESTION = "What is the total?"


@pytest.fixture(scope="module")
def page():
    return draw_document(1, "heldout", 3, family="receipt").image


@pytest.fixture(scope="module")
def entry(tmp_path_factory, page):
    """An entry of a tiny model with one program; the answer that it gave first, and its answer without an entry."""
    config = tiny_config()
    tokenizer = read_exported_tokenizer(NANO_MODEL)
    model = Reader(config.model, random_params(config.model), tokenizer, config.data.tiling, batch_size=1)
    entry = tmp_path_factory.mktemp("entries") / "entry"
    return (
        entry,
        model.ask_and_store(page, QUESTION, max_new_tokens=8, entry=entry),
        model.ask(page, QUESTION, max_new_tokens=8),
    )


def test_a_stored_program_gives_the_same_answer(entry, page):
    folder, first, plain = entry
    model = prepared.PreparedModel(folder, NANO_MODEL)
    stored = model.ask(page, QUESTION, max_new_tokens=8)
    assert (
        stored == first == plain
        and stored.warnings == first.warnings == plain.warnings
        and "cut_off" in stored.warnings
    )
    # A shorter limit, and two views, are other programs.
    with pytest.raises(OSError):
        model.ask(page, QUESTION, max_new_tokens=7)
    with pytest.raises(OSError):
        model.with_views(2).ask(page, QUESTION, max_new_tokens=8)


def test_an_entry_belongs_to_the_files_the_code_and_the_variables(tmp_path, monkeypatch):
    folder = shutil.copytree(NANO_MODEL, tmp_path / "model")
    known = prepared.entry_of(tmp_path, folder, {"HOME": "/home/anna"})
    assert known.parent == tmp_path and prepared.entry_of(tmp_path, folder, {"HOME": "/root"}) == known
    others = {prepared.entry_of(tmp_path, folder, {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"})}
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read(1)
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last[0] ^ 1]))
    others.add(prepared.entry_of(tmp_path, folder, {}))
    status = os.stat(prepared.__file__)
    monkeypatch.setattr(prepared, "_python_files", lambda package: [("generate.py", status)])
    others.add(prepared.entry_of(tmp_path, folder, {}))
    assert len(others | {known}) == 4
    monkeypatch.setattr(prepared, "MAX_BYTES", 1000)
    assert prepared.entry_of(tmp_path, folder, {}) is None
    assert prepared.entry_of(tmp_path, tmp_path, {}) is None


class LoadedModel:
    """Stands in for a model that was loaded because there was no usable entry."""

    notes = ()

    def with_views(self, number):
        return self

    def ask_and_store(self, image, question, *, max_new_tokens, entry):
        return AnswerText(f"loaded for {entry.name}")


@pytest.mark.parametrize("fault", ["none", "truncated", "flipped", "not a program", "missing"])
def test_a_damaged_entry_means_that_the_model_is_loaded(fault, entry, page, tmp_path, monkeypatch):
    folder = shutil.copytree(entry[0], tmp_path / "entry")
    (program,) = (file for file in folder.iterdir() if file.name != "model")
    content = bytearray(program.read_bytes())
    if fault == "truncated":
        program.write_bytes(content[: len(content) // 2])
    elif fault == "flipped":
        content[len(content) // 2] ^= 1
        program.write_bytes(content)
    elif fault == "not a program":
        prepared._write(program, (b"", None, None))
    elif fault == "missing":
        shutil.rmtree(folder)
    monkeypatch.setattr(ask, "_find_entry", lambda args: (folder, NANO_MODEL))
    monkeypatch.setattr(alignvlm_jax, "load", lambda checkpoint: LoadedModel())
    answer, _ = ask._answer(argparse.Namespace(max_new_tokens=8, views=1, checkpoint="nano"), page, QUESTION)
    assert answer == (entry[1] if fault == "none" else "loaded for entry")


def test_old_models_and_programs_are_removed(tmp_path):
    for age in range(5):
        (tmp_path / f"{age}").mkdir()
        os.utime(tmp_path / f"{age}", (1000 - age, 1000 - age))
    prepared._keep_newest(list(tmp_path.iterdir()), 3)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2"}
