"""Flags for how codes are sampled, one per field of `SamplingConfig`."""

import dataclasses

from absl import flags

from gigatok_jax.errors import UserError
from gigatok_jax.sampling import SCHEDULES, SamplingConfig


def define(flag_values: flags.FlagValues) -> None:
    defaults = SamplingConfig()
    flags.DEFINE_float("guidance", defaults.guidance, "1: none", flag_values=flag_values)
    flags.DEFINE_enum(
        "schedule",
        defaults.schedule,
        SCHEDULES,
        "of the guidance over codes",
        flag_values=flag_values,
    )
    flags.DEFINE_float(
        "temperature", defaults.temperature, "0: take the likeliest code", flag_values=flag_values
    )
    for name in ("schedule_start", "schedule_end", "top_p"):
        text = f"see sampling.SamplingConfig.{name}"
        flags.DEFINE_float(name, getattr(defaults, name), text, flag_values=flag_values)
    flags.DEFINE_integer("top_k", defaults.top_k, "0: all codes", flag_values=flag_values)


def settings(flag_values: flags.FlagValues) -> SamplingConfig:
    """The settings that the flags describe."""
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    try:
        chosen = SamplingConfig(**{name: flag_values[name].value for name in names})
    except ValueError as error:
        raise UserError(f"--{error}") from error
    if chosen.schedule != "constant" and chosen.guidance == 1:
        raise UserError(f"--guidance: expected more than 1 with schedule {chosen.schedule}, got 1")
    return chosen
