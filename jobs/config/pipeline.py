"""All stages of a model's life, one after the other."""

from pydantic import Field

from cluster.config import StrictModel
from jobs.config.search import SearchConfig
from jobs.config.serving import DeployConfig, PublishConfig
from jobs.config.training import TrainConfig


class PipelineConfig(StrictModel):
    """Train, search, publish and deploy, in this order."""

    train: TrainConfig = Field(description="The training run.")
    search: SearchConfig = Field(description="The search over its model.")
    publish: PublishConfig = Field(description="Where the winner goes.")
    deploy: DeployConfig = Field(description="How it is offered.")
