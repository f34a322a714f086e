"""Replies for asyncio: the loop never waits, and work ends with the task that asked for it."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from tiny import tiny_config, write_tiny

import edgellama
from edgellama import Cancelled, CancelToken, Chunk, Model, ParameterError, Sampling

LONG, MIDDLE = 3900, 1000  # tokens of a prompt that takes seconds, and less than that
SOON = 2.0  # seconds; the aim is 0.1
GREEDY = Sampling(temperature=0)
ENDLESS = Sampling(temperature=0, logit_bias={2: -float("inf")})
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    config = tiny_config(
        dim=256, ffn_dim=512, n_heads=8, n_kv_heads=4, head_dim=32, n_layers=8, context_length=4096
    )
    path = write_tiny(tmp_path_factory.mktemp("async") / "tiny.gguf", config, "F32")
    with edgellama.load(path, threads=2) as loaded:
        yield loaded


def run(work: Any) -> Any:
    """Like asyncio.run, but a hang is a failure."""

    async def bounded() -> Any:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(bounded())


async def ticking(work: Any) -> tuple[Any, int, float]:
    """The result, how often the loop came round meanwhile, and the longest it did not."""
    task, count, longest = asyncio.ensure_future(work), 0, 0.0
    last = time.monotonic()
    while not task.done():
        await asyncio.sleep(0.005)
        now = time.monotonic()
        count, longest, last = count + 1, max(longest, now - last), now
    return task.result(), count, longest


async def all_of(chunks: Any) -> list[Chunk]:
    return [chunk async for chunk in chunks]


def test_the_loop_goes_on_during_prefill_and_decode(model: Model) -> None:
    chunks, count, longest = run(ticking(all_of(model.agenerate([5] * MIDDLE, max_tokens=5))))
    assert chunks[-1].finish_reason is not None
    assert count > 3 and longest < SOON


def test_the_loop_goes_on_while_a_session_is_waited_for(model: Model) -> None:
    session = model.session()
    thread = threading.Thread(target=session.forward, args=([5] * MIDDLE,))
    thread.start()
    time.sleep(0.05)
    chunks, count, longest = run(
        ticking(all_of(model.agenerate([7, 8], GREEDY, max_tokens=2, session=session)))
    )
    thread.join(60)
    assert len(chunks) == 2 and count > 3 and longest < SOON
    assert session.ids[:2] == (7, 8)


@pytest.mark.parametrize("tokens", [LONG, 3])
def test_cancelling_the_task_ends_the_work(model: Model, tokens: int) -> None:
    """During prefill nothing is kept; during decode the session is what was told so far."""
    session, told = model.session(), []

    async def work() -> None:
        async for chunk in model.agenerate([5] * tokens, ENDLESS, session=session):
            told.append(chunk.token)

    async def interrupted() -> float:
        task = asyncio.ensure_future(work())
        await asyncio.sleep(0.1)
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - started

    assert run(interrupted()) < SOON
    known = [5] * tokens + told
    assert list(session.ids) == known[: session.position]
    assert session.position == 0 or session.position >= tokens
    session.truncate(0)
    assert session.forward([1, 2]).shape == (288,)


def test_a_timeout_ends_the_work_too(model: Model) -> None:
    async def limited() -> float:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(all_of(model.agenerate([5] * LONG)), 0.05)
        return time.monotonic() - started

    assert run(limited()) < SOON


def test_leaving_the_loop_ends_the_work(model: Model) -> None:
    session = model.session()

    async def three() -> list[int | None]:
        tokens = []
        async with model.agenerate([5, 6], ENDLESS, session=session) as chunks:
            async for chunk in chunks:
                tokens.append(chunk.token)
                if len(tokens) == 3:
                    break
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)
        await chunks.aclose()
        return tokens

    tokens = run(three())
    assert session.ids == (5, 6, *tokens[:2])
    fresh = [c.token for c in model.generate([5, 6], ENDLESS, max_tokens=3)]
    assert tokens == fresh


def test_closing_ends_a_step_of_another_task(model: Model) -> None:
    session = model.session()

    async def closed() -> tuple[list[Chunk], float]:
        chunks = model.agenerate([5] * LONG, ENDLESS, session=session)
        task = asyncio.ensure_future(all_of(chunks))
        await asyncio.sleep(0.1)
        with pytest.raises(RuntimeError, match="another task"):
            await anext(chunks)
        started = time.monotonic()
        await chunks.aclose()
        taken = time.monotonic() - started
        return await task, taken

    chunks, taken = run(closed())
    assert chunks[-1].finish_reason == "cancelled" and taken < SOON
    assert session.position == 0 or session.position >= LONG


@pytest.mark.parametrize("last", ["a chunk", "an error"])
def test_closing_after_the_loop_has_ended(model: Model, last: str) -> None:
    """The step was over then; whoever cleans up later may do so in a loop of its own."""
    params: Any = ENDLESS if last == "a chunk" else 5
    reply = model.agenerate([5, 6], params)

    async def step() -> None:
        if last == "a chunk":
            assert (await anext(reply)).finish_reason is None
        else:
            with pytest.raises(ParameterError):
                await anext(reply)

    run(step())
    for _ in range(2):
        run(reply.aclose())
    assert run(all_of(reply)) == []


def test_the_caller_s_token_ends_the_reply_with_a_last_chunk(model: Model) -> None:
    token = CancelToken()
    threading.Timer(0.1, token.cancel).start()
    chunks = run(all_of(model.agenerate([5] * LONG, ENDLESS, cancel=token)))
    assert chunks[-1].finish_reason == "cancelled"
    (chunk,) = run(all_of(model.achat([{"role": "user", "content": "a"}], cancel=token,
                                      template=TEMPLATE)))  # fmt: skip
    assert chunk.finish_reason == "cancelled"


def test_the_caller_s_token_is_left_alone(model: Model) -> None:
    token = CancelToken()

    async def first() -> None:
        async with model.agenerate([5, 6], ENDLESS, cancel=token) as chunks:
            await anext(chunks)

    run(first())
    assert not token.cancelled


def test_wrong_arguments_are_told_at_the_first_step(model: Model) -> None:
    async def first(chunks: Any) -> None:
        with pytest.raises(ParameterError):
            await anext(chunks)
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)

    run(first(model.agenerate([], GREEDY)))
    run(first(model.agenerate([5], GREEDY, max_tokens=-1)))
    run(first(model.achat([], GREEDY, template=TEMPLATE)))
    overflow: Any = "cut"
    messages = [{"role": "user", "content": "a"}]
    run(first(model.achat(messages, template=TEMPLATE, overflow=overflow)))


def test_eight_at_once_answer_as_if_alone(model: Model) -> None:
    prompts = [[i + 3, 7, i] for i in range(8)]

    async def together() -> list[list[Chunk]]:
        replies = [model.agenerate(ids, Sampling(seed=4), max_tokens=6) for ids in prompts]
        return await asyncio.gather(*map(all_of, replies))

    alone = [model.generate(ids, Sampling(seed=4), max_tokens=6) for ids in prompts]
    expected = [[(c.token, c.text) for c in chunks] for chunks in alone]
    assert [[(c.token, c.text) for c in chunks] for chunks in run(together())] == expected


# --- iterators that do not wait ------------------------------------------------------------------


def test_a_reply_that_is_left_frees_its_session(model: Model) -> None:
    sessions: list[weakref.ref[Any]] = []
    chunks = model.generate([5, 6], ENDLESS)
    sessions += [weakref.ref(s) for s in model._runtime.sessions]  # type: ignore[union-attr]
    assert any(s() is not None for s in sessions)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    del chunks
    gc.collect()
    assert all(s() is None for s in sessions)


def test_waiting_for_the_session_ends_with_a_last_chunk(model: Model) -> None:
    session, token = model.session(), CancelToken()
    stop = CancelToken()

    def read() -> None:
        with pytest.raises(Cancelled):
            session.forward([5] * LONG, cancel=stop)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.1)
    threading.Timer(0.05, token.cancel).start()
    started = time.monotonic()
    (chunk,) = model.generate([1, 2], session=session, cancel=token)
    assert time.monotonic() - started < SOON
    assert chunk.finish_reason == "cancelled" and chunk.usage is not None
    assert (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) == (2, 0)
    stop.cancel()
    thread.join(60)
    assert not thread.is_alive() and session.position == 0


@pytest.mark.parametrize("tokens", [LONG, 3])
def test_a_token_set_by_another_thread_ends_a_reply(model: Model, tokens: int) -> None:
    token, session = CancelToken(), model.session()
    at: list[float] = []

    def cancel() -> None:
        at.append(time.monotonic())
        token.cancel()

    threading.Timer(0.1, cancel).start()
    chunks = list(model.generate([5] * tokens, ENDLESS, session=session, cancel=token))
    assert time.monotonic() - at[0] < SOON
    assert chunks[-1].finish_reason == "cancelled"
    told = [c.token for c in chunks if c.token is not None]
    assert list(session.ids) == ([5] * tokens + told)[: session.position]


def test_threads_that_share_a_model_answer_as_if_alone(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = write_tiny(tmp_path_factory.mktemp("threads") / "tiny.gguf", types="Q4_1")

    def replies(model: Model, thread: int) -> list[list[int | None]]:
        session, found = model.session(), []
        for i in range(200):
            prompt = [thread + 5, i % 7 + 1, i % 3]
            chunks = model.generate(prompt, Sampling(seed=i), max_tokens=2, session=session)
            found.append([chunk.token for chunk in chunks])
        return found

    with edgellama.load(path, threads=2, deterministic=True) as model:
        alone = [replies(model, thread) for thread in range(8)]
        together: dict[int, list[list[int | None]]] = {}
        threads = [
            threading.Thread(target=lambda n=n: together.update({n: replies(model, n)}))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert [together[n] for n in range(8)] == alone


# --- tokens that are linked ----------------------------------------------------------------------


def test_a_linked_token_follows_and_does_not_lead() -> None:
    first = CancelToken()
    second, third = first.linked(), first.linked()
    fourth = second.linked()
    second.cancel()
    assert second.cancelled and fourth.cancelled and not first.cancelled and not third.cancelled
    first.cancel()
    assert third.cancelled and first.linked().cancelled


def test_linked_tokens_that_are_gone_are_forgotten() -> None:
    token = CancelToken()
    for _ in range(100):
        token.linked()
    assert len(token._linked) <= 1
