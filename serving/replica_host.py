"""A replica's life: it listens, says once a second that it lives, and stops without losing work.

Takes an engine replica and a directory; gives a replica that gateways find. It does not know Ray.
"""

import asyncio
import logging
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec

from serving.directory import HEARTBEAT_S, Directory, ReplicaEntry
from serving.engines._protocol import EngineStats
from serving.messages import ServedModel
from serving.replica_server import Answering, ReplicaServer, socket_folder

_logger = logging.getLogger(__name__)
_FAREWELL_TIMEOUT_S = 2.0


class Runs(Answering, Protocol):
    """What `serving.replica.EngineReplica` offers."""

    def stats(self) -> EngineStats:
        """Return the load now; raises EngineError if the engine stopped."""
        ...

    def close(self) -> None:
        """Stop the engine."""
        ...


class ReplicaHost:
    """One replica on one event loop."""

    def __init__(self, replica: Runs, model: ServedModel, directory: Directory) -> None:
        self._replica, self._model, self._directory = replica, model, directory
        self._secret = secrets.token_bytes(32)
        self._name = f"{model.reference}#{secrets.token_hex(6)}"
        self._server = ReplicaServer(replica, self._secret)
        self._entry: ReplicaEntry
        self._beating: asyncio.Task[None]

    async def start(self, host: str, node_id: str) -> None:
        """Listen and tell the directory."""
        path = socket_folder(_short_folder()) / f"{os.getpid()}-{secrets.token_hex(4)}.sock"
        address = await self._server.start(path, host, node_id)
        self._entry = ReplicaEntry(
            replica=self._name,
            model=self._model.name,
            version=self._model.version,
            address=address,
            secret=self._secret,
            stats=self._replica.stats(),
            published_s=self._model.published_s,
            task=self._model.task,
            context_tokens=self._model.context_tokens,
        )
        self._beating = asyncio.ensure_future(self._beat())

    async def stop(self, drain_s: float) -> None:
        """Begin nothing new, finish what runs within `drain_s`, and leave the rest to others."""
        self._entry = msgspec.structs.replace(self._entry, is_draining=True)
        with suppress(Exception):  # Gateways hear it on their connections, too.
            async with asyncio.timeout(_FAREWELL_TIMEOUT_S):
                await self._directory.report(self._entry)
        num_left = await self._server.drain(drain_s)
        if num_left:
            _logger.warning("%d requests are left to other replicas", num_left)
        await self._server.close()
        self._beating.cancel()
        with suppress(Exception):  # Its entry expires by itself.
            async with asyncio.timeout(_FAREWELL_TIMEOUT_S):
                await self._directory.leave(self._name)
        self._replica.close()

    async def _beat(self) -> None:
        while True:
            try:
                stats = self._replica.stats()
                self._entry = msgspec.structs.replace(self._entry, stats=stats)
                await self._directory.report(self._entry)
            except Exception as error:  # noqa: BLE001 - the next one may arrive
                _logger.warning("the directory did not take a heartbeat: %r", error)
            await asyncio.sleep(HEARTBEAT_S)


def _short_folder() -> Path:
    """Return a folder for temporary files; paths of sockets end at 107 bytes."""
    return Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())
