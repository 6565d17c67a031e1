"""Checkpoint in, tokens out: what `compress_tool run` writes, served by real vLLM engines in fp32.

One process runs all engines. Three models of the same function are compared: the factored one in
vLLM, the folded one (`export-dense`) in transformers, and the streamed one of `eval`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress_tool.checkpoint import open_checkpoint
from compress_tool.cli import main
from compress_tool.streaming import StreamedModel
from tests.checkpoints import tiny_mixtral

pytest.importorskip("vllm")

from tests.vllm_moesvd.engine_run import PROMPTS, Completion, run_engines

pytestmark = pytest.mark.slow

LOGPROB_NOISE = 1.2e-5
"""Twice the largest |Δ logprob| measured between engines on full-rank computed factors (6e-6):
products of two fp32 factors round where the dense weight did not."""

FULL_RANK = {
    "latent": ["--method", "latent", "--rank", "64"],
    "shared-v": ["--method", "shared-v", "--rank", "96"],
    "two-groups": ["--method", "shared-v", "--groups", "2", "--rank", "96"],
    "svd": ["--method", "svd", "--rank", "64"],
}
LOW_RANK = {
    "latent": ["--method", "latent", "--ratio", "0.3"],
    "latent-centred": ["--method", "latent", "--ratio", "0.3", "--centre"],
    "shared-v": ["--method", "shared-v", "--groups", "2", "--ratio", "0.3"],
    "svd": ["--method", "svd", "--ratio", "0.3"],
    "moe-svd": ["--method", "moe-svd", "--ratio", "0.3"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("end-to-end")
    tiny_mixtral(root / "dense", num_hidden_layers=3)
    stats = str(root / "stats")
    for prefix, methods in (("full", FULL_RANK), ("low", LOW_RANK)):
        for name, flags in methods.items():
            words = ["run", str(root / "dense"), str(root / f"{prefix}-{name}"), *flags]
            words += ["--samples", "64", "--seq-len", "64", "--stats", stats]
            assert main(words) == 0
    for name in LOW_RANK:
        if name != "latent-centred":
            out = root / f"folded-{name}"
            assert main(["export-dense", str(root / f"low-{name}"), str(out)]) == 0
    return root


@pytest.fixture(scope="module")
def completions(folder: Path) -> dict[str, list[Completion]]:
    names = ["dense", *(f"full-{n}" for n in FULL_RANK), *(f"low-{n}" for n in LOW_RANK)]
    return dict(zip(names, run_engines([folder / name for name in names]), strict=True))


@pytest.mark.parametrize("name", FULL_RANK)
def test_full_rank_gives_the_dense_models_tokens(completions, name: str):
    """Equal wherever the dense model's lead is above the noise, and log probabilities within it."""
    for expected, found in zip(completions["dense"], completions[f"full-{name}"], strict=True):
        for step, lead in enumerate(expected.margins):
            assert found.logprobs[step] == pytest.approx(expected.logprobs[step], abs=LOGPROB_NOISE)
            if found.tokens[step] != expected.tokens[step]:
                assert lead <= LOGPROB_NOISE, f"step {step} differs at a lead of {lead}"
                break


@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_is_not_the_dense_model(completions, name: str):
    """The null test of the one above: these checkpoints must fail it."""
    gaps = [
        abs(a.logprobs[0] - b.logprobs[0])
        for a, b in zip(completions["dense"], completions[f"low-{name}"], strict=True)
    ]
    assert max(gaps) > 1000 * LOGPROB_NOISE


def _ids(folder: Path, prompt: str, completion: Completion) -> tuple[torch.Tensor, int]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]
    return torch.tensor([ids + completion.tokens]), len(ids)


def _largest_gap(folder: Path, completions: list[Completion], logits_of) -> float:
    """Largest |Δ logprob| of the served tokens under another implementation's logits."""
    gap = 0.0
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids_1S, start = _ids(folder, prompt, completion)
        logprobs_SV = torch.log_softmax(logits_of(ids_1S)[0].float(), dim=-1)
        for step, (token, logprob) in enumerate(
            zip(completion.tokens, completion.logprobs, strict=True)
        ):
            gap = max(gap, abs(float(logprobs_SV[start + step - 1, token]) - logprob))
    return gap


@pytest.mark.parametrize("name", [name for name in LOW_RANK if name != "latent-centred"])
def test_vllm_equals_transformers_on_the_exported_checkpoint(folder: Path, completions, name: str):
    from transformers import AutoModelForCausalLM

    served = completions[f"low-{name}"]
    model = AutoModelForCausalLM.from_pretrained(folder / f"folded-{name}", dtype=torch.float32)
    with torch.no_grad():
        gap = _largest_gap(folder / "dense", served, lambda ids: model(ids).logits)
        swapped = _largest_gap(folder / "dense", served[::-1], lambda ids: model(ids).logits)
    assert gap <= LOGPROB_NOISE
    assert swapped > 1000 * LOGPROB_NOISE


@pytest.mark.parametrize("name", LOW_RANK)
def test_vllm_equals_the_model_that_eval_scores(folder: Path, completions, name: str):
    checkpoint = open_checkpoint(folder / f"low-{name}", allow_factored=True)
    model = StreamedModel(checkpoint)

    def logits_of(ids_BS: torch.Tensor) -> torch.Tensor:
        hidden = model.embed(ids_BS)
        for layer in range(checkpoint.num_layers):
            hidden = model.run_layer(layer, hidden, 1)
        return model.logits(hidden)

    assert _largest_gap(folder / "dense", completions[f"low-{name}"], logits_of) <= LOGPROB_NOISE
