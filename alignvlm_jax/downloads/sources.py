"""Turns the name of a model into a local folder. The name is a folder, also in a bucket, or a model on the Hub.

model_source("siglip-base")                      siglip-base, a folder
model_source("google/siglip-base-patch16-224")   the folder of this name, or else a copy in the cache of the Hub
model_source("gs://bucket/siglip-base")          a copy in the user's cache folder
pinned("google/siglip-base-patch16-224")         "google/siglip-base-patch16-224@COMMIT"
"""

import os
from pathlib import Path

from alignvlm_jax.downloads import bucket_copy, hub, hub_models
from alignvlm_jax.downloads.hub_cache import snapshot_folder
from alignvlm_jax.downloads.hub_ids import SCHEME, HubId, describe_web_address, parse_model
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import is_bucket, location


def hub_id_of(name: str | os.PathLike) -> HubId | None:
    """Returns the model on the Hub that a name stands for; None if it stands for a folder, which takes precedence.

    `hf://ORGANIZATION/NAME` always stands for the Hub.

    Raises:
      UserError: if the name is an address, or hf:// is followed by something else.
    """
    text = os.fspath(name)
    if text.startswith(SCHEME):
        if (hub_id := parse_model(text)) is None:
            raise UserError(f"{text}: expected hf://ORGANIZATION/NAME, optionally with @REVISION")
        return hub_id
    if "://" in text:
        if (on_hub := describe_web_address(text)) is not None:
            raise UserError(f"{text} is a page of the Hub: write {on_hub}")
        return None
    return None if os.path.lexists(text) else parse_model(text)


def model_source(name: str | os.PathLike, *, with_weights: bool = True, is_quiet: bool = False) -> Path:
    """Returns the local folder of a model, after downloading it if it is on the Hub or in a bucket.

    Args:
      name: a folder, also in a bucket; any folder of a model in the Hub's cache; or a name on the Hub. If there is
        neither a folder nor a name of this form, it is returned as it is.
      with_weights: whether the weights are needed.
      is_quiet: whether to print nothing about downloads.

    Raises:
      UserError: if the model on the Hub or in a bucket cannot be read.
    """
    if is_bucket(name):
        return bucket_copy.model_folder(location(name), with_weights=with_weights)
    if (hub_id := hub_id_of(name)) is None:
        return snapshot_folder(name)
    return hub_models.model_folder(hub_id, with_weights=with_weights, is_quiet=is_quiet)


def pinned(name: str) -> str:
    """Returns the name of a model on the Hub with the commit that it stands for now. Other names stay as they are."""
    hub_id = hub_id_of(name)
    return name if hub_id is None else str(hub.list_files(hub_id).pinned)
