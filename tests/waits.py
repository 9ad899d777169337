"""What an accelerator's host would wait for, found out on a processor."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Notes operations whose result has a size, or is a number, that the host must know.

    On a processor nothing waits; with all operands on an accelerator each of these would.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        asked = name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
        places = args[1] if name.startswith("index") and len(args) > 1 else ()
        chosen = any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool
            for each in (places if isinstance(places, list | tuple) else (places,))
        )
        if asked or chosen:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
