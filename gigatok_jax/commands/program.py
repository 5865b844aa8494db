"""Verbs about the program itself: config, env."""

import contextlib
import dataclasses

from gigatok_jax.commands.verbs import (
    OPTIONAL,
    verb,
)
from gigatok_jax.errors import UserError, first_line


@verb(
    "list the installed configurations, or show all fields of one",
    configs={"config": OPTIONAL},
    positional="words",
    devices=False,
)
def config(words: list[str], config) -> None:
    """gigatok config list, or gigatok config show NAME [--config.a.b=c ...]

    Lists the installed configurations, or shows one. Each field is printed as the flag that sets
    it. Those that follow from others, such as the number of steps, are filled in.
    """
    import inspect
    import shlex

    from flax.traverse_util import flatten_dict

    from gigatok_jax.config import installed

    match words:
        case ["list"] if config is None:
            for name, module in installed().items():
                print(f"{name}: {inspect.getdoc(module)}\n")
        case ["show"] if config is not None:
            if hasattr(config, "resolved_optimizer"):
                resolved = {"steps": config.total_steps, "optimizer": config.resolved_optimizer}
                config = dataclasses.replace(config, **resolved)
            for name, value in flatten_dict(dataclasses.asdict(config), sep=".").items():
                print(f"--config.{name}={shlex.quote(str(value))}")
        case _:
            raise UserError(f"expected list, or show NAME, got {' '.join(words) or 'nothing'}")


@verb("print versions, devices and the cache, for a report of a problem", devices=False)
def env() -> None:
    """gigatok env

    Prints the versions of Python and libraries, the devices that JAX finds, and the cache.
    """
    import importlib.metadata
    import platform

    import jax

    from gigatok_jax.files import cache_dir

    names = ["gigatok_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"]
    names += ["array_record", "pillow", "tensorflow-datasets", "torch", "libtpu"]
    names += [f"jax-cuda{n}-plugin" for n in (12, 13)]
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    try:
        kinds = [device.device_kind for device in jax.devices()]
        found["devices"] = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    except (RuntimeError, AssertionError) as error:
        found["devices"] = f"none ({first_line(error)})"
    found["cache"] = cache_dir()
    print("\n".join(f"{name:<20} {value}" for name, value in found.items()))
