"""Block formats of quantized tensors, and the converter: `quantize` is what applications call."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellama.quantize.convert import Report as Report, quantize as quantize

__all__ = ["Report", "quantize"]


def __getattr__(name: str) -> Any:
    """The converter is imported on first use: runtimes need the block formats alone."""
    if name not in __all__:
        raise AttributeError(f"module 'edgellama.quantize' has no attribute '{name}'")
    from edgellama.quantize import convert

    return getattr(convert, name)
