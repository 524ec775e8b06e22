"""What software the numbers come from."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_NAMES = ("logitmill", "torch", "triton", "transformers", "nvidia-cudnn-frontend")


def versions() -> dict[str, str]:
    """Installed versions of what computes, by name; what is not there computes nothing."""
    found = {}
    for name in _NAMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
