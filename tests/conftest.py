"""Settings that make the tests cheap: compiling takes longer than what is run here."""

from importlib import metadata
import os
import pathlib

# Compiled programs are kept, for pytest's workers, for the processes that tests start, and for the
# next run.
CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "compilations"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if metadata.version("jaxlib").startswith(("0.10.", "0.11.")):  # later ones end at this flag
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # saves a third of compiling
if os.environ.get("PARITY") != "whole":  # whole models run for longer than they compile
    os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

# Tests reach no server but their own. `huggingface_hub` reads its variable when it is imported.
os.environ["https_proxy"] = os.environ["HTTPS_PROXY"] = "http://127.0.0.1:9"
os.environ["HF_HUB_OFFLINE"] = "1"

# Files that take minutes start first, so that none runs alone at the end.
LONG = ("test_processes", "test_parity", "test_training", "test_meshes", "test_loop")


def pytest_configure(config):
    config.option.loadscopereorder = False  # by xdist's own order, files of many tests start first


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))
