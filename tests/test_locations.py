"""What a location is: `~`, schemes that are refused, and every place where a location can be given."""

import argparse
import importlib.util
import os
import pathlib
import re

import pytest

from alignvlm_jax import cli
from alignvlm_jax.config import load_config
from alignvlm_jax.config.building import build
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.loading import read_raw_config
from alignvlm_jax.config.paths import with_locations
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import (
    LocationError,
    absolute,
    is_bucket,
    is_local,
    local_path,
    location,
    open_location,
    parse_location,
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paths_on_a_disk(home):
    """RFC 8089 (file URLs); cockroachdb/cockroach#14435: shells do not expand `~` in --workdir=~/run."""
    assert local_path("~/runs") == f"{home}/runs" and local_path("~") == str(home)
    assert local_path("~root/x") == os.path.expanduser("~root/x") != "~root/x"
    for text in ("file:///data/a%20b", "file:/data/a%20b", "file://localhost/data/a%20b"):
        assert local_path(text) == "/data/a b"
    for text in ("nano", "C:/runs", "a:b", "./gs:/x", "runs/~/x", "data:image/png;base64,/9j/"):
        assert local_path(text) == text
    assert local_path(pathlib.Path("a/b")) == "a/b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # tensorpack/tensorpack#1317: gs://BUCKET became the local folder gs:/BUCKET.
        ("gs://bucket/run", "gs://bucket/run is in a bucket.*mount the bucket"),
        ("gs:/bucket/run", "gs:/bucket/run is in a bucket"),
        ("S3://bucket", "is in a bucket"),
        ("hf://datasets/lmms-lab/DocVQA", "is on the Hugging Face Hub.*hf download"),
        ("https://example.org/a.png", "is on the web.*download it"),
        ("file://host/a", "names another host"),
        ("nfs://host/a", "has the scheme nfs://, which is not supported"),
        ("runs/gs://bucket", "is in a bucket"),
        ("~nobody-has-this-name/x", "this machine has no user nobody-has-this-name"),
        ("", "the path is empty"),
    ],
)
def test_refused_locations(text, message):
    """tensorpack/tensorpack#1317, google/orbax#1652."""
    with pytest.raises(UserError, match=message):
        local_path(text)


def test_buckets():
    """tensorpack/tensorpack#1317: gs://BUCKET became the local folder gs:/BUCKET."""
    assert location("GS://bucket/a/") == "gs://bucket/a" and not is_local("gs://bucket/a")
    assert location("s3://bucket") == "s3://bucket" and is_local(location("data/x"))
    path = open_location("gs://bucket/a") / "b"
    assert (str(path), path.name, str(path.parent)) == ("gs://bucket/a/b", "b", "gs://bucket/a")
    assert is_bucket(path) and absolute(path) == path == open_location(path)
    local = open_location("a/b")
    assert local == pathlib.Path("a/b") and not is_bucket(local) and absolute(local) == pathlib.Path.cwd() / "a/b"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        *((url, "names no bucket: expected gs://BUCKET/PATH") for url in ("gs:/bucket", "gs://", "gs:///a")),
        *(
            (f"gs://{name}/a", "cannot be the name of a bucket")
            for name in ("Bucket", "my bucket", "b", "-bucket", "b#1")
        ),
        *((f"s3://bucket/{key}", "without empty parts") for key in ("a//b", "a/../b", "./a", "a\nb")),
        ("gcs://bucket/a", "is in a bucket"),
        ("https://a", "is on the web"),
    ],
)
def test_malformed_urls(url, message):
    """googleapis/google-cloud-python: the server answers 400 to such names, after the work has begun."""
    with pytest.raises(LocationError, match=message):
        location(url)


@pytest.mark.parametrize(
    ("url", "package", "extra"), [("gs://bucket/a", "gcsfs", "gcs"), ("s3://bucket", "s3fs", "s3")]
)
def test_a_bucket_without_its_package(url, package, extra, monkeypatch):
    """fsspec, registry.py: `Please install gcsfs to access Google Storage`, an ImportError."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(LocationError, match=rf'pip install "alignvlm-jax\[{extra}\]"'):
        location(url)
    assert parse_location(url) == url  # of a stored config


# Options that need a disk: configs are Python files, and these outputs are changed and linked. All others take buckets.
ON_DISK = {
    "train": ["--config"],
    "import": ["--config"],
    "compile": ["--config", "--search-dir"],
    "demo": ["--config", "--out"],
    "reproduce": ["--config", "--data", "--out"],
}


def _options(parser, command):
    """Yields command and action of every argument that is a location."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _options(child, command)
        elif action.metavar in ("DIR", "FILE", "PATH", "IMAGE", "CHECKPOINT", "ENCODER=DIR"):
            yield command, action


OPTIONS = [option for name, parser in cli._parsers()[1].items() for option in _options(parser, name)]


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize(
    ("command", "action"), OPTIONS, ids=[f"{name}{''.join(action.option_strings)}" for name, action in OPTIONS]
)
def test_every_option_takes_a_bucket_or_says_what_to_do(command, action, scheme, home):
    """tensorpack/tensorpack#1317, young-geng/EasyLM#25: a bucket became the local folder gs:."""
    url, prefix = f"{scheme}://bucket/a", "a=" if action.metavar == "ENCODER=DIR" else ""
    if {*action.option_strings} & {*ON_DISK.get(command, ())}:
        with pytest.raises(LocationError, match=f"{url} is in a bucket.*(mount the bucket|copy)"):
            action.type(url)
    else:
        assert action.type(prefix + url) in (url, ("a", url))
    with pytest.raises((LocationError, argparse.ArgumentTypeError)):
        action.type(f"{prefix}{scheme}:/bucket/a")
    assert not list(home.iterdir())


def test_every_option_of_a_tool_that_is_a_path_is_parsed_as_one():
    names = "config|out|json|checkpoint|folder|vision|language|chat-template|workdir|images|input|plot|data"
    tools = pathlib.Path(__file__).parents[1] / "tools"
    options = [
        (file.name, option)
        for file in [*tools.glob("*.py"), *tools.glob("benchmarks/*.py")]
        for option in file.read_text().split("add_argument(")[1:]
        if re.match(rf"\s*\"--({names})\"", option)
    ]
    assert len(options) >= 8
    for file, option in options:
        assert re.search(r"type=(local_path|as_path|location)\b", option.partition("help=")[0]), (file, option[:80])


PATHS = ("data.root", "init_from", "tokenizer", "backbones.vision", "backbones.language", "evaluation.dataset")


@pytest.mark.parametrize("key", [*PATHS, "stages.0.mixture.0.dataset"])
def test_paths_in_configs(key, home):
    """google/orbax#1652 and bash: a config's paths reach pathlib as they are written."""
    file = pathlib.Path(__file__).parents[1] / "configs" / "nano.py"
    assert _get(load_config(file, [f"{key}=~/x"]), key) == f"{home}/x"
    with pytest.raises(UserError, match=f"config.{key}: gs://B/x: 'B' cannot be the name of a bucket"):
        load_config(file, [f"{key}=gs://B/x"])
    # Nothing is read from the bucket here.
    raw = read_raw_config(file, [f"{key}=gs://bucket/x"])
    raw = {name: raw[name] for name in raw if name == key.partition(".")[0]}
    assert _get(with_locations(build(ExperimentConfig, raw, "config", None)), key) == "gs://bucket/x"


def _get(value, key):
    for name in key.split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value
