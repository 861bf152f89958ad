"""`alignvlm export --push-to-hub` uploads what it exports, and checks the token before."""

import pathlib
import shutil

import pytest
from huggingface_hub import constants

from alignvlm_jax import cli
from alignvlm_jax.backbones import NANO_MODEL, trained_model
from alignvlm_jax.checkpoints import workdir
from alignvlm_jax.inference import verification
from alignvlm_jax.interop import export
from tests.hub_server import LFS_BYTES, READ_TOKEN, TOKEN, Repository, forget

NAME = "lab/tiny"
CHECKPOINT = "checkpoint"


@pytest.fixture(autouse=True)
def exports(monkeypatch):
    """Replaces the checkpoint and its export, which tests/interop covers, by a copy of the trained nano model."""

    def write(checkpoint, out, *, dtype, max_shard_bytes):
        assert checkpoint == CHECKPOINT
        out = pathlib.Path(shutil.copytree(NANO_MODEL, out))
        (out / "README.md").write_text('AutoProcessor.from_pretrained("THIS_FOLDER")')
        if max_shard_bytes < 10**9:
            for number in (1, 2):
                shutil.copy(NANO_MODEL / "model.safetensors", f"{out}/model-0000{number}-of-00002.safetensors")

    monkeypatch.setattr(export, "export_alignvlm", write)
    monkeypatch.setattr(workdir, "find_checkpoint", lambda folder: None)


def push(out, *options, name=NAME):
    return cli.main(["export", "--checkpoint", CHECKPOINT, "--out", str(out), "--push-to-hub", name, *options])


def test_the_folder_is_uploaded_with_its_card(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(tmp_path / "out", "--max-shard-size", "20KB") == 0
    repository = hub.repositories["models", NAME]
    assert repository.private
    files = dict(repository.commits[repository.refs["main"]])
    del files[".gitattributes"]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert max(map(len, hub.blobs.values())) > LFS_BYTES
    output = capsys.readouterr()
    assert f"{hub.url}/{NAME}/commit/{repository.refs['main']}" in output.out
    assert "which is private" in output.err
    # A smaller export leaves no shards of the larger one. The model is read again by its name.
    assert push(tmp_path / "small") == 0
    names = repository.commits[repository.refs["main"]]
    assert "model.safetensors" in names and not any(name.startswith("model-0") for name in names)
    forget()
    assert (trained_model(NAME) / "config.json").read_bytes() == names["config.json"]


def test_a_name_without_an_organization_and_a_public_repository(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(tmp_path / "out", "--public", name="tiny") == 0
    repository = hub.repositories["models", "anna/tiny"]
    assert not repository.private
    card = repository.commits[repository.refs["main"]]["README.md"].decode()
    assert card == 'AutoProcessor.from_pretrained("anna/tiny")'


def refuse(*args, **options):
    raise AssertionError("the export began")


@pytest.mark.parametrize(
    ("token", "name", "options", "problem"),
    [
        (None, NAME, (), "nobody is logged in: log in with `hf auth login`"),
        ("hf_expired", NAME, (), "the Hub does not accept your token"),
        (READ_TOKEN, NAME, (), "your token 't' can only read"),
        (TOKEN, "others/tiny", (), "you are anna, and may write to anna, lab"),
        (TOKEN, "a/b/c", (), "expected ORGANIZATION/NAME"),
        (TOKEN, "lab/private", ("--public",), "it exists and is private"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_export(
    token, name, options, problem, hub, tmp_path, monkeypatch, capsys
):
    hub.repositories["models", "lab/private"] = Repository(private=True)
    hub.repositories["models", "lab/private"].commit({})
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(export, "export_alignvlm", refuse)
    assert push(tmp_path / "out", *options, name=name) == 2
    errors = capsys.readouterr().err
    assert problem in errors and errors.count("\n") == 1


def test_the_hub_is_not_reached(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail = lambda method, path: 503 if "whoami" in path else None
    monkeypatch.setattr(export, "export_alignvlm", refuse)
    assert push(tmp_path / "out") == 75
    assert "the Hub answers with status 503: try again later" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(tmp_path / "out") == 2
    assert "HF_HUB_OFFLINE is set: unset it" in capsys.readouterr().err


def test_an_upload_that_fails_says_how_to_continue(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail = lambda method, path: 403 if "/commit/" in path else None
    out = tmp_path / "out"
    assert push(out) == 2
    assert f"The exported folder stays: `hf upload {NAME} {out}` uploads it" in capsys.readouterr().err
    assert (out / "config.json").is_file()


def test_a_folder_that_differs_is_not_uploaded(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    class Different:
        problems = ("x",)

        def describe(self):
            return "different"

    monkeypatch.setattr(verification, "check_packages", lambda: None)
    monkeypatch.setattr(verification, "verify_export", lambda *args, **options: Different())
    assert push(tmp_path / "out", "--verify") == 3
    repository = hub.repositories["models", NAME]
    assert list(repository.commits[repository.refs["main"]]) == [".gitattributes"]
