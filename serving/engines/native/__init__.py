"""Our own engine: continuous batching over the shared decoder."""

from serving.engines.native.config import EngineConfig
from serving.engines.native.engine import NativeEngine
from serving.engines.native.loading import create, start

__all__ = ["EngineConfig", "NativeEngine", "create", "start"]
