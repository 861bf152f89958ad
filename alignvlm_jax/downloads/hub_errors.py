"""Explains why the Hub cannot be used, in one sentence that says what to do."""

import errno
from collections.abc import Sequence

from alignvlm_jax.downloads.hub_ids import HubId
from alignvlm_jax.errors import TemporaryError, UserError

# Answers of a server that is overloaded or restarts. `huggingface_hub` has retried where that can help.
_TEMPORARY_STATUS = (408, 429, 500, 502, 503, 504)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def summarize(error: Exception) -> str:
    """Returns in a few words why the Hub is not used."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return "the Hub refuses access (its terms are not accepted)"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub does not have it, or hides it"
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answers with status {error.response.status_code}"
    return "the Hub cannot be reached"


def explain(
    error: Exception | None, hub_id: HubId, *, reason: str | None = None, missing: Sequence[str] = ()
) -> UserError:
    """Returns the error for the user.

    Args:
      error: error of `huggingface_hub`; None if only the cache was used.
      hub_id: the repository.
      reason: why only the cache was used.
      missing: the files that are missing.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{hub_id.page}"
    has_token = huggingface_hub.get_token() is not None
    noun = "data set" if hub_id.kind == "dataset" else "model"
    # A lost connection is wrapped: its cause says more.
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if error is None:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        text = f"{hub_id}: the cache lacks {names}, and {reason}. Download with a network first"
        return UserError(f"{text}: unset HF_HUB_OFFLINE" if "OFFLINE" in (reason or "") else text)
    if isinstance(error, GatedRepoError):
        if not has_token:
            return UserError(f"{hub_id.name} is gated: accept its terms at {page}, then {_LOGIN}")
        return UserError(
            f"{hub_id.name} is gated, and your token has no access: accept its terms at {page} with the same account, "
            "and wait until access is granted. A fine-grained token also needs permission to read gated repositories"
        )
    if isinstance(error, DisabledRepoError):
        return UserError(f"{hub_id} was disabled on the Hub; {page} may say why")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{hub_id}: {hub_id.name} has no revision {hub_id.revision!r}{_existing_revisions(hub_id)}")
    if isinstance(error, RepositoryNotFoundError):
        hint = "your token does not see it" if has_token else _LOGIN
        local = "" if hub_id.kind == "dataset" else "there is no such folder, and "
        return UserError(f"{hub_id}: {local}the Hub has no such {noun}. Check the spelling; if it is private, {hint}")
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"{hub_id} is not in the cache, and HF_HUB_OFFLINE is set: unset it, or give a local folder")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return UserError(f"{hub_id}: the Hub does not accept your token: {_LOGIN} again")
        if status == 403:
            return UserError(f"{hub_id}: your token may not read this {noun}: {_LOGIN} with one that may")
        if status in _TEMPORARY_STATUS:
            return TemporaryError(f"{hub_id}: the Hub answers with status {status}: try again later")
        return UserError(f"{hub_id}: the Hub answers with status {status}: {_first_line(error)}")
    if isinstance(error, HFValidationError):
        return UserError(f"{hub_id} is not the name of a repository on the Hub: {_first_line(error)}")
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        place = error.filename or constants.HF_HUB_CACHE
        return UserError(f"{place}: {error.strerror}. Set HF_HOME to a folder that can be written and has more room")
    return TemporaryError(
        f"{hub_id}: the Hub cannot be reached at {constants.ENDPOINT} ({_first_line(error)}). Check the network and "
        f"try again, or copy the {noun} here and give its folder"
    )


def _existing_revisions(hub_id: HubId) -> str:
    """Returns the names of some revisions, as the end of a sentence."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    try:
        refs = huggingface_hub.HfApi().list_repo_refs(hub_id.name, repo_type=hub_id.kind)
    except (HTTPError, OSError):
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f". It has {', '.join(names[:8])}{more}" if names else ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
