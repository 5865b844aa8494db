"""How a tokenizer is probed."""

import dataclasses

from gigatok_jax.data.sources import DataConfig
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.training.generator_run import GeneratorRun
from gigatok_jax.training.linear_probe_run import LinearProbeRun


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """AR probing's settings (paper, 3.1 and appendix B).

    Attributes:
      data: images; the training ones make the generator's codes, the evaluation ones judge.
      crop_factors: see `gigatok encode`.
      generator: the run of the small generator. Its data, tokenizer, and its model's codes,
        codebook and classes are what is probed.
      linear_probe: the run of the linear probe, likewise.
      features: whose features judge pictures, see `evaluation.features.load`.
      reference: an `.npz` of real images or their statistics; "": the evaluation images.
      ssim_range: data_range of SSIM, 1 or the reference's 2, see `metrics.ssim`.
      samples: images drawn at each guidance.
      sampling: how they are drawn; the search for guidance starts at its scale.
      batch_size: images at once in encoding and metrics.
      shard_images: images a shard of codes holds, a multiple of `batch_size`.
      sample_batch_size: images at once in sampling.
      seed: of the samples.
    """

    generator: GeneratorRun
    linear_probe: LinearProbeRun
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    crop_factors: tuple[float, ...] = (1.1,)
    features: str = "inception"
    reference: str = ""
    ssim_range: int = 1
    samples: int = 50_000
    sampling: SamplingConfig = dataclasses.field(
        default_factory=lambda: SamplingConfig(guidance=2.0)
    )
    batch_size: int = 32
    shard_images: int = 4_096
    sample_batch_size: int = 64
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "shard_images", "sample_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.shard_images % self.batch_size:
            raise ValueError(
                f"shard_images must be a multiple of batch_size={self.batch_size}, got "
                f"{self.shard_images}"
            )
        if self.data.source == "codes":
            raise ValueError("data.source must have images, got 'codes'")
        if self.ssim_range not in (1, 2):
            raise ValueError(f"ssim_range must be 1 or 2, got {self.ssim_range}")
        if self.sampling.schedule != "constant" and self.sampling.guidance == 1:
            raise ValueError(
                "sampling.guidance must be more than 1 with sampling.schedule="
                f"{self.sampling.schedule}, got 1"
            )
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2, got {self.samples}")
