"""edgellama: run quantized LLaMA-family models on your own machine, offline, from Python.

The names below are imported when first used, so that `import edgellama` costs nothing.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellama.config import ModelConfig as ModelConfig
    from edgellama.control import CancelToken as CancelToken
    from edgellama.errors import (
        Cancelled as Cancelled,
        ContextOverflow as ContextOverflow,
        DeviceUnavailable as DeviceUnavailable,
        EdgeLlamaError as EdgeLlamaError,
        ForkedProcess as ForkedProcess,
        ModelConfigError as ModelConfigError,
        ModelFormatError as ModelFormatError,
        NonFiniteError as NonFiniteError,
        OutOfMemory as OutOfMemory,
        OutputError as OutputError,
        ParameterError as ParameterError,
        TemplateError as TemplateError,
        TokenizerError as TokenizerError,
        UnsafeModelError as UnsafeModelError,
        UnsupportedModelError as UnsupportedModelError,
    )
    from edgellama.generate import Chunk as Chunk, Usage as Usage
    from edgellama.model import Model as Model, ModelInfo as ModelInfo
    from edgellama.opening import load as load
    from edgellama.sampling import Sampling as Sampling
    from edgellama.session import Session as Session

__version__ = "0.1.0"

_HOME = {  # public name -> the module that defines it
    "ModelConfig": "config",
    "CancelToken": "control",
    "Chunk": "generate",
    "Usage": "generate",
    "Model": "model",
    "ModelInfo": "model",
    "Session": "session",
    "load": "opening",
    "Sampling": "sampling",
} | dict.fromkeys(
    (
        "Cancelled",
        "ContextOverflow",
        "DeviceUnavailable",
        "EdgeLlamaError",
        "ForkedProcess",
        "ModelConfigError",
        "ModelFormatError",
        "NonFiniteError",
        "OutOfMemory",
        "OutputError",
        "ParameterError",
        "TemplateError",
        "TokenizerError",
        "UnsafeModelError",
        "UnsupportedModelError",
    ),
    "errors",
)

__all__ = ["__version__", *_HOME]

logging.getLogger("edgellama").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgellama' has no attribute '{name}'")
    value = getattr(import_module(f"edgellama.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
