"""Models on the Hugging Face hub: downloaded before an import, uploaded after an export."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from megatron_mdm import __version__
from megatron_mdm.core.errors import ConversionError, first_line

# Files at the top of a repository that hold numbers and texts; pickles could run code.
_DATA_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt")
_CODE_FILES = ("*.py",)
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?P<file>[^@]+\.safetensors))?(?:@(?P<revision>[^@]+))?"
)


class LocatedModel(NamedTuple):
    """A model's files.

    Attributes:
        path: Their folder, or a .safetensors file.
        name: What the user calls it; of the hub with the commit.
    """

    path: Path
    name: str


def locate_model(given: Path, *, with_code: bool = False) -> LocatedModel:
    """Finds a model here, or else downloads it from the hub into the hub's cache.

    Args:
        given: A folder or a file; or OWNER/NAME, with /FOLDER/FILE.safetensors for one file of it
            and with @REVISION for a branch, tag or commit.
        with_code: Also download Python files, which are not run here.

    Returns:
        Where it lies. What is neither a path nor a name of the hub is returned as it is.

    Raises:
        ConversionError: The hub has no such model, cannot be reached, or refuses.
    """
    match = _NAME.fullmatch(str(given))
    if given.exists() or match is None:
        return LocatedModel(given, given.name)
    repo, file, revision = match["repo"], match["file"], match["revision"]
    with _explain(str(given), f"{given} is no folder or file here, and "):
        if file is not None:
            path = Path(hf_hub_download(repo, file, revision=revision))
            commit = path.parents[len(Path(file).parts) - 1].name
        else:
            patterns = [*_DATA_FILES, *(_CODE_FILES if with_code else ())]
            folder = snapshot_download(
                repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
            path, commit = Path(folder), Path(folder).name
    if file is None and not any(path.glob("*.safetensors")):
        raise ConversionError(
            f"{given} has no .safetensors at its top, and other files of weights can run code: "
            f"give one that it has in a folder, {repo}/FOLDER/FILE.safetensors, or another model."
        )
    return LocatedModel(path, f"{repo}{'' if file is None else f'/{file}'}@{commit}")


def check_upload(name: str) -> None:
    """Checks before a long export that its upload has a chance.

    Args:
        name: OWNER/NAME, or NAME for the owner of the token.

    Raises:
        ConversionError: There is no token, it is not valid, or the hub cannot be reached.
    """
    if get_token() is None:
        raise ConversionError(
            f"{name} cannot be uploaded without a token of the hub: run `hf auth login`, or set "
            "HF_TOKEN."
        )
    with _explain(name):
        validate_repo_id(name)
        HfApi().whoami()


def upload_model(folder: Path, name: str, *, is_public: bool = False) -> str:
    """Uploads a folder as one commit; its card then loads the model by the hub's name.

    Args:
        folder: An export, or adapters.
        name: OWNER/NAME, or NAME for the owner of the token; made if it is not there.
        is_public: Anyone may see a repository that is made.

    Returns:
        The repository's address.

    Raises:
        ConversionError: The hub refuses, or cannot be reached.
    """
    with _explain(name):
        api = HfApi()
        address = api.create_repo(name, private=not is_public, exist_ok=True)
        operations = [
            CommitOperationAdd(file.name, _read_card(file, address.repo_id))
            for file in sorted(folder.iterdir())
            if file.is_file()
        ]
        message = f"Upload by megatron_mdm {__version__}"
        api.create_commit(address.repo_id, operations, commit_message=message)
    return str(address)


def _read_card(file: Path, repo: str) -> str | bytes:
    if file.name != "README.md":
        return str(file)
    here = f"from_pretrained({json.dumps(file.parent.name)}"
    text = file.read_text(encoding="utf-8")
    return text.replace(here, f"from_pretrained({json.dumps(repo)}").encode()


@contextmanager
def _explain(name: str, before: str = "") -> Iterator[None]:
    """Turns the library's errors into one sentence that begins with `before`."""
    try:
        yield
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
        raise ConversionError(before + _describe(error, name, is_upload=not before)) from None


def _describe(error: Exception, name: str, *, is_upload: bool) -> str:
    hub, revision = constants.ENDPOINT, name.partition("@")[2]
    repo = "/".join(name.partition("@")[0].split("/")[:2])
    if isinstance(error, HFValidationError):
        return f"{name} is no name of the hub ({first_line(error)}): use OWNER/NAME."
    if isinstance(error, GatedRepoError):
        return (
            f"{hub} gives {repo} only to those who have accepted its terms: accept them on "
            f"{hub}/{repo}, then run `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision}: give a branch, tag or commit of {hub}/{repo}."
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{repo} has no such file: {hub}/{repo}/tree/main shows its files."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{hub} shows no model {repo}: correct the name, or if it is private run `hf auth "
            "login` or set HF_TOKEN."
        )
    if isinstance(error, HfHubHTTPError):
        reason = first_line(error)
        return f"{hub} refuses {repo} ({reason}): check the name, and the rights of your token."
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{hub} cannot be reached"
    if is_upload:
        return (
            f"{name} cannot be uploaded, since {why}: do it on a machine with a network, by "
            f"`hf upload {name} FOLDER`."
        )
    return (
        f"{repo} is not in the hub's cache {constants.HF_HUB_CACHE}, while {why}: run `hf download "
        f"{repo}` on a machine with a network and copy its HF_HOME here, or give a folder."
    )
