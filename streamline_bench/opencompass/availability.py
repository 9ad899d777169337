"""Says what to install where OpenCompass is missing."""

from __future__ import annotations

from importlib.util import find_spec

from streamline_bench.errors import MissingDependencyError

OPENCOMPASS_INSTALL = (
    "pip install 'streamline-bench[opencompass]' && "
    "pip install --no-deps opencompass==0.5.4 mmengine-lite==0.11.0rc3"
)
"""What works beside transformers 5; OpenCompass's declared dependencies ask for numpy below 2."""


def require_opencompass() -> None:
    """Check that OpenCompass is there.

    Raises:
        MissingDependencyError: it is not; says how to install it.
    """
    if find_spec("opencompass") is None or find_spec("mmengine") is None:
        raise MissingDependencyError(
            f"OpenCompass is not installed in this environment; run: {OPENCOMPASS_INSTALL}"
        )
