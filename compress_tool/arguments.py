"""The command line: one parser, frozen by a golden test. Each flag of `run` is a recipe key."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final, NoReturn

from compress_tool.config import (
    AUTO_K,
    BASES,
    COMBINES,
    METHODS,
    RATIO_BASES,
    STORE_DTYPES,
    WHITENINGS,
)

EXAMPLES: Final = """examples:
  compress_tool inspect ./Mixtral-8x7B
  compress_tool plan ./Mixtral-8x7B --ratio 0.40
  compress_tool run ./Mixtral-8x7B ./mixtral-moesvd-40 --ratio 0.40
  compress_tool verify ./mixtral-moesvd-40 --against ./Mixtral-8x7B
  compress_tool eval ./mixtral-moesvd-40 --text held-out.txt --against ./Mixtral-8x7B
  compress_tool eval ./mixtral-moesvd-40 --tasks arc_easy,piqa

exit codes: 0 ok, 2 usage, 3 bad input, 4 resources or unreachable ratio, 5 numerics,
6 verification failed, 7 unsupported, 75 try again, 130/143 interrupted (state saved)"""


class _Parser(argparse.ArgumentParser):
    """One line on an error instead of the whole usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags. Flags without a value given are absent from the namespace."""
    parser = _Parser(
        prog="compress_tool",
        description="Factor the experts of a Mixture-of-Experts checkpoint, for vLLM.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=summary.capitalize() + ".", allow_abbrev=False
        )
        sub.add_argument(
            "--json", action="store_true", help="print the result as JSON, alone on stdout"
        )
        return sub

    inspect = command("inspect", "sizes of a checkpoint, from its headers")
    inspect.add_argument("checkpoint", type=Path, metavar="DIR")

    plan = command("plan", "what `run` would do, from the headers alone: ranks, bytes, time")
    plan.add_argument("source", type=Path, metavar="SRC", help="a checkpoint, or a config.json")
    plan.add_argument(
        "--stats",
        type=Path,
        metavar="DIR",
        help="plan from what a `run` with --stats has measured: the layers it would choose",
    )
    _add_recipe_flags(plan)

    run = command("run", "compress a checkpoint")
    run.add_argument("source", type=Path, metavar="SRC")
    run.add_argument("out", type=Path, metavar="OUT")
    _add_recipe_flags(run)
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on where an interrupted run stopped (or start, if there is none)",
    )
    run.add_argument(
        "--stats",
        type=Path,
        metavar="DIR",
        help="keep the calibration here and use it again for other methods and ratios",
    )
    _add_device(run)

    verify = command("verify", "read a finished checkpoint back and check everything it promises")
    verify.add_argument("checkpoint", type=Path, metavar="OUT")
    verify.add_argument(
        "--against", type=Path, metavar="SRC", help="the dense source: compare weights as well"
    )

    evaluate = command("eval", "perplexity over all windows of a text, and accuracy on tasks")
    evaluate.add_argument("checkpoint", type=Path, metavar="DIR")
    evaluate.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="text or JSONL files"
    )
    evaluate.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="also KL and top-1 agreement with this model, and its score on the tasks",
    )
    evaluate.add_argument(
        "--tasks",
        metavar="NAME[,NAME]",
        help="tasks of lm-evaluation-harness (extra `eval`): names, .yaml files, `paper` for the "
        "eight of the MoE compression papers, or `continuation`, four-choice questions made of "
        "--text without network",
    )
    evaluate.add_argument(
        "--limit", type=int, metavar="N", help="the first N questions of every task (default: all)"
    )
    evaluate.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="solved examples before a question (default: the task's own number)",
    )
    evaluate.add_argument(
        "--seq-len", type=int, default=256, help="tokens per window (default: 256)"
    )
    evaluate.add_argument(
        "--batch-size", type=int, default=16, help="sequences computed at once (default: 16)"
    )
    evaluate.add_argument(
        "--dynamic-prune",
        type=float,
        metavar="S",
        help="d2-moe: leave out this share of the base's neurons, the least important of every "
        "batch; for evaluation only, vLLM serves the whole base",
    )
    _add_device(evaluate)

    report = command("report", "write report.html of a finished checkpoint again")
    report.add_argument("checkpoint", type=Path, metavar="OUT")
    report.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="OUT",
        help="other compressions of the same model: adds the curve of loss against size",
    )

    export = command("export-dense", "fold the factors back into an ordinary dense checkpoint")
    export.add_argument("checkpoint", type=Path, metavar="OUT")
    export.add_argument("out", type=Path, metavar="DIR")
    export.add_argument(
        "--dtype",
        choices=STORE_DTYPES,
        default="source",
        help="dtype of the dense weights (default: that of the factors)",
    )
    export.add_argument("--resume", action="store_true", help="go on after an interruption")
    return parser


def _add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Flags with the recipe's keys as names; an absent flag leaves the recipe file's value."""
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="YAML with these flags as keys; flags win"
    )
    recipe = parser.add_argument_group("what is written", argument_default=argparse.SUPPRESS)
    recipe.add_argument(
        "--ratio", type=float, metavar="R", help="share of parameters to remove, 0 < R < 1"
    )
    recipe.add_argument(
        "--ratio-of",
        choices=RATIO_BASES,
        help="R refers to all parameters or to the routed experts (default: all)",
    )
    recipe.add_argument(
        "--rank",
        type=int,
        metavar="N",
        help="this rank (narrow: width) in all layers, in place of a ratio",
    )
    recipe.add_argument(
        "--method",
        choices=METHODS,
        help="default: auto, which chooses dense, narrow or latent and its size for each layer",
    )
    recipe.add_argument(
        "--layers", metavar="I,J-K", help="factor only these layers (default: all MoE layers)"
    )
    recipe.add_argument(
        "--groups", type=int, metavar="G", help="shared-v, moe-svd: V matrices per layer (1)"
    )
    recipe.add_argument(
        "--k",
        type=_count_or_auto,
        metavar="K",
        help="moe-svd: U matrices combined per expert, 0 for all, auto for a number per layer (2)",
    )
    recipe.add_argument(
        "--k-lambda",
        type=float,
        metavar="L",
        help="moe-svd with --k auto: a U is kept while its expert's frequency times singular "
        "values is above L times the layer's mean (1.2: 1 to 3 of the bundled model's 8)",
    )
    recipe.add_argument(
        "--combine",
        choices=COMBINES,
        help="moe-svd: how the U are combined; merge fits one U to each cluster of alike experts, "
        "k of them (eq8)",
    )
    recipe.add_argument(
        "--whitening", choices=WHITENINGS, help="moe-svd: whose whitening follows V (top)"
    )
    recipe.add_argument(
        "--layer-rank-share",
        type=float,
        metavar="S",
        help="moe-svd: factor as few layers as leave each this share of full rank (0.5)",
    )
    recipe.add_argument(
        "--centre",
        action="store_true",
        help="latent: fit around the mean output and store it as a bias; such a checkpoint cannot "
        "be exported to dense",
    )
    recipe.add_argument(
        "--alpha", type=float, metavar="A", help="asvd: exponent of mean |x|; 0 is plain SVD (0.5)"
    )
    recipe.add_argument(
        "--nearest",
        action="store_true",
        help="drop: if whole experts cannot meet the ratio, remove up to one expert more",
    )
    recipe.add_argument(
        "--refit-steps",
        type=int,
        metavar="N",
        help="auto, narrow, latent: gradient steps per layer towards the dense output, 0 for none "
        "(auto: 300, others: 0)",
    )
    recipe.add_argument(
        "--base",
        choices=BASES,
        help="d2-moe: what the shared base is; fisher, the paper's, runs a backward pass (regmean)",
    )
    recipe.add_argument(
        "--base-prune", type=float, metavar="S", help="d2-moe: share of the base's neurons cut (0)"
    )
    recipe.add_argument(
        "--share-v", action="store_true", help="d2-moe: one V for the deltas of all experts"
    )
    recipe.add_argument(
        "--calibration",
        nargs="+",
        metavar="FILE",
        help="text or JSONL files (default: the bundled public-domain text)",
    )
    recipe.add_argument("--samples", type=int, metavar="N", help="calibration sequences (128)")
    recipe.add_argument("--seq-len", type=int, metavar="S", help="tokens per sequence (512)")
    recipe.add_argument(
        "--batch-size",
        type=int,
        metavar="B",
        help="calibration sequences in work at once, on a CPU at most one for each thread, on a "
        "GPU one; changes no result (64)",
    )
    recipe.add_argument("--seed", type=int, metavar="N", help="choice of calibration windows (0)")
    recipe.add_argument(
        "--dtype", choices=STORE_DTYPES, help="dtype of the factors (default: source)"
    )


def _count_or_auto(text: str) -> int | str:
    if text == AUTO_K:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected {AUTO_K} or a number") from None


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="cpu or cuda[:n] (default: cpu)"
    )
