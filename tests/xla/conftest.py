"""The XLA backend's tests: on XLA's CPU client, wherever JAX is installed."""

import pytest

pytest.importorskip("jax", reason="JAX is not installed: the extra portalm[tpu] brings it")
