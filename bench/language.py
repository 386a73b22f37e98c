"""A language model judges: a local decoder reads a user's likes and dislikes in words and says what comes next.

A window of judgements is one text, an event a line of it: the candidate's text, a colon, and "dislike" or "like". A
question sees the events before its moment and its own text, and nothing that stands in between. The upper layers are
trained by a binary loss at the colons; the lower ones are frozen, so their states are computed once for all seeds.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from negfast.data.items import ItemTable
from negfast.data.log import DISLIKE, LIKE, EventLog
from negfast.data.split import first_feedback

TEXT, PACK = 32, 768  # tokens of an item's text at most; tokens of a batch, but for one long window
HISTORY, BLOCK = 16, 24  # judgements before a window's first question at least, where there are; questions of a window
RATE, HEAD_RATE = 1e-4, 1e-3

Line = tuple[list[int], list[int]]  # tokens of a text with its colon, and of the sign


@dataclass(frozen=True)
class Window:
    """Judgements of one user in the order of the log, of which some are asked about."""

    rows: np.ndarray  # int64 [n], events of the log
    asked: np.ndarray  # bool [n]


def draw_windows(log: EventLog, from_day: int, before_day: int, most: int, rng: np.random.Generator) -> list[Window]:
    """Windows drawn at random that ask about first judgements of the days, until ``most`` are asked about or all."""
    first = np.zeros(len(log.user), bool)
    first[first_feedback(log)] = True
    first &= log.before(before_day) & ~log.before(from_day)
    windows = []
    for user in np.unique(log.user[first]):
        rows = np.arange(log.user_offsets[user], log.user_offsets[user + 1])
        rows = rows[log.judged[rows]]
        places = np.flatnonzero(first[rows])
        for block in np.split(places, np.arange(BLOCK, len(places), BLOCK)):
            begin = max(block[0] - HISTORY, 0)
            windows.append(Window(rows[begin : block[-1] + 1], np.isin(np.arange(begin, block[-1] + 1), block)))
    order = rng.permutation(len(windows))
    enough = int(np.searchsorted(np.cumsum([windows[n].asked.sum() for n in order]), most)) + 1
    return [windows[n] for n in np.sort(order[:enough])]


def questions(windows: Sequence[Window]) -> np.ndarray:
    """The events that are asked about, int64 [Q]."""
    return np.concatenate([window.rows[window.asked] for window in windows])


@dataclass
class Pack:
    """Windows in one row of T tokens, with N judgements."""

    tokens: Tensor  # int64 [T]
    position: Tensor  # int64 [T]
    visible: Tensor  # bool [T, T], whether a token sees another
    colon: Tensor  # int64 [N], where a judgement is told
    label: np.ndarray  # bool [N], whether it is a dislike
    asked: np.ndarray  # bool [N]


class Reader:
    """Frozen lower layers of a decoder, and what turns windows into its tokens."""

    def __init__(self, folder: Path, trained_layers: int) -> None:
        """``folder``: a local Hugging Face decoder of Llama's kin, with its tokenizer."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.bfloat16).eval()
        self.model.requires_grad_(False)
        self.lower = self.model.layers[:-trained_layers]
        self.upper = self.model.layers[-trained_layers:]
        self.colon, self.signs = self._ids(":"), {LIKE: self._ids(" like\n"), DISLIKE: self._ids(" dislike\n")}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def packs(self, log: EventLog, items: ItemTable, context: str, windows: Sequence[Window]) -> list[Pack]:
        """The windows in their order, as many a pack as `PACK` holds."""
        moments = log.moments(context)
        texts: dict[int, list[int]] = {}
        packs: list[Pack] = []
        parts: list[tuple[Window, list[Line]]] = []
        size = 0
        for window in windows:
            lines = []
            for row in window.rows:
                item = int(log.item[row])
                if item not in texts:
                    texts[item] = self._ids(items.text[item])[:TEXT] + self.colon
                lines.append((texts[item], self.signs[int(log.feedback[row])]))
            length = sum(len(text) + len(sign) for text, sign in lines)
            if parts and size + length > PACK:
                packs.append(_pack(log, moments, parts))
                parts, size = [], 0
            parts.append((window, lines))
            size += length
        return [*packs, _pack(log, moments, parts)]

    @torch.inference_mode()
    def states(self, packs: Sequence[Pack]) -> list[Tensor]:
        """What the lower layers make of each pack, bfloat16 [1, T, d]."""
        found = []
        for pack in packs:
            hidden = self.model.embed_tokens(pack.tokens[None])
            found.append(run_layers(self.model, self.lower, hidden, pack))
        return found

    def head(self) -> nn.Linear:
        """The logit of "dislike" against "like", as the model would say it."""
        head = nn.Linear(self.model.config.hidden_size, 1)
        rows = self.model.embed_tokens.weight.detach().float()
        with torch.no_grad():
            head.weight.copy_(rows[self.signs[DISLIKE][0]] - rows[self.signs[LIKE][0]])
            head.bias.zero_()
        return head


def _pack(
    log: EventLog, moments: np.ndarray, parts: Sequence[tuple[Window, list[tuple[list[int], list[int]]]]]
) -> Pack:
    tokens: list[int] = []
    position: list[int] = []
    owner: list[int] = []
    event: list[int] = []
    colon: list[int] = []
    for number, (_, lines) in enumerate(parts):
        start = len(tokens)
        for text, sign in lines:
            tokens += text + sign
            event += [len(colon)] * (len(text) + len(sign))
            colon.append(len(tokens) - len(sign) - 1)
        position += range(len(tokens) - start)
        owner += [number] * (len(tokens) - start)
    rows = np.concatenate([window.rows for window, _ in parts])
    own, of_event, place = np.array(owner), np.array(event), np.arange(len(tokens))
    itself = (of_event[:, None] == of_event) & (place[:, None] >= place)
    earlier = (own[:, None] == own) & (log.time[rows][of_event] < moments[rows][of_event][:, None])
    return Pack(
        torch.tensor(tokens),
        torch.tensor(position),
        torch.from_numpy(itself | earlier),
        torch.tensor(colon),
        log.feedback[rows] == DISLIKE,
        np.concatenate([window.asked for window, _ in parts]),
    )


def run_layers(model: Any, layers: Sequence[nn.Module], hidden: Tensor, pack: Pack) -> Tensor:
    """``hidden`` [1, T, d] after the layers."""
    ids = pack.position[None]
    rotary = model.rotary_emb(hidden, ids)
    for layer in layers:
        hidden = layer(hidden, attention_mask=pack.visible[None, None], position_ids=ids, position_embeddings=rotary)
    return hidden


class Judge(nn.Module):
    """The upper layers, trained, and the logit at the colons."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.layers = copy.deepcopy(reader.upper).float().requires_grad_(True)
        self.norm = copy.deepcopy(reader.model.norm).float()
        self.head = reader.head()
        self.model = [reader.model]  # not of this module's parameters

    def forward(self, states: Tensor, pack: Pack) -> Tensor:
        """Logits [N] of P(dislike)."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden = run_layers(self.model[0], self.layers, states.float(), pack)
        return self.head(self.norm(hidden[0, pack.colon].float())).squeeze(-1)


def fine_tuned(reader: Reader, packs: Sequence[Pack], states: Sequence[Tensor], epochs: int, seed: int) -> Judge:
    """All judgements of the packs are learned from, a step a pack, at a falling rate."""
    torch.manual_seed(seed)
    judge = Judge(reader).train()
    groups = [{"params": list(judge.layers.parameters()), "lr": RATE}]
    groups.append({"params": list(judge.head.parameters()), "lr": HEAD_RATE})
    optimizer = torch.optim.AdamW(groups)
    steps = epochs * len(packs)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1 - step / steps))
    for _ in range(epochs):
        for number in torch.randperm(len(packs)).tolist():
            found = judge(states[number].clone(), packs[number])
            wanted = torch.from_numpy(packs[number].label).float()
            F.binary_cross_entropy_with_logits(found, wanted).backward()
            nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            falling.step()
    return judge.eval()


@torch.inference_mode()
def asked_logits(judge: Judge, packs: Sequence[Pack], states: Sequence[Tensor]) -> np.ndarray:
    """Logits float64 [Q] of the questions."""
    found = [judge(state, pack)[torch.from_numpy(pack.asked)] for pack, state in zip(packs, states, strict=True)]
    return torch.cat(found).double().numpy()
