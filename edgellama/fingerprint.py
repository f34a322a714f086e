"""What tells one model from another without reading all of it.

Knows nothing about what the digest is for.
"""

import hashlib
from dataclasses import replace

from edgellama.gguf import GGUF
from edgellama.graph import Graph

SAMPLE = 1024  # bytes read at a tensor's middle, and as many at its end


def fingerprint(file: GGUF, graph: Graph) -> bytes:
    """SHA-256 (32 bytes) of a model's config, vocabulary, list of tensors, and samples of each.

    Two files that differ in what the model computes differ here, unless all that differs is bytes
    of tensors elsewhere than in their middle and at their end: quantizing, merging and training
    change nearly every byte. Names, notes and the chat template do not count.
    Raises what `GGUF.read_into` raises.
    """
    digest = hashlib.sha256(repr(replace(graph.config, name="")).encode())
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    texts = [str(token) for token in tokens] if isinstance(tokens, list) else []
    digest.update("\0".join(texts).encode(errors="surrogatepass"))
    room = memoryview(bytearray(2 * SAMPLE))
    for name in sorted(file.tensors):
        info = file.tensors[name]
        digest.update(f"\0{name}\0{info.type.name}\0{info.shape}\0".encode(errors="surrogatepass"))
        if info.n_bytes <= len(room):
            pieces = [(0, room[: info.n_bytes])]
        else:
            last = info.n_bytes - SAMPLE
            pieces = [(last // 2, room[:SAMPLE]), (last, room[SAMPLE:])]
        for start, piece in pieces:
            file.read_into(name, piece, start)
            digest.update(piece)
    return digest.digest()
