"""Fixtures of a Hub on loopback, with a cache of its own."""

import pytest
from huggingface_hub import _tree_cache, constants

from alignvlm_jax.downloads import hub as downloads
from tests.hub_server import HubServer


@pytest.fixture(scope="module")
def server():
    """One server for the tests of a module."""
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """An empty Hub, and an empty cache; nobody is logged in."""
    server.repositories.clear()
    server.requests.clear()
    server.fail = lambda method, path: None
    # The library reads its environment when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    forget()
    yield server
    forget()


def forget():
    """Forgets what this process knows about the Hub, as a new process does."""
    downloads.list_files.cache_clear()
    downloads._say_once.cache_clear()
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
