"""Uploads an exported folder to the Hugging Face Hub.

    repository = prepare_upload("lab/invoices", is_public=False)   before the export: checks the token, creates it
    upload(repository, "exported/")                                 after it; returns the address of the commit

`huggingface_hub` uploads. Files that the Hub has already are not sent again, so an upload that was interrupted is
continued by `hf upload NAME FOLDER`.
"""

import dataclasses
import sys
from pathlib import Path

from alignvlm_jax.downloads.hub_ids import SCHEME, parse_model
from alignvlm_jax.errors import TemporaryError, UserError

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
# An earlier upload of a larger model may have left shards that do not belong to this one.
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_PLACEHOLDER = "THIS_FOLDER"


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository on the Hub that this process may write to.

    Attributes:
      name: "ORGANIZATION/NAME".
      is_private: whether only its owners see it.
    """

    name: str
    is_private: bool


def prepare_upload(text: str, *, is_public: bool = False) -> Repository:
    """Checks that a model can be uploaded, and creates its repository if it does not exist.

    Args:
      text: "ORGANIZATION/NAME", or "NAME" for the user's own.
      is_public: whether everyone may see a new repository. An existing one stays as it is.

    Raises:
      UserError: if nobody is logged in, the token may not write there, or a private repository is to be public;
        `TemporaryError` if the Hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    api = huggingface_hub.HfApi(library_name="alignvlm_jax")
    name = text.removeprefix(SCHEME)
    if (hub_id := parse_model(name if "/" in name else f"me/{name}")) is None or hub_id.revision is not None:
        raise UserError(f"--push-to-hub {text}: expected ORGANIZATION/NAME")
    if huggingface_hub.get_token() is None:
        raise UserError(f"--push-to-hub {text}: nobody is logged in: {_LOGIN}")
    try:
        user = api.whoami()
        name = name if "/" in name else f"{user['name']}/{name}"
        _check_rights(user, name)
        api.create_repo(name, private=not is_public, exist_ok=True)
        is_private = bool(api.model_info(name).private)
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise _explain(error, f"--push-to-hub {name}") from error
    if is_public and is_private:
        raise UserError(f"--push-to-hub {name}: it exists and is private. Make it public on its page, or omit --public")
    return Repository(name, is_private)


def upload(repository: Repository, folder: Path) -> str:
    """Uploads a folder and returns the address of the commit. The model card then names the repository.

    Raises:
      UserError: if the upload fails; the message says how to continue it.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    card = folder / "README.md"
    card.write_text(card.read_text("utf-8").replace(f'"{_PLACEHOLDER}"', f'"{repository.name}"'), "utf-8")
    print(f"uploading to {repository.name}, {_visibility(repository)} ...", file=sys.stderr, flush=True)
    try:
        commit = huggingface_hub.HfApi(library_name="alignvlm_jax").upload_folder(
            repo_id=repository.name,
            folder_path=folder,
            commit_message="Upload a model exported by alignvlm_jax",
            delete_patterns=list(_WEIGHTS),
        )
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError, RuntimeError) as error:
        raise _explain(error, f"{repository.name}", folder) from error
    return commit.commit_url


def _visibility(repository: Repository) -> str:
    return "which is private" if repository.is_private else "which is public"


def _check_rights(user: dict, name: str) -> None:
    """Raises a `UserError` if the token can only read, or the name belongs to somebody else."""
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise UserError(f"--push-to-hub {name}: your token {token.get('displayName', '')!r} can only read: {_LOGIN}")
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", ()))]
    if name.partition("/")[0] not in owners:
        raise UserError(f"--push-to-hub {name}: you are {user['name']}, and may write to {', '.join(owners)}")


def _explain(error: Exception, what: str, folder: Path | None = None) -> UserError:
    """Returns the error for the user; `folder` is the one whose upload failed."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    then = "" if folder is None else f". The exported folder stays: `hf upload {what} {folder}` uploads it"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, UserError):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"{what}: HF_HUB_OFFLINE is set: unset it{then}")
    if isinstance(error, HFValidationError):
        return UserError(f"{what}: not a name for a repository: {reason}")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        message = error.server_message or reason
        if status == 401:
            return UserError(f"{what}: the Hub does not accept your token: {_LOGIN}{then}")
        if status == 403:
            return UserError(f"{what}: your token may not write there ({message}): {_LOGIN}{then}")
        if status < 500 and status != 429:
            return UserError(f"{what}: the Hub refuses it ({message}){then}")
        return TemporaryError(f"{what}: the Hub answers with status {status}: try again later{then}")
    return TemporaryError(f"{what}: the Hub cannot be reached ({reason}): check the network, and try again{then}")
