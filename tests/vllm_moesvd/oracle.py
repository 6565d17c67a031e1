"""What a hand-made checkpoint must generate, computed by transformers from its dense twin."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.vllm_moesvd.engine_run import NUM_TOKENS, PROMPTS, Completion
from tests.vllm_moesvd.hand_made import HandMade


class Oracle:
    """transformers' own Mixtral in fp32; the vectors that no dense model can add are hooked in."""

    def __init__(self, made: HandMade, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            made.write_dense(path), dtype=torch.float32
        ).eval()
        for layer, bias_D in made.bias.items():
            block = self.model.model.layers[layer].mlp
            block.register_forward_hook(partial(_add, bias_D=bias_D))

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Log probabilities [positions, vocabulary] of what follows each token."""
        return self.model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    def complete(self, prompt: str, num_tokens: int = NUM_TOKENS) -> Completion:
        """Greedy continuation of a prompt, whose tokens are its bytes."""
        tokens = encode(prompt)
        chosen: list[int] = []
        values: list[float] = []
        margins: list[float] = []
        for _ in range(num_tokens):
            best, index = self.logprobs(tokens)[-1].topk(2)
            chosen.append(int(index[0]))
            values.append(float(best[0]))
            margins.append(float(best[0] - best[1]))
            tokens = [*tokens, chosen[-1]]
        return Completion(tokens=chosen, logprobs=values, margins=margins)

    def completions(self) -> list[Completion]:
        return [self.complete(prompt) for prompt in PROMPTS]


def encode(text: str) -> list[int]:
    """Token ids of an ASCII text in the byte tokenizer of `tests.checkpoints`."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The byte-level alphabet shows a space as the 256th letter.
    return [alphabet.index("Ġ" if letter == " " else letter) for letter in text]


def max_difference(actual: list[Completion], expected: list[Completion]) -> float:
    """Largest difference of a log probability; the tokens must be the same."""
    assert [one.tokens for one in actual] == [one.tokens for one in expected]
    pairs = zip(
        (value for one in actual for value in one.logprobs),
        (value for one in expected for value in one.logprobs),
        strict=True,
    )
    return max(abs(a - b) for a, b in pairs)


def _add(module: Any, inputs: Any, output: Any, *, bias_D: torch.Tensor) -> Any:
    return output + bias_D
