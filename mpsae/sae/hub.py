"""SAEs on the Hugging Face hub: the two files of a checkpoint, down and up.

A repo holds one SAE at its root, or several in subfolders, as a run's folder does. The token is the
one that `huggingface_hub` finds (HF_TOKEN, or the stored login); it is never asked for here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from mpsae.sae.base import SparseAutoencoder
from mpsae.sae.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_json
from mpsae.sae.model_card import MARK, model_card

_LOGIN = "log in (hf auth login) or set HF_TOKEN"
_CARD = "README.md"


def locate(source: str | Path, revision: str | None, subfolder: str | None) -> Path:
    """Give the local folder of an SAE, downloading its two files where a hub id is meant.

    Raises:
        OSError: it cannot be had; the message says what was asked and what can be done.
        ValueError: a revision of a local folder, or a subfolder that leads out of it.
    """
    below = _place(subfolder)
    folder = Path(source)
    if folder.is_dir() or isinstance(source, Path):
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for hub ids, but {source} is a local folder"
            )
        return folder / below
    if not is_repo_id(source):
        raise OSError(f"{source!r} is neither a local folder nor a hub id (user/repo)")
    return _download(source, revision, below)


def push(
    folders: Mapping[str, Path], repo_id: str, *, private: bool = False, revision: str | None = None
) -> str:
    """Upload SAEs in one commit, with a card that lists all those of the repo.

    Args:
        folders: by subfolder in the repo, ``""`` being its root; of each, two files are uploaded.
        repo_id: ``user/repo``, made where it does not exist.
        private: make it private; a repo that exists stays as it is.
        revision: branch, made where it does not exist; the main one by default.

    Returns:
        The repo's URL.

    Raises:
        OSError: a file is missing, or the hub cannot be reached or refuses.
        ValueError: ``repo_id`` is none.

    Notes:
        The card is README.md. One that somebody else wrote is left as it is.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    configs = {name: read_json(folder / CONFIG_FILE) for name, folder in folders.items()}
    for folder in folders.values():
        if not (folder / WEIGHTS_FILE).is_file():
            raise OSError(f"no {WEIGHTS_FILE} in {folder}")
    _check_repo_id(repo_id)
    try:
        api = HfApi()
        url = _make_repo(api, repo_id, private, revision)
        operations = [
            CommitOperationAdd(str(PurePosixPath(name) / file), folder / file)
            for name, folder in folders.items()
            for file in (CONFIG_FILE, WEIGHTS_FILE)
        ]
        present = api.list_repo_files(repo_id, revision=revision)
        if _CARD not in present or MARK in _read(repo_id, _CARD, revision):
            others = {_name(file) for file in present if _is_config(file)} - configs.keys()
            known = {name: _config(repo_id, name, revision) for name in others}
            card = model_card(repo_id, known | configs, next(iter(configs)), revision)
            operations.append(CommitOperationAdd(_CARD, card.encode()))
        shown = ", ".join(name or "an SAE" for name in folders)
        message = f"Upload {shown if len(folders) < 3 else f'{len(folders)} SAEs'}"
        api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except Exception as error:
        raise _explained(f"cannot push to the hub repo {repo_id!r}", error, revision) from error
    return url


def push_sae(
    sae: SparseAutoencoder,
    repo_id: str,
    private: bool,
    revision: str | None,
    subfolder: str | None,
) -> str:
    """Serve :meth:`SparseAutoencoder.push_to_hub`."""
    name = _place(subfolder)
    with TemporaryDirectory() as folder:
        folders = {str(name) if name.parts else "": sae.save_pretrained(folder)}
        return push(folders, repo_id, private=private, revision=revision)


def check_can_push(repo_id: str) -> None:
    """Make the repo where it does not exist, and ask whether one can write to it.

    Raises:
        OSError: one cannot; the message says why.
        ValueError: ``repo_id`` is none.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    _check_repo_id(repo_id)
    try:
        api = HfApi()
        _make_repo(api, repo_id, private=False, revision=None)
        # an upload's first step, which takes the right to write and changes nothing
        api.preupload_lfs_files(repo_id, [CommitOperationAdd(CONFIG_FILE, b"{}")])
    except Exception as error:
        raise _explained(f"cannot push to the hub repo {repo_id!r}", error, None) from error


def is_repo_id(name: object) -> bool:
    """Say whether it has the form ``user/repo`` of a hub id."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)  # type: ignore[arg-type]
    except HFValidationError:
        return False
    return isinstance(name, str) and name.count("/") == 1


def _place(subfolder: str | None) -> PurePosixPath:
    place = PurePosixPath(subfolder or "")
    if place.is_absolute() or ".." in place.parts:
        raise ValueError(f"subfolder={subfolder!r} must be a relative path without '..'")
    return place


def _check_repo_id(repo_id: object) -> None:
    if not is_repo_id(repo_id):
        raise ValueError(f"{repo_id!r} is no hub id, which has the form user/repo")


def _make_repo(api: Any, repo_id: str, private: bool, revision: str | None) -> str:
    from huggingface_hub import get_token
    from huggingface_hub.utils import LocalTokenNotFoundError

    if get_token() is None:
        raise LocalTokenNotFoundError("no token")
    # None, not False: an organisation's own default is private for some
    url = str(api.create_repo(repo_id, private=private or None, exist_ok=True))
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return url


def _download(repo_id: str, revision: str | None, below: PurePosixPath) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    asked = f"cannot load the SAE {str(below)!r} of" if below.parts else "cannot load"
    asked += f" the hub repo {repo_id!r}"
    try:
        config = Path(hf_hub_download(repo_id, str(below / CONFIG_FILE), revision=revision))
        # the cache has a folder a commit; so both files are of one, whatever is pushed meanwhile
        commit = config.parents[len(below.parts)].name
        hf_hub_download(repo_id, str(below / WEIGHTS_FILE), revision=commit)
    except LocalEntryNotFoundError as error:  # nothing in the cache; the cause says why not more
        raise _explained(asked, error.__cause__ or error, revision) from error
    except EntryNotFoundError as error:
        raise OSError(f"{asked}: {_missing(repo_id, revision)}") from error
    except Exception as error:
        raise _explained(asked, error, revision) from error
    return config.parent


def _missing(repo_id: str, revision: str | None) -> str:
    """Say which SAEs a repo has, where the one that was asked for is missing."""
    from huggingface_hub import HfApi

    wanted = f"there is no {CONFIG_FILE} with {WEIGHTS_FILE} at that place"
    try:
        files = HfApi().list_repo_files(repo_id, revision=revision)
    except Exception:
        return wanted
    names = sorted(_name(file) for file in files if _is_config(file))
    shown = ", ".join(repr(name) for name in names[:8]) + (" ..." if len(names) > 8 else "")
    return f"{wanted}; pass one of subfolder={shown}" if names else f"{wanted}, nor at any other"


def _is_config(file: str) -> bool:
    return PurePosixPath(file).name == CONFIG_FILE


def _name(file: str) -> str:
    return "" if file == CONFIG_FILE else str(PurePosixPath(file).parent)


def _read(repo_id: str, file: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo_id, file, revision=revision)).read_text(encoding="utf-8")


def _config(repo_id: str, name: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    file = str(PurePosixPath(name) / CONFIG_FILE)
    return read_json(Path(hf_hub_download(repo_id, file, revision=revision)))


def _explained(asked: str, error: BaseException, revision: str | None) -> OSError:
    """Make one line of what `huggingface_hub` raises: what was asked, why not, what to do."""
    from huggingface_hub.utils import (
        GatedRepoError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set, and the cache does not have it"
    elif isinstance(error, LocalTokenNotFoundError):
        why = f"there is no token; {_LOGIN}"
    elif isinstance(error, GatedRepoError):
        why = f"it is gated; accept its terms on its page, and {_LOGIN}"
    elif isinstance(error, RevisionNotFoundError):
        why = f"it has no revision {revision!r}; pass a branch, a tag or a commit"
    elif isinstance(error, RepositoryNotFoundError):
        why = f"there is no such repo or local folder, or it is private; if so, {_LOGIN}"
    elif status == 401:
        why = f"the token was refused; {_LOGIN}"
    elif status == 403:
        why = "the token does not give the right to; use one that does, or another repo"
    else:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if status is None or status >= 500:
            why += "; check the connection, or try again later"
    return OSError(f"{asked}: {why}")
