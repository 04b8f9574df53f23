"""The command line end to end on a tiny saved model and a random head: results, refusals, exit codes."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_processes import launch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from haast.api import Haast
from haast.cli import app, settings
from haast.core import RowVerdict, TokenChooser, Verdict
from haast.engine.verify import verify
from haast.errors import HaastWarning, LongContextWarning, PrecisionWarning
from haast.files import check_writable, write_json
from haast.heads.checkpoint import save_head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.prompts import read_json_lines
from haast.target import load as models_module
from haast.tree import DraftTree
from haast.tuning.online import OnlinePolicy

SPECIAL = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EXACT = ["--dtype", "float64", "--packing", "off"]
SMALL = ["--depth", "2", "--draft-top-k", "2", "--width", "2", "--nodes", "5"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(hidden: int = 32) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=258,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=257,
        initializer_range=0.3,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate([*alphabet, *SPECIAL])}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    fast.chat_template = TEMPLATE
    return fast


def save_random_head(folder: Path, config: LlamaConfig) -> Path:
    torch.manual_seed(1)
    sizes = FeatExtrapolatorConfig.for_target(config)
    weights = FeatExtrapolator(sizes).state_dict()
    save_head(folder, sizes, dict(weights), torch.arange(0, 258, 2), {"note": "random"})
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, head/, other-head/ (another hidden size), prompts.jsonl, valid.jsonl."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    save_random_head(folder / "head", tiny_config())
    save_random_head(folder / "other-head", tiny_config(64))
    lines = [{"id": f"p{i}", "category": "ab"[i % 2], "turns": [f"Say {i}.", "Again."]} for i in range(3)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def haast_run(*words: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


def parts(home: Path) -> list[str]:
    return ["--model", str(home / "model"), "--head", str(home / "head"), *EXACT, *SMALL]


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("haast: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


# --- help


def test_help_answers_fast_without_torch() -> None:
    code = (
        "import sys, time; begun = time.process_time()\n"
        "sys.argv = ['haast', '--help']\n"
        "from haast.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'rich'} & set(sys.modules)\n"
        "print('cpu', time.process_time() - begun, 'heavy', sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    for command in ("generate", "chat", "regenerate", "train", "verify", "bench", "info"):
        assert command in done.stdout
    words = done.stderr.split()
    assert done.stderr.rstrip().endswith("heavy []")
    assert float(words[1]) < 0.5


@pytest.mark.parametrize("command", ["generate", "chat", "regenerate", "train", "verify", "bench", "info"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = haast_run(command, "--help")
    assert result.exit_code == 0
    assert f"  haast {command}" in result.output


def test_the_default_model_is_the_librarys() -> None:
    assert settings.DEFAULT_MODEL == models_module.DEFAULT_MODEL


# --- generate and chat


def test_generate_streams_what_the_library_says(home: Path, tmp_path: Path) -> None:
    result = haast_run("generate", "Hello", *parts(home), "--max-new-tokens", 12, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out.json").read_text())
    model = Haast.from_pretrained(str(home / "model"), head=None, dtype="float64", packing="off")
    wanted = model.generate("Hello", max_new_tokens=12)
    assert written["text"] == wanted.text and written["tokens"] == list(wanted.tokens)
    assert result.stdout == wanted.text + "\n"
    assert "\x1b" not in result.stdout  # no terminal, no colour
    assert "tokens/s, tau" in result.stderr
    assert written["stats"]["tau"] >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_generate_samples_alike_with_and_without_a_head(home: Path) -> None:
    law = ["--temperature", 1.0, "--seed", 5, "--max-new-tokens", 16, "--raw", "--json", "-"]
    drafted = document(haast_run("generate", "Hello", *parts(home), *law))
    vanilla = document(haast_run("generate", "Hello", *parts(home), "--head", "none", *law))
    assert drafted["tokens"] == vanilla["tokens"]


def test_generate_reads_stdin_and_stops_at_a_string(home: Path) -> None:
    whole = document(haast_run("generate", "-", *parts(home), "--max-new-tokens", 16, "--json", "-", stdin="Hello"))
    stop = whole["text"][3:5]
    cut = document(haast_run("generate", "Hello", *parts(home), "--stop", stop, "--json", "-"))
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]


def test_compare_says_the_same_text_and_the_speed_up(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["--compare", "--rounds", 2, "--max-new-tokens", 8, "--json", out]
    result = haast_run("generate", "Hello", *parts(home), *words)
    assert result.exit_code == 0, result.output
    assert "--- vanilla" in result.stdout and "the same text" in result.stdout and "speed-up" in result.stdout
    written = json.loads(out.read_text())
    speeds = written["tokens_per_s"]
    assert written["same"] and written["vanilla"]["tokens"] == written["eagle+suffix"]["tokens"]
    assert written["speedup"] == pytest.approx(speeds["eagle+suffix"] / speeds["vanilla"])


def test_interrupt_keeps_what_was_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def interrupted(*words: Any) -> Verdict:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return verify(*words)

    monkeypatch.setattr("haast.engine.step.verify", interrupted)
    result = haast_run("generate", "Hello", *parts(home), "--max-new-tokens", 50)
    assert result.exit_code == 130
    assert len(result.stdout) > 1 and "tau" in result.stderr


def test_colour_marks_drafted_text(home: Path) -> None:
    from io import StringIO

    from haast.api import Piece
    from haast.cli.generate import StreamedText

    out, said = StringIO(), StreamedText()
    said.consume([Piece("a", True, (1,)), Piece("b", False, (2,))], out, colour=True)
    assert out.getvalue() == "\x1b[32ma\x1b[0mb" and said.text == "ab" and said.tokens == [1, 2]


def test_chat_keeps_history_resets_and_leaves(home: Path) -> None:
    talk = "Hi\nAnd you?\n/reset\nHi\n/exit\nnever said\n"
    result = haast_run("chat", *parts(home), "--max-new-tokens", 6, stdin=talk)
    assert result.exit_code == 0, result.output
    answers = [line.removeprefix("> ") for line in result.stdout.split("> ")]
    assert answers[1] == answers[4] or answers[1].strip() == answers[4].strip()
    assert haast_run("chat", *parts(home), stdin="").exit_code == 0  # end of input


def test_chat_survives_an_interrupted_answer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def interrupted(*words: Any) -> Verdict:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return verify(*words)

    monkeypatch.setattr("haast.engine.step.verify", interrupted)
    result = haast_run("chat", *parts(home), "--max-new-tokens", 6, stdin="Hi\nGo on\n/exit\n")
    assert result.exit_code == 0, result.output
    assert "[cut short]" in result.stdout and result.stdout.count("> ") == 3


def test_chat_refuses_a_dialogue_beyond_the_context(home: Path) -> None:
    result = haast_run("chat", *parts(home), "--max-new-tokens", 4, stdin="x" * 300 + "\nHi\n/exit\n")
    assert result.exit_code == 0
    assert "too long" in result.stderr and "256" in result.stderr and "/reset" in result.stderr


# --- regenerate, train, info


def test_regenerate_then_train_then_generate(home: Path, tmp_path: Path) -> None:
    model, answers, run = ["--model", home / "model", *EXACT], tmp_path / "answers.jsonl", tmp_path / "run"
    make = ["regenerate", *model, "--prompts", home / "prompts.jsonl", "--turns", 1, "--out", answers, "--json", "-"]
    assert document(haast_run(*make, "--max-new-tokens", 12))["added"] == 3
    again = haast_run(*make)
    assert document(again)["added"] == 0 and len(list(read_json_lines(answers))) == 3
    model[2:4] = ["--dtype", "float32"]
    shown = haast_run("train", *model, "--answers", answers, "--out", run, "--show-data", 1)
    assert shown.exit_code == 0 and "tokens supervised" in shown.stdout
    length = ["--views", 60, "--draft-vocab", 64, "--batch-tokens", 64, "--valid-prompts", home / "prompts.jsonl"]
    length += ["--valid-limit", 1, "--valid-tokens", 6, "--topk", 4, "--valid-nodes", 5]
    trained = haast_run("train", *model, "--answers", answers, "--out", run, *length, "--json", "-")
    assert document(trained)["tau"] >= 1
    assert (run / "curves.png").exists() and list((run / "tensorboard").glob("events*"))
    card = (run / "best" / "README.md").read_text()
    assert "tau on validation prompts: " in card and "| answers |" in card and "learning_rate" in card
    about = json.loads((run / "best" / "config.json").read_text())["about"]
    assert about["views"] == 60 and about["tau"] >= 1
    refused(haast_run("train", *model, "--answers", answers, "--out", run, *length), "resume")
    for head in (run / "best", run):  # the folder of a run stands for the best head in it
        said = haast_run("generate", "Hi", *parts(home), "--head", head, "--max-new-tokens", 4)
        assert said.exit_code == 0, said.output
    others = answers.read_text().replace(str(home / "model"), "another-model")
    (tmp_path / "others.jsonl").write_text(others)
    foreign = ["train", *model, "--answers", tmp_path / "others.jsonl", "--out", tmp_path / "b", *length[:6]]
    warned = haast_run(*foreign, "--views", 20)
    assert "3 of 3 answers are from another-model" in warned.stderr
    untrained = ["--initialisation", "random", "--learning-rate", 1e-9, *length[6:]]
    alarmed = haast_run(
        "train", *model, "--answers", tmp_path / "others.jsonl", "--out", tmp_path / "c", *length[:6], *untrained
    )
    assert "suspect  answers" in alarmed.stdout and "3 of 3 are from another model" in alarmed.stdout


def test_train_from_shards_and_self_test(home: Path, tmp_path: Path) -> None:
    model = ["--model", home / "model", "--packing", "off"]
    answers, shards, run = tmp_path / "answers.jsonl", tmp_path / "shards", tmp_path / "run"
    prompts = ["--prompts", home / "prompts.jsonl", "--max-new-tokens", 16]
    made = haast_run("regenerate", *model, *prompts, "--out", answers, "--shards", shards, "--topk", 4)
    assert made.exit_code == 0, made.output
    test = haast_run("train", *model, "--shards", shards, "--out", run, "--topk", 4, "--self-test", "--json", "-")
    assert document(test)["self_test"] > 0.9
    short = ["--views", 40, "--topk", 4, "--json", "-"]
    assert "head" in document(haast_run("train", *model, "--shards", shards, "--out", run, *short))
    assert "head" in document(haast_run("train", *model, "--shards", shards, "--out", run, *short, "--resume"))


def test_shards_are_narrowed_to_the_given_answers(home: Path, tmp_path: Path) -> None:
    model = ["--model", home / "model", "--packing", "off", "--topk", 4]
    answers, shards = tmp_path / "answers.jsonl", tmp_path / "shards"
    made = ["regenerate", *model, "--prompts", home / "prompts.jsonl", "--max-new-tokens", 16, "--out", answers]
    assert haast_run(*made, "--shards", shards).exit_code == 0
    first = json.loads(answers.read_text().splitlines()[0])
    train = ["train", *model, "--shards", shards, "--views", 20]
    for name, more in (("answers", ["--answers", answers, "--limit", 1]), ("limit", ["--limit", 1])):
        assert haast_run(*train, *more, "--out", tmp_path / name).exit_code == 0
        about = json.loads((tmp_path / name / "best" / "config.json").read_text())["about"]
        assert about["sequences"] == 1
        if name == "answers":
            assert about["supervised_tokens"] == len(first["response_ids"])
    gz = [*made[:-1], tmp_path / "answers.jsonl.gz"]
    refused(haast_run(*gz), "without .gz")


def test_an_eagle3_head_trains_and_drafts(home: Path, tmp_path: Path) -> None:
    model = ["--model", home / "model", "--packing", "off"]
    answers, run = tmp_path / "answers.jsonl", tmp_path / "run"
    prompts = ["--prompts", home / "prompts.jsonl", "--max-new-tokens", 16]
    assert haast_run("regenerate", *model, *prompts, "--out", answers).exit_code == 0
    sizes = ["--views", 60, "--draft-vocab", 64, "--topk", 4, "--alignment-steps", 3, "--fc-norm", "--markov-rank", 2]
    trained = haast_run("train", *model, "--head", "eagle3", "--answers", answers, "--out", run, *sizes, "--json", "-")
    assert document(trained)["metrics"][-1]["views"] >= 60
    said = haast_run("generate", "Hi", *model, "--head", run / "best", "--max-new-tokens", 8, "--compare")
    assert said.exit_code == 0 and "the same text" in said.output, said.output
    begin = ["--start-from", run / "best", "--out", tmp_path / "next", *sizes[:6]]
    refused(haast_run("train", *model, "--answers", answers, *begin), "is another kind than --head")
    refused(haast_run("train", *model, "--answers", answers, *begin, "--head", "eagle3"), "'markov_rank': (2, 0)")
    begun = haast_run("train", *model, "--answers", answers, *begin[:4], *sizes, "--head", "eagle3")
    assert begun.exit_code == 0, begun.output


def test_medusa_heads_train_and_draft(home: Path, tmp_path: Path) -> None:
    model = ["--model", home / "model", "--packing", "off"]
    answers, run = tmp_path / "answers.jsonl", tmp_path / "run"
    prompts = ["--prompts", home / "prompts.jsonl", "--max-new-tokens", 16]
    assert haast_run("regenerate", *model, *prompts, "--out", answers).exit_code == 0
    sizes = ["--head", "medusa", "--views", 60, "--draft-vocab", 64, "--topk", 4, "--medusa-heads", 2]
    valid = ["--valid-prompts", home / "prompts.jsonl", "--valid-limit", 1, "--valid-tokens", 8]
    trained = haast_run("train", *model, "--answers", answers, "--out", run, *sizes, *valid, "--json", "-")
    assert document(trained)["tau"] >= 1.0
    head = run / "best"
    about = json.loads((head / "config.json").read_text())["about"]
    assert len(about["rank_accuracies"]) == 2 and len(about["rank_accuracies"][0]) == 10
    assert "Medusa heads" in (head / "README.md").read_text()
    said = haast_run("generate", "Hi", *model, "--head", head, "--max-new-tokens", 8, "--compare")
    assert said.exit_code == 0 and "the same text" in said.output, said.output
    checked = haast_run("verify", *model, "--head", head, "--limit", 1, "--max-new-tokens", 8, "--samples", 50)
    assert checked.exit_code == 0, checked.output
    told = document(haast_run("info", *model, "--head", head, "--json", "-"))
    assert told["drafting"]["shape"]["kind"] == "static"
    refused(haast_run("calibrate", *model, "--head", head), "must be an EAGLE head")
    bench = ["bench", *model, "--prompts", home / "prompts.jsonl", "--limit", 1, "--max-new-tokens", 8]
    both = ["--head", "none", "--decoders", "vanilla,medusa"]
    refused(haast_run(*bench, *both), "--medusa-head DIR go together")
    measured = document(haast_run(*bench, *both, "--medusa-head", run, "--medusa-nodes", 4, "--json", "-"))
    assert [row["decoder"] for row in measured["rows"]] == ["vanilla", "medusa"] and not measured["differences"]


@pytest.mark.slow
def test_several_processes_train_from_shards_and_one_speaks(home: Path, tmp_path: Path) -> None:
    model = ["--model", home / "model", "--packing", "off", "--topk", 4]
    answers, shards, run = tmp_path / "answers.jsonl", tmp_path / "shards", tmp_path / "run"
    made = ["regenerate", *model, "--prompts", home / "prompts.jsonl", "--max-new-tokens", 16, "--out", answers]
    assert haast_run(*made, "--shards", shards).exit_code == 0
    begin = ["-m", "haast", "train", *model, "--views", 60, "--out", run]
    refusal = launch(*begin, "--answers", answers, processes=2)
    assert refusal.returncode and "by 2 processes at once" in refusal.stderr and not (run / "best").exists()
    done = launch(*begin, "--shards", shards, "--json", tmp_path / "run.json", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the best head is in") == 1
    assert json.loads((tmp_path / "run.json").read_text())["metrics"][-1]["views"] >= 60
    alone = haast_run("train", *model, "--shards", shards, "--out", tmp_path / "x", "--shard")
    refused(alone, "accelerate launch")


def test_info_states_model_and_head(home: Path) -> None:
    facts = document(haast_run("info", *parts(home), "--json", "-"))
    stock = LlamaForCausalLM(tiny_config())
    assert facts["model"]["parameters"] == sum(p.numel() for p in stock.parameters())
    assert facts["head"]["draft_vocab"] == 129 and facts["head"]["about"] == {"note": "random"}
    assert set(facts["haast"]) >= {"torch", "transformers", "threads", "native_kernels", "native_why_not"}
    lost = haast_run("info", *parts(home), "--head", home / "nowhere", "--json", "-")
    assert lost.exit_code == 1 and "nowhere" in json.loads(lost.stdout)["head"]["problem"]
    assert haast_run("--version").stdout.startswith("haast ")
    assert "draft_vocab" in haast_run("info", *parts(home)).stdout


def test_packed_parameters_are_counted(home: Path) -> None:
    packed = ["--model", home / "model", "--head", "none", "--packing", "f16", "--json", "-"]
    facts = document(haast_run("info", *packed))
    stock = LlamaForCausalLM(tiny_config())
    assert facts["model"]["packed_linears"] > 0
    assert facts["model"]["parameters"] == sum(p.numel() for p in stock.parameters())


# --- verify


def test_verify_finds_nothing_wrong(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "verify.json"
    words = ["--prompts", home / "prompts.jsonl", "--limit", 2, "--max-new-tokens", 12, "--samples", 300, "--json", out]
    result = haast_run("verify", *parts(home), *words)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert written["bugs"] == written["ties"] == 0
    assert [c["check"] for c in written["comparisons"]] == ["greedy", "sampled"] * 2
    assert [law["expected_to_fail"] for law in written["laws"][:2]] == [False, True]
    assert len(written["laws"]) >= 3 and all(law["passed"] for law in written["laws"])


def test_verify_drafts_where_drafts_do_not_pay(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would compare vanilla with vanilla."""
    monkeypatch.setattr(OnlinePolicy, "drafting_off", lambda self, rows: True)
    monkeypatch.setattr(OnlinePolicy, "budget", lambda self, requests: 1)
    tuned = parts(home)[: -len(SMALL)]
    words = ["--prompts", home / "prompts.jsonl", "--limit", 1, "--max-new-tokens", 12, "--samples", 0]
    out = tmp_path / "verify.json"
    result = haast_run("verify", *tuned, *words, "--json", out)
    assert result.exit_code == 0 and "do not pay on this machine" in result.stdout, result.output
    assert all(each["drafts"] > 0 for each in json.loads(out.read_text())["comparisons"])
    one = haast_run("verify", *tuned, *words[:4], "--max-new-tokens", 1, "--samples", 0)
    assert "nothing was drafted" in one.stdout


def test_verify_exits_1_on_a_planted_bug(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def credulous(
        tree: DraftTree, logits: Any, choosers: Sequence[TokenChooser], histories: Any, failures: Any = None
    ) -> Verdict:
        """Accepts the first draft unseen."""
        rows: list[RowVerdict | None] = []
        for row, (chooser, history) in enumerate(zip(choosers, histories, strict=True)):
            children = tree.children(row)[0]
            if not children:
                rows.append(RowVerdict((0,), (chooser.choose(history, logits[row, 0]),), ()))
                continue
            child = children[0]
            token = int(tree.tokens[row, child])
            bonus = chooser.choose([*history, token], logits[row, child])
            rows.append(RowVerdict((0, child), (token, bonus), (True,)))
        return Verdict.of_rows(rows, tree.tokens.device)

    monkeypatch.setattr("haast.engine.step.verify", credulous)
    words = ["--prompts", home / "prompts.jsonl", "--limit", 1, "--max-new-tokens", 12]
    result = haast_run("verify", *parts(home), *words, "--samples", 0)
    assert result.exit_code == 1, result.output
    assert "BUG at token 1" in result.stdout
    tests = haast_run("verify", *parts(home), *words[:-1], 1, "--samples", 300)  # one token: no draft, so only the laws
    assert tests.exit_code == 1
    assert "strings of length 3: p = 0" in tests.stdout and "BUG" in tests.stdout
    bench = haast_run("bench", *parts(home), *words, "--json", "-")
    assert bench.exit_code == 1 and "haast verify" in bench.stderr


# --- bad input, before the model loads


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(*_words: Any, **_more: Any) -> None:
        raise AssertionError("the model was loaded before the input was checked")

    monkeypatch.setattr("haast.target.load.load_target", loads)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--top-p", "0"], "top_p=0.0"),
        (["--nodes", "1"], "nodes=1"),
        (["--depth", "0"], "depth=0"),
        (["--shape", "bush"], "bush"),
        (["--threads", "0"], "threads=0"),
        (["--dtype", "int4"], "int4"),
        (["--device", "abacus"], "abacus"),
        (["--packing", "f8"], "f8"),
        (["--stop", ""], "--stop"),
        (["--model", "./nowhere"], "./nowhere"),
        (["--head", "./nowhere"], "nowhere"),
        (["--head", "default"], "no head is shipped"),
        (["--json", "/nowhere/out.json"], "/nowhere/out.json"),
        (["--compare", "--rounds", "0"], "rounds=0"),
    ],
)
def test_generate_refuses(home: Path, words: list[str], named: str) -> None:
    result = haast_run("generate", "Hello", "--model", home / "model", "--head", home / "head", *words)
    refused(result, named)


@pytest.mark.usefixtures("no_loading")
def test_heads_that_do_not_fit_are_refused(home: Path, tmp_path: Path) -> None:
    model = ["--model", home / "model"]
    refused(haast_run("generate", "Hello", *model, "--head", home / "other-head"), "hidden_size is 64", "32")
    corrupt = save_random_head(tmp_path / "head", tiny_config())
    (corrupt / "config.json").write_text("{")
    refused(haast_run("generate", "Hello", *model, "--head", corrupt), "not JSON")
    refused(haast_run("generate", "", *model, "--head", home / "head"), "empty")


def test_corrupt_weights_and_long_prompts_are_refused(home: Path, tmp_path: Path) -> None:
    corrupt = save_random_head(tmp_path / "head", tiny_config())
    (corrupt / "model.safetensors").write_bytes(b"\x08garbage")
    refused(haast_run("generate", "Hello", *parts(home), "--head", corrupt), "model.safetensors", "corrupt")
    refused(haast_run("generate", "x" * 300, *parts(home)), "256")
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "long", "prompt": "x" * 300}) + "\n")
    refused(haast_run("bench", *parts(home), "--prompts", tmp_path / "long.jsonl"), "'long'", "256")


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("command", ["verify", "bench", "regenerate"])
def test_prompt_files_are_checked_first(home: Path, tmp_path: Path, command: str) -> None:
    own = ["--out", tmp_path / "out.jsonl"] if command == "regenerate" else ["--head", home / "head"]
    begin = [command, "--model", home / "model", *own, "--prompts"]
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(haast_run(*begin, tmp_path / "empty.jsonl"), "holds no prompts")
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    refused(haast_run(*begin, tmp_path / "torn.jsonl"), "line 2")
    refused(haast_run(*begin, tmp_path / "nowhere.jsonl"), "nowhere.jsonl")
    refused(haast_run(*begin, home / "prompts.jsonl", "--limit", 0), "limit=0")
    below_a_file = tmp_path / "empty.jsonl" / "out.json"
    refused(haast_run(*begin, home / "prompts.jsonl", "--json", below_a_file), str(below_a_file))
    if command == "regenerate":
        begin[4] = tmp_path / "empty.jsonl" / "answers.jsonl"
        refused(haast_run(*begin, home / "prompts.jsonl"), "cannot write")


@pytest.mark.usefixtures("no_loading")
def test_train_refuses_before_loading(home: Path, tmp_path: Path) -> None:
    model = ["train", "--model", home / "model", "--out"]
    refused(haast_run(*model, tmp_path), "--answers")
    refused(haast_run(*model, tmp_path, "--shards", tmp_path), "no feature shards")
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": "a", "prompt": "b", "response": "c", "response_ids": [1, 2, 3]}\n{"id": "d"}\n')
    refused(haast_run(*model, tmp_path / "run", "--answers", answers), "line 2")
    answers.write_text(answers.read_text().splitlines()[0])
    refused(haast_run(*model, answers / "run", "--answers", answers), "cannot write")
    refused(haast_run(*model, tmp_path / "run", "--answers", answers, "--views", 0), "views=0")
    refused(haast_run(*model, tmp_path / "run", "--answers", answers, "--start-from", tmp_path / "x"), "no head at")
    refused(haast_run(*model, tmp_path / "run", "--answers", answers, "--start-from", "default"), "no head is shipped")


def test_debug_shows_the_traceback(home: Path) -> None:
    words = ["generate", "Hello", "--model", home / "model", "--nodes", 0]
    assert "Traceback" not in haast_run(*words).stderr
    assert "Traceback" in haast_run("--debug", *words).stderr


def test_results_go_through_links_and_into_pipes(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    write_json({"a": 1}, str(link))
    assert link.is_symlink() and json.loads(real.read_text()) == {"a": 1}
    check_writable("/dev/null")
    write_json({"a": 1}, "/dev/null")
    assert not Path("/dev/null").is_file()
    with pytest.raises(ValueError, match="~nobody-of-this-name"):
        check_writable("~nobody-of-this-name/x.json")


def test_an_error_of_our_own_is_one_line_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr("haast.target.load.load_target", broken)
    result = haast_run("generate", "Hi", *parts(home))
    assert result.exit_code == 3 and result.stderr.count("\n") == 1
    assert "internal error" in result.stderr and "planted" in result.stderr


@pytest.mark.parametrize("category", [LongContextWarning, PrecisionWarning, UserWarning])
def test_a_warning_of_our_own_is_one_line_too(
    home: Path, monkeypatch: pytest.MonkeyPatch, category: type[Warning]
) -> None:
    """pytest takes warnings before they are shown, so the command's way to show one is asked for itself."""
    real, shown = models_module.load_target, []

    def watched(*given: Any, **more: Any) -> Any:
        shown.append(warnings.formatwarning("planted", category, "models.py", 3))
        return real(*given, **more)

    monkeypatch.setattr("haast.target.load.load_target", watched)
    assert haast_run("generate", "Hi", *parts(home)).exit_code == 0
    own = issubclass(category, HaastWarning)
    assert (shown == ["haast: warning: planted\n"]) == own and ("models.py" in shown[0]) != own


def heard(caplog: pytest.LogCaptureFixture, name: str) -> bool:
    """Whether this pytest hears a logger: torch's do not reach the root, where older ones listen."""
    logging.getLogger(name).error("a probe")
    found = any(record.getMessage() == "a probe" for record in caplog.records)
    caplog.clear()
    return found


def test_what_libraries_log_at_import_stays_out_of_commands(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, pytree = models_module.load_target, heard(caplog, "torch.utils._pytree")

    def watched(*given: Any, **more: Any) -> Any:
        for name in ("torchao", "torchao.kernel", "torch.utils._pytree", "elsewhere"):
            logging.getLogger(name).warning("planted by %s", name)
            logging.getLogger(name).error("broken in %s", name)
        return real(*given, **more)

    monkeypatch.setattr("haast.target.load.load_target", watched)
    before = logging.getLogger("torchao").level
    assert haast_run("generate", "Hi", *parts(home)).exit_code == 0
    told = [record.getMessage() for record in caplog.records]
    assert [words for words in told if words.startswith("planted")] == ["planted by elsewhere"]
    assert len([words for words in told if words.startswith("broken")]) == 3 + pytree
    assert logging.getLogger("torchao").level == before


@pytest.mark.parametrize(
    "begin",
    [
        "from haast import Haast",
        pytest.param("import haast.engine.engine; from haast.api import Haast", marks=pytest.mark.slow),
    ],
)
def test_the_library_says_nothing_while_it_is_imported_and_loads(home: Path, begin: str) -> None:
    """Where torchao is installed, transformers imports it, and it has a lot to tell."""
    code = f"import sys; {begin}; Haast.from_pretrained(sys.argv[1], head=None).generate('Hi', max_new_tokens=2)"
    done = subprocess.run([sys.executable, "-c", code, home / "model"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_the_library_says_nothing_while_the_real_model_loads() -> None:
    code = "from haast import Haast; Haast.from_pretrained()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_libraries_log_later_reaches_users_of_the_library(caplog: pytest.LogCaptureFixture) -> None:
    pytree = heard(caplog, "torch.utils._pytree")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).warning("planted by %s", name)
        exec(
            "logger.warning('at import'); logger.error('broken')", {"logger": logging.getLogger(name)}
        )  # a module's code
    told = [record.getMessage() for record in caplog.records]
    assert told == ["planted by torchao", "broken", *["planted by torch.utils._pytree", "broken"] * pytree]


def test_a_torn_model_is_named(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "model", tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused(haast_run("generate", "Hi", "--model", tmp_path / "torn", "--head", "none"), "can't load the model", "torn")


# --- long texts


def test_generate_takes_a_chunk_and_a_window(home: Path) -> None:
    words = ["generate", "a word", *parts(home), "--max-new-tokens", 12, "--json", "-"]
    plain, small = haast_run(*words), haast_run(*words, "--prefill-chunk", 3, "--draft-window", 2)
    assert plain.exit_code == small.exit_code == 0, plain.output + small.output
    assert json.loads(plain.stdout)["text"] == json.loads(small.stdout)["text"]
    assert sum(each["target_forwards"] for each in json.loads(small.stdout)["stats"]["by_length"]) > 0
    for setting in ("--prefill-chunk", "--draft-window"):
        wrong = haast_run(*words, setting, 0)
        name = setting.removeprefix("--").replace("-", "_")
        assert wrong.exit_code == 2 and f"{name}=0 is not allowed" in wrong.stderr


def test_bench_records_both(home: Path, tmp_path: Path) -> None:
    words = ["bench", "--prompts", home / "prompts.jsonl", *parts(home), "--max-new-tokens", 6, "--warmup", 0]
    out = tmp_path / "bench.json"
    done = haast_run(*words, "--prefill-chunk", 5, "--draft-window", 4, "--json", out)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["environment"]["settings"]["draft_window"] == 4
    assert found["environment"]["settings"]["prefill_chunk"] == 5
    assert all(row["by_length"][0]["target_forwards"] == row["target_forwards"] for row in found["rows"])
