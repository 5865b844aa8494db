"""gigatok weights fetch NAME

Downloads published weights into the cache (GIGATOK_CACHE), checks them and converts them.
"""

from absl import flags

from gigatok_jax.errors import UserError
from gigatok_jax.weights import convert, fetch

FLAGS = flags.FlagValues()


def run(positional: list[str]) -> None:
    if len(positional) != 2 or positional[0] != "fetch":
        raise UserError(f"expected: weights fetch NAME, with NAME of {', '.join(fetch.PUBLISHED)}")
    print(convert.fetch_bundle(positional[1]))
