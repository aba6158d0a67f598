"""Uploading what validation found about an expert to its repository on the hub."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from mergeready.errors import MergeReadyError, OptionError
from mergeready.experts.base import Base
from mergeready.experts.fingerprint import Fingerprint
from mergeready.training.history import History
from mergeready.validation.card import HUB_ID
from mergeready.validation.public import public_report, require_public
from mergeready.validation.report import Report
from mergeready.validation.share import write_shared
from mergeready.weights.model_card import CARD_NAME
from mergeready.weights.open import WeightsLike
from mergeready.weights.safetensors_file import SafetensorsFile

# The library's releases use different HTTP libraries, whose own errors its errors derive from.
_REFUSALS: tuple[type[Exception], ...] = (
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    *(k for k in HfHubHTTPError.__mro__ if k.__name__ == "HTTPError" and issubclass(k, Exception)),
)


class UploadError(MergeReadyError):
    """The hub did not take an upload."""


def push_report(
    expert: str | Path,
    repository: str,
    report: Report,
    fingerprint: Fingerprint | None = None,
    *,
    base: WeightsLike | Base | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    history: History | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload card, report and fingerprint in one commit; weights and all other files stay as they are.

    The card on the hub is the one that gets our section; where there is none, the expert's own. The repository is made
    if it does not exist. Before anything is sent, all texts are searched for local paths, tokens and e-mail addresses.

    Args:
        expert: The expert's folder.
        repository: Hub id of the repository, such as org/law.
        report: What validating it found.
        fingerprint: Its fingerprint.
        base: The base, whose fingerprint goes into the card.
        base_model: Hub id of the base.
        dataset: Hub id of the dataset that its own task was evaluated on.
        history: Its training run, for the page's curves.
        private: Whether a repository that has to be made is private.
        token: Access token; by default the one that the hub's library knows.

    Returns:
        Address of the commit.

    Raises:
        OptionError: If the repository is no hub id, or something private would have been uploaded.
        UploadError: If the hub refused or could not be reached.
        FormatError: If the card cannot be changed without touching what is not ours.
    """
    if not HUB_ID.fullmatch(repository):
        raise OptionError(f"`push` must be a hub id such as org/name, not {repository!r}.")
    api = HfApi(token=token)
    try:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            known = _known(api, repository)
            card = _card(api, repository, known) or Path(expert) / CARD_NAME
            if card.is_file():
                shutil.copyfile(card, folder / CARD_NAME)
            files = write_shared(
                folder, public_report(report, repository), fingerprint,
                base=base, base_model=base_model, dataset=dataset, history=history,
            )  # fmt: skip
            require_public({path.name: _text(path) for path in files})
            operations = [CommitOperationAdd(path.name, path) for path in files]
            if known is None:
                api.create_repo(repository, private=private, exist_ok=True)
            made = api.create_commit(
                repository,
                operations,
                commit_message="Composability: report and fingerprint by mergeready",
                parent_commit=None if known is None else known.sha,
            )
            return str(made.commit_url)
    except _REFUSALS as error:
        raise UploadError(f"{repository} could not be written: {_without(token, str(error))}") from None


def _known(api: HfApi, repository: str) -> ModelInfo | None:
    """The repository as it is now; None where there is none."""
    try:
        return api.model_info(repository)
    except RepositoryNotFoundError:
        return None


def _card(api: HfApi, repository: str, known: ModelInfo | None) -> Path | None:
    """The card of exactly that commit: an older one, from the cache, would undo what others wrote since."""
    if known is None or not any(file.rfilename == CARD_NAME for file in known.siblings or ()):
        return None
    return Path(api.hf_hub_download(repository, CARD_NAME, revision=known.sha))


def _text(path: Path) -> str:
    """What can be read in a file: of a fingerprint, its metadata."""
    if path.suffix == ".safetensors":
        return "\n".join(SafetensorsFile(path).metadata.values())
    return path.read_text(encoding="utf-8")


def _without(token: str | None, text: str) -> str:
    return text if not token else text.replace(token, "…")
