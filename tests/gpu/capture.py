"""Decoding gives the same tokens however it is driven: captured or not, in one loop or by steps.

On CUDA a step is captured as a graph and feeds itself; here it is compared, token for token, with
sessions whose graph is not captured, with steps driven from outside, after a rewind, and with two
sessions in turns. On the CPU nothing is captured; the rest is compared as well.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import edgellama
from edgellama.generate import generate
from gpu import models, provider
from gpu.parts import Given, Row, Skip, Task

TOKENS, PROMPT, CONTEXT = 64, 24, 256
GREEDY = edgellama.Sampling(temperature=0)
Ids = list[int]
Check = Callable[[edgellama.Model, Ids], tuple[Ids, Ids]]  # what must be the same


def tasks(given: Given) -> Iterator[Task]:
    provider.require(given.device)
    checks: dict[str, Check] = {"generate = steps": steps, "rewound": rewound, "in turns": turns}
    if given.device == "cuda":
        checks |= {"feeding itself = steps": feeding, "drawn = drawn of all": drawn}
    names = ("gqa",) if given.quick else ("gqa", "head128", "tied")
    for name in names:
        for kind in ("F16", "Q4_0", "Q8_0"):
            path = partial(models.write, Path(given.scratch), name, kind)
            labels = {"model": name, "type": kind}
            yield labels | {"check": "captured = not"}, partial(captured, given, path)
            for what, check in checks.items():
                yield labels | {"check": what}, partial(checked, given, path, check)
    labels = {"model": "default", "type": "own", "check": "captured = not"}
    yield labels, partial(captured, given, lambda: _default(given))


def _default(given: Given) -> Path:
    if not given.model:
        raise Skip("the default model is not here: `edgellama pull` fetches it")
    return Path(given.model)


def captured(given: Given, path: Callable[[], Path]) -> Row:
    """Tokens with the graph captured, and without."""
    if given.device != "cuda":
        raise Skip("graphs are captured on CUDA only")
    with _loaded(given, path()) as model:
        assert _captures(model), "this session captures nothing: there is nothing to compare"
        wanted = generated(model, prompt(model))
    with uncaptured(), _loaded(given, path()) as model:
        assert not _captures(model)
        return _compared(wanted, generated(model, prompt(model)))


def checked(given: Given, path: Callable[[], Path], check: Check) -> Row:
    with _loaded(given, path()) as model:
        return _compared(*check(model, prompt(model)))


def _compared(a: Ids, b: Ids) -> Row:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    return {"tokens": len(a), "same": same, "ok": a == b and len(a) > TOKENS // 2}


def _loaded(given: Given, path: Path) -> edgellama.Model:
    return edgellama.load(path, runtime="onnx", device=given.device, context=CONTEXT)


def _captures(model: edgellama.Model) -> bool:
    """As ONNX Runtime's session itself says."""
    session = model._runtime.inference  # type: ignore[union-attr]
    options: dict[str, Any] = session.get_provider_options().get(provider.CUDA, {})
    return options.get("enable_cuda_graph") == "1"


@contextmanager
def uncaptured() -> Iterator[None]:
    """Sessions opened inside decode without a captured graph."""
    from edgellama.runtimes.onnx_device import Device

    original = Device.of

    def of(api: Any, options: Any) -> Device:
        device = original(api, options)
        switched = dict(device.provider_options) | {"enable_cuda_graph": "0"}
        return replace(device, provider_options=switched)

    Device.of = staticmethod(of)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Device.of = staticmethod(original)  # type: ignore[method-assign]


# --- ways to decode ------------------------------------------------------------------------------


def prompt(model: edgellama.Model) -> Ids:
    return [3 + 7 * i % (model.config.vocab_size - 3) for i in range(PROMPT)]


def generated(model: edgellama.Model, ids: Ids, **options: Any) -> Ids:
    chunks = model.generate(ids, GREEDY, max_tokens=TOKENS, **options)
    return [chunk.token for chunk in chunks if chunk.token is not None]


def stepped(session: edgellama.Session, ids: Ids, n: int) -> Iterator[int]:
    """Greedy tokens, each step driven from here."""
    logits = session.forward(ids)
    for _ in range(n):
        token = int(logits.argmax())
        yield token
        logits = session.forward([token])


def steps(model: edgellama.Model, ids: Ids) -> tuple[Ids, Ids]:
    wanted = generated(model, ids)
    return wanted, list(stepped(model.session(), ids, len(wanted)))


def feeding(model: edgellama.Model, ids: Ids) -> tuple[Ids, Ids]:
    """A graph that takes its own token as the next one; all logits are fetched now and then."""
    wanted = list(stepped(model.session(), ids, TOKENS))
    session = runtime_session(model)
    found = [int(session.forward(ids).argmax())]
    while len(found) < TOKENS:
        few = session.step(found[-1])
        found.append(int(few.ids[0] if len(found) % 7 else session.logits().argmax()))
    return wanted, found


class _Plain:
    """A session that gives all logits only."""

    def __init__(self, session: edgellama.Session) -> None:
        self.session = session

    @property
    def position(self) -> int:
        return self.session.position

    def forward(self, ids: Sequence[int], *, cancel: Any = None) -> Any:
        return self.session.forward(ids, cancel=cancel)


def drawn(model: edgellama.Model, ids: Ids) -> tuple[Ids, Ids]:
    """Tokens drawn among the few that leave the device, and among all; several replies."""
    wanted, found = [], []
    for seed in range(4):
        how = edgellama.Sampling(seed=seed, top_k=40)
        plain = _Plain(model.session())
        reply = generate(plain, model.tokenizer, ids, how, context=CONTEXT, max_tokens=TOKENS)
        wanted += [chunk.token for chunk in reply if chunk.token is not None]
        chunks = model.generate(ids, how, max_tokens=TOKENS)
        found += [chunk.token for chunk in chunks if chunk.token is not None]
    return wanted, found


def runtime_session(model: edgellama.Model) -> Any:
    """The runtime's own session: more than `Session` offers."""
    assert model._runtime is not None
    return model._runtime.session()


def rewound(model: edgellama.Model, ids: Ids) -> tuple[Ids, Ids]:
    """A session that went elsewhere first, then back to the middle of the prompt."""
    wanted = list(stepped(model.session(), ids, TOKENS))
    session = model.session()
    list(stepped(session, ids[:10] + ids[::-1], 8))
    session.truncate(10)
    return wanted, list(stepped(session, ids[10:], TOKENS))


def turns(model: edgellama.Model, ids: Ids) -> tuple[Ids, Ids]:
    """Two sessions, a step each: both as if alone."""
    others = ids[::-1]
    alone = [list(stepped(model.session(), prompt, TOKENS)) for prompt in (ids, others)]
    pairs = zip(
        stepped(model.session(), ids, TOKENS), stepped(model.session(), others, TOKENS), strict=True
    )
    both = list(zip(*pairs, strict=True))
    return [*alone[0], *alone[1]], [*both[0], *both[1]]
