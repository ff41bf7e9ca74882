"""The registry: published models by name and version, on disk, never changed once written.

Takes model directories with a manifest; gives entries whose every byte was checked. Layout:
`root/NAME/VERSION/` is a model directory, `root/NAME/aliases.json` says which version is
`production` and how that came about. It does not know how a model was made or is served.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from cluster.config import StrictModel
from cluster.errors import ConfigError, IntegrityError, ModelNotFoundError, VersionExistsError
from cluster.storage import (
    MANIFEST,
    check_name,
    read_manifest,
    staged_directory,
    storage_errors,
    verify_directory,
)
from jobs._aliases import Aliases, read_aliases, write_aliases

PRODUCTION = "production"
LATEST = "latest"
_RESERVED = (PRODUCTION, LATEST)
_LOCK = ".lock"


class Entry(StrictModel):
    """One published version. `digest` is the manifest's own, which covers every file's digest."""

    name: str
    version: str
    path: Path
    digest: str
    size_bytes: int
    published_at: str
    aliases: tuple[str, ...] = ()
    metrics: dict[str, Any] = Field(default_factory=dict)
    lineage: dict[str, Any] = Field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The spelling that names exactly this version."""
        return f"{self.name}@{self.version}"


class Registry:
    """Published models below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def publish(
        self,
        source: Path,
        name: str,
        version: str | None = None,
        *,
        metrics: Mapping[str, Any] | None = None,
        lineage: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Copy a model directory in as `name@version`; without a version the next number is taken.

        The source's digests are checked first, and what its manifest says (kind, recipe, gate,
        lineage) is kept. Raises VersionExistsError if the version exists, IntegrityError if the
        source is damaged, ModelFormatError if it has no manifest. A failure leaves nothing behind.
        """
        _check_names(name, version)
        manifest = verify_directory(source)
        with self._locked(name):
            version = version or self._next_version(name)
            target = self.root / name / version
            if target.exists():
                raise VersionExistsError(
                    f"{name}@{version} exists in {self.root} and is never overwritten. Choose "
                    "another version, or none to take the next number."
                )
            values = _published_manifest(manifest, name, version, metrics, lineage)
            with staged_directory(target, values) as staging:
                shutil.copytree(
                    source, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST)
                )
        return self.resolve(f"{name}@{version}")

    def entries(self, name: str | None = None) -> list[Entry]:
        """Return all versions (of one model), oldest first; only manifests are checked."""
        names = [name] if name is not None else self._names()
        return [
            self._entry(each, version, read_manifest(self.root / each / version))
            for each in names
            for version in self._versions(each)
        ]

    def resolve(self, reference: str, *, verify: bool = True) -> Entry:
        """Return the entry of `name@version`, `name@production`, `name@latest`, or `name`.

        A bare name means production. Every file's digest is checked unless `verify` is false.
        Raises ModelNotFoundError that lists what exists, or IntegrityError.
        """
        name, version = self._locate(reference)
        directory = self.root / name / version
        manifest = verify_directory(directory) if verify else read_manifest(directory)
        return self._entry(name, version, manifest)

    def promote(self, name: str, version: str) -> Entry:
        """Point `name@production` to a version, after checking its digests."""
        entry = self.resolve(f"{name}@{version}")
        with self._locked(name):
            aliases = read_aliases(self._aliases_path(name))
            if aliases.current(PRODUCTION) != entry.version:
                changed = aliases.promoted(PRODUCTION, entry.version, _now())
                write_aliases(self._aliases_path(name), changed)
        return self.resolve(entry.reference, verify=False)

    def roll_back(self, name: str) -> Entry:
        """Point `name@production` to the version before the present one, after checking it.

        Raises ModelNotFoundError if there is no earlier one.
        """
        self._require_model(name)
        with self._locked(name):
            aliases = read_aliases(self._aliases_path(name))
            previous = aliases.previous(PRODUCTION)
            if previous is None:
                raise ModelNotFoundError(
                    f"{name}@{PRODUCTION} has no earlier version to roll back to. "
                    f"{self._describe_versions(name)} Promote one of them instead."
                )
            self.resolve(f"{name}@{previous}")
            write_aliases(self._aliases_path(name), aliases.rolled_back(PRODUCTION, _now()))
        return self.resolve(f"{name}@{previous}", verify=False)

    def history(self, name: str) -> list[dict[str, str]]:
        """Return what happened to the aliases of a model, oldest first."""
        self._require_model(name)
        return [event.model_dump() for event in read_aliases(self._aliases_path(name)).history]

    def _locate(self, reference: str) -> tuple[str, str]:
        name, separator, version = reference.partition("@")
        if not name or (separator and not version):
            raise ConfigError(
                f"model `{reference}`: expected name, name@version or name@{PRODUCTION}."
            )
        check_name(name, "model name")
        self._require_model(name)
        version = version or PRODUCTION
        if version == LATEST:
            return name, self._versions(name)[-1]
        if version == PRODUCTION:
            promoted = read_aliases(self._aliases_path(name)).current(PRODUCTION)
            if promoted is None:
                raise ModelNotFoundError(
                    f"no version of `{name}` was promoted to {PRODUCTION}. "
                    f"{self._describe_versions(name)} Name a version, or promote one."
                )
            version = promoted
        check_name(version, "version")
        if version not in self._versions(name):
            raise ModelNotFoundError(f"no `{name}@{version}`. {self._describe_versions(name)}")
        return name, version

    def _require_model(self, name: str) -> None:
        if not self._versions(name):
            names = self._names()
            found = f"It has: {', '.join(names)}." if names else "It is empty."
            raise ModelNotFoundError(
                f"no model `{name}` in the registry {self.root}. {found} "
                "Name one of these, or publish it first."
            )

    def _describe_versions(self, name: str) -> str:
        return f"`{name}` has: {', '.join(self._versions(name))}."

    def _names(self) -> list[str]:
        return [each for each in _folders(self.root) if self._versions(each)]

    def _versions(self, name: str) -> list[str]:
        return sorted(_folders(self.root / name), key=_version_key)

    def _next_version(self, name: str) -> str:
        numbers = [int(version) for version in self._versions(name) if version.isdecimal()]
        return str(max(numbers, default=0) + 1)

    def _aliases_path(self, name: str) -> Path:
        return self.root / name / "aliases.json"

    def _entry(self, name: str, version: str, manifest: Mapping[str, Any]) -> Entry:
        path = self.root / name / version
        if (manifest.get("name"), manifest.get("version")) != (name, version):
            raise IntegrityError(
                f"{path} holds {manifest.get('name')}@{manifest.get('version')}: it was not "
                "published here. Move it back, or publish it under this name."
            )
        aliases: Aliases = read_aliases(self._aliases_path(name))
        return Entry(
            name=name,
            version=version,
            path=path,
            digest=manifest["self_sha256"],
            size_bytes=sum(file["size_bytes"] for file in manifest["files"].values()),
            published_at=manifest.get("published_at", ""),
            aliases=(PRODUCTION,) if aliases.current(PRODUCTION) == version else (),
            metrics=manifest.get("metrics", {}),
            lineage=manifest.get("lineage", {}),
        )

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the model's lock, so that two publishers never take the same number."""
        with storage_errors(f"locking {self.root / name}"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
            lock = (self.root / name / _LOCK).open("w")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def find_model(reference: str, registry_root: Path) -> Path:
    """Return the directory that `reference` means: an existing path, else a registry entry."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if "/" in reference:
        raise ModelNotFoundError(
            f"no directory `{reference}`. Give a model directory, or name@version of the registry."
        )
    return Registry(registry_root).resolve(reference).path


def _published_manifest(
    source: Mapping[str, Any],
    name: str,
    version: str,
    metrics: Mapping[str, Any] | None,
    lineage: Mapping[str, Any] | None,
) -> dict[str, Any]:
    kept = {key: value for key, value in source.items() if key not in ("files", "self_sha256")}
    values = {
        **kept,
        "name": name,
        "version": version,
        "published_at": _now(),
        "metrics": {**kept.get("metrics", {}), **(metrics or {})},
        "lineage": {
            **kept.get("lineage", {}),
            **(lineage or {}),
            "source_digest": source["self_sha256"],
        },
    }
    return json.loads(json.dumps(values))  # what is refused here must not fail after the copy


def _check_names(name: str, version: str | None) -> None:
    check_name(name, "model name")
    if version is None:
        return
    check_name(version, "version")
    if version in _RESERVED:
        raise ConfigError(
            f"version `{version}` is not allowed: it is an alias. Choose another, or none."
        )


def _folders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(child.name for child in path.iterdir() if child.is_dir() and child.name[0] != ".")


def _version_key(version: str) -> tuple[int, int, str]:
    return (1, int(version), "") if version.isdecimal() else (0, 0, version)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
