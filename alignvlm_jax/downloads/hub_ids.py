"""Parses the names of repositories on the Hugging Face Hub.

    parse_model("meta-llama/Llama-3.2-1B-Instruct@v1")        HubId("meta-llama/Llama-3.2-1B-Instruct", "v1")
    parse_model("hf://google/siglip-base-patch16-224")        the same without a revision
    parse_dataset("hf://datasets/lmms-lab/DocVQA@main/DocVQA")  a folder of a data set

A revision is a branch, a tag, a reference such as refs/pr/3, or a commit.
"""

import dataclasses
import re
from typing import Literal, Self

from alignvlm_jax.errors import UserError

SCHEME = "hf://"

_NAME = r"[A-Za-z0-9_][\w.-]*/[\w.-]+"
# References of pull requests contain slashes.
_REVISION = r"refs/(?:pr|convert|heads|tags)/[^/@\s]+|[^/@\s]+"
_MODEL = re.compile(rf"(?:{SCHEME}(?:models/)?)?(?P<name>{_NAME})(?:@(?P<revision>{_REVISION}))?")
_DATASET = re.compile(rf"{SCHEME}datasets/(?P<name>{_NAME})(?:@(?P<revision>{_REVISION}))?(?:/(?P<path>[^\s].*?))?/?")
_WEB = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<name>.+?)/?(?:/(?:tree|blob)/(?P<revision>[^/]+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class HubId:
    """The name of a repository on the Hub, or of a part of it.

    Attributes:
      name: "ORGANIZATION/NAME".
      revision: a branch, tag, reference or commit; None is the main branch.
      kind: "model" or "dataset".
      path: a file, folder or pattern in the repository; empty for all of it.
    """

    name: str
    revision: str | None = None
    kind: Literal["model", "dataset"] = "model"
    path: str = ""

    def __str__(self) -> str:
        prefix = f"{SCHEME}datasets/" if self.kind == "dataset" else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{prefix}{self.name}{revision}{'/' if self.path else ''}{self.path}"

    @property
    def is_pinned(self) -> bool:
        """True if the revision is a commit, which never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def page(self) -> str:
        """Path of the repository's page on the Hub's web site."""
        return f"datasets/{self.name}" if self.kind == "dataset" else self.name

    def at(self, commit: str) -> Self:
        """Returns the same repository at a commit."""
        return dataclasses.replace(self, revision=commit)


def parse_model(text: str) -> HubId | None:
    """Returns the model that a text names; None if the text cannot be the name of one."""
    if match := _MODEL.fullmatch(text):
        return HubId(match["name"], match["revision"])
    return None


def parse_dataset(text: str) -> HubId:
    """Returns the data set, or the part of one, that `hf://datasets/...` names.

    Raises:
      UserError: if the text has another form.
    """
    match = _DATASET.fullmatch(text)
    if match is None or ".." in (match["path"] or "").split("/"):
        raise UserError(f"{text}: expected hf://datasets/ORGANIZATION/NAME, optionally with @REVISION and /PATH")
    return HubId(match["name"], match["revision"], "dataset", match["path"] or "")


def describe_web_address(text: str) -> str | None:
    """Returns the name of the repository whose page on the Hub a text is; None if it is not such an address."""
    match = _WEB.fullmatch(text)
    if match is None or not re.fullmatch(rf"(datasets/)?{_NAME}", match["name"]):
        return None
    revision = f"@{match['revision']}" if match["revision"] else ""
    return f"{SCHEME if match['name'].startswith('datasets/') else ''}{match['name']}{revision}"
