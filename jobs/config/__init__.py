"""Every job's configuration, as values. No I/O, no torch, no Ray.

The relations between fields are checked here; whether the work fits a machine is the planner's.
"""

from jobs.config.compression import (
    CalibrationConfig,
    CompressConfig,
    EvaluateConfig,
    GateConfig,
    KvCache,
    Recipe,
    Scheme,
    Step,
)
from jobs.config.model import DecoderConfig, ModelConfig, RopeScaling, Shape
from jobs.config.pipeline import PipelineConfig
from jobs.config.search import Rung, SearchConfig, SearchLimits, Workload
from jobs.config.serving import MIN_PARITY, DeployConfig, PublishConfig, ReplicaScaling
from jobs.config.training import (
    DataConfig,
    OptimizerConfig,
    Precision,
    ScalingConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = [
    "MIN_PARITY",
    "CalibrationConfig",
    "CompressConfig",
    "DataConfig",
    "DecoderConfig",
    "DeployConfig",
    "EvaluateConfig",
    "GateConfig",
    "KvCache",
    "ModelConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "Precision",
    "PublishConfig",
    "Recipe",
    "ReplicaScaling",
    "RopeScaling",
    "Rung",
    "ScalingConfig",
    "ScheduleConfig",
    "Scheme",
    "SearchConfig",
    "SearchLimits",
    "Shape",
    "Step",
    "TokenizerConfig",
    "TrainConfig",
    "Workload",
]
