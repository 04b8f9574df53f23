"""What a head's files leave open, measured on the target's own greedy text.

Owns the measurement: how many tokens of a chain of drafts the target would accept, at every position of some text of
its own, for each way to read the head; and the choice among them. An answer other than what the files say has to be
better beyond chance; what can't be told apart is said.

    pairs of depth 0    (f_0, x_1)  (f_1, x_2)  ...           states s_0, s_1, ... predict x_2, x_3, ...
    pairs of depth 1    (s_0, x_2)  (s_1, x_3)  ...           each sees the pairs of depth 0 up to its own place,
    pairs of depth d                                          and its own at every depth before
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from haast.device import without_autograd
from haast.formats.base import Question, Reading
from haast.heads.checkpoint import build_module
from haast.heads.medusa import MedusaHeads
from haast.heads.module import DraftModule
from haast.target.target import Target
from haast.tree import DraftTree

DEPTHS = 3
TOKENS = 208  # of greedy text, over all prompts
_SURE, _SAME = 3.5, 2.0  # standard errors: beyond the first another reading is better, within the second as good
_LEAST_GAIN = 0.05  # of tau, by which a better reading is better
# Short and of several kinds: what is drafted for an answer is drafted after these.
PROMPTS = (
    "Explain in a few sentences why the sky looks blue during the day and red in the evening.",
    "Write a Python function that returns the n-th Fibonacci number, and say how it works.",
    "List five things that a small town can do to become friendlier to people on bicycles.",
    "A train leaves at noon and travels 180 kilometres in two hours. How fast is it? Think step by step.",
)


@dataclass(frozen=True)
class Text:
    """A text of the target's own: tokens (n,), features (n, width) by layer, and where its own part begins."""

    tokens: Tensor
    features: Tensor
    hidden: dict[int, Tensor]
    begin: int

    @property
    def pairs(self) -> int:
        """Positions after which a chain of `DEPTHS` drafts can be judged."""
        return len(self.tokens) - 1 - DEPTHS


@dataclass(frozen=True)
class Agreement:
    """How a reading drafts: (positions,) accepted drafts of a chain of `DEPTHS`."""

    accepted: Tensor

    @property
    def first(self) -> float:
        """The share of positions whose next token is drafted; 0 where there are none."""
        return float((self.accepted > 0).double().mean()) if len(self.accepted) else 0.0

    @property
    def tau(self) -> float:
        """Tokens a step by chains of `DEPTHS` drafts, the target's own included."""
        return 1.0 + float(self.accepted.double().mean()) if len(self.accepted) else 1.0

    def above(self, other: Agreement) -> float:
        """By how many standard errors this is better, place by place."""
        difference = (self.accepted - other.accepted).double()
        spread = float(difference.std()) if len(difference) > 1 else 0.0
        return float(difference.mean()) / (spread / len(difference) ** 0.5) if spread else 0.0


@dataclass(frozen=True)
class Tried:
    """One answer to one question, with all other answers as they were kept."""

    question: str
    answer: str
    agreement: Agreement
    kept: bool


@dataclass(frozen=True)
class Settled:
    """What was found: the reading that is kept, how it drafts, all that was tried, and what can't be told apart."""

    reading: Reading
    agreement: Agreement
    tried: tuple[Tried, ...]
    unsure: tuple[str, ...]

    @property
    def changed(self) -> list[Tried]:
        """The answers that are not what the files say."""
        first: dict[str, str] = {}
        for each in self.tried:
            first.setdefault(each.question, each.answer)
        return [each for each in self.tried if each.kept and each.answer != first[each.question]]


def settle(
    target: Target,
    reading: Reading,
    questions: Sequence[Question],
    texts: Sequence[Text] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Settled:
    """Answer the questions, one after another, and once more with the answers of the others.

    Args:
        target: whom the head is for.
        reading: what the files say.
        questions: what they leave open.
        texts: of the target's own; made here if absent.
        say: told what is being measured.
    """
    search = _Search(target, reading, questions, say)
    if texts is None:
        texts = own_text(target, layers_of([search.read(one) for one in _each_alone(questions)]), say=say)
    search.texts = texts
    for _ in range(2):
        if not search.improve():
            break
    tried, unsure = search.around()
    return Settled(search.read(search.chosen), search.measured(search.chosen), tried, unsure)


class _Search:
    """The answers so far, and how every set of answers that was looked at drafts."""

    def __init__(
        self, target: Target, reading: Reading, questions: Sequence[Question], say: Callable[[str], None]
    ) -> None:
        self.target, self.reading, self.questions, self.say = target, reading, questions, say
        self.texts: Sequence[Text] = ()
        self.chosen = [0] * len(questions)
        self._known: dict[tuple[int, ...], Agreement] = {}

    def read(self, answers: Sequence[int]) -> Reading:
        """The head as these answers read it."""
        found = self.reading
        for question, answer in zip(self.questions, answers, strict=True):
            found = question.options[answer].change(found)
        return found

    def measured(self, answers: Sequence[int]) -> Agreement:
        """How it then drafts."""
        key = tuple(answers)
        if key not in self._known:
            self.say(f"trying reading {len(self._known) + 1}")
            self._known[key] = agreement(self.target, self.read(key), self.texts)
        return self._known[key]

    def with_answer(self, place: int, answer: int) -> list[int]:
        """The chosen answers but for one."""
        return [*self.chosen[:place], answer, *self.chosen[place + 1 :]]

    def improve(self) -> bool:
        """Answer every question once, given the other answers; whether an answer changed."""
        before = list(self.chosen)
        for place, question in enumerate(self.questions):
            for answer in range(len(question.options)):
                other = self.with_answer(place, answer)
                found, best = self.measured(other), self.measured(self.chosen)
                if found.above(best) > _SURE and found.tau > best.tau + _LEAST_GAIN:
                    self.chosen = other
        return self.chosen != before

    def around(self) -> tuple[tuple[Tried, ...], tuple[str, ...]]:
        """All that differs from the chosen answers in one, and which of these drafts alike."""
        best, tried, unsure = self.measured(self.chosen), [], []
        for place, question in enumerate(self.questions):
            for answer, option in enumerate(question.options):
                found, kept = self.measured(self.with_answer(place, answer)), answer == self.chosen[place]
                tried.append(Tried(question.name, option.label, found, kept))
                if not kept and abs(best.above(found)) < _SAME:
                    label = question.options[self.chosen[place]].label
                    unsure.append(f"{question.name}: {label} (kept) and {option.label} draft alike")
        return tuple(tried), tuple(unsure)


def _each_alone(questions: Sequence[Question]) -> list[list[int]]:
    """The first answers, and every other answer beside them."""
    first = [0] * len(questions)
    return [first] + [
        [*first[:place], answer, *first[place + 1 :]]
        for place, question in enumerate(questions)
        for answer in range(1, len(question.options))
    ]


def layers_of(readings: Sequence[Reading]) -> list[int]:
    """All layers of the target that one of the readings reads."""
    ids = itertools.chain.from_iterable(getattr(reading.config, "layer_ids", ()) for reading in readings)
    return sorted(set(ids))


@without_autograd
def own_text(
    target: Target, layers: Sequence[int], tokens: int = TOKENS, say: Callable[[str], None] = lambda _: None
) -> list[Text]:
    """Greedy answers of the target's own, `tokens` tokens in all, with what heads read of them."""
    texts: list[Text] = []
    made, share = 0, -(-tokens // len(PROMPTS))
    for prompt in _prompts(target):
        if made >= tokens:
            break
        with target.lock:
            text = _answer(target, prompt, share + 1, layers)
        made += len(text.tokens) - len(prompt)
        say(f"{made} of {tokens} tokens of the target's own text")
        if len(text.tokens) > len(prompt) + DEPTHS:  # else it has ended before a chain could be judged
            texts.append(text)
    return texts


def _answer(target: Target, prompt: list[int], most: int, layers: Sequence[int]) -> Text:
    """A greedy answer of `most` tokens at most."""
    said, features = list(prompt), list[Tensor]()
    hidden: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    cache, waiting = target.new_cache(1, len(prompt) + most), list(prompt)
    for _ in range(most):
        tree = DraftTree.chain(torch.tensor([waiting], device=target.device))
        output = target.forward(tree, cache, last_only=True, hidden_layers=layers)
        cache.advance([len(waiting)])
        features.append(output.features[0])
        for layer in layers:
            hidden[layer].append(output.hidden[layer][0])
        token = int(output.logits[0, -1].argmax())
        said.append(token)
        if token in target.end_ids:
            break
        waiting = [token]
    found = {layer: torch.cat(parts) for layer, parts in hidden.items()}
    return Text(torch.tensor(said, device=target.device), torch.cat(features), found, len(prompt) - 1)


def _prompts(target: Target) -> list[list[int]]:
    """As the target is asked: by its template where it has one; without a tokenizer some tokens of its vocabulary."""
    tokenizer = target.tokenizer
    if tokenizer is None:
        rows = torch.randint(target.vocab_size, (64, 8), generator=torch.Generator().manual_seed(0))
        return [row.tolist() for row in rows]
    if tokenizer.chat_template is None:
        return [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS * 4]
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS * 4]
    texts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in asked]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


@without_autograd
def agreement(target: Target, reading: Reading, texts: Sequence[Text]) -> Agreement:
    """How a head, read like this, drafts for these texts."""
    module = module_of(target, reading).to(target.device, target.dtype).eval()
    read = _chain_medusa if isinstance(module, MedusaHeads) else _chain_eagle
    vocab = None if reading.draft_vocab is None else reading.draft_vocab.to(target.device)
    with target.lock:
        found = [read(target, module, vocab, text) for text in texts]  # type: ignore[arg-type]
    fresh = _fresh(texts)
    return Agreement(torch.cat([torch.zeros(0, dtype=torch.int64), *(each.cpu() for each in found)])[fresh])


def _fresh(texts: Sequence[Text]) -> list[int]:
    """The positions that count: of the target's own part, each run of tokens the first time alone.

    Greedy text may go in circles; what is right in one round is right in all of them, and is no more evidence.
    """
    known, kept, place = set[tuple[int, ...]](), list[int](), 0
    for text in texts:
        tokens = text.tokens.tolist()
        for position in range(text.pairs):
            run = tuple(tokens[max(position - 1, 0) : position + 3])
            if position >= text.begin - 1 and run not in known:
                known.add(run)
                kept.append(place + position)
        place += text.pairs
    return kept


def module_of(target: Target, reading: Reading) -> DraftModule | MedusaHeads:
    """The head, with the target's rows as its LM head where it has none."""
    weights, vocab = dict(reading.weights), reading.draft_vocab
    if reading.shares_lm_head:
        ids = torch.arange(target.vocab_size) if vocab is None else vocab
        weights["lm_head.weight"] = target.head_rows(ids.to(target.device)).float().cpu()
    module = build_module(reading.config, None if vocab is None else len(vocab))
    wide = next(iter(weights.values())).dtype
    module.to(wide).load_state_dict(weights)
    return module.requires_grad_(False)


def _chain_eagle(target: Target, module: DraftModule, vocab: Tensor | None, text: Text) -> Tensor:
    """(pairs,) accepted drafts after every position."""
    tokens, pairs = text.tokens, text.pairs
    parts = [text.hidden[layer] for layer in module.target_layers] or [text.features]
    states = module.fuse(torch.cat([part[:pairs] for part in parts], dim=-1).unsqueeze(0))
    embed = module.embedding(target.borrowed(target.embedding))
    follows, masked = int(module.follows_token), module.masked()
    whole, embedded, found = states, list[Tensor](), list[Tensor]()
    alive = torch.ones(pairs, dtype=torch.bool, device=tokens.device)
    accepted = torch.zeros(pairs, dtype=torch.int64, device=tokens.device)
    for depth in range(DEPTHS):
        token = tokens[depth + follows : depth + follows + pairs]
        if depth and masked is not None:
            token = torch.full_like(token, masked[0])
        embedded.append(embed(token.unsqueeze(0)).to(tokens.device))
        if depth:
            after = found[-1] if masked is None else masked[1].expand(1, pairs, -1)
            whole = torch.cat([whole, after], dim=1)
        found.append(_run(module, torch.cat(embedded, dim=1), whole, depth + 1, pairs)[:, -pairs:])
        logits = _logits(target, module, vocab, found[-1], tokens[depth + 1 : depth + 1 + pairs].unsqueeze(0))[0]
        best = logits.argmax(-1)
        best = best if vocab is None else vocab[best]
        alive = alive & (best == tokens[depth + 2 : depth + 2 + pairs])
        accepted += alive
    return accepted


def _run(module: DraftModule, embeddings: Tensor, states: Tensor, depths: int, pairs: int) -> Tensor:
    """The head over pairs of several depths, (1, depths * pairs, hidden), as the module's docstring draws them."""
    place = torch.arange(pairs, device=states.device)
    number, at = torch.arange(depths, device=states.device).repeat_interleave(pairs), place.repeat(depths)
    before = (number.unsqueeze(0) == 0) & (at.unsqueeze(0) <= at.unsqueeze(1))
    own = (at.unsqueeze(0) == at.unsqueeze(1)) & (number.unsqueeze(0) <= number.unsqueeze(1))
    bias = torch.zeros(len(at), len(at), dtype=states.dtype, device=states.device)
    bias = bias.masked_fill(~(before | own), torch.finfo(states.dtype).min)
    output: Tensor = module(embeddings, states, (at + number).unsqueeze(0), bias[None, None])
    return output


def _logits(target: Target, module: DraftModule, vocab: Tensor | None, states: Tensor, before: Tensor) -> Tensor:
    read = module.lm_input(states, before)
    if not module.own_lm_head and vocab is None and not module.config.markov_rank:
        return target.head_logits(read)
    ids = torch.arange(target.vocab_size, device=states.device) if vocab is None else vocab
    logits: Tensor = read @ module.lm_rows(target.head_rows(ids)).T
    bias = None if module.own_lm_head else target.head_bias(ids)
    return logits if bias is None else logits + bias


def _chain_medusa(target: Target, module: MedusaHeads, vocab: Tensor | None, text: Text) -> Tensor:
    """The same for Medusa heads: head i after position t guesses the token at t + 2 + i."""
    tokens, depths = text.tokens, min(DEPTHS, len(module))
    pairs = text.pairs
    logits = module(text.features[:pairs])
    alive = torch.ones(pairs, dtype=torch.bool, device=tokens.device)
    accepted = torch.zeros(pairs, dtype=torch.int64, device=tokens.device)
    for depth in range(depths):
        best = logits[depth].argmax(-1)
        best = best if vocab is None else vocab[best]
        alive = alive & (best == tokens[depth + 2 : depth + 2 + pairs])
        accepted += alive
    return accepted
