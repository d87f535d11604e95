"""Sends the export of a run to the Hugging Face hub, as one commit. The token comes from the environment alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.model_place import HF_CONFIG_FILE, is_hf
from model.secret_text import without_secrets
from tasks.bucket_runs import EXPORT, model_here
from tasks.manifests import MANIFEST, check, load_manifest
from tasks.model_card import CARD, LICENCE_PLACEHOLDER

TOKEN = "HF_TOKEN"  # noqa: S105 (the variable's name)


def push_export(run: str, repo_id: str, *, public: bool = False, revision: str | None = None) -> tuple[str, list[str]]:
    """Sends the Hugging Face directory of `run` to the repository `repo_id`, which is made where it is not there.

    Args:
        run: a run's directory, or its `hf/`; also in a bucket.
        repo_id: `ORG/NAME` on the hub.
        public: a new repository is to be seen by everybody, not by its owners alone.
        revision: the branch; unset: main.

    Returns:
        Where the commit can be seen, and what a person should look at before others see it.

    Raises:
        ValueError: no export, a damaged one, no token, or the hub refused; with the remedy.
    """
    token = _token(repo_id)
    directory = export_of(run)
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _hub_errors(repo_id):
        api.create_repo(repo_id, private=not public, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            revision=revision,
            commit_message=f"Export of {directory.parent.name}",
            ignore_patterns=[MANIFEST, ".*"],
        )
    return str(done.commit_url), _to_look_at(directory)


def check_push(repo_id: str) -> None:
    """Asks the hub whether it knows this machine's token, before a run that ends with a push. Raises ValueError with the remedy."""
    token = _token(repo_id)
    from huggingface_hub import HfApi

    with _hub_errors(repo_id):
        HfApi(token=token).whoami()


def _token(repo_id: str) -> str:
    token = os.environ.get(TOKEN)
    if not token:
        raise ValueError(f"{TOKEN} is not set: put a token with write access for {repo_id} there (hub: Settings, Access Tokens)")
    return token


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """What the hub or the way there refuses, as a ValueError with the remedy."""
    # HTTPError is that of the HTTP library that this version of the client uses
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"--repo={repo_id!r}: {error}") from None
    except HfHubHTTPError as error:
        said = without_secrets(str(error.server_message or error))
        raise ValueError(f"the hub refused {repo_id!r} ({said[:300]}): {TOKEN} has to have write access there") from None
    except (OfflineModeIsEnabled, HTTPError, ConnectionError) as error:
        raise ValueError(
            f"the hub cannot be reached ({without_secrets(str(error))[:200]}): try again when this machine is online"
        ) from None


def export_of(run: str) -> Path:
    """The verified Hugging Face directory of a run, on this machine. Raises ValueError where there is none or it is damaged."""
    place = model_here(run)
    directory = place if is_hf(place) else place / EXPORT
    if not is_hf(directory):
        raise ValueError(
            f"{run} has no export ({directory / HF_CONFIG_FILE} is not there): give a finished run's directory, or run its export again"
        )
    manifest, reason = load_manifest(directory)
    if manifest is None:
        raise ValueError(f"{directory} is no finished export (its manifest {reason}): run the same training command again")
    if damages := check(directory, manifest.fingerprint, hashes=True):
        raise ValueError(f"{directory} is damaged ({'; '.join(map(str, damages[:4]))}): run the same training command again")
    return directory


def _to_look_at(directory: Path) -> list[str]:
    card = directory / CARD
    if card.is_file() and LICENCE_PLACEHOLDER in card.read_text(encoding="utf-8"):
        return ["its card has no licence yet: choose one in README.md on the hub before you make the repository public"]
    return []
