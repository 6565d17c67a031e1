"""The recipe of one compression: every choice that decides what is written, from flags or YAML.

A recipe is data. Two runs with equal recipes, equal sources and equal calibration text write equal
bytes; `--resume` therefore refuses a recipe that differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from compress_tool.errors import InputError, UsageError

METHODS: Final = (
    "auto",
    "latent",
    "shared-v",
    "svd",
    "moe-svd",
    "asvd",
    "svd-llm",
    "drop",
    "narrow",
    "d2-moe",
)
RATIO_BASES: Final = ("all", "experts")
STORE_DTYPES: Final = ("source", "float32", "bfloat16", "float16")
COMBINES: Final = ("eq8", "alg3", "mean", "frequency", "merge")
AUTO_K: Final = "auto"
K_LAMBDA: Final = 1.2
"""Gives the bundled model 1 to 3 U matrices per layer, as the authors report for Mixtral-8x7B; at
1.5 every layer keeps one, at 0.8 five or more of eight."""
FISHER: Final = "fisher"
BASES: Final = ("regmean", "mean", "frequency", FISHER)
WHITENINGS: Final = ("top", "expert")
REFIT_METHODS: Final = ("auto", "narrow", "latent")
AUTO_REFIT_STEPS: Final = 300
"""Ten passes over the default calibration; 600 steps gained 5 to 11 % of a layer's KL over 200."""
MAX_RECIPE_BYTES: Final = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All choices; each field is a flag (`--seq-len`) and a key of the YAML file (`seq_len`).

    `ratio` is the share of parameters to remove, of the whole model or (`ratio_of: experts`) of
    the routed experts. With `rank`, all chosen layers take that rank and no ratio is kept.
    `layers` limits which layers are factored. `k` (a number, or "auto" for each layer's own by
    `k_lambda`), `combine`, `whitening` and `layer_rank_share` belong to moe-svd, `groups` to
    moe-svd and shared-v, `centre` to latent, `alpha` to asvd, `nearest` to drop, `base`,
    `base_prune` and `share_v` to d2-moe, `refit_steps` to auto, narrow and latent (None:
    the method's own). With `rank`, auto is latent; for narrow it is the width.
    """

    method: str = "auto"
    ratio: float | None = None
    ratio_of: str = "all"
    rank: int | None = None
    layers: tuple[int, ...] | None = None
    groups: int = 1
    k: int | str = 2
    k_lambda: float = K_LAMBDA
    combine: str = "eq8"
    whitening: str = "top"
    layer_rank_share: float = 0.5
    centre: bool = False
    alpha: float = 0.5
    nearest: bool = False
    refit_steps: int | None = None
    base: str = "regmean"
    base_prune: float = 0.0
    share_v: bool = False
    calibration: tuple[str, ...] = ()
    samples: int = 128
    seq_len: int = 512
    batch_size: int = 64
    seed: int = 0
    dtype: str = "source"

    def __post_init__(self) -> None:
        _choice("method", self.method, METHODS)
        _choice("ratio_of", self.ratio_of, RATIO_BASES)
        _choice("combine", self.combine, COMBINES)
        _choice("whitening", self.whitening, WHITENINGS)
        _choice("dtype", self.dtype, STORE_DTYPES)
        _choice("base", self.base, BASES)
        if not 0 <= self.base_prune < 1:
            raise UsageError(f"--base-prune is {self.base_prune:g}, expected a share below 1")
        if self.ratio is None and self.rank is None:
            raise UsageError("say how much to remove: --ratio (0 < R < 1), or --rank")
        if self.ratio is not None and self.rank is not None:
            raise UsageError("--ratio and --rank contradict each other; give one of them")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UsageError(f"--ratio is {self.ratio:g}, expected a share between 0 and 1")
        for name in ("rank", "samples", "seq_len", "batch_size", "groups"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{_flag(name)} is {value}, expected at least 1")
        if self.seq_len < 2:
            raise UsageError("--seq-len is 1, expected at least 2")
        if self.k != AUTO_K and (isinstance(self.k, str) or self.k < 0):
            raise UsageError(f"--k is {self.k}, expected auto, 0 (no trimming) or more")
        if not 0 <= self.k_lambda < float("inf"):
            raise UsageError(f"--k-lambda is {self.k_lambda:g}, expected 0 or more")
        if self.k != AUTO_K and self.k_lambda != K_LAMBDA:
            raise UsageError("--k-lambda belongs to --k auto")
        if self.k == AUTO_K and self.whitening == "expert":
            raise UsageError(
                "--k auto weighs loss against stored U, --whitening expert stores every U at any "
                "k; use --whitening top, or give k"
            )
        if self.combine == "merge" and self.whitening == "expert":
            raise UsageError(
                "--combine merge shares U of one V, --whitening expert gives every expert its own; "
                "use --whitening top"
            )
        if not 0 < self.layer_rank_share <= 1:
            raise UsageError(
                f"--layer-rank-share is {self.layer_rank_share:g}, expected a share up to 1"
            )
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"--alpha is {self.alpha:g}, expected a number from 0 to 1")
        if self.refit_steps is not None and self.refit_steps < 0:
            raise UsageError(f"--refit-steps is {self.refit_steps}, expected 0 (none) or more")
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}, expected 0 or more")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise UsageError(f"--layers is {self.layers}, expected layer indices, e.g. 3,5,7-9")
        self._refuse_foreign_flags()

    def _refuse_foreign_flags(self) -> None:
        """A flag that the chosen method ignores is a mistake, not a no-op."""
        defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
        owners = {
            "k": ("moe-svd",),
            "k_lambda": ("moe-svd",),
            "combine": ("moe-svd",),
            "whitening": ("moe-svd",),
            "layer_rank_share": ("moe-svd",),
            "groups": ("moe-svd", "shared-v"),
            "centre": ("auto", "latent"),
            "alpha": ("asvd",),
            "nearest": ("drop",),
            "base": ("d2-moe",),
            "base_prune": ("d2-moe",),
            "share_v": ("d2-moe",),
            "refit_steps": REFIT_METHODS,
        }
        for name, methods in owners.items():
            if getattr(self, name) != defaults[name] and self.method not in methods:
                raise UsageError(
                    f"{_flag(name)} belongs to --method {' or '.join(methods)}, "
                    f"not to {self.method}"
                )

    @property
    def num_refit_steps(self) -> int:
        """Gradient steps per layer: what the recipe says, else the method's default."""
        if self.refit_steps is not None:
            return self.refit_steps
        return AUTO_REFIT_STEPS if self.method == "auto" and self.rank is None else 0

    def to_json(self) -> dict[str, Any]:
        """JSON values; `recipe_from` is the inverse."""
        values = dataclasses.asdict(self)
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
        }

    def to_yaml(self) -> str:
        """The recipe.yaml of the output folder, readable by `--recipe`."""
        return yaml.safe_dump(self.to_json(), sort_keys=False, allow_unicode=True)


def recipe_from(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Build a recipe from flag or YAML values; raises UsageError naming the key."""
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    unknown = sorted(str(key) for key in values if key not in fields)
    if unknown:
        raise UsageError(
            f"{where}: unknown key {', '.join(unknown[:5])}; known keys are {', '.join(fields)}"
        )
    return Recipe(**{key: _typed(key, value, where) for key, value in values.items()})


def read_recipe(file: Path) -> dict[str, Any]:
    """The mapping in a recipe file; raises InputError if it is not YAML, UsageError if not ours."""
    try:
        if file.stat().st_size > MAX_RECIPE_BYTES:
            raise InputError(f"{file}: a recipe has at most {MAX_RECIPE_BYTES} bytes")
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: is not a YAML file ({reason})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{file}: expected keys and values, e.g. `ratio: 0.4`")
    recipe_keys = {field.name for field in dataclasses.fields(Recipe)}
    unknown = sorted(str(key) for key in values if key not in recipe_keys)
    if unknown:
        raise UsageError(f"{file}: unknown key {', '.join(unknown[:5])}")
    return values


def parse_layers(text: str) -> tuple[int, ...]:
    """`3,5,7-9` to (3, 5, 7, 8, 9); raises UsageError."""
    layers: set[int] = set()
    for part in text.replace(" ", "").strip("[]").split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise UsageError(f"--layers is {text!r}, expected layer indices, e.g. 3,5,7-9")
        layers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(layers))


def _typed(key: str, value: Any, where: str) -> Any:
    """Bring a YAML value to the field's type, or say what was expected."""
    if key == "layers" and isinstance(value, str):
        return parse_layers(value)
    if key in ("layers", "calibration") and isinstance(value, list | tuple):
        kind = int if key == "layers" else str
        if all(type(item) is kind for item in value):
            return tuple(value) if key == "calibration" else tuple(sorted(set(value)))
    elif key == "calibration" and isinstance(value, str):
        return (value,)
    else:
        annotation = {field.name: field.type for field in dataclasses.fields(Recipe)}[key]
        kinds = _KINDS[str(annotation)]
        if type(value) in kinds:
            return float(value) if float in kinds and value is not None else value
    raise UsageError(f"{where}: {key} is {value!r}, which is not a value for it")


_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "str": (str,),
    "int": (int,),
    "int | str": (int, str),
    "bool": (bool,),
    "float": (int, float),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
    "tuple[int, ...] | None": (type(None),),
    "tuple[str, ...]": (),
}


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{_flag(name)} is {value!r}, expected one of {', '.join(allowed)}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
