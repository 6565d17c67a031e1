"""The ledger and the slices, without a vLLM model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from tests.checkpoints import POCKET_MIXTRAL, mixtral_config, tiny_mixtral
from tests.vllm_moesvd.hand_made import EXACT_LAYERS, MIXTRAL, ODD_LAYERS, hand_made
from vllm_moesvd.format import CheckpointSpec, FormatError
from vllm_moesvd.loading import (
    Ledger,
    LoadingError,
    ModelPlan,
    expected_tensors,
    load_padded_slice,
    open_ledger,
    pad_to,
    read_plan,
)


def test_the_ledger_takes_each_promised_tensor_once() -> None:
    ledger = Ledger(expected={"a": (2, 3), "b": (4,)})
    ledger.receive("b", (4,))
    ledger.receive("a", torch.zeros(2, 3).shape)
    ledger.close()


def test_optional_tensors_may_be_absent_but_not_wrong() -> None:
    ledger = Ledger(expected={"a": (2,), "b": (4,)}, optional=frozenset({"b"}))
    ledger.receive("a", (2,))
    ledger.close()
    with pytest.raises(LoadingError, match=r"b: found shape \[5\], expected \[4\]"):
        ledger.receive("b", (5,))


@pytest.mark.parametrize(
    ("arrivals", "message"),
    [
        ([("a", (2, 3))], r"tensor b and 1 more: not found, expected shape \[4\]"),
        ([("a", (3, 2))], r"tensor a: found shape \[3, 2\], expected \[2, 3\]"),
        ([("a", (6,))], r"tensor a: found shape \[6\], expected \[2, 3\]"),
        ([("x", (1,))], r"tensor x: found with shape \[1\], but config.json promises no such"),
        ([("b", (4,)), ("b", (4,))], "tensor b: found twice, expected once"),
    ],
)
def test_the_ledger_says_what_is_wrong_in_one_line(
    arrivals: list[tuple[str, tuple[int, ...]]], message: str
) -> None:
    ledger = Ledger(expected={"a": (2, 3), "b": (4,), "c": (1,)})
    with pytest.raises(LoadingError, match=message) as caught:
        for name, shape in arrivals:
            ledger.receive(name, shape)
        ledger.close()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
def test_hand_made_checkpoints_hold_exactly_the_expected_tensors(tied: bool, tmp_path) -> None:
    for layers, exact in ((EXACT_LAYERS, True), (ODD_LAYERS, False)):
        made = hand_made(layers, exact=exact)
        made.config["tie_word_embeddings"] = tied
        hf_config = AutoConfig.from_pretrained(made.write(tmp_path / f"{exact}"))
        plan = read_plan(MIXTRAL, hf_config)
        stored = {name: tuple(tensor.shape) for name, tensor in made.tensors.items()}
        assert expected_tensors(plan, hf_config) == stored
        assert open_ledger(plan, hf_config).optional == ({"lm_head.weight"} if tied else set())


def test_a_dense_checkpoint_has_the_published_names(tmp_path) -> None:
    """With no factored layer the table is that of the dense checkpoint: an independent check."""
    import safetensors

    for path in (tiny_mixtral(tmp_path / "tiny", num_hidden_layers=3), POCKET_MIXTRAL):
        hf_config = AutoConfig.from_pretrained(path)
        plan = ModelPlan(
            family=MIXTRAL,
            shape=MIXTRAL.moe_shape(hf_config.to_dict()),
            num_layers=hf_config.num_hidden_layers,
            moe_layers=tuple(range(hf_config.num_hidden_layers)),
            spec=CheckpointSpec(layers={}),
        )
        with safetensors.safe_open(path / "model.safetensors", framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        expected = expected_tensors(plan, hf_config)
        if hf_config.tie_word_embeddings:
            assert expected.pop("lm_head.weight") == stored["model.embed_tokens.weight"]
        assert expected == stored


def test_a_config_without_our_key_is_refused(tmp_path) -> None:
    hf_config = AutoConfig.from_pretrained(tiny_mixtral(tmp_path / "dense"))
    with pytest.raises(FormatError, match="moesvd: expected an object, found None"):
        read_plan(MIXTRAL, hf_config)
    assert "moesvd" not in mixtral_config()


def test_padding_appends_zeros() -> None:
    padded = pad_to(torch.ones(2, 3), (4, 5))
    assert padded.shape == (4, 5)
    assert padded.sum() == 6
    assert padded[:2, :3].all()
    same = torch.ones(2, 3)
    assert pad_to(same, (2, 3)) is same


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shard_dim", [0, 1])
def test_slices_of_all_processes_are_the_padded_tensor(tp_size: int, shard_dim: int) -> None:
    tensor = torch.randn(5, 6)
    local = list(tensor.shape)
    local[shard_dim] = -(-local[shard_dim] // tp_size)
    slices = []
    for tp_rank in range(tp_size):
        parameter = torch.nn.Parameter(torch.full(local, float("nan")), requires_grad=False)
        load_padded_slice(parameter, tensor, shard_dim=shard_dim, tp_rank=tp_rank)
        slices.append(parameter.data)
    whole = torch.cat(slices, dim=shard_dim)
    assert torch.equal(whole, pad_to(tensor, tuple(whole.shape)))


def test_a_replicated_factor_is_padded_too() -> None:
    parameter = torch.nn.Parameter(torch.full((3, 4), float("nan")), requires_grad=False)
    load_padded_slice(parameter, torch.ones(2, 4), shard_dim=None, tp_rank=1)
    assert torch.equal(parameter.data, pad_to(torch.ones(2, 4), (3, 4)))
