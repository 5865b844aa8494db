"""`python -m gigatok_jax VERB`."""

import sys

from gigatok_jax.cli import main

sys.exit(main())
