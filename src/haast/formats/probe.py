"""Probes the open conventions of a head: measures each reading of its files on the target's own greedy text.

Owns the measurement and the choice. For each reading, it counts how many tokens of a drafted chain the target would
accept, at every position of the text. A reading other than the default is chosen only if it is significantly better.
Readings that can't be distinguished are reported.

    pairs of depth 0    (f_0, x_1)  (f_1, x_2)  ...           states s_0, s_1, ... predict x_2, x_3, ...
    pairs of depth 1    (s_0, x_2)  (s_1, x_3)  ...           each attends to depth 0 up to its own position,
    pairs of depth d                                          and to its own position at all smaller depths
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from haast.device import without_autograd
from haast.formats.base import Question, Reading
from haast.heads.block import BlockHead
from haast.heads.checkpoint import build_module
from haast.heads.medusa import MedusaHeads
from haast.heads.module import DraftModule
from haast.target.target import Target
from haast.tree import DraftTree

DEPTHS = 3
_BLOCKS = 32  # blocks of a block head that are measured at a time
TOKENS = 208  # greedy tokens over all prompts
# In standard errors: above the first, a reading is better; below the second, two readings are indistinguishable.
_BETTER_ERRORS, _SAME_ERRORS = 3.5, 2.0
_MIN_GAIN = 0.05  # in tau, for a reading to be better
# Short prompts of several kinds.
PROMPTS = (
    "Explain in a few sentences why the sky looks blue during the day and red in the evening.",
    "Write a Python function that returns the n-th Fibonacci number, and say how it works.",
    "List five things that a small town can do to become friendlier to people on bicycles.",
    "A train leaves at noon and travels 180 kilometres in two hours. How fast is it? Think step by step.",
)


@dataclass(frozen=True)
class Text:
    """A prompt and the target's greedy answer.

    Attributes:
        tokens: (n,) int64, of prompt and answer.
        features: (n - 1, H), of the target's last layer.
        hidden: layer -> (n - 1, H), of the layers that heads read.
        begin: index of the prompt's last token.
    """

    tokens: Tensor
    features: Tensor
    hidden: dict[int, Tensor]
    begin: int

    @property
    def pairs(self) -> int:
        """The number of positions for which the text is long enough to verify a chain of `DEPTHS` drafts."""
        return len(self.tokens) - 1 - DEPTHS


@dataclass(frozen=True)
class Agreement:
    """How well a reading drafts. `accepted`: (positions,) int64, accepted drafts of a chain of `DEPTHS`."""

    accepted: Tensor

    @property
    def first(self) -> float:
        """The share of positions whose first draft is accepted; 0 without positions."""
        return float((self.accepted > 0).double().mean()) if len(self.accepted) else 0.0

    @property
    def tau(self) -> float:
        """Tokens per step with chains of `DEPTHS` drafts, the bonus token included."""
        return 1.0 + float(self.accepted.double().mean()) if len(self.accepted) else 1.0

    def above(self, other: Agreement) -> float:
        """By how many standard errors this is better than `other`, paired by position."""
        difference = (self.accepted - other.accepted).double()
        deviation = float(difference.std()) if len(difference) > 1 else 0.0
        return float(difference.mean()) / (deviation / len(difference) ** 0.5) if deviation else 0.0


@dataclass(frozen=True)
class Trial:
    """One answer to one question, measured with the chosen answers to all other questions.

    Attributes:
        question, answer: the labels that users see.
        agreement: the measurement.
        kept: whether this is the chosen answer.
    """

    question: str
    answer: str
    agreement: Agreement
    kept: bool


@dataclass(frozen=True)
class ProbeResult:
    """The result of probing a head.

    Attributes:
        reading: the chosen reading.
        agreement: its measurement.
        tried: all answers to all questions.
        unsure: messages about answers that draft alike.
    """

    reading: Reading
    agreement: Agreement
    tried: tuple[Trial, ...]
    unsure: tuple[str, ...]

    @property
    def changed(self) -> list[Trial]:
        """The chosen answers that differ from the defaults of the files."""
        first: dict[str, str] = {}
        for trial in self.tried:
            first.setdefault(trial.question, trial.answer)
        return [trial for trial in self.tried if trial.kept and trial.answer != first[trial.question]]


def probe_conventions(
    target: Target,
    reading: Reading,
    questions: Sequence[Question],
    texts: Sequence[Text] | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> ProbeResult:
    """Answer the questions by measuring, one after another, in two passes: a later answer may change an earlier one.

    Args:
        target: the target that the head is for.
        reading: the default reading.
        questions: the open questions.
        texts: greedy text of the target; generated if absent.
        report: called with a progress message.
    """
    search = _Search(target, reading, questions, report)
    if texts is None:
        layers = layers_of([search.read(answers) for answers in _one_changed(questions)])
        texts = own_text(target, layers, report=report)
    search.texts = texts
    for _ in range(2):
        if not search.improve():
            break
    tried, unsure = search.trials()
    return ProbeResult(search.read(search.chosen), search.measured(search.chosen), tried, unsure)


class _Search:
    """Coordinate search over the answers, with a cache of measurements."""

    def __init__(
        self, target: Target, reading: Reading, questions: Sequence[Question], report: Callable[[str], None]
    ) -> None:
        self.target, self.reading, self.questions, self.report = target, reading, questions, report
        self.texts: Sequence[Text] = ()
        self.chosen = [0] * len(questions)
        self._measured: dict[tuple[int, ...], Agreement] = {}

    def read(self, answers: Sequence[int]) -> Reading:
        """The reading with these answers."""
        reading = self.reading
        for question, answer in zip(self.questions, answers, strict=True):
            reading = question.options[answer].change(reading)
        return reading

    def measured(self, answers: Sequence[int]) -> Agreement:
        """The measurement of the reading with these answers, from the cache if possible."""
        key = tuple(answers)
        if key not in self._measured:
            self.report(f"trying reading {len(self._measured) + 1}")
            self._measured[key] = agreement(self.target, self.read(key), self.texts)
        return self._measured[key]

    def with_answer(self, index: int, answer: int) -> list[int]:
        """The chosen answers with the one at `index` replaced."""
        return [*self.chosen[:index], answer, *self.chosen[index + 1 :]]

    def improve(self) -> bool:
        """Answer every question once, given the other answers. Returns whether an answer changed."""
        before = list(self.chosen)
        for index, question in enumerate(self.questions):
            for answer in range(len(question.options)):
                answers = self.with_answer(index, answer)
                measured, best = self.measured(answers), self.measured(self.chosen)
                if measured.above(best) > _BETTER_ERRORS and measured.tau > best.tau + _MIN_GAIN:
                    self.chosen = answers
        return self.chosen != before

    def trials(self) -> tuple[tuple[Trial, ...], tuple[str, ...]]:
        """The chosen answers with each one varied alone, and messages about variations that draft alike."""
        best, tried, unsure = self.measured(self.chosen), [], []
        for index, question in enumerate(self.questions):
            for answer, option in enumerate(question.options):
                measured, kept = self.measured(self.with_answer(index, answer)), answer == self.chosen[index]
                tried.append(Trial(question.name, option.label, measured, kept))
                if not kept and abs(best.above(measured)) < _SAME_ERRORS:
                    label = question.options[self.chosen[index]].label
                    unsure.append(f"{question.name}: {label} (kept) and {option.label} draft alike")
        return tuple(tried), tuple(unsure)


def _one_changed(questions: Sequence[Question]) -> list[list[int]]:
    """The default answers, and all answers that differ from them in one question."""
    first = [0] * len(questions)
    return [first] + [
        [*first[:index], answer, *first[index + 1 :]]
        for index, question in enumerate(questions)
        for answer in range(1, len(question.options))
    ]


def layers_of(readings: Sequence[Reading]) -> list[int]:
    """All target layers that any of the readings uses."""
    ids = itertools.chain.from_iterable(getattr(reading.config, "layer_ids", ()) for reading in readings)
    return sorted(set(ids))


@without_autograd
def own_text(
    target: Target, layers: Sequence[int], tokens: int = TOKENS, report: Callable[[str], None] = lambda _: None
) -> list[Text]:
    """Greedy answers of the target with their features, about `tokens` tokens over all prompts."""
    texts: list[Text] = []
    generated, share = 0, -(-tokens // len(PROMPTS))
    for prompt in _prompts(target):
        if generated >= tokens:
            break
        with target.lock:
            text = _answer(target, prompt, share + 1, layers)
        generated += len(text.tokens) - len(prompt)
        report(f"{generated} of {tokens} tokens of the target's own text")
        if len(text.tokens) > len(prompt) + DEPTHS:  # a shorter text can't verify a whole chain
            texts.append(text)
    return texts


def _answer(target: Target, prompt: list[int], max_new_tokens: int, layers: Sequence[int]) -> Text:
    """Decode a greedy answer of at most `max_new_tokens` tokens."""
    tokens, features = list(prompt), list[Tensor]()
    hidden: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    cache, pending = target.new_cache(1, len(prompt) + max_new_tokens), list(prompt)
    for _ in range(max_new_tokens):
        tree = DraftTree.chain(torch.tensor([pending], device=target.device))
        output = target.forward(tree, cache, last_only=True, hidden_layers=layers)
        cache.advance([len(pending)])
        features.append(output.features[0])
        for layer in layers:
            hidden[layer].append(output.hidden[layer][0])
        token = int(output.logits[0, -1].argmax())
        tokens.append(token)
        if token in target.end_ids:
            break
        pending = [token]
    states = {layer: torch.cat(parts) for layer, parts in hidden.items()}
    return Text(torch.tensor(tokens, device=target.device), torch.cat(features), states, len(prompt) - 1)


def _prompts(target: Target) -> list[list[int]]:
    """Encoded prompts, with the chat template if there is one; without a tokenizer, random tokens."""
    tokenizer = target.tokenizer
    if tokenizer is None:
        rows = torch.randint(target.vocab_size, (64, 8), generator=torch.Generator().manual_seed(0))
        return [row.tolist() for row in rows]
    if tokenizer.chat_template is None:
        return [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS * 4]
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS * 4]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


@without_autograd
def agreement(target: Target, reading: Reading, texts: Sequence[Text]) -> Agreement:
    """Measure how well the head, in this reading, drafts on these texts."""
    module = module_of(target, reading).to(target.device, target.dtype).eval()
    count = {MedusaHeads: _accepted_medusa, BlockHead: _accepted_block}.get(type(module), _accepted_eagle)
    vocab = None if reading.draft_vocab is None else reading.draft_vocab.to(target.device)
    with target.lock:
        counts = [count(target, module, vocab, text) for text in texts]  # type: ignore[operator]
    distinct = _distinct_positions(texts)
    return Agreement(torch.cat([torch.zeros(0, dtype=torch.int64), *(each.cpu() for each in counts)])[distinct])


def _distinct_positions(texts: Sequence[Text]) -> list[int]:
    """The positions that count: those of the answers, each n-gram only once.

    Greedy text may repeat itself; the repetitions are no independent evidence.
    """
    seen, kept, offset = set[tuple[int, ...]](), list[int](), 0
    for text in texts:
        tokens = text.tokens.tolist()
        for position in range(text.pairs):
            ngram = tuple(tokens[max(position - 1, 0) : position + 3])
            if position >= text.begin - 1 and ngram not in seen:
                seen.add(ngram)
                kept.append(offset + position)
        offset += text.pairs
    return kept


def module_of(target: Target, reading: Reading) -> DraftModule | MedusaHeads:
    """The head's module; without an LM head of its own it gets the target's rows."""
    weights, vocab = dict(reading.weights), reading.draft_vocab
    if reading.shares_lm_head:
        ids = torch.arange(target.vocab_size) if vocab is None else vocab
        weights["lm_head.weight"] = target.head_rows(ids.to(target.device)).float().cpu()
    module = build_module(reading.config, None if vocab is None else len(vocab))
    dtype = next(iter(weights.values())).dtype
    module.to(dtype).load_state_dict(weights)
    return module.requires_grad_(False)


def _accepted_eagle(target: Target, module: DraftModule, vocab: Tensor | None, text: Text) -> Tensor:
    """(pairs,) int64: accepted drafts after every position of the text."""
    tokens, pairs = text.tokens, text.pairs
    parts = [text.hidden[layer] for layer in module.target_layers] or [text.features]
    states = module.fuse(torch.cat([part[:pairs] for part in parts], dim=-1).unsqueeze(0))
    embed = module.embedding(target.borrowed(target.embedding))
    shift, masked = int(module.follows_token), module.masked()
    inputs, embedded, outputs = states, list[Tensor](), list[Tensor]()
    alive = torch.ones(pairs, dtype=torch.bool, device=tokens.device)
    accepted = torch.zeros(pairs, dtype=torch.int64, device=tokens.device)
    for depth in range(DEPTHS):
        token = tokens[depth + shift : depth + shift + pairs]
        if depth and masked is not None:
            token = torch.full_like(token, masked[0])
        embedded.append(embed(token.unsqueeze(0)).to(tokens.device))
        if depth:
            fed_back = outputs[-1] if masked is None else masked[1].expand(1, pairs, -1)
            inputs = torch.cat([inputs, fed_back], dim=1)
        outputs.append(_draft_states(module, torch.cat(embedded, dim=1), inputs, depth + 1, pairs)[:, -pairs:])
        logits = _logits(target, module, vocab, outputs[-1], tokens[depth + 1 : depth + 1 + pairs].unsqueeze(0))[0]
        best = logits.argmax(-1)
        best = best if vocab is None else vocab[best]
        alive = alive & (best == tokens[depth + 2 : depth + 2 + pairs])
        accepted += alive
    return accepted


def _draft_states(module: DraftModule, embeddings: Tensor, states: Tensor, depths: int, pairs: int) -> Tensor:
    """Run the head over the pairs of several depths, (1, depths * pairs, hidden); the module docstring has the mask."""
    position = torch.arange(pairs, device=states.device).repeat(depths)
    depth = torch.arange(depths, device=states.device).repeat_interleave(pairs)
    prefix = (depth.unsqueeze(0) == 0) & (position.unsqueeze(0) <= position.unsqueeze(1))
    own = (position.unsqueeze(0) == position.unsqueeze(1)) & (depth.unsqueeze(0) <= depth.unsqueeze(1))
    bias = torch.zeros(len(position), len(position), dtype=states.dtype, device=states.device)
    bias = bias.masked_fill(~(prefix | own), torch.finfo(states.dtype).min)
    output: Tensor = module(embeddings, states, (position + depth).unsqueeze(0), bias[None, None])
    return output


def _logits(target: Target, module: DraftModule, vocab: Tensor | None, states: Tensor, tokens: Tensor) -> Tensor:
    hidden = module.lm_input(states, tokens)
    if not module.own_lm_head and vocab is None and not module.config.markov_rank:
        return target.head_logits(hidden)
    ids = torch.arange(target.vocab_size, device=states.device) if vocab is None else vocab
    logits: Tensor = hidden @ module.lm_rows(target.head_rows(ids)).T
    bias = None if module.own_lm_head else target.head_bias(ids)
    return logits if bias is None else logits + bias


def _accepted_block(target: Target, module: BlockHead, vocab: Tensor | None, text: Text) -> Tensor:
    """`_accepted_eagle` for block heads: the block after position t is anchored at the token of t + 1."""
    tokens, pairs, depths = text.tokens, text.pairs, min(DEPTHS, module.config.depths)
    context = module.fuse(torch.cat([text.hidden[layer][:pairs] for layer in module.target_layers], dim=-1))
    embed, places = module.embedding(target.borrowed(target.embedding)), torch.arange(1, pairs + 1).to(context.device)
    states = torch.cat([module.at_anchors(context, embed, tokens[part], part) for part in torch.split(places, _BLOCKS)])
    guesses = []
    for depth in range(depths):
        before = tokens[depth + 1 : depth + 1 + pairs]
        logits = _logits(target, module, vocab, states[:, depth].unsqueeze(0), before.unsqueeze(0))[0]
        bias = module.markov_bias(module.normed(states[:, depth]), before)
        guesses.append((logits if bias is None else logits + bias).argmax(-1))
    return _followed(text, guesses, vocab)


def _accepted_medusa(target: Target, module: MedusaHeads, vocab: Tensor | None, text: Text) -> Tensor:
    """`_accepted_eagle` for Medusa heads: head i at position t predicts the token at t + 2 + i."""
    return _followed(text, module(text.features[: text.pairs])[:DEPTHS].argmax(-1), vocab)


def _followed(text: Text, guesses: Iterable[Tensor], vocab: Tensor | None) -> Tensor:
    """(pairs,): how many depths' best draft tokens, (pairs,) each, the text follows without a miss."""
    alive = torch.ones(text.pairs, dtype=torch.bool, device=text.tokens.device)
    accepted = torch.zeros(text.pairs, dtype=torch.int64, device=text.tokens.device)
    for depth, best in enumerate(guesses):
        best = best if vocab is None else vocab[best]
        alive = alive & (best == text.tokens[depth + 2 : depth + 2 + text.pairs])
        accepted += alive
    return accepted
