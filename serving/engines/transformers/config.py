"""Options of the transformers engine, as values. No I/O, no torch."""

from serving.engines._options import TorchOptions


class TransformersConfig(TorchOptions):
    """How much the transformers engine runs at a time, and in which precision."""
