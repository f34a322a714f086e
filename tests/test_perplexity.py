"""Perplexity and distances: the formulas by hand, the definition step by step, the command."""

import json
import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from accuracy import TEXT
from tiny import tiny_config, write_tiny

import edgellama
from edgellama import perplexity
from edgellama.cli.main import run
from edgellama.distance import Estimate, Scores, exp_mean, mean, quantile, root_mean_square
from edgellama.perplexity import chunked, measure, read_text

WORDS = "the cat and the dog sat on a mat in the rain " * 6
CHUNK = 32  # tokens, to be quick

needs_llamacpp = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one vocabulary, and one of another."""
    folder = tmp_path_factory.mktemp("models")
    return [
        write_tiny(folder / "model.gguf", seed=1),
        write_tiny(folder / "base.gguf", seed=2),
        write_tiny(folder / "other.gguf", tiny_config(vocab_size=320)),
    ]


@pytest.fixture(scope="module")
def models(paths: list[Path]) -> Iterator[list[edgellama.Model]]:
    loaded = [edgellama.load(path, "reference", context=64) for path in paths]
    yield loaded
    for model in loaded:
        model.close()


# --- formulas -----------------------------------------------------------------------------------


def test_scores_of_hand_made_distributions() -> None:
    q = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    p = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]))
    shift = np.array([[7.0], [-3.0]])  # softmax does not see it
    targets = np.array([0, 2])
    scores = Scores.of((q + shift).astype(np.float32), targets, p.astype(np.float32))
    assert scores.nll == pytest.approx([math.log(2), -math.log(0.8)], rel=1e-6)
    assert scores.base_nll == pytest.approx([math.log(4), -math.log(0.6)], rel=1e-6)
    first = 0.25 * math.log(0.5) + 0.5 * math.log(2)
    second = 0.4 * math.log(2) + 0.6 * math.log(0.75)
    assert scores.kl == pytest.approx([first, second], rel=1e-6)  # of the base from the model
    assert scores.same.tolist() == [False, True]
    figures = scores.figures()
    assert figures.perplexity.value == pytest.approx((0.5 * 0.8) ** -0.5, rel=1e-6)
    assert figures.ratio is not None and figures.delta_p_rms is not None
    assert figures.ratio.value == pytest.approx((0.25 * 0.6 / (0.5 * 0.8)) ** 0.5, rel=1e-6)
    assert figures.delta_p_rms.value == pytest.approx(math.sqrt((0.25**2 + 0.2**2) / 2), rel=1e-6)
    assert figures.delta_p_mean is not None
    assert figures.delta_p_mean.value == pytest.approx(0.225, rel=1e-6)


def test_errors_are_those_of_llamacpp() -> None:
    """Its sums, spelled out: of x, of x squared, and of products where two perplexities meet."""
    rng = np.random.default_rng(5)
    a, b = rng.exponential(3, 400), rng.exponential(2, 400)
    a += b  # related, as two models' are
    n = len(a)

    def spread(x: np.ndarray) -> float:
        return math.sqrt(((x * x).sum() / n - (x.sum() / n) ** 2) / (n - 1))

    assert mean(a).error == pytest.approx(spread(a), rel=1e-12)
    assert exp_mean(a).error == pytest.approx(math.exp(a.mean()) * spread(a), rel=1e-12)
    covariance = ((a * b).sum() / n - a.mean() * b.mean()) / (n - 1)
    error = math.sqrt(spread(a) ** 2 + spread(b) ** 2 - 2 * covariance)
    ratio = exp_mean(a - b)
    assert ratio.error == pytest.approx(math.exp(a.mean() - b.mean()) * error, rel=1e-9)
    assert root_mean_square(a).value == pytest.approx(math.sqrt((a * a).mean()), rel=1e-12)
    half = 0.5 / root_mean_square(a).value * spread(a * a)
    assert root_mean_square(a).error == pytest.approx(half, rel=1e-12)
    share = mean(a > b + 1)
    p = share.value
    assert share.error == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)), rel=1e-12)


def test_error_of_a_quantile_covers_what_repeating_shows() -> None:
    rng = np.random.default_rng(6)
    repeated = [quantile(rng.exponential(1, 1000), 0.99) for _ in range(300)]
    seen = np.std([estimate.value for estimate in repeated])
    stated = np.mean([estimate.error for estimate in repeated])
    assert 0.7 < stated / seen < 1.4
    assert np.mean([e.value for e in repeated]) == pytest.approx(math.log(100), rel=0.03)


def test_one_token_has_no_error() -> None:
    assert mean(np.array([2.0])) == Estimate(2.0, None)
    assert root_mean_square(np.zeros(3)) == Estimate(0.0, 0.0)


# --- the definition -----------------------------------------------------------------------------


def spelled_out(model: edgellama.Model, text: str, context: int, bos: bool) -> np.ndarray:
    """Negative log-likelihoods as llama.cpp's tool goes about them, a whole chunk at once."""
    ids = model.tokenizer.encode(text, bos=bos)
    found = []
    for start in range(0, len(ids) - context + 1, context):
        chunk = ids[start : start + context]
        read = [model.tokenizer.bos, *chunk[1:]] if bos else chunk
        logits = model.session().forward(read, all_logits=True).astype(np.float64)
        for i in range(context // 2, context - 1):
            row = logits[i]
            found.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[chunk[i + 1]])
    return np.array(found)


@pytest.mark.parametrize("context", [CHUNK, 33])
def test_perplexity_is_llamacpps(models: list[edgellama.Model], context: int) -> None:
    wanted = spelled_out(models[0], WORDS, context, bos=True)
    quality = measure(models[0], WORDS, context=context)
    assert quality.figures.tokens == len(wanted) == quality.chunks * ((context - 1) // 2)
    assert quality.figures.perplexity.value == pytest.approx(np.exp(wanted.mean()), rel=1e-5)
    assert quality.figures.kl_mean is None and quality.figures.ratio is None


def test_bos_only_where_the_model_wants_it(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.add_bos_token": False}
    path = write_tiny(tmp_path / "nobos.gguf", seed=1, metadata=metadata)
    with edgellama.load(path, "reference", context=CHUNK) as model:
        assert all(chunk[0] != model.tokenizer.bos for chunk in chunked(model.tokenizer, WORDS, 32))
        wanted = spelled_out(model, WORDS, CHUNK, bos=False)
        got = measure(model, WORDS, context=CHUNK).figures.perplexity.value
    assert got == pytest.approx(np.exp(wanted.mean()), rel=1e-5)


def test_against_a_base(models: list[edgellama.Model]) -> None:
    quality = measure(models[0], WORDS, base=models[1], context=CHUNK)
    ours, theirs = (spelled_out(model, WORDS, CHUNK, bos=True) for model in models[:2])
    figures = quality.figures
    assert figures.base_perplexity is not None and figures.ratio is not None
    assert figures.base_perplexity.value == pytest.approx(np.exp(theirs.mean()), rel=1e-5)
    assert figures.ratio.value == pytest.approx(np.exp((ours - theirs).mean()), rel=1e-5)
    delta = np.exp(-ours) - np.exp(-theirs)
    assert figures.delta_p_mean is not None
    assert figures.delta_p_mean.value == pytest.approx(delta.mean(), abs=1e-7)
    other_way = measure(models[1], WORDS, base=models[0], context=CHUNK).figures
    assert figures.kl_mean != other_way.kl_mean and figures.same_top == other_way.same_top


def test_a_model_is_no_way_from_itself(models: list[edgellama.Model]) -> None:
    figures = measure(models[0], WORDS, base=models[0], context=CHUNK).figures
    assert figures.kl_mean == figures.kl_median == figures.kl_p99 == Estimate(0.0, 0.0)
    assert figures.kl_max == Estimate(0.0)
    assert figures.same_top == figures.ratio == Estimate(1.0, 0.0)


def test_buckets_share_out_the_positions(models: list[edgellama.Model]) -> None:
    quality = measure(models[0], WORDS, base=models[1], context=CHUNK)
    spans = [(bucket.first, bucket.last) for bucket in quality.buckets]
    assert spans == [(16, 18), (19, 22), (23, 26), (27, 30)]
    tokens = [bucket.figures.tokens for bucket in quality.buckets]
    assert tokens == [quality.chunks * (last - first + 1) for first, last in spans]
    by_position = spelled_out(models[0], WORDS, CHUNK, bos=True).reshape(quality.chunks, -1)
    wanted = np.exp(by_position[:, 3:7].mean())
    assert quality.buckets[1].figures.perplexity.value == pytest.approx(wanted, rel=1e-5)


def test_first_chunks_and_progress(models: list[edgellama.Model]) -> None:
    seen: list[tuple[int, int, str]] = []
    quality = measure(
        models[0], WORDS, context=CHUNK, chunks=2, progress=lambda *step: seen.append(step)
    )
    wanted = spelled_out(models[0], WORDS, CHUNK, bos=True)[: quality.figures.tokens]
    assert quality.chunks == 2
    assert quality.figures.perplexity.value == pytest.approx(np.exp(wanted.mean()), rel=1e-5)
    assert seen == [(0, 64, "scoring"), (32, 64, "scoring"), (64, 64, "scoring")]


def test_refusals(models: list[edgellama.Model]) -> None:
    with pytest.raises(edgellama.EdgeLlamaError, match=r"at least 64 are needed, two chunks"):
        measure(models[0], "the cat", context=CHUNK)
    with pytest.raises(edgellama.ContextOverflow):
        measure(models[0], WORDS, context=65)
    with pytest.raises(edgellama.ParameterError, match="another vocabulary: it has 320 tokens"):
        measure(models[0], WORDS, base=models[2], context=CHUNK)
    for wrong in ({"context": 7}, {"chunks": 0}, {"context": True}):
        with pytest.raises(edgellama.ParameterError, match=next(iter(wrong))):
            measure(models[0], WORDS, **({"context": CHUNK} | wrong))


def test_other_tokens_of_the_same_number(paths: list[Path], tmp_path: Path) -> None:
    from tiny import vocabulary

    pieces, _, _ = vocabulary(288)
    pieces[270] = "another"
    path = write_tiny(tmp_path / "b.gguf", metadata={"tokenizer.ggml.tokens": pieces})
    with (
        edgellama.load(paths[0], "reference", context=64) as model,
        edgellama.load(path, "reference", context=64) as base,
        pytest.raises(edgellama.ParameterError, match="token 270 is another"),
    ):
        measure(model, WORDS, base=base, context=CHUNK)


def test_cancelled_in_the_middle(models: list[edgellama.Model]) -> None:
    token = edgellama.CancelToken()
    with pytest.raises(edgellama.Cancelled):
        measure(
            models[0],
            WORDS,
            context=CHUNK,
            cancel=token,
            progress=lambda done, _total, _what: token.cancel() if done else None,
        )


def test_logits_that_are_not_finite(tmp_path: Path) -> None:
    huge = {"output.weight": np.full((288, 64), 3e38, np.float32)}
    path = write_tiny(tmp_path / "huge.gguf", tiny_config(tied_output=False), weights=huge)
    with (
        edgellama.load(path, "cpu", context=CHUNK, threads=1) as model,
        pytest.raises(edgellama.NonFiniteError, match=r"huge\.gguf: chunk 1, position 16"),
    ):
        measure(model, WORDS, context=CHUNK)


# --- against the peer ---------------------------------------------------------------------------


@needs_llamacpp
def test_llamacpp_and_cpu_agree_on_a_tiny_model(paths: list[Path]) -> None:
    with (
        edgellama.load(paths[0], "cpu", context=CHUNK, threads=1, kv_type="f32") as model,
        edgellama.load(paths[0], "llama.cpp", context=CHUNK, threads=1, kv_type="f32") as base,
    ):
        figures = measure(model, WORDS, base=base, context=CHUNK).figures
    assert figures.ratio is not None and figures.kl_max is not None
    assert figures.ratio.value == pytest.approx(1, abs=1e-4)
    assert figures.kl_max.value < 1e-5


@needs_llamacpp
def test_llamacpp_and_cpu_agree_on_the_default_model(default_model: Path) -> None:
    """Within the standard error of so few tokens; on 7,650 the two are 0.01 % apart."""
    text = read_text(TEXT)
    with (
        edgellama.load(default_model, "cpu", context=64, threads=1) as model,
        edgellama.load(default_model, "llama.cpp", context=64, threads=1) as base,
    ):
        figures = measure(model, text, base=base, context=64).figures
    assert figures.ratio is not None and figures.kl_mean is not None
    assert figures.ratio.error is not None and figures.ratio.error < 0.03
    assert abs(figures.ratio.value - 1) < 4 * figures.ratio.error
    assert figures.kl_mean.value < 8e-3


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS + "\n", encoding="utf-8")
    return path


def command(paths: list[Path], text: Path, *more: str) -> list[str]:
    start = ["perplexity", str(paths[0]), "--text", str(text), "--runtime", "reference"]
    return [*start, "--context", "32", *more]


def test_command_prints_a_table(
    paths: list[Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(paths, text, "--base", str(paths[1]))) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line]
    assert lines[0].startswith("perplexity  ") and " ± " in lines[0]
    assert len(lines) == 10 + 5 and lines[-1].startswith("27 to 30")
    assert "model.gguf (reference) against base.gguf (reference)" in err
    assert run(command(paths, text, "--quiet")) == 0
    out, err = capsys.readouterr()
    assert out.startswith("perplexity  ") and "KL" not in out and not err


def test_command_prints_json(
    paths: list[Path],
    models: list[edgellama.Model],
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(command(paths, text, "--json", "--base", str(paths[1]), "--chunks", "3")) == 0
    told = json.loads(capsys.readouterr().out)
    wanted = measure(models[0], WORDS, base=models[1], context=CHUNK, chunks=3)
    assert told["chunks"] == 3 and told["context"] == CHUNK
    assert told["figures"]["kl_p99"]["value"] == pytest.approx(wanted.figures.kl_p99.value)
    assert [b["first"] for b in told["buckets"]] == [b.first for b in wanted.buckets]
    assert told["base"] == str(paths[1]) and told["base_device"]["runtime"] == "reference"


@pytest.mark.parametrize(
    ("content", "more", "status", "said"),
    [
        (b"\xff\xfe", [], 1, "is not UTF-8 text: byte 255 at 0"),
        (b"the cat", [], 1, "two chunks"),
        (None, [], 1, "No such file"),
        (b"the cat", ["--base-runtime", "cpu"], 2, "--base-runtime is for --base"),
    ],
)
def test_command_refuses(
    paths: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    more: list[str],
    status: int,
    said: str,
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert run(command(paths, path, *more)) == status
    err = capsys.readouterr().err
    assert said.replace("No such file", os.strerror(2)) in err and err.count("\n") == 1


def test_a_text_files_line_breaks_stay(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"a\r\nb\n\n")
    assert perplexity.read_text(path) == "a\r\nb\n"


# --- long texts ---------------------------------------------------------------------------------


def test_no_more_is_encoded_than_is_taken(models: list[edgellama.Model]) -> None:
    tokenizer = models[0].tokenizer
    text = "".join(f"the cat {i} sat on a mat\n " for i in range(4000))
    for limit in (1, 2, 3, 7):
        every = chunked(tokenizer, text, CHUNK)
        assert chunked(tokenizer, text, CHUNK, limit) == every[: max(limit, 1)]
    chunked(tokenizer, text + "\ud800", CHUNK, 2)  # no text, but nobody gets there
    with pytest.raises(edgellama.ParameterError, match="lone surrogate"):
        chunked(tokenizer, text + "\ud800", CHUNK)


def test_a_text_of_hardly_any_tokens_is_encoded_to_its_end(
    models: list[edgellama.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " the" * 4000
    wanted = chunked(models[0].tokenizer, text, CHUNK)[:3]
    monkeypatch.setattr(perplexity, "LETTERS_A_TOKEN", 1)  # as if tokens were longer
    monkeypatch.setattr(perplexity, "MARGIN", 1)
    assert chunked(models[0].tokenizer, text, CHUNK, 3) == wanted


def test_no_more_is_read_than_is_taken(
    paths: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(perplexity, "MOST_BYTES", 1 << 22)
    path = tmp_path / "endless.txt"
    path.write_text("é" + WORDS * 8000, encoding="utf-8")
    os.truncate(path, 1 << 30)  # a hole, which takes no room
    text = read_text(path, 2, CHUNK)
    assert text.startswith("é" + WORDS) and len(text) < 1e6
    with pytest.raises(edgellama.EdgeLlamaError, match="longer than 4194304 bytes"):
        read_text(path)
    assert run(command(paths, path)) == 1
    assert "longer than" in capsys.readouterr().err
    assert run(command(paths, path, "--chunks", "2")) == 0


def test_half_a_letter_at_the_end_of_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "MARGIN", 0)
    path = tmp_path / "text.txt"
    path.write_text("é" * 20_000, encoding="utf-8")
    monkeypatch.setattr(perplexity, "BYTES_A_TOKEN", 1)
    assert read_text(path, 3, 7) == "é" * 11  # 22 bytes
    path.write_bytes(b"\xc3")
    with pytest.raises(edgellama.EdgeLlamaError, match="byte 195 at 0"):
        read_text(path, 3, 7)


@pytest.mark.parametrize("name", [os.devnull, "/dev/zero", "pipe", "."])
def test_what_is_no_text_file_is_refused_unread(
    paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if name == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("there are no named pipes here")
        os.mkfifo(tmp_path / name)
    elif name == "/dev/zero" and not os.path.exists(name):
        pytest.skip("there is no such device here")
    assert run(command(paths, tmp_path / name)) == 1
    err = capsys.readouterr().err
    assert ("a folder, not a text file" if name == "." else "not a regular file") in err
    assert err.count("\n") == 1
