"""The Hugging Face hub: a folder up, a model down.  Needs huggingface-hub (extra ``hub``)."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# What a model needs; a repository may hold anything else beside it.
_MODEL_FILES = ["config.json", "model.safetensors", "metrics.json", "README.md"]


class HubError(RuntimeError):
    """The hub cannot be reached, or does not let us."""


def is_repository(name: str) -> bool:
    """True for ``owner/name``, where neither that folder nor ``owner`` exists here."""
    here = Path(name).exists() or Path(name).parent.exists()
    return _REPOSITORY.fullmatch(name) is not None and not here


def push_folder(
    folder: Path, repository: str, *, private: bool, message: str, token: str | None = None
) -> str:
    """Upload the files of ``folder`` as one commit to ``owner/name``; returns its address.

    The repository is created, private if asked for, where there is none.  Raises ``HubError``.
    """
    if _REPOSITORY.fullmatch(repository) is None:
        raise HubError(f"a repository is named owner/name, got {repository!r}")
    hub = _hub()

    def upload() -> str:
        api = hub.HfApi(token=token)
        made = api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=made.repo_id, folder_path=str(folder), commit_message=message, repo_type="model"
        )
        return f"https://huggingface.co/{made.repo_id}"

    return _asking(f"push to {repository}", upload)


def fetch_model_folder(
    repository: str, *, revision: str | None = None, token: str | None = None
) -> Path:
    """Download a shared model (or find it in the hub's cache); returns its folder.

    ``revision`` is a branch, a tag or a commit.  Raises ``HubError``.
    """
    hub = _hub()

    def download() -> Path:
        return Path(
            hub.snapshot_download(
                repository, revision=revision, allow_patterns=_MODEL_FILES, token=token
            )
        )

    return _asking(f"fetch {repository}", download)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError(
            "the hub needs huggingface-hub: pip install 'fpt-fast[hub]'; without it share a folder"
        ) from error
    return huggingface_hub


def _asking(what: str, call: Callable[[], _T]) -> _T:
    try:
        return call()
    except HubError:
        raise
    except Exception as error:  # every kind of network, permission and repository failure
        raise HubError(
            f"cannot {what} ({type(error).__name__}: {_first_line(error)}). Log in with `hf auth "
            "login` or set HF_TOKEN, and check the name, the network and your permissions"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
