"""transformers' own model code behind our scheduling and sampling: for any architecture it has."""

from serving.engines.transformers.config import TransformersConfig
from serving.engines.transformers.loading import create

__all__ = ["TransformersConfig", "create"]
