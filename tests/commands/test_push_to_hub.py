"""`alignvlm export --push-to-hub` uploads what it exports, and checks the token before."""

import pytest
from huggingface_hub import constants

import alignvlm_jax
from alignvlm_jax import cli
from alignvlm_jax.backbones import trained_model
from alignvlm_jax.inference import verification
from alignvlm_jax.interop import export
from tests.hub_server import LFS_BYTES, READ_TOKEN, TOKEN, Repository, forget
from tests.interop.exported import make_checkpoint

NAME = "lab/tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("push") / "checkpoint"))


def push(checkpoint, out, *options, name=NAME):
    return cli.main(["export", "--checkpoint", checkpoint, "--out", str(out), "--push-to-hub", name, *options])


def test_the_folder_is_uploaded_with_its_card(hub, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(checkpoint, tmp_path / "out", "--max-shard-size", "20KB") == 0
    repository = hub.repositories["models", NAME]
    assert repository.private
    files = dict(repository.commits[repository.refs["main"]])
    del files[".gitattributes"]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert f'from_pretrained("{NAME}"' in files["README.md"].decode()
    assert max(map(len, hub.blobs.values())) > LFS_BYTES
    output = capsys.readouterr()
    assert f"{hub.url}/{NAME}/commit/{repository.refs['main']}" in output.out
    assert "which is private" in output.err
    # It is read again by its name. A smaller export leaves no shards of the larger one.
    assert "model-00001" in "".join(path.name for path in trained_model(NAME).iterdir())
    assert push(checkpoint, tmp_path / "small") == 0
    names = repository.commits[repository.refs["main"]]
    assert "model.safetensors" in names and not any(name.startswith("model-0") for name in names)
    forget()
    assert alignvlm_jax.load(NAME).tiling.tile_size


def test_a_name_without_an_organization_and_a_public_repository(hub, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(checkpoint, tmp_path / "out", "--public", "--vision-only", name="tiny") == 0
    assert not hub.repositories["models", "anna/tiny"].private


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
    token, name, options, problem, hub, checkpoint, tmp_path, monkeypatch, capsys
):
    hub.repositories["models", "lab/private"] = Repository(private=True)
    hub.repositories["models", "lab/private"].commit({})
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(export, "export_alignvlm", refuse)
    assert push(checkpoint, tmp_path / "out", *options, name=name) == 2
    errors = capsys.readouterr().err
    assert problem in errors and errors.count("\n") == 1


def test_the_hub_is_not_reached(hub, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail = lambda method, path: 503 if "whoami" in path else None
    monkeypatch.setattr(export, "export_alignvlm", refuse)
    assert push(checkpoint, tmp_path / "out") == 75
    assert "the Hub answers with status 503: try again later" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(checkpoint, tmp_path / "out") == 2
    assert "HF_HUB_OFFLINE is set: unset it" in capsys.readouterr().err


def test_an_upload_that_fails_says_how_to_continue(hub, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail = lambda method, path: 403 if "/commit/" in path else None
    out = tmp_path / "out"
    assert push(checkpoint, out, "--language-only") == 2
    assert f"The exported folder stays: `hf upload {NAME} {out}` uploads it" in capsys.readouterr().err
    assert (out / "config.json").is_file()


def test_a_folder_that_differs_is_not_uploaded(hub, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    class Different:
        problems = ("x",)

        def describe(self):
            return "different"

    monkeypatch.setattr(verification, "check_packages", lambda: None)
    monkeypatch.setattr(verification, "verify_export", lambda *args, **options: Different())
    assert push(checkpoint, tmp_path / "out", "--verify") == 3
    repository = hub.repositories["models", NAME]
    assert list(repository.commits[repository.refs["main"]]) == [".gitattributes"]
