"""How functions of LLVM's language are written down, for `level_sources.py` and its parts.

Knows nothing about what they compute.
"""

_HEAD = "define {result} @edgellama.{name}({arguments}) alwaysinline {{\n{body}\n}}\n"
V = "<16 x i32>"
B = "<64 x i8>"


def function(result: str, name: str, arguments: str, body: str) -> str:
    return _HEAD.format(result=result, name=name, arguments=arguments, body=body)


def mask(indices: range) -> str:
    return f"<{len(indices)} x i32> <" + ", ".join(f"i32 {i}" for i in indices) + ">"


def constant(kind: str, value: int) -> str:
    """A vector's value, all lanes alike; its type stands before it or with the other operand."""
    return f"splat ({kind} {value})"
