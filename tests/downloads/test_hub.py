"""Models come from the Hub: only the files that are read, once per host, and from the cache without a network."""

import hashlib
import json
import socket
import threading

import pytest
from huggingface_hub import constants

from alignvlm_jax.backbones import NANO_MODEL, backbone_folder, trained_model
from alignvlm_jax.downloads.hub_ids import HubId, parse_dataset, parse_model
from alignvlm_jax.downloads.sources import pinned
from alignvlm_jax.errors import TemporaryError, UserError
from alignvlm_jax.locations import source_location
from tests.hub_server import READ_TOKEN, TOKEN, forget

NAME = "org/llama"
NANO = backbone_folder("language", "nano")
FILES = {path.name: path.read_bytes() for path in NANO.iterdir()}
# What repositories hold next to the files that are read.
OTHERS = {
    "README.md": b"# Llama",
    "pytorch_model.bin": b"pickle",
    "model-q4.gguf": b"GGUF",
    "onnx/model.onnx": b"onnx",
    "original/consolidated.00.pth": b"pth",
    "original/params.json": b"{}",
    ".gitattributes": b"",
}


def refusal(*names, kind=UserError):
    with pytest.raises(kind) as error:
        for name in names:
            backbone_folder("language", name)
    assert type(error.value) is kind
    return str(error.value)


def offline(monkeypatch):
    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_only_the_files_that_are_read_are_downloaded(hub, capsys):
    commit = hub.add(NAME, FILES | OTHERS)
    folder = backbone_folder("language", NAME)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert f"{NAME}@{commit[:12]}: downloading 1 file" in capsys.readouterr().err
    assert pinned(NAME) == f"{NAME}@{commit}"
    # Another process finds them all in the cache.
    forget()
    hub.requests.clear()
    assert backbone_folder("language", NAME) == folder
    assert hub.downloads() == [] and "from the cache" in capsys.readouterr().err


def test_the_weights_are_downloaded_only_where_they_are_needed(hub):
    hub.add(NAME, FILES)
    folder = backbone_folder("language", NAME, with_weights=False)
    assert "model.safetensors" not in hub.downloads() and (folder / "tokenizer.json").is_file()


def test_the_shards_of_the_index_are_downloaded_and_no_other_weights(hub):
    shards = {f"model-0000{i}-of-00002.safetensors": b"x" * i for i in (1, 2)}
    index = json.dumps({"weight_map": {f"tensor{i}": name for i, name in enumerate(shards)}}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "consolidated.safetensors": b"xyz"}
    hub.add(NAME, files | shards)
    folder = backbone_folder("language", NAME)
    assert {path.name for path in folder.glob("*.safetensors")} == set(shards)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("org/name", HubId("org/name")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("hf://org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("runs/a/b", None),
        ("./runs", None),
        ("/data/llama", None),
        ("nano", None),
    ],
)
def test_names_of_models_are_recognized(text, expected):
    assert parse_model(text) == expected


def test_names_of_data_sets_are_recognized():
    part = parse_dataset("hf://datasets/org/name@main/a/*.parquet")
    assert part == HubId("org/name", "main", "dataset", "a/*.parquet")
    assert parse_dataset("hf://datasets/org/name/") == HubId("org/name", None, "dataset")
    for text in ("hf://org/name", "hf://datasets/org", "hf://datasets/org/name/../x"):
        with pytest.raises(UserError, match="expected hf://datasets/ORGANIZATION/NAME"):
            parse_dataset(text)


def test_a_revision_is_fetched_and_a_missing_one_is_named(hub):
    first = hub.add(NAME, FILES)
    hub.add(NAME, {"config.json": b"{}"})
    hub.repositories["models", NAME].refs["v1"] = first
    assert backbone_folder("language", f"{NAME}@v1").name == first
    assert backbone_folder("language", f"{NAME}@{first}").name == first
    message = refusal(f"{NAME}@v2")
    assert f"{NAME} has no revision 'v2'. It has main, v1" in message


def test_a_local_folder_goes_first(hub, tmp_path, monkeypatch):
    hub.add(NAME, FILES)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "llama").mkdir(parents=True)
    assert "org/llama is not a language backbone" in refusal(NAME)
    assert hub.requests == []
    assert backbone_folder("language", f"hf://{NAME}").parent.name == "snapshots"


def test_repositories_that_cannot_be_read_say_what_to_do(hub, monkeypatch):
    hub.add("meta/gated", FILES, gated="manual")
    hub.add("org/private", FILES, private=True)
    hub.add("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.add("org/gguf", {"config.json": b"{}", "a.gguf": b"x"})
    assert f"accept its terms at {hub.url}/meta/gated, then log in with `hf auth login`" in refusal("meta/gated")
    for name in ("org/mistyped", "org/private"):
        message = refusal(name)
        assert f"{name}: there is no such folder, and the Hub has no such model. Check the spelling" in message
        assert "if it is private, log in" in message
    assert "no model.safetensors (it has pytorch_model.bin)" in refusal("org/pickled")
    assert "name org/pickled@refs/pr/N" in refusal("org/pickled")
    assert "(it has a.gguf): name a model in the format of transformers" in refusal("org/gguf")
    assert "write google/siglip@v1" in refusal("https://huggingface.co/google/siglip/tree/v1")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert "your token has no access: accept its terms" in refusal("meta/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "does not accept your token" in refusal("meta/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert backbone_folder("language", "meta/gated") and backbone_folder("language", "org/private")


def test_without_a_network_the_cache_is_used(hub, monkeypatch, capsys):
    commit = hub.add(NAME, FILES)
    folder = backbone_folder("language", NAME)
    # The Hub fails, and then no request is allowed.
    forget()
    hub.fail = lambda method, path: 503
    assert backbone_folder("language", NAME) == folder
    assert f"{NAME}@{commit[:12]}: from the cache, because the Hub answers with status 503" in capsys.readouterr().err
    assert refusal("org/other", kind=TemporaryError).endswith("the Hub answers with status 503: try again later")
    offline(monkeypatch)
    hub.requests.clear()
    assert backbone_folder("language", NAME) == folder
    assert "from the cache, because HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert pinned(NAME) == f"{NAME}@{commit}"
    assert "not in the cache, and HF_HUB_OFFLINE is set" in refusal("org/other")
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached_is_a_temporary_error(hub, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        message = refusal(NAME, kind=TemporaryError)
    assert "the Hub cannot be reached at http://127.0.0.1" in message and "give its folder" in message


def test_files_that_are_missing_offline_are_named(hub, monkeypatch):
    hub.add(NAME, FILES)
    backbone_folder("language", NAME, with_weights=False)
    offline(monkeypatch)
    message = refusal(NAME)
    assert "the cache lacks model.safetensors, and HF_HUB_OFFLINE is set" in message


def test_a_pinned_commit_in_the_cache_needs_no_request(hub):
    commit = hub.add(NAME, FILES)
    backbone_folder("language", NAME)
    forget()
    hub.requests.clear()
    assert backbone_folder("language", f"{NAME}@{commit}").name == commit
    assert hub.requests == []


def test_a_broken_connection_is_resumed_and_finished_files_are_kept(hub, monkeypatch):
    hub.add(NAME, FILES)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    cuts = []

    def cut_once(method, path):
        if path.endswith("model.safetensors") and method == "GET" and not cuts:
            cuts.append(path)
            return "cut"

    hub.fail = cut_once
    folder = backbone_folder("language", NAME)
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert hub.downloads().count("model.safetensors") == 2
    # A download that fails keeps the files that have arrived.
    forget()
    hub.add("org/other", FILES)
    hub.fail = lambda method, path: 404 if path.endswith("model.safetensors") else None
    refusal("org/other")
    hub.fail = lambda method, path: None
    hub.requests.clear()
    forget()
    # A process that is killed leaves a part of a file.
    blobs = backbone_folder("language", "org/other", with_weights=False).parents[1] / "blobs"
    for blob in (hashlib.sha256(FILES["model.safetensors"]).hexdigest(), "other"):
        (blobs / f"{blob}.0a1b2c3d.incomplete").write_bytes(b"part")
    backbone_folder("language", "org/other")
    assert hub.downloads() == ["model.safetensors"]
    assert [path.name for path in blobs.glob("*.incomplete")] == ["other.0a1b2c3d.incomplete"]


def test_one_of_several_readers_downloads(hub):
    hub.add(NAME, FILES)
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(backbone_folder("language", NAME))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and len(folders) == 4
    assert hub.downloads().count("model.safetensors") == 1


def test_a_checkpoint_is_read_from_the_hub_but_a_mistyped_run_is_not_looked_up(hub, tmp_path, monkeypatch):
    hub.add("lab/alignvlm", {path.name: path.read_bytes() for path in NANO_MODEL.iterdir()})
    for name in ("lab/alignvlm", source_location("hf://lab/alignvlm")):
        assert (trained_model(name) / "alignvlm_training.json").is_file()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    hub.requests.clear()
    assert str(trained_model("runs/mistyped")) == "runs/mistyped"
    assert hub.requests == []


def test_files_of_the_real_repositories_are_chosen():
    """The names as they are in google/siglip-so400m-patch14-384 and meta-llama/Llama-3.1-8B-Instruct."""
    from alignvlm_jax.downloads.hub_models import small_files

    siglip = ["README.md", "config.json", "preprocessor_config.json", "special_tokens_map.json", "spiece.model"]
    siglip += ["tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    assert "spiece.model" not in small_files(siglip)
    llama = ["original/params.json", "model.safetensors.index.json", "config.json", "USE_POLICY.md", "LICENSE"]
    assert small_files(llama) == ["model.safetensors.index.json", "config.json"]
