"""Names of torch devices: refused where they stand for none, before anything is loaded or run."""

from __future__ import annotations

from streamline_bench.errors import RecipeError

__all__ = ["found_device", "known_device"]

_KNOWN = ("cpu", "cuda", "mps", "xpu")


def known_device(name: str) -> str:
    """Return a device as torch writes it, wherever it may be.

    Raises:
        RecipeError: no name of a device that models run on.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in _KNOWN:
        raise RecipeError(
            f"'{name}' is no device to compute on; give cpu, cuda, cuda:N or, where it is left "
            "open, auto as --device."
        )
    return "cpu" if device.type == "cpu" else str(device)


def found_device(name: str) -> str:
    """Return a device of this machine as torch writes it; ``auto`` is cuda where there is one.

    Nothing is put on it: a process that only plans must not hold a part of a GPU.

    Raises:
        RecipeError: no name of a device, or this machine has none of that name.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(known_device(name))
    if device.type == "cpu":
        return "cpu"
    count = getattr(torch, device.type).device_count()
    if (device.index or 0) >= count:
        kind = f"{device.type} device{'s' * (count > 1)}"
        raise RecipeError(
            f"--device is {name} and this process sees {count or 'no'} {kind}; give another one, "
            "or auto."
        )
    return str(device)
