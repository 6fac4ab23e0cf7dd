"""Where a model's files are: a folder, or a snapshot of a model hub that huggingface_hub fetches or finds in its cache."""

from __future__ import annotations

import functools
import re
import time
from pathlib import Path
from typing import Any, Final

import structlog
from tqdm.auto import tqdm

from streamkv.errors import ConfigError, ModelLoadError

__all__ = ["ALLOWED", "IGNORED", "fetch", "is_hub_id", "resolve_model"]

ALLOWED: Final = (
    "*.safetensors",
    "*.json",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
"""All that is ever downloaded: neither code nor pickles."""
IGNORED: Final = ("*/*.safetensors", "*/*.json", "*/*.model", "consolidated*")
"""Other formats live in sub-folders, and `consolidated*` is a second copy of the weights."""

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REPORT_EVERY_S: Final = 5.0

log = structlog.get_logger(__name__)


def is_hub_id(model: str) -> bool:
    """Whether a name means a model on the hub: it has the form `org/name`, and there is no such folder."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).is_dir()


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The folder that a name means. A hub id may be downloaded now; asked for again, the answer is the same snapshot.

    Args:
        model: a folder, or a hub id.
        revision: branch, tag or commit of a hub id; None = the hub's default branch.

    Raises:
        ConfigError: a revision of a folder.
        ModelLoadError: no folder and no hub id, or the hub has no such model, or it cannot be reached.
    """
    if is_hub_id(model):
        return _fetch_once(model, revision)
    path = Path(model)
    if not path.is_dir():
        raise ModelLoadError(f"{model} is no folder, and no id of a model on the hub, which has the form org/name")
    if revision is not None:
        raise ConfigError(f"{model} is a folder and has no revisions; leave --revision away", param="revision")
    return path


@functools.cache
def _fetch_once(repo_id: str, revision: str | None) -> Path:
    """Engine and tokenizer must come from one snapshot, even if the branch moves between the two questions."""
    return fetch(repo_id, revision)


def fetch(repo_id: str, revision: str | None = None, *, endpoint: str | None = None, cache_dir: Path | None = None) -> Path:
    """Download what is missing of a snapshot, or find it in the cache where the hub cannot be reached.

    Args:
        endpoint, cache_dir: None = those of huggingface_hub (HF_ENDPOINT; HF_HUB_CACHE, HF_HOME).

    Raises:
        ModelLoadError: one sentence what to do.
    """
    from huggingface_hub import constants, errors, snapshot_download  # half a second, which a folder does not need

    began = _LoggingBar.last = time.monotonic()
    server, cache = endpoint or constants.ENDPOINT, cache_dir or constants.HF_HUB_CACHE
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(ALLOWED),
            ignore_patterns=list(IGNORED),
            endpoint=endpoint,
            cache_dir=cache_dir,
            tqdm_class=_LoggingBar,
        )
    except errors.GatedRepoError as error:
        raise ModelLoadError(
            f"{repo_id} is gated: accept its terms at {server}/{repo_id} and give a token in HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelLoadError(f"{repo_id} at {server} has no branch, tag or commit {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"{repo_id} is neither a folder here nor a model at {server}; check the name, "
            "or give a token in HF_TOKEN if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"{repo_id} is neither a folder here nor complete in the cache {cache}, and {server} cannot be reached; give "
            f"a folder, or run `hf download {repo_id}` where there is a network and point HF_HOME at a copy of its cache"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # other answers of the server, transport, a full disk
        log.exception("download_failed", model=repo_id)
        raise ModelLoadError(f"{repo_id} cannot be fetched from {server} ({type(error).__name__}); the log says why") from error
    path = Path(folder)
    log.info("model_resolved", model=repo_id, revision=revision, sha=path.name, seconds=round(time.monotonic() - began, 1))
    return path


class _LoggingBar(tqdm):  # type: ignore[type-arg]  # generic in the stubs only
    """A bar on a terminal; elsewhere, a line in the log every few seconds."""

    last = 0.0  # of all bars: the same bytes are counted by two, as received and as written

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.is_bytes, self.done = kwargs.get("unit") == "B", 0.0
        super().__init__(*args, **{"disable": None, **kwargs})

    def update(self, n: float | None = 1) -> bool | None:
        """Add to the count."""
        self.done += n or 0
        if self.disable and self.is_bytes and time.monotonic() - _LoggingBar.last >= _REPORT_EVERY_S:
            _LoggingBar.last = time.monotonic()
            log.info("downloading", bytes=int(self.done), of=self.total)
        return super().update(n)
