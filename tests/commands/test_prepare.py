"""`alignvlm prepare`: its output, and the defaults that its help states. tests/data converts every format."""

import dataclasses

import pytest

from alignvlm_jax import cli
from alignvlm_jax.commands import prepare as command
from alignvlm_jax.data import prepare
from alignvlm_jax.data.formats import FORMATS
from alignvlm_jax.data.formats.checks import Limits
from alignvlm_jax.data.formats.conversation import FormatOptions
from tests.data.formats.samples import llava_record, write_images, write_json

REQUIRED = ["prepare", "--format", "llava", "--input", "a.json", "--out", "o"]


def test_a_summary_is_printed(tmp_path, capsys):
    write_images(tmp_path / "in" / "images", 8)
    write_json(tmp_path / "in" / "a.json", [llava_record(i) for i in range(9)])

    def run(*arguments):
        words = ["--input", tmp_path / "in", "--images", tmp_path / "in" / "images", "--out", tmp_path / "out"]
        words = ["prepare", "--format", "llava", *words, "--processes", 1, *arguments]
        return cli.main([str(word) for word in words]), *capsys.readouterr()

    code, _, errors = run()
    assert code == 2 and "error: 1 of 9 records" in errors
    code, output, errors = run("--max-rejects", 0.2)
    assert code == 0 and "\r" not in errors  # a progress bar is for a terminal
    assert output.splitlines() == [f"{tmp_path / 'out'}: 8 of 9 records, 1 refused", "         1  missing image"]


def test_a_bucket_that_does_not_answer_is_tried_again_later(monkeypatch, capsys):
    def fail(*arguments, **options):
        raise TimeoutError("gs://bucket/a: timed out")

    monkeypatch.setattr(prepare, "prepare", fail)
    assert cli.main(REQUIRED) == 75
    assert "the bucket cannot be reached now" in capsys.readouterr().err


def test_unknown_options_are_for_beam_only(capsys):
    beam = ["--temp_location", "x", "--config.x=1"]
    assert cli.parse([*REQUIRED, "--runner", "DirectRunner", *beam]).passed_on == beam
    with pytest.raises(SystemExit):
        cli.parse([*REQUIRED, "--temp_location", "x"])
    assert "unrecognized arguments: --temp_location x" in capsys.readouterr().err


def test_the_stated_defaults_are_those_of_the_library():
    """The command states them itself, so that its help does not wait for numpy."""
    args = cli.parse(REQUIRED)
    assert command.FORMATS == tuple(FORMATS)
    assert args.max_rejects == prepare.DEFAULT_MAX_REJECTS
    options = FormatOptions(args.records_per_shard, args.source, args.instruction, args.max_record_bytes)
    limits = Limits(args.images, args.follow_links, args.max_pixels, args.max_record_bytes)
    assert dataclasses.astuple(options) == dataclasses.astuple(FormatOptions())
    assert dataclasses.astuple(limits) == dataclasses.astuple(Limits())
