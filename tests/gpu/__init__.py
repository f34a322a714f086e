"""Full-precision parity and speed on a CUDA machine; `run.py` is the command.

Golden logits come from `decoder.py`, a plain decoder in torch that shares no arithmetic with
edgellama's runtimes. docs/gpu.md tells how to run it and what its figures mean.
"""
