"""What software the numbers come from."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

_NAMES = ("logitmill", "torch", "triton", "transformers")


def versions() -> dict[str, str]:
    """Installed versions of what computes, by name; what is not there computes nothing."""
    found = {}
    for name in _NAMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    # Which of several libraries the front end finds is not torch's choice.
    if find_spec("cudnn") is not None:
        from ..kernels.gpu import cudnn

        if (installed := cudnn.find_version()) is not None:
            found["cuDNN"] = str(installed)
    return found
