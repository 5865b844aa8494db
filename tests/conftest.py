"""Settings that make the tests cheap: compiling takes longer than what is run here."""

import os
import pathlib

# Compiled programs are kept, for pytest's workers, for the processes that tests start, and for the
# next run.
CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "compilations"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
if os.environ.get("PARITY") != "whole":  # whole models run for longer than they compile
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ.setdefault("XLA_FLAGS", flags)
