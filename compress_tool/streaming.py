"""A model run by transformers' own code with one part of its weights in memory at a time.

The parts are the embedding, each decoder layer, and the head. The model is built on the meta
device; a part is read from disk by tensor name when it is used and dropped when another one is.

Memory: the largest part (a decoder layer in `dtype`), the hidden states the caller holds
(N * S * D numbers), and the activations of one batch. Nothing grows with the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from threading import local
from typing import Any, Final

import torch

from compress_tool.checkpoint import EMBEDDING, LM_HEAD, Checkpoint
from compress_tool.dynamic_prune import dynamic_base
from compress_tool.errors import InputError, NumericsError, UnsupportedError, UsageError
from compress_tool.experts import Observer, check_experts
from compress_tool.meta_model import meta_model
from compress_tool.packing import folded_expert, layer_bias
from compress_tool.side_by_side import one_thread, side_by_side

REST: Final = "rest"
"""The part that stays in memory: what is neither embedding, decoder layer nor head (the norm)."""
MAX_KEPT_SHAPES: Final = 4
"""Batch shapes whose masks and position embeddings are kept: full and last, of two lengths."""

_LayerCall = tuple[tuple[Any, ...], dict[str, Any]]


class StreamedModel:
    """A causal language model over a Checkpoint, dense or factored, layer by layer.

    `embed`, then `run_layer` for 0, 1, …, then `logits`: the same numbers as the model's own
    forward, up to rounding. Not thread-safe: it owns the weights of the part in use.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build the model on the meta device and load what is neither embedding, layer nor head."""
        self._checkpoint = checkpoint
        self._device = torch.device(device)
        self._dtype = dtype
        self._model = meta_model(checkpoint, dtype, self._device)
        self._layers = list(self._model.base_model.layers)
        names = {i: checkpoint.family.fused_prefix.format(layer=i) for i in checkpoint.moe_layers}
        self._experts = {i: self._model.get_submodule(name) for i, name in names.items()}
        for layer, experts in self._experts.items():
            check_experts(experts, names[layer])
            experts.moesvd_observer = experts.moesvd_bias_D = experts.moesvd_dynamic = None
        self._meta: dict[str, torch.Tensor] = self._model.state_dict(keep_vars=True)
        self._parts = _parameters_by_part(self._meta, self._model, checkpoint.num_layers)
        self._loaded: str | int | None = None
        self._calls: dict[tuple[int, int], list[_LayerCall]] = {}
        for name in set(checkpoint.outer_tensors()) - {EMBEDDING, LM_HEAD}:
            self._place(name, checkpoint.read(name))
        self._check_complete(REST)

    @torch.no_grad()
    def embed(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Token ids to the hidden states [B, S, D] that enter layer 0, on the CPU.

        Raises InputError for an id outside the vocabulary, UsageError for sequences longer than
        the model's positions.
        """
        longest = self._checkpoint.config.get("max_position_embeddings")
        if longest is not None and ids_BS.shape[1] > longest:
            raise UsageError(
                f"sequences of {ids_BS.shape[1]} tokens asked, the model's "
                f"max_position_embeddings is {longest}; use a smaller --seq-len"
            )
        vocab_size = self._checkpoint.tensors[EMBEDDING].shape[0]
        if ids_BS.numel() and not (int(ids_BS.min()) >= 0 and int(ids_BS.max()) < vocab_size):
            raise InputError(
                f"{self._checkpoint.path}: the tokenizer gives token {int(ids_BS.max())}, the "
                f"vocabulary has {vocab_size}; the tokenizer is not the model's own"
            )
        self._load(EMBEDDING)
        entering: list[torch.Tensor] = []

        def record(layer: int, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if layer == 0:
                entering.append(hidden)
            return hidden

        with self._layers_replaced(record):
            self._model.base_model(input_ids=ids_BS.to(self._device), use_cache=False)
        return entering[0].cpu()

    def embed_all(self, ids_NS: torch.Tensor, batch_size: int) -> torch.Tensor:
        """`embed` for all sequences, batch by batch, into one tensor [N, S, D]."""
        size = self._checkpoint.shape.hidden_size
        hidden_NSD = torch.empty(*ids_NS.shape, size, dtype=self._dtype)
        for start in range(0, len(ids_NS), batch_size):
            rows = slice(start, start + batch_size)
            hidden_NSD[rows] = self.embed(ids_NS[rows])
        return hidden_NSD

    def load_layer(self, layer: int) -> None:
        """Read the weights of one decoder layer, and drop the part that was in memory."""
        self._load(layer)

    def free(self) -> None:
        """Drop the part in memory, whichever it is; it is read again when it is used again."""
        part, self._loaded = self._loaded, None
        if part is None:
            return
        for name in self._parts[part]:
            self._set(name, self._meta[name])
        if isinstance(part, int) and part in self._experts:
            self._experts[part].moesvd_bias_D = self._experts[part].moesvd_dynamic = None

    @torch.no_grad()
    def run_layer(
        self,
        layer: int,
        hidden_NSD: torch.Tensor,
        batch_size: int,
        observer: Observer | None = None,
    ) -> torch.Tensor:
        """Replace the hidden states of all sequences by what `layer` makes of them; returns them.

        `observer` sees the input of the routed experts and the routing, batch by batch in order;
        a layer without experts has nothing to see.
        Raises NumericsError when an output is not finite.
        """
        with self._observed(layer, observer):
            for start in range(0, len(hidden_NSD), batch_size):
                rows = slice(start, start + batch_size)
                self._store(layer, hidden_NSD, rows, self.call_layer(layer, hidden_NSD[rows]))
        return hidden_NSD

    def run_sequences(
        self, layer: int, hidden_NSD: torch.Tensor, at_once: int, observer: Observer | None = None
    ) -> torch.Tensor:
        """`run_layer` with every sequence computed alone, by one thread; returns the states.

        A product's last bits depend on its number of rows and threads, and a truncation enlarges
        them. Here nothing depends on either: on a CPU up to `at_once` sequences are in work side
        by side, one for each thread, elsewhere one.
        """
        self._load(layer)
        self._layer_calls(1, hidden_NSD.shape[1])
        rows = [slice(number, number + 1) for number in range(len(hidden_NSD))]
        seen = local()

        def compute(row: slice) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            seen.routed = ()
            with torch.no_grad():
                return self.call_layer(layer, hidden_NSD[row]), seen.routed

        def keep(*routed: torch.Tensor) -> None:
            seen.routed = routed

        with self._observed(layer, keep if observer else None), one_thread(self._device) as threads:
            workers = max(1, min(threads, at_once, len(rows)))
            # Closed here: a failure below then ends the threads before their number is reset.
            with closing(side_by_side(compute, rows, workers)) as computed:
                for row, (output, routed) in zip(rows, computed, strict=True):
                    if observer is not None and routed:
                        observer(*routed)
                    self._store(layer, hidden_NSD, row, output)
        return hidden_NSD

    @contextmanager
    def _observed(self, layer: int, observer: Observer | None) -> Iterator[None]:
        """The layer is in memory, and `observer` sees what its experts are given."""
        self._load(layer)
        experts = self._experts.get(layer)
        if experts is not None:
            experts.moesvd_observer = observer
        try:
            yield
        finally:
            if experts is not None:
                experts.moesvd_observer = None

    def _store(self, layer: int, states: torch.Tensor, rows: slice, output: torch.Tensor) -> None:
        if not output.isfinite().all():
            raise NumericsError(
                f"{self._checkpoint.path}: layer {layer} gives NaN or infinite hidden "
                f"states in {self._dtype}; check the weights of that layer, or use float32"
            )
        states[rows] = output.to(states)

    def call_layer(self, layer: int, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """A batch through one layer, on the device; gradients flow where the caller has them."""
        self._load(layer)
        hidden = hidden_BSD.to(self._device, self._dtype)
        args, kwargs = self._layer_calls(*hidden.shape[:2])[layer]
        output = self._layers[layer](hidden, *args, **kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def experts_of(self, layer: int) -> Any:
        """transformers' routed-experts module of an MoE layer."""
        return self._experts[layer]

    @torch.no_grad()
    def logits(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """Hidden states that left the last layer to logits [B, S, V], fp32, on the device."""
        return self.call_head(hidden_BSD)

    def call_head(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """`logits`; gradients flow where the caller has them."""
        self._load(LM_HEAD)
        hidden = hidden_BSD.to(self._device, self._dtype)
        with self._layers_replaced(lambda layer, hidden, *args, **kwargs: hidden):
            logits: torch.Tensor = self._model(inputs_embeds=hidden, use_cache=False).logits
        return logits.float()

    def _layer_calls(self, batch_size: int, seq_len: int) -> list[_LayerCall]:
        """The masks and positions that the model's own forward passes to each of its layers."""
        shape = (batch_size, seq_len)
        if shape not in self._calls:
            if len(self._calls) >= MAX_KEPT_SHAPES:
                self._calls.clear()
            calls: list[_LayerCall] = []

            def record(layer: int, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                calls.append((args, kwargs))
                return hidden

            size = self._checkpoint.shape.hidden_size
            zeros = torch.zeros(*shape, size, dtype=self._dtype, device=self._device)
            with self._layers_replaced(record):
                self._model.base_model(inputs_embeds=zeros, use_cache=False)
            self._calls[shape] = calls
        return self._calls[shape]

    @contextmanager
    def _layers_replaced(self, function: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Call `function(layer, hidden, …)` in place of every decoder layer's forward."""
        for index, layer in enumerate(self._layers):
            layer.forward = partial(function, index)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward

    def _load(self, part: str | int) -> None:
        """Bring the embedding, the head or a decoder layer into memory, alone."""
        if self._loaded == part:
            return
        self.free()
        self._loaded = part
        try:
            if isinstance(part, int):
                self._load_decoder_layer(part)
            else:
                tied = part == LM_HEAD and self._checkpoint.tied_embeddings
                self._place(part, self._checkpoint.read(EMBEDDING if tied else part))
        except BaseException:
            self.free()
            raise

    def _load_decoder_layer(self, layer: int) -> None:
        checkpoint, family = self._checkpoint, self._checkpoint.family
        expert_names = set(checkpoint.expert_tensors(layer))
        for name in checkpoint.layer_tensors(layer):
            if name not in expert_names:
                # transformers 5 names the routed block otherwise than published Mixtrals do.
                self._place(family.fused_name(layer, name), checkpoint.read(name))
        if layer in self._experts:
            module = family.fused_prefix.format(layer=layer)
            gate_up_EFD, down_EDF = self._stacked_experts(layer)
            self._place(f"{module}.gate_up_proj", gate_up_EFD)
            self._place(f"{module}.down_proj", down_EDF)
            bias_D = layer_bias(checkpoint, layer)
            on_device = None if bias_D is None else bias_D.to(self._device)
            self._experts[layer].moesvd_bias_D = on_device
            self._experts[layer].moesvd_dynamic = dynamic_base(
                checkpoint, layer, self._device, self._dtype
            )
        self._check_complete(layer)

    def _stacked_experts(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F], filled expert by expert."""
        checkpoint = self._checkpoint
        num_experts, size = checkpoint.shape.num_experts, checkpoint.shape.hidden_size
        blank = torch.empty(0, dtype=self._dtype, device=self._device)
        gate_up_EFD = down_EDF = blank
        for expert in range(num_experts):
            gate_FD, up_FD, down_DF = folded_expert(checkpoint, layer, expert)
            width = gate_FD.shape[0]
            if expert == 0:
                gate_up_EFD = blank.new_empty(num_experts, 2 * width, size)
                down_EDF = blank.new_empty(num_experts, size, width)
            gate_up_EFD[expert, :width] = gate_FD
            gate_up_EFD[expert, width:] = up_FD
            down_EDF[expert] = down_DF
        return gate_up_EFD, down_EDF

    def _place(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor where the model keeps the parameter or buffer `name`."""
        if name not in self._meta:
            raise UnsupportedError(
                f"{self._checkpoint.path}: tensor {name} has no place in transformers' "
                f"{type(self._model).__name__}; this transformers version is not supported"
            )
        if isinstance(self._meta[name], torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor.to(self._device, self._dtype), requires_grad=False)
        else:
            # A buffer, such as the bias of a router, keeps the precision it was published in.
            tensor = tensor.to(self._device)
        self._set(name, tensor)

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(path), leaf, tensor)

    def _check_complete(self, part: str | int) -> None:
        """Every parameter of a part must be real: one left on meta was in no checkpoint tensor."""
        state = self._model.state_dict(keep_vars=True)
        missing = [name for name in self._parts[part] if state[name].is_meta]
        if missing:
            raise UnsupportedError(
                f"{self._checkpoint.path}: transformers' {type(self._model).__name__} has the "
                f"parameter {missing[0]}, the checkpoint does not; this transformers version is "
                "not supported"
            )


def _parameters_by_part(
    names: Iterable[str], model: Any, num_layers: int
) -> dict[str | int, list[str]]:
    """Which parameters are loaded together: EMBEDDING, LM_HEAD, each layer's number, REST."""
    prefix = f"{model.base_model_prefix}.layers."
    parts: dict[str | int, list[str]] = {part: [] for part in (EMBEDDING, LM_HEAD, REST)}
    parts |= {layer: [] for layer in range(num_layers)}
    for name in names:
        if name.startswith(prefix):
            parts[int(name.removeprefix(prefix).split(".", 1)[0])].append(name)
        else:
            parts[name if name in (EMBEDDING, LM_HEAD) else REST].append(name)
    return parts
