"""Tasks through lm-evaluation-harness: its own numbers for the exported model, clear refusals."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from compress_tool.checkpoint import open_checkpoint
from compress_tool.cli import main
from compress_tool.continuation import continuation_task, questions_from_files
from compress_tool.errors import InputError, TemporaryError, UnsupportedError, UsageError
from compress_tool.export_dense import export_dense
from compress_tool.tasks import PRESET_TASKS, load_tasks, run_tasks, task_names
from tests.checkpoints import tiny_mixtral
from tests.compress_tool.test_export_dense import SPECS, factored

pytest.importorskip("lm_eval")
TEXT = Path(__file__).parent.parent.parent / "examples" / "texts" / "heldout.txt"
TASK = """
task: my_task
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def silent(stage: str, done: int, total: int, detail: str) -> None:
    pass


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A checkpoint with a latent, a shared-v, a narrow and a dense layer, and its export."""
    root = tmp_path_factory.mktemp("pair")
    checkpoint = factored(root, SPECS)
    export_dense(checkpoint, root / "dense")
    return checkpoint, root / "dense"


def harness_hf(folder: Path):
    """`lm_eval --model hf` on a dense checkpoint, in this process."""
    stand_ins = one_process_accelerate() if importlib.util.find_spec("accelerate") is None else {}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        from lm_eval.models.huggingface import HFLM

    from transformers import AutoModelForCausalLM, AutoTokenizer

    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
        batch_size=4,
    )


def one_process_accelerate() -> dict[str, ModuleType]:
    """What the harness asks of accelerate in one process: how many there are, and on what."""
    module, utils = ModuleType("accelerate"), ModuleType("accelerate.utils")
    module.InitProcessGroupKwargs = lambda timeout: None
    module.Accelerator = lambda kwargs_handlers: SimpleNamespace(
        num_processes=1, device=torch.device("cpu")
    )
    module.find_executable_batch_size = lambda starting_batch_size: lambda function: function
    module.utils, utils.get_max_memory = utils, None
    return {"accelerate": module, "accelerate.utils": utils}


@pytest.fixture(scope="module")
def harness_model(pair):
    return harness_hf(pair[1])


def streamed(checkpoint):
    from compress_tool.harness import StreamedLM

    return StreamedLM(checkpoint, batch_size=4, progress=silent)


def instances(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=values, idx=index)
        for index, values in enumerate(arguments)
    ]


def test_log_likelihoods_are_those_of_lm_eval_hf(pair, harness_model):
    """Empty contexts, trailing spaces, a context that opens with <s>, one that is too long."""
    asked = [
        ("It was the best of", " times"), ("It was the best of ", "times"), ("", "the worst"),
        ("<s>It was", " the age"), ("long " * 130, " context"), ("é", "ü"),
    ]  # fmt: skip
    ours = streamed(pair[0]).loglikelihood(instances("loglikelihood", *asked))
    theirs = harness_model.loglikelihood(instances("loglikelihood", *asked))
    for (our_score, our_greedy), (score, greedy) in zip(ours, theirs, strict=True):
        assert our_score == pytest.approx(score, rel=1e-4, abs=1e-4)
        assert our_greedy == bool(greedy)
    assert len({round(score, 3) for score, _ in ours}) > 3


def test_a_tokenizer_with_an_opening_token_of_its_own(tmp_path):
    """As Mixtral's: <s> stands before every text, and is not a part of continuations."""
    from tokenizers import Tokenizer, processors

    folder = tiny_mixtral(tmp_path / "m")
    file = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 256)]
    )
    tokenizer.save(file)
    ours = streamed(open_checkpoint(folder, allow_factored=True))
    theirs = harness_hf(folder)
    for text in ("It was", "<s>It was"):
        ids = ours.tok_encode(text)
        assert ids == theirs.tok_encode(text)
        assert (ids[0], len(ids), ids.count(256)) == (256, 7, 1)
    asked = instances("loglikelihood", ("It was", " the best"), ("", "of"))
    for (ours_score, _), (score, _) in zip(
        ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True
    ):
        assert ours_score == pytest.approx(score, rel=1e-4)


def test_rolling_likelihoods_are_those_of_lm_eval_hf(pair, harness_model):
    """512 positions: the second text has three windows, the last of which overlaps."""
    asked = instances("loglikelihood_rolling", ("It was the age",), ("of wisdom " * 120,))
    ours = streamed(pair[0]).loglikelihood_rolling(asked)
    theirs = harness_model.loglikelihood_rolling(asked)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_generated_text_is_that_of_lm_eval_hf(pair, harness_model):
    settings = {"until": ["\n"], "do_sample": False, "max_gen_toks": 12}
    free = streamed(pair[0]).generate_until(
        instances("generate_until", ("It was", dict(settings)), ("the age of", dict(settings)))
    )
    theirs = harness_model.generate_until(
        instances("generate_until", ("It was", dict(settings)), ("the age of", dict(settings)))
    )
    assert free == theirs
    assert any(free)
    stop = next(text for text in free if text)[1:3]
    stopped = streamed(pair[0]).generate_until(
        instances("generate_until", ("It was", settings | {"until": [stop]}))
    )
    assert stop not in stopped[0]


def test_sampling_is_refused(pair):
    with pytest.raises(UnsupportedError, match="only greedy"):
        streamed(pair[0]).generate_until(
            instances("generate_until", ("a", {"until": [], "do_sample": True, "temperature": 1}))
        )


def test_accuracy_is_that_of_lm_eval_hf(pair, harness_model):
    from lm_eval.evaluator import evaluate

    questions = questions_from_files([TEXT])
    tasks = load_tasks(["continuation"], [TEXT])
    options = {"limit": 16, "num_fewshot": None, "batch_size": 8, "progress": silent}
    ours = run_tasks(pair[0], tasks, **options)
    theirs = evaluate(
        lm=harness_model,
        task_dict=load_tasks(["continuation"], [TEXT]),
        limit=16,
        log_samples=False,
    )["results"]["continuation"]
    assert ours["continuation"]["acc"] == theirs["acc,none"]
    assert ours["continuation"]["acc_stderr"] == pytest.approx(theirs["acc_stderr,none"])
    assert ours["continuation"]["samples"] == 16
    assert ours["continuation"]["num_fewshot"] == 0
    assert len(questions) == 200 and continuation_task(questions)["task"] == "continuation"


def test_a_task_file_the_texts_and_the_other_model_in_one_call(pair, tmp_path, capsys):
    checkpoint, dense = pair
    data = tmp_path / "data.jsonl"
    rows = [
        {"context": "It was the", "choices": [" best", " w"], "answer": number % 2}
        for number in range(6)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "my_task.yaml"
    task.write_text(TASK.format(file=data))
    text = tmp_path / "text.txt"
    text.write_text("It was the age of foolishness. " * 8)
    words = ["eval", checkpoint.path, "--text", text, "--tasks", task, "--limit", "5"]
    words += ["--num-fewshot", "0", "--against", dense]
    assert main([*map(str, words), "--json"]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result["kl"] == pytest.approx(0, abs=1e-9)
    scores = result["tasks"]["my_task"]
    assert scores["samples"] == 5
    # The five answers are 0 1 0 1 0, and every question is the same.
    assert scores["acc"] in (0.4, 0.6)
    assert scores["against"]["acc"] == scores["acc"]
    assert "Tokenizing" not in output.err
    assert main([*map(str, words)]) == 0
    assert "my_task acc" in capsys.readouterr().out


def test_the_preset_names_the_tasks_of_the_papers():
    names = ["openbookqa", "arc_easy", "arc_challenge", "winogrande", "hellaswag", "piqa",
             "mathqa", "gsm8k"]  # fmt: skip
    assert task_names("paper") == names
    assert task_names("gsm8k,paper, my.yaml") == ["gsm8k", *names[:-1], "my.yaml"]


def test_the_harness_keeps_the_preset_where_it_is_looked_for():
    import lm_eval

    root = Path(lm_eval.__file__).parent / "tasks"
    for name, folder in PRESET_TASKS.items():
        files = [file.read_text() for file in (root / folder).glob("*.yaml")]
        assert any(f"task: {name}\n" in text for text in files), name


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError("Couldn't reach 'allenai/openbookqa' on the Hub"), TemporaryError),
        (FileNotFoundError("no data.jsonl"), InputError),
        (ValueError("broken\nsecond line"), InputError),
    ],
)
def test_a_data_set_that_does_not_come_is_one_line(monkeypatch, error, expected):
    import datasets

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(expected, match=r"^task openbookqa: ") as caught:
        load_tasks(["openbookqa"], [])
    assert "\n" not in str(caught.value)


def test_refusals_come_before_any_work(capsys, tmp_path, monkeypatch):
    folder = tiny_mixtral(tmp_path / "m")
    cases = [
        ([], 2, "--text, --tasks or both"),
        (["--tasks", "continuation"], 2, "name it with --text"),
        (["--tasks", "a,,b"], 2, "single commas"),
        (["--tasks", str(tmp_path / "none.yaml")], 3, "no such file"),
        (["--tasks", "paper", "--limit", "0"], 2, "--limit is 0"),
        (["--tasks", "paper", "--num-fewshot", "-1"], 2, "--num-fewshot is -1"),
        (["--text", str(TEXT), "--limit", "3"], 2, "no task is named"),
        (["--text", str(TEXT), "--batch-size", "0"], 2, "--batch-size is 0"),
    ]
    for words, code, named in cases:
        assert main(["eval", str(folder), *words]) == code, words
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("error: ") and output.err.count("\n") == 1
        assert named in output.err
    monkeypatch.setattr(
        "compress_tool.tasks.find_spec",
        lambda name: None if name == "lm_eval" else importlib.util.find_spec(name),
    )
    assert main(["eval", str(folder), "--tasks", "paper"]) == 7
    assert "vllm-moesvd[eval]" in capsys.readouterr().err


@pytest.mark.slow
def test_an_unknown_name_is_one_line_with_the_nearest():
    """Slow: it reads the harness's whole index of tasks."""
    with pytest.raises(UsageError, match=r"'openbookqq'.*did you mean openbookqa\?"):
        load_tasks(["openbookqq"], [])
