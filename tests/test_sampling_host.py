"""NumPy's error settings are the host's own: whatever they say, the same tokens are drawn."""

from typing import Any

import numpy as np
import pytest
from samplinghelp import logits_of

from edgellama.runtimes.base import Likeliest
from edgellama.sampler import Sampler, normalizer
from edgellama.sampling import Sampling

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "greedy": {"temperature": 0},
    "cold": {"temperature": 1e-29},
    "hot": {"temperature": 100, "top_k": 0, "top_p": 1, "min_p": 0},
    "biased": {"logit_bias": {1: -1e6, 2: -np.inf, 3: 1e6}},
    "typical": {"typical_p": 0.5, "top_k": 0},
    "sigma": {"top_n_sigma": 1, "top_k": 0},
    "xtc": {"xtc_probability": 1, "xtc_threshold": 0.01},
    "penalties": {"repetition_penalty": 100, "presence_penalty": 1e-30},
    "dry": {"dry_multiplier": 100, "dry_base": 100},
    "mirostat": {"mirostat": 2},
}
LOGITS = {
    "usual": logits_of(0),
    "many": logits_of(1, 5000),
    "far apart": (np.linspace(-1, 1, 5000) * 3.3e38).astype(np.float32),
    "subnormal": logits_of(2) * np.float32(1e-42),
    "banned": np.where(np.arange(50) % 3, logits_of(3), -np.inf).astype(np.float32),
}


def drawn(logits: Any, sampling: Sampling) -> list[Any]:
    sampler = Sampler(sampling, len(logits))
    top = np.argsort(-logits, kind="stable")[:20]
    likeliest = Likeliest(top.astype(np.int64), logits[top], -2.0)
    found: list[Any] = [sampler.sample(logits, [1, 2, 3, 1, 2], at) for at in range(5)]
    return [*found, sampler.sample_few(likeliest, [1, 2, 3, 1, 2], 5), normalizer(logits)]


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_host_s_numpy_settings_do_not_matter(settings: str, logits: str) -> None:
    sampling = Sampling(seed=3, **SETTINGS[settings])
    with np.errstate(all="ignore"):
        wanted = drawn(LOGITS[logits], sampling)
    with np.errstate(all="raise"):
        assert drawn(LOGITS[logits], sampling) == wanted
