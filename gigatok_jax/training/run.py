"""What the configurations of all training runs have in common."""

import dataclasses
import math

from gigatok_jax.data.sources import DataConfig
from gigatok_jax.models import layers
from gigatok_jax.sharding import MeshConfig
from gigatok_jax.training.loop import LoopConfig
from gigatok_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What any training run is told.

    Attributes:
      task: which kind of run this is.
      epochs: passes over `epoch_images`; a fraction is allowed.
      epoch_images: images that count as one epoch.
      steps: length of the run; 0: what `epochs` and `batch_size` give.
      batch_size: images a step, over all devices.
      accumulate: parts that a batch is divided into, one after the other, where memory does not
        hold it whole. What is computed over a batch (a tokenizer's entropy loss, BatchNorm of its
        discriminator) is then computed over each part.
      average_decay: of the moving average of the weights, which evaluation and the bundle use; 0:
        none.
      dtype: type of the computation; "auto": bfloat16, but float32 on CPU.
      remat: which activations are computed again in the backward pass: "none"; "dots", what lies
        between products with weights, which mostly is faster than keeping it; "full", all within
        a block.
      evaluation_images: held-out images that evaluations read.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    task: str
    epochs: float
    epoch_images: int = 1_280_000
    steps: int = 0
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    average_decay: float
    dtype: str = "auto"
    remat: str = "dots"
    evaluation_images: int = 512

    def __post_init__(self):
        task = type(self).__dataclass_fields__["task"].default
        if self.task != task:
            raise ValueError(f"task must be {task!r}, got {self.task!r}")
        for name in ("batch_size", "epoch_images", "evaluation_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_size={self.batch_size}, got {self.accumulate}"
            )
        if self.steps < 0 or (self.steps == 0 and not self.epochs > 0):
            raise ValueError(f"epochs or steps must be positive, got {self.epochs}, {self.steps}")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay must be in [0, 1), got {self.average_decay}")
        if self.dtype not in layers.DTYPES:
            raise ValueError(f"dtype must be one of {layers.DTYPES}, got {self.dtype!r}")
        if self.remat not in layers.REMAT:
            raise ValueError(f"remat must be one of {layers.REMAT}, got {self.remat!r}")
        if self.optimizer.warmup_steps >= self.total_steps:
            raise ValueError(
                f"optimizer.warmup_steps must be fewer than the run's {self.total_steps} steps, "
                f"got {self.optimizer.warmup_steps}; set it with --config.optimizer.warmup_steps"
            )

    @property
    def total_steps(self) -> int:
        return self.steps or math.ceil(self.epochs * self.epoch_images / self.batch_size)
