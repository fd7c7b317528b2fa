"""Models on the Hugging Face hub: at which commit, which of their files belong to a checkpoint, and
bringing these to this machine.

A model's commit is asked for once. Everything is then read at that commit, should another one be
published meanwhile.
"""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from rich.filesize import decimal

from quantize.checkpoint.client_words import client_words
from quantize.checkpoint.coming import Shown, counted, not_shown
from quantize.checkpoint.companions import (
    MODULES,
    belongs,
    belongs_by_config,
    configs,
    folders_named,
)
from quantize.checkpoint.disk import advice_on_cache
from quantize.checkpoint.json_files import INDEX
from quantize.errors import QuantizeError

CONFIG = "config.json"
_NOT_THE_MODEL = ("consolidated*", "adapter_*")
"""Weights in Mistral's own format beside the same in the hub's, and adapters."""


@dataclass(frozen=True)
class HubFile:
    """A file of a model on the hub.

    Attributes:
        size: in bytes.
        digest: SHA-256 of its contents if it is large, else git's hash of it. In the hub's cache
            it is the blob's name.
    """

    size: int
    digest: str

    @property
    def has_sha256(self) -> bool:
        """Whether ``digest`` is that."""
        return len(self.digest) == 64


@dataclass(frozen=True)
class HubModel:
    """A model on the hub, at one commit.

    Attributes:
        name: ``ORG/NAME``.
        commit: 40 hexadecimal digits.
        files: all that it has, by relative path.
        revision: what the user calls this commit: a branch, a tag or the commit itself.
    """

    name: str
    commit: str
    files: dict[str, HubFile]
    revision: str = "main"

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.name} on the hub, at {self.revision},"

    def described(self, code: bool) -> Path:
        """What says how to read the weights, in the hub's cache: the config and the index.

        Args:
            code: the top level's Python modules too.

        Returns:
            the folder of this commit.
        """
        self._check_config()
        names = [n for n in (CONFIG, INDEX) if n in self.files]
        names += [n for n in self._top if code and fnmatchcase(n, MODULES)]
        with without_bars():
            return self._bring(names)

    def companions(self) -> Path:
        """All files beside the weights that belong to the checkpoint, in the hub's cache.

        They are those of its top level, then those in the folders that its configs name. Python
        files are among them, so that they are copied to the target; they run only with
        ``--trust-remote-code``.

        Returns:
            the folder of this commit.
        """
        self._check_config()
        names = {CONFIG, INDEX} & self.files.keys()
        names |= {n for n in self._top if belongs(n) or fnmatchcase(n, MODULES)}
        with without_bars():
            folder = self._bring(sorted(names))
            named = folders_named(configs(folder))
            inside = [n for n in self.files if "/" in n and n.partition("/")[0] in named]
            return self._bring(sorted(filter(belongs_by_config, inside))) if inside else folder

    def _check_config(self) -> None:
        if CONFIG not in self.files:
            raise QuantizeError(
                f"{self.name} on the hub has no {CONFIG} at {self.revision}, so it is no "
                "checkpoint in Transformers' format; check the name, or pass another --revision"
            )

    @property
    def candidates(self) -> list[str]:
        """Names of the files that may be its weights: any that an index names; without an index
        what is not known to be something else."""
        if INDEX in self.files:
            return self._top
        return [n for n in self._top if not any(fnmatchcase(n, p) for p in _NOT_THE_MODEL)]

    def missing(self, names: Collection[str]) -> list[str]:
        """Which of these files are not in the hub's cache."""
        from huggingface_hub import try_to_load_from_cache

        found = {n: try_to_load_from_cache(self.name, n, revision=self.commit) for n in names}
        return [name for name, path in found.items() if not isinstance(path, str)]

    def bring(self, names: Sequence[str], shown: Shown = not_shown) -> Path:
        """Download the weights into the hub's cache, unless they are there; the last of all files.

        Args:
            shown: shows how much has come.

        Returns:
            the folder of this commit.

        Raises:
            QuantizeError: if that fails, or the cache's disk has no room for it.
        """
        with asking(self.name):
            missing = [self.files[name] for name in self.missing(names)]
            nbytes = sum(file.size for file in missing)
            _check_room(self.name, nbytes)
            with ExitStack() as showing:
                showing.enter_context(without_bars())
                if missing:
                    sizes = {file.digest: file.size for file in missing}
                    came = showing.enter_context(shown(nbytes))
                    showing.enter_context(counted(self._described / "../../blobs", sizes, came))
                folder = self._bring(names)
            if self.revision != self.commit:  # so that it is found when the hub is not
                ref = folder.parent.parent / "refs" / self.revision
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(self.commit)
            return folder

    def _bring(self, names: Sequence[str]) -> Path:
        from huggingface_hub import snapshot_download  # slow to import, not needed for a folder

        exactly = [glob.escape(name) for name in names]
        return Path(snapshot_download(self.name, revision=self.commit, allow_patterns=exactly))

    @property
    def _described(self) -> Path:
        """The folder of this commit in the hub's cache, which has the config."""
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(self.name, CONFIG, revision=self.commit)
        return Path(str(config)).parent

    @property
    def _top(self) -> list[str]:
        return sorted(name for name in self.files if "/" not in name)


def look_up(source: str, revision: str | None = None) -> Path | HubModel:
    """What ``source`` is: a folder, or a model on the hub of which nothing is downloaded yet.

    If the hub does not answer, a model that is in its cache is the folder there.

    Args:
        source: a folder, or a hub id such as ``org/name``.
        revision: a branch, tag or commit on the hub; by default the main branch.

    Raises:
        QuantizeError: if it is neither, or the hub has no such model for this user.
    """
    folder = folder_of(source)
    if folder is not None:
        if revision is not None:
            raise QuantizeError(
                f"--revision {revision}: {source} is a folder here, and has none; leave it out, or "
                "give a hub id"
            )
        return folder
    with asking(source):
        try:
            return _listed(source, revision)
        except Exception:
            if (cached := _cached(source, revision)) is not None:
                return cached
            raise


def folder_of(source: str) -> Path | None:
    """The folder that ``source`` names; None if it is a hub id.

    Raises:
        QuantizeError: if it is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise QuantizeError(f"{source} is neither a folder nor a hub id such as org/name")
    return None


def resolve(source: str, revision: str | None = None, shown: Shown = not_shown) -> Path:
    """The folder that holds the checkpoint ``source``, all of it.

    Args:
        source: a folder, which is returned as it is, or a hub id such as ``org/name``, which is
            downloaded unless it is in the hub's cache.
        revision: see :func:`look_up`.
        shown: shows a download.

    Raises:
        QuantizeError: see :func:`look_up`; also if the download fails.
    """
    found = look_up(source, revision)
    if isinstance(found, Path):
        return found
    from quantize.checkpoint.headers import find_files  # PyTorch comes with it

    with asking(source):
        folder = found.companions()
    names = [file.name for file in find_files(folder, found.candidates, found.title)]
    return found.bring(names, shown)


@contextmanager
def asking(name: str) -> Iterator[None]:
    """Within, an error of the hub's client becomes one of ours.

    Raises:
        QuantizeError: one line that says which model, and what to do.
    """
    try:
        yield
    except QuantizeError:
        raise
    except Exception as error:  # the hub's errors, OSError, and those of the HTTP library
        raise QuantizeError(
            f"{name} is not a folder here, and reading it from the hub failed: "
            f"{client_words(behind(error))}{advice(error)}"
        ) from error


def behind(error: BaseException) -> BaseException:
    """What went wrong, where the client says only that it has no such file in its cache either."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def without_bars() -> Iterator[None]:
    """Within, the client shows no progress: small files come at once."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _check_room(name: str, nbytes: int) -> None:
    """Raise QuantizeError if the disk of the hub's cache has no room for a download."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if nbytes > (free := shutil.disk_usage(place).free):
        raise QuantizeError(
            f"{name}: {decimal(nbytes)} are still to be downloaded, but the disk of {cache} has "
            f"{decimal(free)} free, {decimal(nbytes - free)} too little; free some space, or set "
            "HF_HUB_CACHE to another folder"
        )


def advice(error: Exception) -> str:
    """What to do about an error of the hub's client, as the end of a sentence; nothing, if that is
    not known."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):  # a kind of RepositoryNotFoundError
        return "; accept its terms on its page there, and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "; check the name, and if it is private log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "; pass one that it has with --revision: a branch, a tag, or a commit's 40 digits"
    cause = behind(error)
    if isinstance(cause, UnicodeEncodeError):  # of a header
        return "; the token that HF_TOKEN or `hf auth login` gave is none: correct it"
    if isinstance(cause, HFValidationError):
        return ""  # of the name that was given
    status = 0
    if isinstance(cause, HfHubHTTPError):  # one of them is a ValueError as well
        status = 0 if cause.response is None else cause.response.status_code
    elif isinstance(cause, ValueError | KeyError | TypeError | AttributeError):
        return "; what answered is not the hub, but a proxy or a login page: look at HF_ENDPOINT"
    if status in (401, 403):
        return "; log in with `hf auth login`, and correct HF_TOKEN if it is set"
    if status in (408, 429) or status >= 500:
        return "; try again later"
    return advice_on_cache(cause)


def _listed(name: str, revision: str | None) -> HubModel:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    commit = api.model_info(name, revision=revision).sha
    if commit is None:
        raise QuantizeError(f"{name}: the hub does not say which commit it has; try again")
    tree = api.list_repo_tree(name, recursive=True, revision=commit)
    files = {
        entry.path: HubFile(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in tree
        if isinstance(entry, RepoFile)
    }
    return HubModel(name, commit, files, revision or "main")


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder of a model in the hub's cache; None if it is not there, with all its weights."""
    from huggingface_hub import snapshot_download

    from quantize.checkpoint.headers import find_files

    try:
        # Of all files: what does not belong to the model was never downloaded.
        found = snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=[CONFIG]
        )
        find_files(Path(found))
        return Path(found)
    except Exception:  # what went wrong with the hub is what matters
        return None


def revision_of(folder: Path) -> str | None:
    """The commit on the hub that a checkpoint in ``folder`` was downloaded from, if that is known.

    Returns:
        ``ORG/NAME@COMMIT`` of a folder in the hub's cache; ``COMMIT`` of one that the hub's client
        has filled (``hf download --local-dir``); else None.
    """
    cached = folder.absolute()
    repository = cached.parent.parent.name
    if cached.parent.name == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')}@{cached.name}"
    notes = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    try:
        commit = notes.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, ValueError):
        return None
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None
