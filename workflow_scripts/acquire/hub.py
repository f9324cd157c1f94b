"""Files of Hugging Face repositories: what the hub says about them, where they are cached, how to fetch them.

huggingface_hub answers what a repository has (revision, size, hash) and finds its cache; the transfer itself
is :mod:`workflow_scripts.acquire.download`'s, which resumes after a crash and verifies hashes, as the client
does not. HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN, HF_HOME and HF_HUB_CACHE mean what they mean for the client.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from workflow_scripts.acquire.answers import hub_advice
from workflow_scripts.acquire.download import fetch
from workflow_scripts.acquire.patience import Patience, retry_after
from workflow_scripts.acquire.settled import COMMIT, SHORT_COMMIT, Settled, is_commit
from workflow_scripts.acquire.stopping import pause
from workflow_scripts.acquire.verified import (
    Wanted,
    already_there,
    hash_file,
    objection,
    provenance_path,
    recall,
)
from workflow_scripts.acquire.voice import Voice, say
from workflow_scripts.io import Hiccup, UserError, read_json, write_json
from workflow_scripts.secrets import hide

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

    from workflow_scripts.config.sources import HubFile

T = TypeVar("T")
# What a repository has at the revision of a source, where the configuration does not name every file.
LISTING = ".listing.json"


class Repository:
    """A repository at a revision. A branch or a tag stays what ``settled`` notes that it was."""

    def __init__(
        self,
        repo: str,
        repo_type: str,
        revision: str,
        patience: Patience | None = None,
        settled: Settled | None = None,
    ) -> None:
        from huggingface_hub import HfApi, constants, get_token

        self.repo, self.repo_type, self.revision = repo, repo_type, revision
        self.patience = patience or Patience()
        self.offline = constants.is_offline_mode()
        self.endpoint = constants.ENDPOINT.rstrip("/")
        self.token = get_token()
        if self.token:
            hide(self.token)
        self.api = HfApi(endpoint=self.endpoint, token=self.token or False)
        self.settled = None if is_commit(revision) else settled
        self._commit = self.settled.read(repo, revision) if self.settled else None
        # Files are asked for by several threads, which have to mean the same commit.
        self._asking = threading.Lock()

    @property
    def shown(self) -> str:
        """The repository's name in messages."""
        return f"{self.repo} ({self.repo_type}, revision {self.revision})"

    @property
    def fixed(self) -> str | None:
        """The revision if it is a commit, which never has other files, or the one that it is noted to be."""
        return self.revision if is_commit(self.revision) else self._commit

    # -- what the hub says

    def commit(self) -> str:
        """The full commit that the revision stands for; the hub's file URLs take no shortened ones."""
        with self._asking:
            if self._commit is None:
                self._commit = self._find_commit()
            return self._commit

    def _find_commit(self) -> str:
        if COMMIT.fullmatch(self.revision):
            return self.revision
        if SHORT_COMMIT.fullmatch(self.revision):
            return self._full_revision()
        info = self._ask(
            lambda: self.api.repo_info(self.repo, revision=self.revision, repo_type=self.repo_type)
        )
        commit = str(info.sha)
        self._settle(commit)
        return commit

    def _settle(self, commit: str) -> None:
        if self.settled is not None:
            self.settled.write(self.repo, self.revision, commit)
            say(
                f"{self.shown} is commit {commit} now and stays it here ({self.settled.path}); set"
                " `revision` to it, so that others fetch the same, or to a newer one"
            )

    def _full_revision(self) -> str:
        commits = self._ask(lambda: self.api.list_repo_commits(self.repo, repo_type=self.repo_type))
        found = [c.commit_id for c in commits if c.commit_id.startswith(self.revision)]
        if len(found) != 1:
            known = ", ".join(c.commit_id[:12] for c in commits[:5])
            raise UserError(
                f"revision: {self.revision!r} is {'no' if not found else 'more than one'} commit of"
                f" {self.repo}; the newest are {known}. Pin one of them in full"
            )
        return found[0]

    def files(self) -> list[RepoFile]:
        """All files of the repository."""
        from huggingface_hub.hf_api import RepoFile

        tree = self._ask(
            lambda: list(
                self.api.list_repo_tree(
                    self.repo, repo_type=self.repo_type, revision=self.commit(), recursive=True
                )
            )
        )
        return [item for item in tree if isinstance(item, RepoFile)]

    def names(self) -> list[str]:
        """The paths of all files. Raises :class:`UserError` without a network."""
        if self.offline:
            raise UserError(
                f"{self.shown}: HF_HUB_OFFLINE is set, and which files it has is not known here; unset it, or"
                " name each file"
            )
        return [item.path for item in self.files()]

    def describe(self, paths: Sequence[str]) -> dict[str, RepoFile]:
        """Size and hash of some files. Raises :class:`UserError` for one that is not there."""
        from huggingface_hub.hf_api import RepoFile

        commit = self.commit()
        infos = self._ask(
            lambda: self.api.get_paths_info(self.repo, list(paths), revision=commit, repo_type=self.repo_type)
        )
        found = {info.path: info for info in infos if isinstance(info, RepoFile)}
        for path in paths:
            if path not in found:
                names = [info.path for info in self.files()]
                close = get_close_matches(path, names, n=3, cutoff=0.4) or names[:5]
                raise UserError(f"{self.shown} has no file {path!r}; it has {', '.join(close)}")
        return found

    def _ask(self, question: Callable[[], T]) -> T:
        """Asks the hub, again and again while it is busy; its errors become messages that say what to do."""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError

        why = ""
        with Voice(self.repo, self.patience.say_s) as voice:
            for attempt in range(1, self.patience.attempts + 1):
                voice.set_activity(f"waiting for an answer of {self.endpoint}")
                wait = None
                try:
                    return question()
                except HfHubHTTPError as error:
                    why, wait = self._refused(error)
                except (HTTPError, ConnectionError) as error:
                    why = self._unreachable(error)
                if attempt < self.patience.attempts:
                    seconds = self.patience.pause(attempt, wait)
                    voice.say(f"{why} from {self.endpoint}; again in {seconds:.1f} s")
                    voice.set_activity(f"waiting {seconds:.0f} s to ask {self.endpoint} again ({why})")
                    pause(seconds)
        raise Hiccup(
            f"{self.shown}: {self.endpoint} can't be reached ({why}); check the network and HF_ENDPOINT, or"
            " name a copy that you have under `local`"
        )

    def _refused(self, error: HfHubHTTPError) -> tuple[str, float | None]:
        """What to say about a busy hub, and how long it wants to wait. Raises :class:`UserError` for a
        final no.
        """
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        status = error.response.status_code if error.response is not None else 0
        finals: dict[type[HfHubHTTPError], str] = {
            GatedRepoError: (
                f"its owner asks for agreement to terms; accept them on {self.page}, set HF_TOKEN"
            ),
            RevisionNotFoundError: "there is no such revision; pin an existing commit",
            RepositoryNotFoundError: (
                f"there is no such repository at {self.endpoint}, or it is private and needs "
                "HF_TOKEN; check `repo` and `repo_type`"
            ),
        }
        for kind, message in finals.items():
            if isinstance(error, kind):
                raise UserError(f"{self.shown}: {message}") from None
        if status not in (408, 429) and status < 500:
            raise UserError(f"{self.shown}: the hub answers HTTP {status}: {self._advice(status)}") from None
        return f"HTTP {status}", retry_after(error.response.headers.get("Retry-After"))

    @property
    def page(self) -> str:
        """Where people look at the repository, and agree to its terms."""
        kind = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        return f"{self.endpoint}/{kind}{self.repo}"

    def _advice(self, status: int) -> str:
        advice = hub_advice(self.repo, self.page, self.revision)
        return advice.get(status, f"check `repo`, `repo_type` and `revision`, and look at {self.page}")

    def _unreachable(self, error: Exception) -> str:
        from huggingface_hub.errors import OfflineModeIsEnabled

        if isinstance(error, OfflineModeIsEnabled):
            raise UserError(f"{self.shown}: {OFFLINE}") from None
        return type(error).__name__

    # -- files

    def cached(self, path: str) -> Path | None:
        """The file in the client's cache, if it is there at this revision."""
        from huggingface_hub import constants, try_to_load_from_cache

        revisions = [self.fixed or self.revision, *([self._commit] if self._commit else [])]
        if SHORT_COMMIT.fullmatch(self.revision):
            kind = f"{self.repo_type}s--{self.repo.replace('/', '--')}"
            snapshots = Path(constants.HF_HUB_CACHE) / kind / "snapshots"
            if snapshots.is_dir():
                revisions += [p.name for p in sorted(snapshots.iterdir()) if p.name.startswith(self.revision)]
        for revision in revisions:
            found = try_to_load_from_cache(self.repo, path, revision=revision, repo_type=self.repo_type)
            if isinstance(found, str):
                if self.offline and self.fixed is None:
                    self._commit = Path(found).parents[path.count("/")].name
                    self._settle(self._commit)
                return Path(found)
        return None

    def wanted(self, info: RepoFile, mirrors: Sequence[str] = ()) -> Wanted:
        """How to fetch a file, with the hash that the hub gives: sha256 of big files, git's of small ones."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(
            self.repo, info.path, repo_type=self.repo_type, revision=self.commit(), endpoint=self.endpoint
        )
        return Wanted(
            name=info.path,
            urls=(url, *mirrors),
            bytes=info.size,
            sha256=info.lfs.sha256 if info.lfs else None,
            git_sha1=None if info.lfs else info.blob_id,
            advice=hub_advice(self.repo, self.page, self.revision),
            headers={"Authorization": f"Bearer {self.token}"} if self.token else {},
            facts={"repo": self.repo, "repo_type": self.repo_type, "revision": self.commit()},
        )


OFFLINE = (
    "HF_HUB_OFFLINE is set and the file is neither here nor in the hub's cache; unset it, or fetch the file"
    " on a machine with a network first (the acquire and prepare steps run on the login node)"
)


def find_files(repository: Repository, files: Sequence[HubFile], folder: Path) -> list[HubFile]:
    """The files of a source, those that a pattern stands for in its place. What a commit has is asked once
    and remembered in ``folder``.

    Raises:
        UserError: no file is called so.
    """
    memory = folder / LISTING
    known = read_json(memory) if memory.is_file() else {}
    asked = known if known.get("revision") == (repository.fixed or repository.revision) else {}
    if not asked or not (repository.offline or repository.fixed):
        names = repository.names()
        asked = {"revision": repository.fixed, "names": names}
        write_json(memory, asked)
    found: list[HubFile] = []
    for file in files:
        names = _called(file.path, asked["names"]) if file.is_pattern else [file.path]
        if not names:
            close = get_close_matches(file.path, asked["names"], n=3, cutoff=0.4) or asked["names"][:5]
            raise UserError(f"{repository.shown} has no file {file.path!r}; it has {', '.join(close)}")
        found += [_renamed(repository, file, name) for name in names]
    return list({file.path: file for file in found}.values())


def _renamed(repository: Repository, file: HubFile, name: str) -> HubFile:
    try:
        return type(file).model_validate({**file.model_dump(exclude_unset=True), "path": name})
    except ValueError as error:  # a name that the configuration could not have either
        raise UserError(f"{repository.shown}, {file.path}: {error}") from None


def _called(pattern: str, names: Sequence[str]) -> list[str]:
    """The names whose parts are as the pattern's: `*` does not go beyond a folder."""
    parts = pattern.split("/")
    return [
        name
        for name in sorted(names)
        if len(own := name.split("/")) == len(parts) and all(map(fnmatchcase, own, parts))
    ]


def get_file(
    repository: Repository, file: HubFile, target: Path, patience: Patience
) -> tuple[Path, dict[str, Any]]:
    """Makes one hub file available and returns where it lies and its provenance.

    Looked for in this order: the target itself, the client's cache, the network.
    """
    pinned = Wanted(
        file.path, (), file.bytes, file.sha256, first_use=file.trust == "first_use", role=file.role
    )
    if recall(target) is not None and (known := already_there(pinned, target)) is not None:
        return target, known
    if repository.offline:
        known = already_there(pinned, target)
        if known is not None:
            return target, known
    cached = repository.cached(file.path)
    if repository.offline and cached is None:
        raise UserError(f"{repository.shown}, {file.path}: {OFFLINE}")
    wanted = pinned if repository.offline else _checked_with_config(repository, file)
    if cached is not None and (known := verify_cached(cached, wanted, target)) is not None:
        return cached, known
    if repository.offline:
        raise UserError(f"{cached}: the hub's cache has another file than the config expects; {OFFLINE}")
    return target, fetch(wanted, target, patience)


def _checked_with_config(repository: Repository, file: HubFile) -> Wanted:
    """The hub's own facts about a file, compared with those of the config."""

    try:
        info = repository.describe([file.path])[file.path]
    except UserError:
        if not file.mirrors or file.sha256 is None:
            raise
        say(f"{repository.shown} can't be asked; trying the mirrors")
        return Wanted(
            file.path,
            tuple(file.mirrors),
            file.bytes,
            file.sha256,
            first_use=file.trust == "first_use",
            role=file.role,
        )
    wanted = repository.wanted(info, file.mirrors)
    differs = [
        f"{what} {theirs} (config: {ours})"
        for what, ours, theirs in (("size", file.bytes, wanted.bytes), ("sha256", file.sha256, wanted.sha256))
        if ours is not None and theirs is not None and ours != theirs
    ]
    if differs and file.trust == "publisher":
        raise UserError(
            f"{repository.shown}, {file.path}: the hub has another file than the config expects:"
            f" {', '.join(differs)}; check `revision`, or correct the config if the new file is what you want"
        )
    if differs:
        say(f"warning: {file.path}: the hub has {', '.join(differs)}")
    if wanted.sha256 is None and file.sha256 is not None:
        wanted = replace(wanted, sha256=file.sha256)
    return wanted


def verify_cached(cached: Path, wanted: Wanted, target: Path) -> dict[str, Any] | None:
    """Hashes a cached file once; its provenance is noted beside where the file would have been fetched to."""
    stat = cached.stat()
    memory = provenance_path(target.with_name(target.name + ".cached"))
    key = {"path": str(cached), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if memory.is_file() and (known := read_json(memory)).get("key") == key:
        found: dict[str, Any] = known["provenance"]
        if wanted.sha256 in (None, found["sha256"]) or wanted.first_use:
            return found
    say(f"{cached}: verifying the file of the hub's cache")
    sha, git = hash_file(cached)
    if objection(wanted, stat.st_size, sha, git) is not None:
        say(f"warning: {cached}: not the expected content; it is left alone and not used")
        return None
    provenance = {"bytes": stat.st_size, "sha256": sha, "from": "the hub's cache", **wanted.facts}
    memory.parent.mkdir(parents=True, exist_ok=True)
    write_json(memory, {"key": key, "provenance": provenance})
    return provenance


def fetch_snapshot(
    repo: str,
    revision: str,
    folder: Path,
    repo_type: str = "model",
    choose: Callable[[list[str]], list[str]] = list,
    patience: Patience | None = None,
) -> tuple[str, list[tuple[Path, dict[str, Any]]]]:
    """Makes a repository's files that ``choose`` picks available: the commit, and each file with its
    provenance.

    Files of the client's cache are used where they are; the others are fetched into ``folder``.
    """
    patience = patience or Patience()
    repository = Repository(repo, repo_type, revision, patience)
    if repository.offline:
        return _fetched_before(repository, folder, choose) or _cached_snapshot(repository, choose)
    infos = {info.path: info for info in repository.files()}
    found = []
    for path in choose(sorted(infos)):
        target = folder / path
        wanted = repository.wanted(infos[path])
        known = None
        if recall(target) is None and (cached := repository.cached(path)) is not None:
            known = verify_cached(cached, wanted, target)
            if known is not None:
                found.append((cached, {"path": path, **known}))
        if known is None:
            found.append((target, {"path": path, **fetch(wanted, target, patience)}))
    return repository.commit(), found


def _fetched_before(
    repository: Repository, folder: Path, choose: Callable[[list[str]], list[str]]
) -> tuple[str, list[tuple[Path, dict[str, Any]]]] | None:
    """Offline: what an earlier run fetched into ``folder``, if a model's configuration is among it."""
    known = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        facts = recall(path) if path.is_file() else None
        if (
            facts
            and facts.get("repo") == repository.repo
            and facts["revision"].startswith(repository.revision)
        ):
            known[str(path.relative_to(folder))] = facts
    if "config.json" not in known:
        return None
    commit = str(known["config.json"]["revision"])
    return commit, [(folder / name, {"path": name, **known[name]}) for name in choose(sorted(known))]


def _cached_snapshot(
    repository: Repository, choose: Callable[[list[str]], list[str]]
) -> tuple[str, list[tuple[Path, dict[str, Any]]]]:
    """Offline: the files that the client's cache has."""
    config = repository.cached("config.json")
    if config is None:
        raise UserError(f"{repository.shown}: {OFFLINE}")
    snapshot = config.parent
    names = choose(sorted(str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file()))
    return snapshot.name, [(snapshot / name, _trusted_by_name(snapshot / name, name)) for name in names]


def _trusted_by_name(path: Path, name: str) -> dict[str, Any]:
    """The client's cache names a file's content by its hash, offline all that there is to compare with."""
    sha, git = hash_file(path)
    blob = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", blob) and blob not in (sha, git):
        raise UserError(
            f"{path}: the file in the hub's cache is damaged; delete {path.resolve()} and fetch it again"
        )
    return {"path": name, "bytes": path.stat().st_size, "sha256": sha}
